"""Common loops for embedding texts in FP32 PyTorch, using the libraries themselves.

- ``plain``: batches of 32 in the source's order, each padded to its longest text;
- ``open_clip``: its tokenizer, which pads to 77 tokens, and ``encode_text``, 32 texts at a time;
- ``sentence-transformers``: ``encode`` with its defaults: sorts by length, pads each batch of 32.

The time includes tokenising, as the pipeline's does, but not opening the model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LOOPS", "TimedLoop", "timed_loop"]

LOOPS = ("plain", "open_clip", "sentence-transformers")
_BATCH = 32
_CONTEXT_LENGTH = 77


@dataclass(frozen=True, slots=True)
class TimedLoop:
    """Measured work of one way over some rows.

    Attributes:
        padding: Padding as a share of the computed tokens, if the way reports it.
        vectors: float32 (rows, dim), L2-normalised, if the way computes the whole tower.
        busy_each_second: CPU seconds ÷ cores in every second from the first full one to the last batch.
        error: Reason that the way cannot run the model.
    """

    rows: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    padding: float | None = None
    vectors: NDArray[np.float32] | None = None
    busy_each_second: tuple[float, ...] = ()
    error: str | None = None


def timed_loop(way: str, checkpoint: Path, texts: list[str]) -> TimedLoop:
    """Embed texts with one of ``LOOPS``; the first call in a process opens and warms up the model."""
    try:
        run = _opened(way, checkpoint)
    except (ImportError, ValueError, OSError) as error:
        return TimedLoop(error=f"{type(error).__name__}: {error}")
    started, cpu_started = time.perf_counter(), time.process_time()
    vectors, padding = run(texts)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return TimedLoop(len(texts), seconds, cpu_seconds, padding, vectors)


_Run = Callable[[list[str]], tuple[NDArray[np.float32] | None, float | None]]


@lru_cache
def _opened(way: str, checkpoint: Path) -> _Run:
    model, tokenizer = _open_clip(checkpoint)
    if way == "sentence-transformers":
        run = _sentence_transformers(model, tokenizer)
    elif way == "open_clip":
        run = _open_clip_loop(model, tokenizer)
    else:
        run = _plain_loop(model, tokenizer)
    run(["a text to warm up with"] * _BATCH)
    return run


@lru_cache
def _open_clip(checkpoint: Path) -> tuple[Any, Any]:
    """Return open_clip's model and tokenizer of a checkpoint."""
    from open_clip.tokenizer import HFTokenizer

    from export.families.open_clip_checkpoint import checkpoint_from_folder

    opened = checkpoint_from_folder(checkpoint)
    languages = {"legacy_behaviour": False} if opened.text_config["model_type"] == "m2m_100" else {}
    return opened.model, HFTokenizer(opened.tokenizer_source, context_length=_CONTEXT_LENGTH, **languages)


def _batches(texts: list[str]) -> Iterator[list[str]]:
    return (texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH))


def _plain_loop(model: Any, tokenizer: Any) -> _Run:
    import torch

    def run(texts: list[str]) -> tuple[NDArray[np.float32], float]:
        vectors, n_tokens, n_computed = [], 0, 0
        with torch.inference_mode():
            for batch in _batches(texts):
                tokens = tokenizer.tokenizer(
                    [tokenizer.clean_fn(text) for text in batch],
                    padding=True,
                    truncation=True,
                    max_length=_CONTEXT_LENGTH,
                    return_tensors="pt",
                )
                n_tokens += int(tokens.attention_mask.sum())
                n_computed += tokens.attention_mask.numel()
                vectors.append(torch.nn.functional.normalize(model.text(tokens.input_ids), dim=-1).numpy())
        return np.concatenate(vectors), 1 - n_tokens / n_computed

    return run


def _open_clip_loop(model: Any, tokenizer: Any) -> _Run:
    import torch

    pad_id = tokenizer.tokenizer.pad_token_id

    def run(texts: list[str]) -> tuple[NDArray[np.float32], float]:
        vectors, n_tokens, n_computed = [], 0, 0
        with torch.inference_mode():
            for batch in _batches(texts):
                tokens = tokenizer(batch)
                n_tokens += int((tokens != pad_id).sum())
                n_computed += tokens.numel()
                vectors.append(model.encode_text(tokens, normalize=True).numpy())
        return np.concatenate(vectors), 1 - n_tokens / n_computed

    return run


def _sentence_transformers(model: Any, tokenizer: Any) -> _Run:
    """Build the loop of the transformer and mean pooling; the library omits the projection."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    with tempfile.TemporaryDirectory() as folder:
        model.text.transformer.save_pretrained(folder)
        tokenizer.tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=_CONTEXT_LENGTH)
        width = int(model.text.transformer.config.hidden_size)
        encoder = SentenceTransformer(modules=[transformer, Pooling(width, "mean")], device="cpu")

    def run(texts: list[str]) -> tuple[None, None]:
        encoder.encode(texts, batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False)
        return None, None

    return run
