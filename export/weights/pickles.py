"""Read tensors from torch's pickled files (``.bin``, ``.pt``, ``.pth``, ``.ckpt``) without running code.

A training checkpoint holds more than weights: hyperparameters as OmegaConf objects, optimiser and callback
states, paths of another machine. torch's ``weights_only`` rejects such a file completely. Here, every name
except torch's few tensor constructors is replaced with an inert placeholder: it is never imported, and
calling it gives an object without behaviour. A file that names a function of the operating system is
rejected.
"""

from __future__ import annotations

import collections
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from runtime.errors import CheckpointError

__all__ = ["Unread", "objects_from_torch_file"]

_HARMFUL_MODULES = frozenset(
    {
        "os",
        "posix",
        "nt",
        "subprocess",
        "pty",
        "socket",
        "shutil",
        "sys",
        "runpy",
        "importlib",
        "ctypes",
        "webbrowser",
        "commands",
        "code",
        "pdb",
    }
)
_HARMFUL_BUILTINS = frozenset(
    {
        "eval",
        "exec",
        "execfile",
        "compile",
        "open",
        "__import__",
        "breakpoint",
        "input",
    }
)


class _HarmfulNameError(pickle.UnpicklingError):
    """Raised if a pickle names a function that accesses the operating system or the interpreter."""


class Unread:
    """Placeholder of an object that is not built; it accepts any call, item and state, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Unread:
        """Accept any arguments that ``pickle`` passes."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Unread:
        """Return itself when called as a function."""
        return self

    def append(self, item: Any) -> None:
        """Ignore an item of an unread list."""

    def extend(self, items: Any) -> None:
        """Ignore items of an unread list."""

    def add(self, item: Any) -> None:
        """Ignore an item of an unread set."""


class _Constructor:
    """Function that rebuilds a tensor; immutable, so that no pickle can change it."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes a function of torch")

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without a storage")
    rebuild: Any = torch._utils._rebuild_tensor
    rebuilt: Tensor = rebuild(storage, offset, size, stride)
    return rebuilt


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _subclass(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    return function(*args) if isinstance(function, _Constructor) else Unread()


_CONSTRUCTORS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _Constructor(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Constructor(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Constructor(
        lambda storage, offset, size, stride, grad, hooks, dtype, *_: _tensor(
            storage, offset, size, stride
        ).view(dtype)
    ),
    ("torch._utils", "_rebuild_parameter"): _Constructor(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Constructor(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Constructor(_subclass),
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _Constructor(lambda name: torch.strided),
}


def objects_from_torch_file(path: Path) -> Any:
    """Read a ``torch.save`` file: tensors on the CPU, and ``Unread`` for every other object.

    Raises:
        CheckpointError: the file is not a torch pickle, would run code, or is truncated.
    """
    _refuse_archives(path)
    met: list[str] = []
    try:
        return torch.load(
            path,
            map_location="cpu",
            weights_only=False,  # the restricted unpickler replaces torch's list of allowed names
            pickle_module=_restricted_pickle(met),
            mmap=_is_zip(path),
        )
    except MemoryError:
        raise
    except _HarmfulNameError as error:
        raise CheckpointError(
            f"{path} is a pickle that would run code when loaded ({error}), which is refused. "
            "Do not load it with torch either; get the weights as safetensors from their author."
        ) from error
    except Exception as error:  # a damaged pickle may raise any exception
        short = isinstance(error, EOFError) or any(word in str(error) for word in ("truncated", "EOF"))
        if short or not (met or isinstance(error, pickle.UnpicklingError)):
            raise CheckpointError(
                f"{path} ({path.stat().st_size:,} bytes) cannot be read: {_first_line(error)}. "
                "The file is cut short or corrupt: copy it again."
            ) from error
        named = f"{_first_line(error)}; it names {met[0]}" if met else _first_line(error)
        raise CheckpointError(
            f"{path} is corrupt, or a pickle that would run code when loaded, which is refused "
            f"({named}). Copy it again, or convert it to safetensors if you trust it."
        ) from error


def _restricted_pickle(met: list[str]) -> Any:
    """Create a restricted replacement of the ``pickle`` module, with the parts that ``torch.load`` uses."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = _global(module, name)
            if isinstance(found, type) and issubclass(found, Unread):
                met.append(f"{module}.{name}")
            return found

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "persistent_load":  # only storages: "module" would make torch read source files
                value = _storages_only(value)
            super().__setattr__(name, value)

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load, __name__="restricted pickle")


def _storages_only(persistent_load: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def load(saved_id: Any) -> Any:
        kind = saved_id[0] if isinstance(saved_id, tuple) and saved_id else None
        if kind not in ("storage", b"storage"):
            raise pickle.UnpicklingError(f"a whole module was pickled, not its weights ({kind!r})")
        return persistent_load(saved_id)

    return load


def _global(module: str, name: str) -> Any:
    if (module, name) in _CONSTRUCTORS:
        return _CONSTRUCTORS[module, name]
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if module in ("torch", "torch.storage") and name.endswith("Storage"):
        # torch's own reader resolves typed storages before this call.
        return torch.storage.UntypedStorage if name == "UntypedStorage" else torch.storage.TypedStorage
    root = module.partition(".")[0]
    builtin = root in ("builtins", "__builtin__") and name.partition(".")[0] in _HARMFUL_BUILTINS
    if root in _HARMFUL_MODULES or builtin:
        raise _HarmfulNameError(f"{module}.{name}")
    return type(name.rpartition(".")[2] or "Unread", (Unread,), {"__module__": "unread." + module})


def _refuse_archives(path: Path) -> None:
    """Reject archives that ``torch.load`` would pass to other readers.

    Raises:
        CheckpointError: TorchScript, a tar archive (torch 0.1 wrote those), or a damaged zip.
    """
    if not _is_zip(path):
        if tarfile.is_tarfile(path):
            raise CheckpointError(
                f"{path} is a tar archive, not a torch.save file. Unpack it and pass the folder."
            )
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read: {_first_line(error)}. "
            "The file is cut short or corrupt: copy it again."
        ) from error
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript program, not weights. Save its state_dict with torch.save, and "
            "pass that file."
        )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
