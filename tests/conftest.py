"""What several test files share: the sample checkpoints, exported once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sample_models import CHECKPOINTS, NAMES, ROOT, Exported

if TYPE_CHECKING:
    from runtime.server import Server, ServerEnvironment


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from, or left in, the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """Folder of the sample checkpoints."""
    return CHECKPOINTS


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Triton repository for all exports of the session."""
    return tmp_path_factory.mktemp("triton") / "repository"


@pytest.fixture(scope="session")
def exported(repository: Path) -> Exported:
    """Sample name → REPOSITORY/NAME, exported in FP32 at its first use."""
    from export import repository_from_checkpoint
    from export.repository import ExportOptions

    options = ExportOptions(captions_per_language=0)

    def model_of(name: str) -> Path:
        if not (repository / f"{name}.babeltower.json").is_file():
            repository_from_checkpoint(CHECKPOINTS / name, repository, name=name, options=options)
        return repository / name

    return model_of


@pytest.fixture(scope="session")
def server_environment() -> ServerEnvironment:
    """The server's own environment, made once under build/ where nobody named another."""
    from runtime.server import environment_from_folder

    named = os.environ.get("BABELTOWER_SERVER_ENV")
    return environment_from_folder(Path(named) if named else ROOT / "build" / "server")


@pytest.fixture(scope="session")
def served(exported: Exported, server_environment: ServerEnvironment) -> Iterator[Server]:
    """A Triton server on this machine that serves every sample."""
    from runtime.server import running_server

    (repository,) = {exported(name).parent for name in NAMES}
    with running_server(repository, environment=server_environment) as server:
        yield server
