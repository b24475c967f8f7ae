"""One model folder of immich in a process of its own: opening, memory, and queries fed as its service does.

Only numpy, ONNX Runtime and tokenizers are imported, with the service's options: two threads, one row a run,
every text padded to the context length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.timing.lean_process import called_alone
from runtime.errors import BabeltowerError

__all__ = ["Opening", "Turns", "opening_of", "resident_bytes", "turns_of"]

N_TOKENS = 5
"""Tokens of the timed query, special tokens included."""

_THREADS = 2
_MINIMUM_TURNS = 3


@dataclass(frozen=True, slots=True)
class Opening:
    """Cost of a folder's first answers in a fresh process.

    Attributes:
        first_wall_s: Seconds from opening the text tower to its first vector; imports are not counted.
        first_cpu_s: CPU seconds of the same.
        load_cpu_s: CPU seconds of it until graph and tokenizer are open.
        resident_bytes: Resident memory with both towers open, after a text and an image.
        text_resident_bytes: Resident memory with the text tower alone, after a text.
    """

    first_wall_s: float
    first_cpu_s: float
    load_cpu_s: float
    resident_bytes: int
    text_resident_bytes: int


@dataclass(frozen=True, slots=True)
class Turns:
    """Times of a query of five tokens in alternate runs, in milliseconds; wall clock and processor."""

    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]
    plain_wall_ms: tuple[float, ...]
    plain_cpu_ms: tuple[float, ...]


def opening_of(folder: Path) -> Opening:
    """Open a folder in a fresh process, and embed a text and an image."""
    return Opening(**called_alone(__name__, _open.__name__, str(folder.resolve())))


def turns_of(folder: Path, plain: Path, *, turns: int, threads: int = _THREADS) -> Turns:
    """Time a five-token query in a folder and in a plain graph, in turns in one fresh process.

    Args:
        plain: FP32 graph of the same tower that computes every position: the query costs it all 77.
        threads: Threads of each run. With several, one that has nothing to do waits in a loop, so that CPU
            times of a busy machine hold the waiting for the others.
    """
    paths = str(folder.resolve()), str(plain.resolve())
    found = called_alone(__name__, _take_turns.__name__, *paths, max(turns, _MINIMUM_TURNS), threads)
    return Turns(**{name: tuple(times) for name, times in found.items()})


def _open(given: str) -> Mapping[str, Any]:
    folder = Path(given)
    import onnxruntime
    import tokenizers  # noqa: F401 - the service has imported it before the first query

    del onnxruntime
    wall, cpu = time.perf_counter(), time.process_time()
    session = _session(folder / "textual" / "model.onnx")
    tokenizer = _tokenizer(folder)
    load_cpu_s = time.process_time() - cpu
    session.run(None, {"text": _ids(tokenizer, "um gato preto")})
    first_wall_s, first_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    text_resident_bytes = resident_bytes()
    visual = _session(folder / "visual" / "model.onnx")
    visual.run(None, {"image": np.zeros([1, *visual.get_inputs()[0].shape[1:]], np.float32)})
    return {
        "first_wall_s": first_wall_s,
        "first_cpu_s": first_cpu_s,
        "load_cpu_s": load_cpu_s,
        "resident_bytes": resident_bytes(),
        "text_resident_bytes": text_resident_bytes,
    }


def _take_turns(given: str, plain: str, turns: int, threads: int) -> Mapping[str, Any]:
    folder = Path(given)
    session = _session(folder / "textual" / "model.onnx", threads)
    plain_session = _session(Path(plain), threads)
    row = _query(_tokenizer(folder))
    ids = row.astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": (ids != row[0, -1]).astype(np.int64)}
    runs: dict[str, Callable[[], Any]] = {
        "": lambda: session.run(None, {"text": row}),
        "plain_": lambda: plain_session.run(["vector"], feeds),
    }
    times: dict[str, list[float]] = {f"{name}{clock}_ms": [] for name in runs for clock in ("wall", "cpu")}
    for turn in range(turns + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            if turn:  # the first run of a shape plans its memory
                for clock, seconds in spent.items():
                    times[f"{name}{clock}_ms"].append(1_000 * seconds)
    return times


def _query(tokenizer: Any) -> Any:
    """A text of five tokens, padded."""
    words = sorted(
        token[1:] for token in tokenizer.get_vocab() if token.startswith("▁") and token[1:].isalpha()
    )
    for word in words:
        encoding = tokenizer.encode(f"por_Latn{word} {word} {word}")
        if sum(encoding.attention_mask) == N_TOKENS:
            return np.array([encoding.ids], np.int32)
    raise BabeltowerError(f"The tokenizer makes no text of {N_TOKENS} tokens.")


def _ids(tokenizer: Any, text: str) -> Any:
    return np.array([tokenizer.encode(f"por_Latn{text}").ids], np.int32)


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    textual = folder / "textual"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_cfg"]
    pad = json.loads((textual / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"]
    tokenizer = Tokenizer.from_file(str(textual / "tokenizer.json"))
    tokenizer.enable_padding(
        length=config["context_length"], pad_token=pad, pad_id=tokenizer.token_to_id(pad)
    )
    tokenizer.enable_truncation(max_length=config["context_length"])
    return tokenizer


def _session(graph: Path, threads: int = _THREADS) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads, options.intra_op_num_threads = 1, threads
    return onnxruntime.InferenceSession(
        str(graph),
        sess_options=options,
        providers=["CPUExecutionProvider"],
        provider_options=[{"arena_extend_strategy": "kSameAsRequested"}],
    )


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
