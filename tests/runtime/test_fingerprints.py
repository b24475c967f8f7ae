"""Fingerprints of the former kind: read, and told apart from today's wherever the two meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from runtime.embeddings import Encoding
from runtime.errors import InputError, ServerError
from runtime.fingerprints import is_former, remark_on_kind, remark_on_models, remark_on_vectors
from runtime.indexes.exact import Index
from runtime.indexes.space import Space
from runtime.manifest import Modality
from runtime.remote.served_model import ServedModel, require_served_model

FORMER, TODAY, OTHER = "bt1-" + "a" * 32, "bt2-" + "b" * 32, "bt2-" + "c" * 32


def space(vectors: str, model: str) -> Any:
    Space(vectors, 4, Encoding.FLOAT32).require(model, holder="gallery.index")


def index(vectors: str, model: str) -> Any:
    Index(("a",), np.eye(1, 4, dtype=np.float32), vectors).search(
        np.eye(1, 4, dtype=np.float32), fingerprint=model
    )


def served(vectors: str, model: str) -> Any:
    found = ServedModel("m", model, "fp32", "fp32", "onnxruntime", (4,), dict.fromkeys(Modality, 8))
    require_served_model(found, engine=None, precision=None, fingerprint=vectors)


@pytest.mark.parametrize("refuse", [space, index, served])
@pytest.mark.parametrize(
    ("vectors", "model", "said"),
    [
        (FORMER, TODAY, "vectors is of the former kind .* Embed them again with this model"),
        (TODAY, FORMER, "model is of the former kind .* Export its checkpoint again"),
        (TODAY, OTHER, None),
        (FORMER, "bt1-other", None),
    ],
)
def test_a_refusal_says_which_is_old(
    refuse: Callable[[str, str], Any], vectors: str, model: str, said: str | None
) -> None:
    with pytest.raises((InputError, ServerError), match=said) as refusal:
        refuse(vectors, model)
    assert ("former kind" in str(refusal.value)) is (said is not None)


@pytest.mark.parametrize("refuse", [space, index, served])
@pytest.mark.parametrize("fingerprint", [FORMER, TODAY])
def test_old_vectors_and_their_old_model_go_on(refuse: Callable[[str, str], Any], fingerprint: str) -> None:
    refuse(fingerprint, fingerprint)


def test_descriptions_say_so() -> None:
    assert is_former(FORMER)
    assert not is_former(TODAY)
    assert "former kind" in remark_on_kind(FORMER)
    assert remark_on_kind(TODAY) == ""
    assert FORMER in remark_on_models(TODAY, FORMER) == remark_on_models(FORMER, TODAY)
    assert remark_on_models(TODAY, OTHER) == remark_on_vectors(TODAY, TODAY) == ""
