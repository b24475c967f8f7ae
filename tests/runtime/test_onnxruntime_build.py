"""The CPU and GPU builds of ONNX Runtime never share an environment; CUDA's libraries are loaded first."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.backends import onnxruntime_build, version_of_engine
from runtime.backends.onnxruntime_build import (
    import_onnxruntime,
    installed_builds,
    preload,
    require_cuda_build,
)
from runtime.errors import EngineError, MissingPackageError
from runtime.manifest import Engine

MODULE = """
__version__ = "1.31.1"
loads = []
class InferenceSession: pass
def get_available_providers(): return {providers}
def preload_dlls():
    loads.append("dlls")
    {preload}
"""
CPU = ["CPUExecutionProvider"]
CUDA = ["CUDAExecutionProvider", *CPU]

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Write distributions to an environment that has no other packages, and the module of the last."""
    site = tmp_path / "site-packages"
    site.mkdir()
    standard = [path for path in sys.path if "site-packages" not in path]
    monkeypatch.setattr(sys, "path", [str(site), *standard])
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    preload.cache_clear()

    def installed(*names: str, providers: list[str] = CPU, preload: str = "pass") -> Path:
        for name in names:
            info = site / f"{name.replace('-', '_')}-1.31.1.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")
        (site / "onnxruntime").mkdir()
        code = MODULE.format(providers=providers, preload=preload)
        (site / "onnxruntime" / "__init__.py").write_text(code)
        importlib.invalidate_caches()
        return site

    yield installed
    preload.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        del sys.modules[name]


def test_both_builds_at_once_are_refused_with_what_to_uninstall(install: Install) -> None:
    site = install("onnxruntime", "onnxruntime-gpu", providers=CUDA)
    assert set(installed_builds()) == {"onnxruntime", "onnxruntime-gpu"}
    for call in (import_onnxruntime, require_cuda_build, preload):
        with pytest.raises(EngineError) as caught:
            call()
        assert str(caught.value) == (
            f"onnxruntime and onnxruntime-gpu are both installed in {site.resolve() / 'onnxruntime'}, and "
            "have overwritten each other's files. Run: pip uninstall --yes onnxruntime onnxruntime-gpu && "
            "pip install 'babeltower[gpu]' (for CPUs only: pip install 'babeltower[cpu]')"
        )


def test_builds_in_folders_of_their_own_do_not_disturb_each_other(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install("onnxruntime-gpu", providers=CUDA)
    other = tmp_path / "system"
    other.mkdir()
    shutil.copytree(site / "onnxruntime_gpu-1.31.1.dist-info", other / "onnxruntime-1.31.1.dist-info")
    (other / "onnxruntime-1.31.1.dist-info" / "METADATA").write_text("Name: onnxruntime\nVersion: 1.31.1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(other)])
    assert set(installed_builds()) == {"onnxruntime", "onnxruntime-gpu"}
    assert require_cuda_build().get_available_providers() == CUDA


def test_no_build_names_both_extras(install: Install) -> None:
    with pytest.raises(MissingPackageError) as caught:
        import_onnxruntime()
    assert str(caught.value) == (
        "Running an ONNX file needs onnxruntime, which is not installed. Run: pip install 'babeltower[cpu]', "
        "or with an NVIDIA GPU: pip install 'babeltower[gpu]'"
    )
    with pytest.raises(MissingPackageError, match=r"onnxruntime-gpu.*not installed.*'babeltower\[gpu\]'"):
        require_cuda_build()


def test_a_cpu_build_does_not_stand_in_for_cuda(install: Install) -> None:
    install("onnxruntime")
    assert import_onnxruntime().get_available_providers() == CPU
    remedy = r"pip uninstall --yes onnxruntime && pip install 'babeltower\[gpu\]'"
    expected = rf"onnxruntime 1\.31\.1 has no CUDA.*{remedy}"
    for call in (require_cuda_build, preload):
        with pytest.raises(MissingPackageError, match=expected):
            call()


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "half"])
def test_files_that_another_build_took_along_are_missed(install: Install, left: str) -> None:
    module = install("onnxruntime-gpu", providers=CUDA) / "onnxruntime"
    if left == "nothing":
        shutil.rmtree(module)
    elif left == "half":
        (module / "__init__.py").write_text("from onnxruntime.capi import onnxruntime_validation\n")
    else:
        (module / "__init__.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(
        EngineError, match=r"missing, as after uninstalling.*uninstall --yes onnxruntime-gpu &&"
    ):
        import_onnxruntime()


def test_cuda_libraries_are_loaded_once(install: Install) -> None:
    install("onnxruntime-gpu", providers=CUDA)
    assert preload() is preload()
    assert preload().loads == ["dlls"]


def test_a_cuda_library_that_does_not_load_is_named(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = "Failed to load libcublas.so.13: no such file"
    install("onnxruntime-gpu", providers=CUDA, preload=f"print({failure!r}); print('Please follow …')")
    with pytest.raises(
        MissingPackageError, match=r"1\.31\.1 are incomplete: Failed to load libcublas\.so\.13"
    ):
        preload()
    assert capsys.readouterr().out == ""


def test_the_backend_asks_before_it_imports() -> None:
    backend = importlib.import_module("runtime.backends.onnxruntime")
    assert backend.import_onnxruntime is onnxruntime_build.import_onnxruntime


@pytest.mark.parametrize("engine", [Engine.CUDA, Engine.ONNXRUNTIME])
def test_the_version_is_that_of_the_build_which_runs(engine: Engine, install: Install) -> None:
    """The distribution for CPUs is beside it, in a folder that is searched later."""
    module = install("onnxruntime", providers=CUDA) / "onnxruntime" / "__init__.py"
    module.write_text(module.read_text().replace("1.31.1", "7.8.9"))
    assert version_of_engine(engine) == "7.8.9"


def test_a_build_that_cannot_load_cudas_libraries_is_too_old(install: Install) -> None:
    site = install("onnxruntime-gpu", providers=CUDA)
    module = site / "onnxruntime" / "__init__.py"
    module.write_text(module.read_text().replace("def preload_dlls():", "def _unused():"))
    with pytest.raises(MissingPackageError, match=r"needs onnxruntime-gpu 1\.28 or newer; 1"):
        preload()
