"""Common inputs of all peers in a run: the same weights, inputs and expected vectors.

The reference is the library that the checkpoint is made for, in FP32 (``export/families/references.py``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.peers.registry import Stage
from runtime.manifest import Modality

if TYPE_CHECKING:
    from export.towers import Towers

__all__ = ["GivenModel", "PeerCase", "given_model"]

N_TOKENS = 16
_LANGUAGE = "por_Latn"
_CALIBRATION_BATCHES = 8


@dataclass(frozen=True, slots=True)
class PeerCase:
    """Set of rows for one tower, with the reference's vectors."""

    modality: Modality
    stage: Stage
    n_rows: int
    inputs: Path
    reference: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GivenModel:
    """Checkpoint prepared for all peers.

    Attributes:
        checkpoint: Folder in the published format; an open_clip folder names itself as its text model.
        text_encoder: Text model alone in transformers' format, with the layers after it in ``tail.json`` and
            ``tail.npz``, for libraries of text encoders.
        example: Inputs to trace a graph on, by modality.
        calibration: Batches of real inputs, by modality; keys are ``BATCH/INPUT``.
    """

    name: str
    family: str
    repository: Path
    checkpoint: Path
    text_encoder: Path
    language: str | None
    example: Mapping[Modality, Path]
    calibration: Mapping[Modality, Path]
    cases: tuple[PeerCase, ...]

    def task(self, modality: Modality) -> dict[str, Any]:
        """Return the task of a loop in plain values."""
        return {
            "model": self.name,
            "family": self.family,
            "tower": modality.value,
            "repository": str(self.repository),
            "checkpoint": str(self.checkpoint),
            "files": sorted(path.name for path in self.checkpoint.iterdir()),
            "text_encoder": str(self.text_encoder),
            "language": self.language,
            "example": str(self.example[modality]),
            "calibration": str(self.calibration[modality]),
        }


def given_model(checkpoint: Path, repository: Path, work: Path, *, batches: Sequence[int]) -> GivenModel:
    """Prepare a checkpoint under ``work``, with inputs and reference vectors.

    Args:
        repository: ``REPOSITORY/NAME`` of the exported model.
        work: Folder for this model alone; its contents are removed.
        batches: Number of rows of each case.
    """
    from export.checkpoint import towers_from_checkpoint

    towers = towers_from_checkpoint(checkpoint)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    needs_language = towers.text_preprocessing.needs_language
    language = _LANGUAGE if needs_language else None
    rows = {
        (Modality.TEXT, Stage.PREPARED): _token_rows(towers, max(batches)),
        (Modality.IMAGE, Stage.PREPARED): _pixel_rows(towers, max(batches)),
        (Modality.TEXT, Stage.WHOLE): {"texts": np.array(captions(max(batches)))},
        (Modality.IMAGE, Stage.WHOLE): {"files": np.array(_image_files(work / "images", max(batches)))},
    }
    cases = []
    for (modality, stage), arrays in rows.items():
        vectors = _reference_vectors(towers, modality, stage, arrays, language)
        for n_rows in batches:
            file = work / f"{modality.value}_{stage.value}_{n_rows}.npz"
            np.savez(file, **{name: array[:n_rows] for name, array in arrays.items()})  # type: ignore[arg-type]
            cases.append(PeerCase(modality, stage, n_rows, file, vectors[:n_rows]))
    example = {}
    for modality in Modality:
        example[modality] = work / f"{modality.value}_example.npz"
        part = {name: array[:2] for name, array in rows[modality, Stage.PREPARED].items()}
        np.savez(example[modality], **part)  # type: ignore[arg-type]
    return GivenModel(
        name=checkpoint.name,
        family=towers.family,
        repository=repository.resolve(),
        checkpoint=_laid_out(checkpoint, work / "checkpoint"),
        text_encoder=_text_encoder(towers, checkpoint, work / "text_encoder"),
        language=language,
        example=example,
        calibration=_calibration(towers, work),
        cases=tuple(cases),
    )


