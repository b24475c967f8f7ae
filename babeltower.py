"""babeltower: multilingual CLIP towers, exported once, served and embedded anywhere.

    from babeltower import Encoder

    with Encoder.open("models/nllb-clip") as encoder:
        vectors = encoder.embed_texts(["um gato preto"], language="por_Latn")

This module re-exports the public names of ``runtime``; each is imported at its first use.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

import runtime

if TYPE_CHECKING:
    from runtime import *  # noqa: F403

__all__ = ["__version__", *runtime.__all__]  # noqa: F405


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("babeltower")
    if name in runtime.__all__:
        return getattr(runtime, name)
    raise AttributeError(f"module 'babeltower' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if __name__ == "__main__":
    from runtime.commands.__main__ import main

    main()
