"""Opening of the place that a path or URL names."""

from __future__ import annotations

import os
import re
from pathlib import Path

from runtime.corpus.stores.base import Store
from runtime.corpus.stores.local import LocalStore
from runtime.corpus.stores.objects import ObjectStore
from runtime.errors import CorpusError
from runtime.extras import import_optional, install_hint

__all__ = ["store_from_location"]

_COLLAPSED = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")
_SCHEME_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def store_from_location(location: str | os.PathLike[str]) -> Store:
    """Open a folder, or a URL such as ``s3://bucket/prefix`` with fsspec.

    Nothing is read or written; credentials and endpoints are those of fsspec's file system, which reads the
    usual environment variables.

    Raises:
        CorpusError: the URL is malformed, or its scheme is unknown.
        MissingPackageError: fsspec or the scheme's package is not installed.
    """
    name = os.fspath(location)
    if "://" not in name:
        if match := _COLLAPSED.match(name):
            raise CorpusError(
                f"{name} looks like a URL that was made a path, which joins its slashes. Pass it as a "
                f"string: {match[1]}://…"
            )
        return LocalStore(Path(name))
    scheme, _, rest = name.partition("://")
    if scheme == "file":
        return LocalStore(Path(rest if rest.startswith("/") else f"/{rest}"))
    fsspec = import_optional("fsspec", f"{scheme}://", "babeltower[corpus]")
    try:
        filesystem, root = fsspec.core.url_to_fs(name, use_listings_cache=False)
    except ImportError as error:
        package = _SCHEME_PACKAGES.get(scheme)
        hint = install_hint(package) if package else f"{error}."
        raise CorpusError(
            f"{name} cannot be opened: no package for {scheme}:// is installed. {hint}"
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise CorpusError(f"{name} cannot be opened as an output folder: {error}.") from error
    if not root.strip("/"):
        raise CorpusError(f"{name} names no folder; expected {scheme}://BUCKET/FOLDER.")
    return ObjectStore(filesystem, root, name)
