"""Summary of a model's manifest as plain values and readable text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.cosines import nan_first
from runtime.errors import LanguageError
from runtime.fingerprints import remark_on_kind
from runtime.manifest import Manifest, TowerFiles, Variant, verify_file
from runtime.preprocessing.dropped_tokens import dropped_tokens_of
from runtime.preprocessing.languages import Language, flores_from_code, languages, spoken_language

__all__ = [
    "dropped_tokens",
    "languages_of_codes",
    "languages_of_model",
    "lines_from_vocabulary",
    "summary_from_model",
    "text_from_languages",
    "text_from_summary",
]


def summary_from_model(model: str) -> dict[str, Any]:
    """Verify the files of ``REPOSITORY/NAME`` and describe it in plain values.

    Raises:
        ManifestError: there is no such model, or a file does not match its manifest.
    """
    manifest = Manifest.read(model)
    for variant in manifest.variants.values():
        manifest.verify(Path(model).parent, variant)
    manifest.verify_front_ends(Path(model).parent)
    for record in manifest.probes:
        verify_file(Path(model).parent, record)
    return {
        "name": manifest.name,
        "family": manifest.family,
        "architecture": manifest.architecture,
        "licence": manifest.licence,
        "fingerprint": manifest.fingerprint,
        "dim": manifest.dim,
        "mrl_dims": list(manifest.mrl_dims),
        "languages": list(manifest.languages),
        "language_token": manifest.text.needs_language,
        "context_length": manifest.text.context_length,
        "cleaning": manifest.text.clean,
        "padding": manifest.text.padding,
        "image": {
            "size": [manifest.image.height, manifest.image.width],
            "resize": manifest.image.resize,
            "interpolation": manifest.image.interpolation,
            "order": manifest.image.order,
        },
        "source": dict(manifest.source),
        "vocabulary": [dataclasses.asdict(kept) for kept in manifest.vocabulary],
        "variants": {name: _variant_summary(variant) for name, variant in manifest.variants.items()},
    }


def dropped_tokens(model: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """Return the tokens that each text needs and the vocabulary of ``REPOSITORY/NAME`` lacks.

    Raises:
        ManifestError: the checkpoint's own tokenizer cannot be read.
        InputError: a text holds a lone surrogate.
    """
    manifest = Manifest.read(model)
    if not manifest.vocabulary:
        return {text: [] for text in texts}
    variant = next(iter(manifest.variants.values()))
    found = dropped_tokens_of(Path(model).parent / variant.tokenizer, manifest.text, texts)
    return {text: list(tokens) for text, tokens in zip(texts, found, strict=True)}


def _length_line(summary: Mapping[str, Any]) -> str:
    always = "always" if summary["padding"] == "context" else "up to"
    return f"{always} {summary['context_length']} tokens"


def _variant_summary(variant: Variant) -> dict[str, Any]:
    return {
        "precision": variant.precision.value,
        "engines": list(variant.engines),
        "text_bytes": _size_bytes(variant.text),
        "image_bytes": _size_bytes(variant.image),
        "parity": dict(variant.parity),
        "versions": dict(variant.versions),
        "created": variant.created,
        "packed_text": variant.packs_text,
    }


def _size_bytes(tower: TowerFiles) -> int:
    return sum(record.size_bytes for record in tower.files)


def text_from_summary(summary: dict[str, Any]) -> str:
    """Format a summary as text; its files must be verified already."""
    image = summary["image"]
    widths = [summary["dim"], *sorted(summary["mrl_dims"], reverse=True)]
    facts = {
        "family": f"{summary['family']} ({summary['architecture']})",
        "licence": summary["licence"],
        "fingerprint": summary["fingerprint"] + remark_on_kind(summary["fingerprint"]),
        "widths": ", ".join(map(str, widths)),
        "languages": _languages_line(summary),
        "text": f"{_length_line(summary)}, cleaning: {summary['cleaning']}",
        "image": "{size[0]}×{size[1]}, {resize}, {interpolation}, {order}".format(**image),
    }
    lines = [summary["name"], *(f"  {name:<12} {value}" for name, value in facts.items())]
    for kept in summary["vocabulary"]:
        lines += [f"  {'vocabulary':<12} {line}" for line in lines_from_vocabulary(kept)]
    for text, tokens in summary.get("dropped_tokens", {}).items():
        lines.append(f"  {'text':<12} {text!r} needs {' '.join(tokens) or 'no dropped token'}")
    for name, variant in summary["variants"].items():
        sizes = f"text {_megabytes(variant['text_bytes'])}, image {_megabytes(variant['image_bytes'])}"
        packed = ", packed texts" if variant["packed_text"] else ""
        lines.append(f"  {name:<12} {sizes}{packed}; files verified")
        lines += [f"  {'':<12} {line}" for line in _parity_lines(variant["parity"])]
    return "\n".join(lines)


def lines_from_vocabulary(kept: Mapping[str, Any]) -> list[str]:
    """Describe a pruned vocabulary, given as plain values: the kept share, and texts that need more."""
    lines = [
        f"{kept['n_tokens']:,} of {kept['n_whole']:,} tokens, kept by {kept['kept_by'].value} for "
        + ", ".join(kept["languages"])
    ]
    for name, found in kept["needing"].items():
        n_texts = sum(counts["n_texts"] for counts in found.values())
        needing = {code: counts["n_needing"] for code, counts in found.items() if counts["n_needing"]}
        worst = max(needing, key=lambda code: needing[code], default=None)
        lines.append(
            f"{sum(needing.values())} of {n_texts} texts of {name} need a dropped token"
            + (f"; most in {worst}: {needing[worst]}" if worst else "")
        )
    return lines


def _languages_line(summary: dict[str, Any]) -> str:
    token = "every text must name one" if summary["language_token"] else "texts need not name one"
    return f"{len(summary['languages'])} ({token})"


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _parity_lines(parity: dict[str, Any]) -> Iterator[str]:
    """Yield the reference and each engine's measured cosines."""
    engines = parity.get("engines", {})
    if engines:
        yield f"compared with {parity['reference']}"
    for engine, figures in engines.items():
        language, worst = min(figures["languages"].items(), key=lambda item: nan_first(item[1]["min_cosine"]))
        yield (
            f"{engine}: cosine of texts ≥ {figures['text']['min_cosine']:.7f}, of images "
            f"≥ {figures['image']['min_cosine']:.7f}; worst of {len(figures['languages'])} languages: "
            f"{language} at {worst['min_cosine']:.7f}"
        )


def languages_of_model(model: str | None) -> tuple[Language, ...]:
    """Return every known language, or those of ``REPOSITORY/NAME``."""
    if model is None:
        return languages()
    rows = {language.flores: language for language in languages()}
    return tuple(_row(rows, code) for code in Manifest.read(model).languages)


def languages_of_codes(codes: Sequence[str], model: str | None) -> tuple[Language, ...]:
    """Return the language rows of codes, in the given order.

    Raises:
        LanguageError: a code is unknown, or ``REPOSITORY/NAME`` does not support its language.
    """
    rows = {row.flores: row for row in languages_of_model(model)}
    return tuple(rows[spoken_language(code, rows)] for code in codes)


def _row(rows: dict[str, Language], code: str) -> Language:
    """Return a code's row; a code that only the model knows gets a row without a name."""
    try:
        return rows[flores_from_code(code)]
    except LanguageError:
        return Language(flores=code, bcp47="", cldr="", flores200=False, name="", aliases=())


def text_from_languages(found: Sequence[Language]) -> str:
    """Format one line per language: FLORES-200 code, BCP-47 tag, English name."""
    return "\n".join(f"{row.flores:<10} {row.bcp47:<12} {row.name}".rstrip() for row in found)
