"""What several test files share: the sample checkpoints, exported once a session."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from sample_models import CHECKPOINTS, NAMES, ROOT, Exported

if TYPE_CHECKING:
    from runtime.server import Server, ServerEnvironment


# How long an example takes tells how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

_SUPPORT = Path(__file__).parent / "support"
_TRAINING_STACK = {"torch", "transformers", "open_clip", "onnx", "onnx_ir", "safetensors", "export", "bench"}
_RUNS_EVERYTHING = "document_blocks"  # runs documented commands, exports among them
_MADE_WITH_TORCH = {"exported", "served", "server_environment", "clean_python"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--unit``."""
    parser.addoption("--unit", action="store_true", help="only tests that need no torch and no server")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``--unit``: leave out tests of servers, and files that import the training stack."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    if not config.getoption("--unit") or not is_test:
        return None
    return True if collection_path.parent.name == "triton" or _needs_torch(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--unit``: leave out tests of exported models and of servers."""
    if not config.getoption("--unit"):
        return
    needy = [item for item in items if _MADE_WITH_TORCH & set(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=needy)
    items[:] = [item for item in items if item not in needy]


@cache
def _needs_torch(path: Path) -> bool:
    """Tell whether a file, or a support module that it imports, imports the training stack at its top."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
    helpers = [_SUPPORT / f"{name}.py" for name in names]
    return bool(names & {*_TRAINING_STACK, _RUNS_EVERYTHING}) or any(
        _needs_torch(file) for file in helpers if file.is_file()
    )


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
    """A Triton server on this machine that serves every sample, and takes shared memory."""
    from runtime.server import ServerOptions, running_server
    from runtime.server.security import Security

    (repository,) = {exported(name).parent for name in NAMES}
    options = ServerOptions(security=Security(shared_memory=True))
    with running_server(repository, environment=server_environment, options=options) as server:
        yield server
