"""Download and read the npm packages that provide the emoji names and drawings of the sample data."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

VARIATION_SELECTOR = "\ufe0f"  # requests emoji presentation; not all packages include it


@dataclass(frozen=True, slots=True)
class Package:
    """Npm package with a pinned version."""

    name: str
    version: str
    licence: str

    @property
    def tarball(self) -> str:
        """File name of the tarball written by ``npm pack``."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


CLDR = Package("cldr-annotations-full", "48.2.0", "Unicode-3.0")
CLDR_DERIVED = Package("cldr-annotations-derived-full", "48.2.0", "Unicode-3.0")
NOTO = Package("emoji-datasource-google", "16.0.0", "Apache-2.0 (drawings), MIT (package)")
TWEMOJI = Package("emoji-datasource-twitter", "16.0.0", "CC-BY-4.0 (drawings), MIT (package)")


class Tarball:
    """Npm tarball, read without unpacking it to disk."""

    def __init__(self, package: Package, folder: Path) -> None:
        self.package = package
        self.path = folder / package.tarball
        if not self.path.exists():
            fetch(package, folder)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the tarball."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def files(self, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
        """Yield the files whose full path inside the package matches ``pattern``, in archive order."""
        with tarfile.open(self.path) as archive:
            for member in archive:
                match = re.fullmatch(pattern, member.name.split("/", 1)[-1])
                stream = archive.extractfile(member) if match else None
                if match and stream:
                    yield match, stream.read()

    def json(self, path: str) -> Any:
        """Read one JSON file of the package."""
        for _, content in self.files(re.escape(path)):
            return json.loads(content)
        raise FileNotFoundError(f"{self.package.tarball} has no {path!r}; check the pinned version.")


def fetch(package: Package, folder: Path) -> None:
    """Download a package's tarball into ``folder`` with the npm client."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    subprocess.run(["npm", "pack", "--silent", wanted], cwd=folder, check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True, slots=True)
class Emoji:
    """Emoji without skin-tone variants.

    Attributes:
        text: Fully qualified characters.
        code_points: Hexadecimal code points joined by ``-``, as in ``1f600``.
        category: Unicode group, for example ``Food & Drink``.
        image: File name of the drawing inside the package.
        short_names: Names as typed between colons, for example ``grinning``.
    """

    text: str
    code_points: str
    category: str
    image: str
    short_names: tuple[str, ...]

    @property
    def key(self) -> str:
        """Characters without variation selectors, which are the same in all packages."""
        return self.text.replace(VARIATION_SELECTOR, "")


class EmojiDatasource:
    """Package ``emoji-datasource-*``: the list of emoji, and one vendor's 64-px drawings."""

    def __init__(self, package: Package, folder: Path) -> None:
        self.tarball = Tarball(package, folder)
        self.vendor = package.name.rsplit("-", 1)[-1]

    @cached_property
    def emoji(self) -> list[Emoji]:
        """All emoji drawn by the vendor, in Unicode order."""
        entries = sorted(self.tarball.json("emoji.json"), key=lambda entry: entry["sort_order"])
        drawn = [entry for entry in entries if entry[f"has_img_{self.vendor}"]]
        return [_emoji_from_entry(entry) for entry in drawn]

    def drawings(self) -> dict[str, Image.Image]:
        """Load RGB drawings on white, 64 × 64, by ``Emoji.text``."""
        wanted = {emoji.image: emoji.text for emoji in self.emoji}
        files = self.tarball.files(rf"img/{self.vendor}/64/([^/]+\.png)")
        return {wanted[match[1]]: on_white(content) for match, content in files if match[1] in wanted}


def _emoji_from_entry(entry: Mapping[str, Any]) -> Emoji:
    code_points = entry["unified"].lower()
    text = "".join(chr(int(point, 16)) for point in code_points.split("-"))
    return Emoji(text, code_points, entry["category"], entry["image"], tuple(entry["short_names"]))


def on_white(encoded: bytes) -> Image.Image:
    """Decode an image and composite it on white.

    CLIP's preprocessing uses ``convert("RGB")``, which drops alpha and exposes the colour of transparent
    pixels, so transparency must be removed before a drawing is stored.
    """
    image = Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")).convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB")


def names_from_cldr(folder: Path) -> dict[str, dict[str, str]]:
    """Read emoji names (CLDR's text-to-speech names) by CLDR locale and ``Emoji.key``."""
    names: dict[str, dict[str, str]] = {}
    for package, part in ((CLDR, "annotations"), (CLDR_DERIVED, "annotationsDerived")):
        for match, content in Tarball(package, folder).files(rf"{part}/([\w-]+)/annotations\.json"):
            entries = json.loads(content)[part].get("annotations", {})
            locale = names.setdefault(match[1], {})
            for text, entry in entries.items():
                if entry.get("tts"):
                    locale[text.replace(VARIATION_SELECTOR, "")] = entry["tts"][0]
    return names