def captions(n: int) -> list[str]:
    """Return Portuguese captions of one to four names, about as long as real ones."""
    from export.retrieval.sample_set import sample_retrieval_set

    (names,) = (entry.texts for entry in sample_retrieval_set().captions if entry.language == _LANGUAGE)
    return [", ".join(names[5 * i + k] for k in range(1 + i % 4)) for i in range(n)]


def _token_rows(towers: Towers, n: int) -> dict[str, NDArray[Any]]:
    """Return real token ids, cut to one length so that no row has padding."""
    texts = [" ".join(group) for group in zip(*[iter(captions(8 * n))] * 8, strict=True)]
    ids = towers.reference.token_ids(texts, [_LANGUAGE] * n)
    ids = np.concatenate(
        [ids[:, : N_TOKENS - 1], np.full((n, 1), towers.text_preprocessing.suffix_ids[-1])], 1
    )
    return {"input_ids": ids.astype(np.int64), "attention_mask": np.ones_like(ids, dtype=np.int64)}


def _pixel_rows(towers: Towers, n: int) -> dict[str, NDArray[Any]]:
    from export.retrieval.sample_set import sample_retrieval_set
    from runtime.preprocessing.image import decode, pixels_from_image

    sources = sample_retrieval_set().images[:n]
    pixels = np.stack(
        [pixels_from_image(decode(source.read()), towers.image_preprocessing) for source in sources]
    )
    return {"pixels": pixels, "pixel_values": _normalised(towers, pixels)}


