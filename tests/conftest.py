"""What several test files share: the sample checkpoints, exported once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_models import CHECKPOINTS, Exported


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
