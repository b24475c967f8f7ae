"""A model folder, read by the contract of immich's machine-learning service alone.

Nothing of the exporter or the runtime is used: tokenizers, ONNX Runtime, Pillow and numpy, as that service
uses them. ``prepared`` is its newer way to open a graph on a CPU: batches pinned to one row, the optimised
graph written beside the model with its packed weights, and that file opened.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

CODE_OF_LOCALE = {
    "ar": "arb_Arab",
    "cs": "ces_Latn",
    "de": "deu_Latn",
    "en": "eng_Latn",
    "es": "spa_Latn",
    "fr": "fra_Latn",
    "he": "heb_Hebr",
    "hi": "hin_Deva",
    "ja": "jpn_Hira",
    "ko": "kor_Hang",
    "lv": "lav_Latn",
    "pt": "por_Latn",
    "pt-BR": "por_Latn",
    "ru": "rus_Cyrl",
    "tr": "tur_Latn",
    "zh-CN": "zho_Hans",
    "zh-TW": "zho_Hant",
}
"""Some of the interface's locales, and the code that the service passes for each."""


def code_of_locale(locale: str) -> str:
    return CODE_OF_LOCALE.get(locale) or CODE_OF_LOCALE.get(locale.split("-")[0]) or "eng_Latn"


class Textual:
    """The text half: one string a run, padded to the context length, without a mask."""

    def __init__(self, folder: Path, *, prepared: bool = False) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_cfg"]
        own = folder / "textual"
        pad_token = json.loads((own / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
        length = config.get("context_length", 77)
        self.tokenizer = Tokenizer.from_file((own / "tokenizer.json").as_posix())
        self.tokenizer.enable_padding(
            length=length, pad_token=pad_token, pad_id=self.tokenizer.token_to_id(pad_token)
        )
        self.tokenizer.enable_truncation(max_length=length)
        self.canonicalize = (config.get("tokenizer_kwargs") or {}).get("clean") == "canonicalize"
        self.session = open_session(own / "model.onnx", prepared=prepared)
        self.has_languages = folder.name.startswith("nllb")

    def predict(self, text: str, language: str | None = None) -> NDArray[np.float32]:
        """The vector of a text; ``language`` is a locale of the interface."""
        code = None if language is None else code_of_locale(language)
        return self.predict_in(text, code)

    def predict_in(self, text: str, code: str | None) -> NDArray[np.float32]:
        assert not self.canonicalize, "no family here is trained on canonical text"
        text = " ".join(text.split())
        if self.has_languages and code is not None:
            text = f"{code}{text}"
        tokens = self.tokenizer.encode(text)
        row: NDArray[np.float32] = self.session.run(None, {"text": np.array([tokens.ids], np.int32)})[0][0]
        return row


class Visual:
    """The image half: one image a run, normalised by the service."""

    def __init__(self, folder: Path, *, prepared: bool = False) -> None:
        own = folder / "visual"
        self.config = json.loads((own / "preprocess_cfg.json").read_text(encoding="utf-8"))
        size = self.config["size"]
        self.size = size[0] if isinstance(size, list) else size
        methods = {method.name.lower(): method for method in Image.Resampling}
        self.resampling = methods[self.config["interpolation"].lower()]
        self.session = open_session(own / "model.onnx", prepared=prepared)
        assert self.session.get_inputs()[0].type == "tensor(float)", "uint8 would be another way of feeding"

    def predict(self, file: bytes) -> NDArray[np.float32]:
        """The vector of an image file."""
        image = Image.open(io.BytesIO(file))
        image.load()
        if image.mode != "RGB":
            image = image.convert("RGB")
        pixels = np.asarray(self._resized(image), dtype=np.float32) / 255.0
        mean, std = (np.array(self.config[key], dtype=np.float32) for key in ("mean", "std"))
        pixels *= 1.0 / std
        pixels -= mean / std
        row: NDArray[np.float32] = self.session.run(None, {"image": pixels.transpose(2, 0, 1)[None]})[0][0]
        return row

    def _resized(self, image: Image.Image) -> Image.Image:
        size = self.size
        if self.config.get("resize_mode", "shortest") == "squash":
            return image.resize((size, size), resample=self.resampling)
        if image.width < image.height:
            image = image.resize((size, int((image.height / image.width) * size)), resample=self.resampling)
        else:
            image = image.resize((int((image.width / image.height) * size), size), resample=self.resampling)
        left, upper = (int((side / 2) - (size / 2)) for side in image.size)
        return image.crop((left, upper, left + size, upper + size))


def open_session(model: Path, *, prepared: bool) -> Any:
    if not prepared:
        return _session(model, _options())
    folder = model.parent / "cpu" / "batch1"
    folder.mkdir(parents=True, exist_ok=True)
    options = _options()
    options.optimized_model_filepath = (folder / "model.onnx").as_posix()
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", "model.data"),
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
    ):
        options.add_session_config_entry(key, value)
    _pin(options)
    _session(model, options)
    options = _options()
    _pin(options)
    return _session(folder / "model.onnx", options)


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads, options.intra_op_num_threads = 1, 2
    return options


def _pin(options: Any) -> None:
    for name in ("batch", "DynamicDimension.0", "None"):
        options.add_free_dimension_override_by_name(name, 1)


def _session(model: Path, options: Any) -> Any:
    return onnxruntime.InferenceSession(
        model.as_posix(),
        sess_options=options,
        providers=["CPUExecutionProvider"],
        provider_options=[{"arena_extend_strategy": "kSameAsRequested"}],
    )
