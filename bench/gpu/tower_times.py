"""Time one tower in every shape: exported forms, PyTorch and its compiler, in one process and in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.gpu.clocks import METRICS, Clock, Contender
from bench.gpu.forms import TimedForm, forms_to_time, graph_for_gpu
from bench.gpu.lines import Bench
from bench.gpu.packed_texts import RAGGED_SHAPES, caption_lengths, captions_contender
from bench.gpu.peers import torch_tower
from bench.gpu.sessions import TimedSession
from bench.gpu.towers import (
    CAPTIONS,
    DRY_TOWERS,
    TOWERS,
    TimedShape,
    TimedTower,
    n_tokens,
    random_inputs,
    shapes_of,
    tower_of,
)
from bench.gpu.turns import POLL_S, Turn
from runtime.manifest import Modality

__all__ = ["prepare_and_time", "time_autotuned"]

_WARM_UP = 4
_TURNS = 2
_TOO_LITTLE_S = 3.0
_MOST_SHAPES = 64
_AUTOTUNE_S = 40.0
_DRY_CAPTIONS = 64
_DTYPES = {"cuda": torch.float16, "cpu": torch.float32}


def prepare_and_time(bench: Bench, slug: str, *, until: float) -> None:
    """Prepare one tower; when told to, time every shape and write a line per contender.

    The product's own form is timed beside PyTorch first, then beside packed texts, then the others as far as
    the tower's time goes.

    Args:
        until: Time (``time.time()``) until which PyTorch may compile; 0 leaves the compiler out.
    """
    tower = tower_of(slug)
    cuda = torch.cuda.is_available() and not bench.dry
    stream = _stream(cuda)
    with torch.inference_mode(), torch.cuda.stream(stream):
        peers = _Peers(tower, "cuda" if cuda else "cpu")
        shapes = [(shape, random_inputs(tower, shape)) for shape in shapes_of(tower, dry=bench.dry)]
        compiled = list(_compile(bench, peers, shapes, until)) if cuda else []
        turn = Turn.of(bench, slug)
        while not turn.graphs.exists():
            time.sleep(POLL_S)
        opened = list(_opened(bench, tower, stream))
        turn.ready.touch()
        last = turn.wait_to_begin()
        clock = Clock(stream)
        for n_before, (shape, inputs) in enumerate(shapes):
            if time.time() >= last:
                left = ", ".join(str(shape) for shape, _ in shapes[n_before:])
                bench.emit(step="speed", tower=tower.name, error=f"out of the tower's time; left out: {left}")
                break
            contenders = list(_contenders(bench, tower, opened[:1], inputs, shape))
            contenders += peers.contenders(inputs, compiled=shape in compiled)
            _time(bench, tower, shape, contenders, clock)
        if tower.modality is Modality.TEXT and time.time() < last:
            _time_packed(bench, tower, opened, clock)
        for shape, inputs in shapes:
            if time.time() < last:
                contenders = list(_contenders(bench, tower, opened[1:], inputs, shape))
                contenders += peers.with_plain_attention(inputs)
                _time(bench, tower, shape, contenders, clock)


def _time_packed(bench: Bench, tower: TimedTower, opened: list[Opened], clock: Clock) -> None:
    """Time the product's padded and packed form in the captions of a corpus, then in ragged batches."""
    chosen = [(form, session) for form, session in opened if form.in_full and session.is_in_full]
    lengths = caption_lengths(_DRY_CAPTIONS) if bench.dry else caption_lengths()
    try:
        contenders = [captions_contender(tower, form, session, lengths) for form, session in chosen]
        _time(bench, tower, TimedShape(len(lengths)), contenders, clock, lengths=lengths)
    except Exception as error:
        _emit_error(bench, tower, CAPTIONS, error)
    for shape in () if bench.dry else RAGGED_SHAPES:
        contenders = list(_contenders(bench, tower, chosen, random_inputs(tower, shape), shape))
        _time(bench, tower, shape, contenders, clock)


