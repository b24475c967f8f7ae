"""JavaScript libraries of the page: files of two npm packages, of one version, known by their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ExportError
from runtime.opening.cache import default_cache_folder
from runtime.storage import replace_file

__all__ = ["PACKAGES", "NpmPackage", "copy_packages", "require_packages"]


@dataclass(frozen=True, slots=True)
class NpmPackage:
    """Npm package of one version.

    Attributes:
        folder: Folder of its files in the page's ``vendor``.
        files: Path inside the package → file name in the page, and SHA-256. Modules end in ``.js``, since
            some hosts send ``.mjs`` as a type that browsers do not run.
    """

    name: str
    version: str
    licence: str
    folder: str
    files: Mapping[str, tuple[str, str]]

    @property
    def wanted(self) -> str:
        """Name and version, as npm takes them."""
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """File name that ``npm pack`` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    NpmPackage(
        "onnxruntime-web",
        "1.30.0",
        "MIT",
        "onnxruntime-web",
        {
            "dist/ort.wasm.min.mjs": (
                "ort.wasm.min.js",
                "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
            ),
            "dist/ort-wasm-simd-threaded.mjs": (
                "ort-wasm-simd-threaded.js",
                "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
            ),
            "dist/ort-wasm-simd-threaded.wasm": (
                "ort-wasm-simd-threaded.wasm",
                "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
            ),
        },
    ),
    NpmPackage(
        "@huggingface/tokenizers",
        "0.2.0",
        "Apache-2.0",
        "tokenizers",
        {
            "dist/tokenizers.min.mjs": (
                "tokenizers.min.js",
                "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a",
            ),
            "LICENSE": ("LICENSE", "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"),
        },
    ),
)


def copy_packages(target: Path, given: Path | None) -> None:
    """Copy the files of all packages to ``target/FOLDER/``.

    Args:
        given: Folder with the packages, as tarballs of ``npm pack`` or installed in ``node_modules``; None to
            use those of an earlier export, or to fetch them with npm.

    Raises:
        ExportError: a package is missing, is of another version, or cannot be fetched.
    """
    for package in PACKAGES:
        found = _files_of_package(package, given)
        folder = target / package.folder
        folder.mkdir(parents=True)
        for path, (name, _) in package.files.items():
            (folder / name).write_bytes(found[path])


def require_packages(given: Path | None) -> None:
    """Check that all packages are there, and fetch missing ones; see ``copy_packages``."""
    for package in PACKAGES:
        _files_of_package(package, given)


def _files_of_package(package: NpmPackage, given: Path | None) -> dict[str, bytes]:
    if given is not None:
        return _from_folder(package, given)
    kept = _cache_folder()
    if kept is not None and (kept / package.tarball).is_file():
        with contextlib.suppress(ExportError):  # a damaged copy is fetched again
            found = _from_tarball(package, kept / package.tarball)
            if not _differing(package, found):
                return found
    return _fetched(package, kept)


def _cache_folder() -> Path | None:
    opening = default_cache_folder()
    return None if opening is None else opening.with_name("npm")


def _from_folder(package: NpmPackage, folder: Path) -> dict[str, bytes]:
    tarball = folder / package.tarball
    installed = [folder / package.name, folder / "node_modules" / package.name]
    if tarball.is_file():
        place, found = tarball, _from_tarball(package, tarball)
    elif places := [path for path in installed if path.is_dir()]:
        place = places[0]
        found = {path: (place / path).read_bytes() for path in package.files if (place / path).is_file()}
    else:
        raise ExportError(
            f"{folder} holds neither {package.tarball} nor a folder {package.name}. Write the file with "
            f"`npm pack {package.wanted}` in that folder, or leave --npm-packages out to fetch it."
        )
    if differing := _differing(package, found):
        raise ExportError(
            f"{place} is not {package.wanted}: {differing[0]} is missing or has another checksum. Parity is "
            f"tested with this version alone. Replace it: `npm pack {package.wanted}`."
        )
    return found


def _fetched(package: NpmPackage, kept: Path | None) -> dict[str, bytes]:
    npm = shutil.which("npm")
    by_hand = (
        f"Fetch it where npm is installed, with `npm pack {' '.join(one.wanted for one in PACKAGES)}`, and "
        "pass the folder of the files as --npm-packages FOLDER."
    )
    if npm is None:
        raise ExportError(
            f"The page needs {package.wanted}, and npm, which would fetch it, is not here. {by_hand}"
        )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", "--silent", package.wanted], cwd=folder, capture_output=True, text=True, check=False
        )
        tarball = Path(folder) / package.tarball
        if done.returncode or not tarball.is_file():
            said = " ".join(done.stderr.split())[:400]
            raise ExportError(f"npm could not fetch {package.wanted}: {said or 'it said nothing'}. {by_hand}")
        found = _from_tarball(package, tarball)
        if differing := _differing(package, found):
            raise ExportError(
                f"{package.wanted} as npm fetched it is not the package that was tested: {differing[0]} is "
                f"missing or has another checksum. Ask who runs your npm registry. {by_hand}"
            )
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            replace_file(kept / package.tarball, lambda path: shutil.copyfile(tarball, path))
    return found


def _from_tarball(package: NpmPackage, tarball: Path) -> dict[str, bytes]:
    try:
        with tarfile.open(tarball) as archive:
            return dict(_members(archive, package))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ExportError(
            f"{tarball} cannot be read: {error}. Remove it, and write it again with "
            f"`npm pack {package.wanted}`."
        ) from error


def _members(archive: tarfile.TarFile, package: NpmPackage) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        path = member.name.split("/", 1)[-1]
        if path in package.files and member.isfile() and (stream := archive.extractfile(member)):
            yield path, stream.read()


def _differing(package: NpmPackage, found: Mapping[str, bytes]) -> list[str]:
    return [
        path
        for path, (_, sha256) in package.files.items()
        if path not in found or hashlib.sha256(found[path]).hexdigest() != sha256
    ]
