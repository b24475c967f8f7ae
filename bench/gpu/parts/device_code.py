"""Cut a CUDA library down to the device code of one architecture and the kernels that transformers need.

A library built for many GPUs holds each of its kernels six times and hundreds that no tower calls: 219 of
the 284 MB of ONNX Runtime's CUDA provider. The device code of a compilation unit is a *fatbin*: a header and
one entry per architecture, each with a header of its own and a compressed ELF file. Offsets stay as they
are, since the library's tables point to them; unneeded code becomes zeros, which compress to nothing. A unit
that is left out gets an empty ELF file, so that the driver still finds a valid image of every unit.

For temporary bundles only: a kernel that was left out fails when it is launched.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import BabeltowerError

__all__ = ["Cut", "Unit", "cut_library", "is_needed", "units_of"]

_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _ELF = 1, 2
_HEADER_BYTES = 16

_HEAD_DIM = re.compile(r"Flash_fwd_kernel_traitsILi(\d+)E")
_LARGEST_HEAD = 64
"""Width of an attention head in every published tower; the samples' heads are narrower."""

_UNNEEDED = re.compile(
    "|".join(
        (
            r"[Mm]oe(FC|_gemm|_gemv|Routing|_router|Gemv|Permute|Softmax)|sparse_mixer|ExpertMaps",
            r"13device_kernelI|GemmFpAInt|fpA_intB|weight_only|run_global",
            r"MatMul(Float|Block|NBits)|kgemm_4bit|QOrder",
            r"kernel_mha|kernel_paired|masked_multihead_attention|PagedKV|PagedDecode|PagedAttention|UnpackRoPE",
            r"LinearAttention|gated_delta|CsaScore|DynamicSparse|Longformer",
            r"TopK|topk|BeamSearch|KeyCacheExpansion|Dropout|RandomKernel",
            r"Resize|Upsample|Deform|GridSample|RoIAlign|GroupNorm",
        )
    )
)
"""Kernels of mixtures of experts, weights of 8 bits and fewer, text generation, training and resizing."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Code for one architecture within a unit: offsets in the file, sizes in bytes, headers included."""

    kind: int
    architecture: int
    start: int
    header_bytes: int
    code_bytes: int

    @property
    def end(self) -> int:
        """Offset after the entry."""
        return self.start + self.header_bytes + self.code_bytes


@dataclass(frozen=True, slots=True)
class Unit:
    """Device code of one compilation unit: the offset of its header, and its entries."""

    start: int
    entries: Sequence[Entry]

    def code_for(self, architecture: int) -> Entry | None:
        """Return the unit's machine code for an architecture."""
        found = [e for e in self.entries if e.kind == _ELF and e.architecture == architecture]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Cut:
    """Counts of units, and bytes of device code before and after."""

    n_units: int
    n_kept: int
    source_bytes: int
    kept_bytes: int


def units_of(library: bytes | bytearray) -> Iterator[Unit]:
    """Find the units of a library's device code, in file order.

    Raises:
        BabeltowerError: a unit's entries are not as this module expects.
    """
    at = 0
    while (at := library.find(_MAGIC, at)) >= 0:
        _, header_bytes, size = struct.unpack_from("<HHQ", library, at + 4)
        if header_bytes != _HEADER_BYTES or at + header_bytes + size > len(library):
            at += len(_MAGIC)  # the same four bytes within something else
            continue
        end = at + header_bytes + size
        yield Unit(at, tuple(_entries(library, at + header_bytes, end)))
        at = end