def time_autotuned(bench: Bench) -> None:
    """Time PyTorch with the slowest and best compilation, in a few shapes, as far as the time goes."""
    cuda = torch.cuda.is_available() and not bench.dry
    stream = _stream(cuda)
    for tower in (DRY_TOWERS if bench.dry else TOWERS)[:2]:
        for shape in shapes_of(tower, dry=bench.dry)[1:3]:
            if bench.left_s < _AUTOTUNE_S:
                return
            torch._dynamo.reset()
            with torch.inference_mode(), torch.cuda.stream(stream):
                peers = _Peers(tower, "cuda" if cuda else "cpu", mode="max-autotune")
                inputs = random_inputs(tower, shape)
                compiled = list(_compile(bench, peers, [(shape, inputs)], bench.ends_at)) if cuda else []
                contenders = [
                    replace(contender, by=f"{contender.by}, autotuned")
                    for contender in peers.contenders(inputs, compiled=bool(compiled))
                    if compiled and contender.by != "PyTorch"
                ]
                _time(bench, tower, shape, contenders, Clock(stream))


def _stream(cuda: bool) -> Any:
    make: Any = torch.cuda.Stream
    return make() if cuda else None


Opened = tuple[TimedForm, TimedSession]


def _opened(bench: Bench, tower: TimedTower, stream: Any) -> Iterator[Opened]:
    """Open a session per form, without the product's backend if that fails; an error is a line."""
    handle = stream.cuda_stream if stream is not None else None
    for form in forms_to_time(dry=bench.dry):
        if form.texts_only and tower.modality is not Modality.TEXT:
            continue
        for attempt in (form, replace(form, in_full=False)) if form.in_full else (form,):
            what = f"{form.by} {form.precision.value}"
            started = time.perf_counter()
            try:
                graph = graph_for_gpu(bench.skeleton(tower.slug), form, bench.graphs)
                session = TimedSession(graph, attempt, stream=handle)
            except Exception as error:
                _emit_error(bench, tower, what, error)
                continue
            bench.emit(step="opened", tower=tower.name, what=what, seconds=time.perf_counter() - started)
            yield attempt, session
            break


def _contenders(
    bench: Bench,
    tower: TimedTower,
    opened: list[Opened],
    inputs: Mapping[str, NDArray[Any]],
    shape: TimedShape,
) -> Iterator[Contender]:
    for form, session in opened:
        if shape.rows > form.most_rows:
            continue
        try:
            contender = session.contender(inputs)
            for _ in range(_WARM_UP):
                contender.launch()
            yield contender
        except Exception as error:
            _emit_error(bench, tower, f"{shape}", error)


def _emit_error(bench: Bench, tower: TimedTower, what: str, error: Exception) -> None:
    bench.emit(step="speed", tower=tower.name, what=what, error=f"{type(error).__name__}: {error}"[:900])


