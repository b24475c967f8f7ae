"""MTEB's model interface over an encoder: any exported precision, any engine, in process or on a server.

MTEB itself (``babeltower[mteb]``) is imported only for a model's description; the vectors are the encoder's,
so that a score is that of the exported model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cosines import unit_rows
from runtime.encoder import Encoder
from runtime.errors import InputError, LanguageError
from runtime.extras import import_optional
from runtime.local import LocalEncoder
from runtime.preprocessing.languages import flores_from_code
from runtime.remote import RemoteEncoder

__all__ = ["MtebModel"]

Float = NDArray[np.float32]


class MtebModel:
    """An opened encoder as MTEB's ``EncoderProtocol``, for ``mteb.evaluate``.

    A task names the languages of each of its subsets; texts are embedded in the subset's language. Where a
    subset has several, ``languages`` decides, since no language is guessed.

    Args:
        encoder: Opened model; it is not closed.
        languages: Language code by subset of a task, such as ``{"no": "nob_Latn"}``, in place of the task's.
        dim: Vector width; default: the full width.

    Raises:
        InputError: the model does not have the width.
        LanguageError: a language code is unknown.
    """

    def __init__(
        self, encoder: Encoder, *, languages: Mapping[str, str] | None = None, dim: int | None = None
    ) -> None:
        self.encoder = encoder
        self.dim = encoder.require_width(dim)
        self.languages = {subset: flores_from_code(code) for subset, code in (languages or {}).items()}
        self._meta: Any = None

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Float:
        """Embed the batches of a task's loader: texts, images, or the sum of both if rows have both.

        Args:
            inputs: Batches with ``text``, a list of strings, or ``image``, a list of Pillow images, or both.
            task_metadata: MTEB's description of the task, which names the subset's languages.
            hf_subset: Subset of the task.

        MTEB's other options (split, kind of prompt, batch size) do not affect the vectors.

        Returns:
            float32 (rows, dim), L2-normalised, in input order.

        Raises:
            InputError: a batch has neither texts nor images.
            LanguageError: the model needs a language, and the subset has several, or one that it lacks.
        """
        parts = [self._rows(batch, task_metadata, hf_subset) for batch in inputs]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float:
        """Return the cosines of all pairs of vectors of ``encode``, float32 (rows1, rows2)."""
        found: Float = _matrix(embeddings1) @ _matrix(embeddings2).T
        return found

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float:
        """Return the cosine of each vector of ``encode`` with its counterpart, float32 (rows,)."""
        found: Float = np.einsum("ij,ij->i", _matrix(embeddings1), _matrix(embeddings2))
        return found

    @property
    def mteb_model_meta(self) -> Any:
        """MTEB's description of the model: its name, fingerprint, precision, engine, width and languages.

        Raises:
            MissingPackageError: MTEB is not installed.
        """
        if self._meta is None:
            models = import_optional("mteb.models.model_meta", "Scoring with MTEB", "babeltower[mteb]")
            self._meta = models.ModelMeta.create_empty(
                {
                    "name": f"babeltower/{self.encoder.name}",
                    "revision": self.encoder.fingerprint,
                    "embed_dim": self.dim,
                    "similarity_fn_name": models.ScoringFunction.COSINE,
                    "modalities": ["text", "image"],
                    "use_instructions": False,
                    **_facts(self.encoder),
                }
            )
        return self._meta

    def _rows(self, batch: Mapping[str, Any], task_metadata: Any, subset: str) -> Float:
        parts = []
        if "text" in batch:
            texts = list(batch["text"])
            language = self._language(task_metadata, subset)
            parts.append(self.encoder.embed_texts(texts, language, dim=self.dim))
        if "image" in batch:
            parts.append(self.encoder.embed_images(list(batch["image"]), dim=self.dim))
        if not parts:
            raise InputError(
                f"A batch of {task_metadata.name} has {sorted(batch)}; expected text or image, as the model "
                "embeds nothing else."
            )
        found: Float = parts[0] if len(parts) == 1 else unit_rows(parts[0] + parts[1])
        return found

    def _language(self, task_metadata: Any, subset: str) -> str | None:
        """Return the language of a subset's texts; None for a model that needs none."""
        if subset in self.languages:
            return self.languages[subset]
        if isinstance(self.encoder, LocalEncoder) and not self.encoder.manifest.text.needs_language:
            return None
        stated: Sequence[str] = task_metadata.hf_subsets_to_langscripts.get(subset, ())
        known = set()
        for code in stated:
            try:
                known.add(flores_from_code(code))
            except LanguageError as error:
                raise self._undecided(task_metadata, subset, stated) from error
        if len(known) != 1:
            raise self._undecided(task_metadata, subset, stated)
        return known.pop()

    def _undecided(self, task_metadata: Any, subset: str, stated: Sequence[str]) -> LanguageError:
        return LanguageError(
            f"The texts of {task_metadata.name}, subset {subset!r}, are in {list(stated)}, but "
            f"{self.encoder.name} needs one language. Pass MtebModel(..., languages={{{subset!r}: CODE}})."
        )


def _facts(encoder: Encoder) -> dict[str, Any]:
    """Return how a model is run, by which MTEB tells its results apart, and what its manifest says."""
    if isinstance(encoder, LocalEncoder):
        manifest = encoder.manifest
        return {
            "languages": [code.replace("_", "-") for code in manifest.languages],
            "max_tokens": manifest.text.context_length,
            "experiment_kwargs": {"precision": encoder.precision.value, "engine": encoder.engine.value},
        }
    if isinstance(encoder, RemoteEncoder):
        served = encoder.served
        return {"experiment_kwargs": {"precision": served.precision, "engine": served.engine}}
    return {}


def _matrix(embeddings: Any) -> Float:
    found = np.asarray(embeddings, np.float32)
    return found[None] if found.ndim == 1 else found
