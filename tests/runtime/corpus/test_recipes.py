"""The recipes for other engines run as they are written, and give the vectors of the encoder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
from corpus_runs import sentences, write_texts
from sample_models import ROOT, Exported

from runtime import Encoder

N_ROWS = 200


@pytest.fixture(scope="module")
def model(exported: Exported) -> Path:
    return exported("nllb-clip")


@pytest.mark.parametrize("engine", ["daft", pytest.param("spark", marks=pytest.mark.slow)])
def test_a_recipe_gives_the_encoders_vectors(engine, model, tmp_path):
    pytest.importorskip("pyspark" if engine == "spark" else "daft")
    if engine == "spark" and not os.environ.get("JAVA_HOME") and shutil.which("java") is None:
        pytest.skip("Spark needs Java 17 or later: apt-get install openjdk-17-jre-headless")
    texts = sentences(N_ROWS)
    texts[30] = None
    source = write_texts(tmp_path / "a.parquet", texts, key=list(range(N_ROWS)))
    script = ROOT / "samples" / f"{engine}_embed.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": sys.executable}
    environment |= {"OMP_NUM_THREADS": "1", "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [sys.executable, str(script), str(model), str(source), str(tmp_path / "out"), "text", "en"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]
    table = pa.dataset.dataset(tmp_path / "out", format="parquet").to_table().sort_by("key")
    assert table["key"].to_pylist() == list(range(N_ROWS))
    problems = table["problem"].to_pylist()
    assert problems[30] == "null-text: The text is null."
    assert [i for i, problem in enumerate(problems) if problem] == [30]
    vectors = table["vector"].to_pylist()
    good = [i for i in range(N_ROWS) if i != 30]
    assert vectors[30] is None
    with Encoder.open(model, threads=1) as encoder:
        expected = encoder.embed_texts([texts[i] for i in good], "en")
    np.testing.assert_allclose(np.asarray([vectors[i] for i in good]), expected, atol=2e-6)
