"""Build ``samples/emoji`` from npm packages: emoji names in 106 languages and two vendors' drawings.

    python -m samples.build [--npm-folder FOLDER]

The output is deterministic for given versions of the packages, Pillow and pyarrow.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from samples.sources import (
    CLDR,
    CLDR_DERIVED,
    NOTO,
    TWEMOJI,
    Emoji,
    EmojiDatasource,
    Package,
    Tarball,
    names_from_cldr,
)

ROOT = Path(__file__).resolve().parent
LANGUAGES = ROOT.parent / "runtime" / "preprocessing" / "languages.csv"
N_EMOJI = 1911
N_LANGUAGES = 106
N_LOCALES_WITH_NAMES = 160
MIN_NAMES = 1500
N_COLOURS = 255


def main() -> None:
    """Parse the command line and build the sample data."""
    parser = argparse.ArgumentParser(description="Build samples/emoji from npm packages.")
    parser.add_argument(
        "--npm-folder", type=Path, help="folder of npm tarballs; missing ones are downloaded into it"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "emoji")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        build(arguments.npm_folder or Path(scratch), arguments.out)


def build(npm_folder: Path, out: Path) -> None:
    """Write captions, training drawings, gallery and provenance to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    train, gallery = EmojiDatasource(NOTO, npm_folder), EmojiDatasource(TWEMOJI, npm_folder)
    emoji = train.emoji
    if [one.text for one in emoji] != [one.text for one in gallery.emoji] or len(emoji) != N_EMOJI:
        raise ValueError(
            f"The two vendors must have the same {N_EMOJI} emoji; found {len(emoji)} and {len(gallery.emoji)}"
        )
    names = names_from_cldr(npm_folder)
    captions = captions_from_names(emoji, names, selected_languages(emoji, names))
    write(captions, out / "captions.parquet")
    write(table_from_drawings(emoji, train.drawings(), "noto"), out / "train.parquet")
    write(table_from_drawings(emoji, gallery.drawings(), "twemoji"), out / "gallery.parquet")
    (out / "provenance.json").write_text(provenance((CLDR, CLDR_DERIVED, NOTO, TWEMOJI), npm_folder))
    print(f"{captions.num_rows} captions of {len(emoji)} emoji in {N_LANGUAGES} languages → {out}")


def selected_languages(
    emoji: Sequence[Emoji], names: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, str, str]]:
    """Return (flores, bcp47, cldr) of languages with at least ``MIN_NAMES`` emoji names, sorted by flores.

    A language is one row of the runtime's language table, which has one CLDR locale per row; regional locales
    (``pt-PT``, ``es-MX``) only override a few names of their parent and have no row.
    """
    counts = {locale: sum(one.key in named for one in emoji) for locale, named in names.items()}
    n_locales = sum(count > 0 for count in counts.values())
    with LANGUAGES.open(encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table) if counts.get(row["cldr"], 0) >= MIN_NAMES]
    complete = {locale for locale, count in counts.items() if count >= MIN_NAMES}
    if (
        n_locales != N_LOCALES_WITH_NAMES
        or len(rows) != N_LANGUAGES
        or complete != {row["cldr"] for row in rows}
    ):
        raise ValueError(
            f"Expected {N_LANGUAGES} languages out of {N_LOCALES_WITH_NAMES} locales, "
            f"got {len(rows)} of {n_locales}; "
            f"locales without a row in {LANGUAGES.name}: {sorted(complete - {row['cldr'] for row in rows})}"
        )
    return sorted((row["flores"], row["bcp47"], row["cldr"]) for row in rows)


def captions_from_names(
    emoji: Sequence[Emoji], names: Mapping[str, Mapping[str, str]], languages: Sequence[tuple[str, str, str]]
) -> pa.Table:
    """Build a table of one row per (language, emoji) with a name, by flores code and in Unicode order."""
    rows = [
        (one.text, flores, bcp47, names[cldr][one.key])
        for flores, bcp47, cldr in languages
        for one in emoji
        if one.key in names[cldr]
    ]
    columns = list(zip(*rows, strict=True))
    return pa.table(dict(zip(("emoji", "flores", "bcp47", "caption"), map(pa.array, columns), strict=True)))


def table_from_drawings(emoji: Sequence[Emoji], drawings: Mapping[str, Image.Image], vendor: str) -> pa.Table:
    """Build a table of one row per emoji, in Unicode order, with its drawing as PNG bytes."""
    return pa.table(
        {
            "emoji": [one.text for one in emoji],
            "code_points": [one.code_points for one in emoji],
            "category": [one.category for one in emoji],
            "vendor": [vendor] * len(emoji),
            "image": pa.array([png_from_drawing(drawings[one.text]) for one in emoji], pa.binary()),
        }
    )


def png_from_drawing(drawing: Image.Image) -> bytes:
    """Encode a palette PNG: 255 colours look the same on flat drawings and need a third less space."""
    encoded = io.BytesIO()
    drawing.quantize(N_COLOURS, dither=Image.Dither.NONE).save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def write(table: pa.Table, path: Path) -> None:
    """Write a Parquet file atomically, by renaming."""
    part = path.with_suffix(".part")
    text = [name for name in table.column_names if name != "image"]
    pq.write_table(table, part, compression="zstd", compression_level=19, use_dictionary=text)
    part.rename(path)


def provenance(packages: Sequence[Package], npm_folder: Path) -> str:
    """Return JSON with the version, licence and SHA-256 of each input package's tarball."""
    described = [
        {"name": p.name, "version": p.version, "licence": p.licence, "sha256": Tarball(p, npm_folder).sha256}
        for p in packages
    ]
    return json.dumps({"packages": described}, indent=2) + "\n"


if __name__ == "__main__":
    main()
