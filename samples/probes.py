"""Write ``export/parity/probes.json``: eight emoji names per language for the parity check of exports.

python -m samples.probes
"""

from __future__ import annotations

import json
from pathlib import Path

from samples import dataset

_PROBED = ("🐈", "🌋", "🚲", "🍇", "👩‍🚀", "🏳️‍🌈", "🎻", "🇧🇷")
"""Emoji with short and long names, compounds and place names; most languages have all eight."""

TARGET = Path(__file__).resolve().parent.parent / "export" / "parity" / "probes.json"


def main() -> None:
    """Select the names and write the file."""
    probes: dict[str, list[str]] = {}
    for caption in dataset.load_captions():
        if caption.emoji in _PROBED:
            probes.setdefault(caption.flores, []).append(caption.text)
    source = "Unicode CLDR 48.2.0 annotations, Unicode License v3 (samples/LICENSES)"
    rows = ",\n".join(
        f"  {json.dumps(language)}: {json.dumps(probes[language], ensure_ascii=False)}"
        for language in sorted(probes)
    )
    text = f'{{\n "source": {json.dumps(source)},\n "texts": {{\n{rows}\n }}\n}}\n'
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