def _entries(library: bytes | bytearray, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        kind, _, header_bytes, code_bytes = struct.unpack_from("<HHIQ", library, at)
        (architecture,) = struct.unpack_from("<I", library, at + 28)
        entry = Entry(kind, architecture, at, header_bytes, code_bytes)
        if kind not in (_PTX, _ELF) or entry.end > end:
            raise BabeltowerError(
                f"The device code at byte {at} has an entry of kind {kind} that ends at {entry.end}; "
                f"expected kind {_PTX} or {_ELF}, and an end by {end}. The library's format is not known."
            )
        yield entry
        at = entry.end


def is_needed(kernels: Collection[str]) -> bool:
    """Tell whether a unit may be called by a text or image tower, by the mangled names of its kernels."""
    heads = {int(dim) for name in kernels for dim in _HEAD_DIM.findall(name)}
    if heads:
        return min(heads) <= _LARGEST_HEAD
    return not any(_UNNEEDED.search(name) for name in kernels)


def cut_library(source: Path, target: Path, *, architecture: int, cuobjdump: Path) -> Cut:
    """Write a library that keeps only the needed kernels of one architecture.

    Args:
        source: Shared library with device code for several architectures.
        target: Output file, of the same size.
        architecture: Compute capability as one number, such as 90.
        cuobjdump: NVIDIA's tool, which names the kernels of compressed code.

    Raises:
        BabeltowerError: the library has no code for the architecture, or no empty unit.
    """
    library = bytearray(source.read_bytes())
    units = list(units_of(library))
    names = _kernels_by_entry(source, units, architecture, cuobjdump)
    empty = _smallest_empty(library, units, names, architecture)
    kept = 0
    kept_bytes = 0
    for unit in units:
        own = unit.code_for(architecture)
        needed = own is not None and is_needed(names[own.start])
        code = bytes(library[own.start : own.end]) if needed and own else empty
        _replace_code(library, unit, code)
        kept += needed
        kept_bytes += len(code) if needed else 0
    target.write_bytes(library)
    total = sum(entry.code_bytes for unit in units for entry in unit.entries)
    return Cut(len(units), kept, total, kept_bytes)


def _replace_code(library: bytearray, unit: Unit, code: bytes) -> None:
    """Make ``code`` the unit's only entry, padded with zeros that belong to the last entry's place."""
    start, end = unit.entries[0].start, unit.entries[-1].end
    if len(code) > end - start:
        code = code[:0]
    library[start:end] = code + bytes(end - start - len(code))
    struct.pack_into("<Q", library, unit.start + 8, len(code))


def _smallest_empty(
    library: bytearray, units: Sequence[Unit], names: dict[int, list[str]], architecture: int
) -> bytes:
    """Return the smallest entry without a kernel: what every unit that is left out gets."""
    entries = [entry for unit in units if (entry := unit.code_for(architecture)) is not None]
    empty = [entry for entry in entries if not names[entry.start]]
    if not empty:
        raise BabeltowerError(
            f"The library has {len(entries)} units for architecture {architecture} and none without kernels; "
            "expected both. Name another architecture or another build."
        )
    smallest = min(empty, key=lambda entry: entry.end - entry.start)
    return bytes(library[smallest.start : smallest.end])


def _kernels_by_entry(
    source: Path, units: Sequence[Unit], architecture: int, cuobjdump: Path
) -> dict[int, list[str]]:
    """Return the mangled kernel names of each entry for the architecture, by the entry's offset.

    ``cuobjdump`` numbers the entries of machine code from 1, in file order.
    """
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("", "a"):
            subprocess.run(
                [cuobjdump.resolve(), "-xelf", f"sm_{architecture}{suffix}", source.resolve()],
                cwd=folder,
                check=True,
                capture_output=True,
            )
        files = {int(path.name.split(".")[-3]): path for path in Path(folder).iterdir()}
        found = {}
        entries = [entry for unit in units for entry in unit.entries if entry.kind == _ELF]
        for number, entry in enumerate(entries, 1):
            if entry.architecture == architecture:
                found[entry.start] = _kernels_of(files[number].read_bytes())
    return found


def _kernels_of(elf: bytes) -> list[str]:
    """Return the kernels of an ELF file: its sections ``.text.NAME``."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    n_sections, names_at = struct.unpack_from("<HH", elf, 0x3C)
    sections = [struct.unpack_from("<IIQQ", elf, table + 64 * index) for index in range(n_sections)]
    (names_offset,) = struct.unpack_from("<Q", elf, table + 64 * names_at + 24)
    found = []
    for name, *_ in sections:
        start = names_offset + name
        text = elf[start : elf.index(b"\0", start)].decode()
        if text.startswith(".text."):
            found.append(text.removeprefix(".text."))
    return found
