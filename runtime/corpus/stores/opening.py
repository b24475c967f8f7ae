"""Opening of the place that a path or URL names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from runtime.corpus.faults import PATIENCE_S, Patience
from runtime.corpus.stores.base import Store
from runtime.corpus.stores.local import LocalStore
from runtime.corpus.stores.objects import ObjectStore
from runtime.errors import CorpusError
from runtime.extras import import_optional, install_hint

__all__ = ["store_from_location"]

_COLLAPSED = re.compile(r"([a-z][a-z0-9+.-]+):/(?!/)")
_S3, _GS = ("s3", "s3a"), ("gs", "gcs")
_SHORTEST_REQUEST_S, _LONGEST_REQUEST_S = 1.0, 30.0
_SCHEME_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


def store_from_location(location: str | os.PathLike[str], *, patience_s: float = PATIENCE_S) -> Store:
    """Open a folder, or a URL such as ``s3://bucket/prefix`` with fsspec.

    Nothing is read or written; credentials and endpoints are those of fsspec's file system, which reads the
    usual environment variables.

    Args:
        patience_s: Seconds for which a request to an object store is repeated while its fault may pass.

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
        limits = _limits_of_requests(scheme, patience_s)
        filesystem, root = fsspec.core.url_to_fs(name, use_listings_cache=False, **limits)
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
    if scheme in _S3:
        filesystem.retries = 1  # each request is repeated here, with one patience for all stores
    return ObjectStore(filesystem, root, name, Patience(patience_s))


def _limits_of_requests(scheme: str, patience_s: float) -> dict[str, Any]:
    """Return options with which a request to a store that does not answer ends within the patience.

    What the user configured for fsspec is left as it is.
    """
    longest_s = max(_SHORTEST_REQUEST_S, min(_LONGEST_REQUEST_S, patience_s / 2))
    if scheme in _S3:
        own = import_optional("fsspec.config", "An object store", "babeltower[corpus]").conf
        asked = own.get(scheme, {}).get("config_kwargs", {})
        once = {"mode": "standard", "total_max_attempts": 1}
        limits = {"connect_timeout": longest_s, "read_timeout": longest_s, "retries": once}
        return {"config_kwargs": {**limits, **asked}}
    return {"requests_timeout": longest_s} if scheme in _GS else {}
