"""Recipe: embed a corpus with Daft, on this machine or on a Ray cluster.

    python samples/daft_embed.py MODEL SOURCE.parquet OUT TEXT_COLUMN LANGUAGE

Every worker opens the model once. The bookkeeping is Daft's: the output is a folder of Parquet.
"""

from __future__ import annotations

import sys
from typing import Any

from runtime.corpus import BatchEmbedder

__all__ = ["embedded"]

_BATCH_ROWS = 4_096


def embedded(frame: Any, model: str, *, text: str, language: str | None = None) -> Any:
    """Return a Daft data frame with two more columns: ``vector`` and ``problem``, null for good rows.

    Args:
        frame: Daft data frame with a column of texts.
        model: ``REPOSITORY/NAME``, at the same path on every worker.
    """
    import daft
    import pyarrow

    lists = daft.DataType.list(daft.DataType.float32())
    result = daft.DataType.struct({"vector": lists, "problem": daft.DataType.string()})

    class Embed:
        def __init__(self) -> None:
            self._embed = BatchEmbedder(model, text=text, language=language, threads=1)

        def __call__(self, texts: Any) -> Any:
            found = self._embed(pyarrow.table({text: texts.to_arrow()}))
            vectors = found["vector"].combine_chunks().cast(pyarrow.list_(pyarrow.float32()))
            problems = found["problem"].combine_chunks()
            return pyarrow.StructArray.from_arrays([vectors, problems], ["vector", "problem"])

    run: Any = daft.udf(return_dtype=result, batch_size=_BATCH_ROWS)(Embed)
    found = frame.with_column("_found", run(daft.col(text)))
    for name in ("vector", "problem"):
        found = found.with_column(name, daft.col("_found").get(name))
    return found.exclude("_found")


def main() -> None:
    """Embed a Parquet file or folder into a folder."""
    import daft

    model, source, out, text, language = sys.argv[1:]
    embedded(daft.read_parquet(source), model, text=text, language=language).write_parquet(out)


if __name__ == "__main__":
    main()