class _Peers:
    """PyTorch's tower, eager and compiled.

    From NumPy to NumPy, it copies through page-locked host memory without blocking, as the product does.
    """

    def __init__(self, tower: TimedTower, device: str, mode: str = "reduce-overhead") -> None:
        self.device = device
        self.tower = tower
        self.pinned = device == "cuda"
        self.module = torch_tower(tower, device=device, dtype=_DTYPES[device])
        self.plain = torch_tower(tower, device=device, dtype=_DTYPES[device], attention="eager")
        torch._dynamo.config.recompile_limit = _MOST_SHAPES  # beyond it, shapes run eagerly without a word
        self.compiled: Any = torch.compile(self.module, mode=mode, dynamic=False)

    def on_device(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}

    def contenders(self, inputs: Mapping[str, NDArray[Any]], *, compiled: bool) -> Iterator[Contender]:
        for name, module in (("PyTorch", self.module), ("PyTorch compiled", self.compiled)):
            if module is self.module or compiled:
                yield self._contender(name, module, inputs)

    def with_plain_attention(self, inputs: Mapping[str, NDArray[Any]]) -> Iterator[Contender]:
        yield replace(self._contender("PyTorch, plain attention", self.plain, inputs), metrics=METRICS[:1])

    def _contender(self, name: str, module: Any, inputs: Mapping[str, NDArray[Any]]) -> Contender:
        held = self.on_device(inputs)
        staged = {key: torch.from_numpy(array.copy()) for key, array in inputs.items()}
        n_rows = len(next(iter(inputs.values())))
        found = torch.empty((n_rows, self.tower.dim), dtype=torch.float32, pin_memory=self.pinned)
        if self.pinned:
            staged = {key: tensor.pin_memory() for key, tensor in staged.items()}
        attention = "eager" if module is self.plain else "scaled_dot_product_attention"
        return Contender(
            name,
            "torch",
            "fp16" if self.device == "cuda" else "fp32",
            partial(self.launch, module, held),
            partial(self.from_host, module, inputs, staged, held, found),
            {"attention": attention, "torch": torch.__version__, "pinned": self.pinned},
        )

    def launch(self, module: Any, held: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if module is self.compiled:
            begin: Any = torch.compiler.cudagraph_mark_step_begin
            begin()
        found: torch.Tensor = module(**held)
        return found

    def from_host(
        self,
        module: Any,
        inputs: Mapping[str, NDArray[Any]],
        staged: Mapping[str, torch.Tensor],
        held: Mapping[str, torch.Tensor],
        found: torch.Tensor,
    ) -> NDArray[np.float32]:
        """Copy in, compute and copy out, by way of the ``staged`` inputs and ``found`` in host memory."""
        for name, array in inputs.items():
            staged[name].copy_(torch.from_numpy(array))
            held[name].copy_(staged[name], non_blocking=True)
        found.copy_(self.launch(module, held), non_blocking=True)
        if self.pinned:
            torch.cuda.current_stream().synchronize()
        vectors: NDArray[np.float32] = found.numpy().copy()
        return vectors


def _compile(
    bench: Bench, peers: _Peers, shapes: list[tuple[TimedShape, dict[str, NDArray[Any]]]], until: float
) -> Iterator[TimedShape]:
    """Compile shape by shape while there is time; a further shape is begun if one more would fit."""
    slowest = 0.0
    for shape, inputs in shapes:
        started = time.time()
        if started + slowest > until:
            return
        held = peers.on_device(inputs)
        try:
            for _ in range(_WARM_UP):
                peers.launch(peers.compiled, held)
            torch.cuda.synchronize()
        except Exception as error:
            bench.emit(step="compile", shape=str(shape), error=f"{type(error).__name__}: {error}"[:900])
            continue
        seconds = time.time() - started
        slowest = max(slowest, seconds)
        bench.emit(step="compile", shape=str(shape), seconds=seconds)
        yield shape


def _time(
    bench: Bench,
    tower: TimedTower,
    shape: TimedShape,
    contenders: list[Contender],
    clock: Clock,
    *,
    lengths: NDArray[np.int64] | None = None,
) -> None:
    """Time the contenders in turns, and write a line for each.

    Args:
        lengths: Tokens of each text, if the shape is a window of captions.
    """
    if lengths is None:
        load = "ragged" if shape.ragged else ""
        unpadded, operations = n_tokens(tower, shape), tower.operations(shape)
    else:
        load, unpadded = CAPTIONS, int(lengths.sum())
        operations = sum(tower.operations(TimedShape(1, int(length))) for length in lengths)
    found: dict[int, dict[str, list[float]]] = {}
    vectors = {}
    for _ in range(_TURNS):
        for number, contender in enumerate(contenders):
            if bench.left_s < _TOO_LITTLE_S:
                break
            try:
                vectors[number] = np.asarray(contender.from_host())
                for name, samples in clock.samples(contender).items():
                    found.setdefault(number, {}).setdefault(name, []).extend(samples)
            except Exception as error:
                _emit_error(bench, tower, f"{contender.by} {contender.precision} {shape}", error)
    for number, by_metric in found.items():
        contender = contenders[number]
        bench.emit(
            step="speed",
            tower=tower.name,
            modality=tower.modality.value,
            shape=str(shape) if lengths is None else f"{shape} {load}",
            rows=shape.rows,
            tokens=shape.tokens,
            load=load,
            n_tokens=unpadded,
            by=contender.by,
            engine=contender.engine,
            precision=contender.precision,
            unit_vectors=_are_unit(vectors[number]),
            samples={name: [round(ms, 5) for ms in samples] for name, samples in by_metric.items()},
            operations=operations,
            product_weights=tower.product_weights,
            detail=contender.detail,
        )


def _are_unit(vectors: NDArray[Any]) -> bool:
    lengths = np.square(vectors.astype(np.float64)).sum(axis=1)
    return bool(np.allclose(lengths, 1, atol=0.01))