def _normalised(towers: Towers, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    scale, shift = (towers.image.get_buffer(name).numpy() for name in ("scale", "shift"))
    values: NDArray[np.float32] = (pixels.astype(np.float32) * scale + shift).astype(np.float32)
    return values


def _image_files(folder: Path, n: int) -> list[str]:
    from export.retrieval.sample_set import sample_retrieval_set

    folder.mkdir()
    files = []
    for i, source in enumerate(sample_retrieval_set().images[:n]):
        files.append(folder / f"{i}.png")
        files[-1].write_bytes(source.read())
    return [str(file.resolve()) for file in files]


def _reference_vectors(
    towers: Towers, modality: Modality, stage: Stage, arrays: Mapping[str, NDArray[Any]], language: str | None
) -> NDArray[np.float32]:
    from runtime.preprocessing.image import decode

    reference = towers.reference
    if stage is Stage.PREPARED:
        if modality is Modality.TEXT:
            return reference.text_vectors(arrays["input_ids"])[towers.dim]
        return reference.image_vectors(arrays["pixel_values"])[towers.dim]
    if modality is Modality.TEXT:
        ids = reference.token_ids([str(t) for t in arrays["texts"]], [language] * len(arrays["texts"]))
        return reference.text_vectors(ids)[towers.dim]
    pixels = np.stack([reference.pixels(decode(str(file))) for file in arrays["files"]])
    return reference.image_vectors(pixels)[towers.dim]


def _laid_out(checkpoint: Path, folder: Path) -> Path:
    """Link a checkpoint's files, with open_clip's configuration naming the folder, not a hub model."""
    folder.mkdir()
    for file in checkpoint.resolve().iterdir():
        (folder / file.name).symlink_to(file)
    _let_older_transformers_read(folder)
    config_file = folder / "open_clip_config.json"
    if config_file.is_file():
        from export.families.open_clip_checkpoint import text_config_of

        config = json.loads(config_file.read_text(encoding="utf-8"))
        text = config["model_cfg"]["text_cfg"]
        text_config = text_config_of(checkpoint, str(text["hf_model_name"]))
        here = str(folder.resolve())
        text |= {"hf_model_name": here, "hf_tokenizer_name": here, "hf_model_pretrained": False}
        _replace(config_file, config)
        if not (folder / "config.json").is_file():
            _replace(folder / "config.json", dict(text_config))
    return folder.resolve()


def _let_older_transformers_read(folder: Path) -> None:
    """Rename entries to the published names, which releases 4 and 5 of transformers both read.

    Release 5 saves some under new names.
    """
    from safetensors import numpy, safe_open

    file = folder / "tokenizer_config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        if "extra_special_tokens" in config:
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
            _replace(file, config)
    weights = folder / "model.safetensors"
    ours, published = "vision_model.encoder.layer.", "vision_model.encoder.layers."
    if not weights.is_file():
        return
    with safe_open(weights, "np") as stored:
        names = {name: name.replace(ours, published) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        if all(old == new for old, new in names.items()):
            return
        tensors = {new: stored.get_tensor(old) for old, new in names.items()}
    weights.unlink()
    numpy.save_file(tensors, weights, metadata={"format": "pt"})


def _replace(file: Path, data: Mapping[str, Any]) -> None:
    file.unlink(missing_ok=True)
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _text_encoder(towers: Towers, checkpoint: Path, folder: Path) -> Path:
    """Write the text model alone, and its pooling and projection beside it layer by layer."""
    folder.mkdir()
    reference: Any = towers.reference
    if towers.family == "altclip":
        text = reference.model.text_model
        encoder = _plain_roberta(text.roberta)
        tail = [text.pre_LN, text.transformation, reference.model.text_projection]
        pooling = "cls"
    else:
        encoder = reference.text.transformer
        tail = (
            list(reference.text.proj) if hasattr(reference.text.proj, "__iter__") else [reference.text.proj]
        )
        pooling = "mean" if "Mean" in type(reference.text.pooler).__name__ else "cls"
    encoder.save_pretrained(folder)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, folder)
    _let_older_transformers_read(folder)
    arrays: dict[str, Any] = {}
    layers = []
    for i, layer in enumerate(tail):
        layers.append(type(layer).__name__)
        arrays |= {f"{i}/{name}": tensor.numpy() for name, tensor in layer.state_dict().items()}
    np.savez(folder / "tail.npz", **arrays)
    context = towers.text_preprocessing.context_length
    _replace(folder / "tail.json", {"pooling": pooling, "layers": layers, "context_length": context})
    return folder.resolve()


def _plain_roberta(roberta: Any) -> Any:
    """Return AltCLIP's RoBERTa as the XLM-RoBERTa that it was initialised from."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(**{k: v for k, v in roberta.config.to_dict().items() if k != "model_type"})
    plain = XLMRobertaModel(config, add_pooling_layer=False)
    state = {name.replace("encoder.layers.", "encoder.layer."): t for name, t in roberta.state_dict().items()}
    plain.load_state_dict(state)
    return plain.eval()


def _calibration(towers: Towers, work: Path) -> dict[Modality, Path]:
    """Write the batches that this project's INT8 graphs are calibrated on; return the files."""
    from export.precision.calibration import CalibrationSize, calibration_from_samples
    from runtime.preprocessing.text import Tokenizer

    tokenizer_file = work / "tokenizer.json"
    tokenizer_file.write_text(towers.tokenizer_json, encoding="utf-8")
    found = calibration_from_samples(
        Tokenizer(tokenizer_file, towers.text_preprocessing),
        towers.text_preprocessing,
        towers.image_preprocessing,
        languages=towers.languages,
        size=CalibrationSize(n_texts=32 * _CALIBRATION_BATCHES, n_images=16 * _CALIBRATION_BATCHES),
    )
    files = {}
    for modality in Modality:
        arrays: dict[str, Any] = {}
        for i, batch in enumerate(found.batches(modality)):
            arrays |= {f"{i}/{name}": array for name, array in batch.items()}
            if modality is Modality.IMAGE:
                arrays[f"{i}/pixel_values"] = _normalised(towers, batch["pixels"])
        files[modality] = work / f"{modality.value}_calibration.npz"
        np.savez(files[modality], **arrays)
    return files
