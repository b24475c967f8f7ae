"""PyTorch mode that computes every operation in float64, regardless of a module's dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["in_double"]

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def in_double() -> Iterator[None]:
    """Compute in float64: upcast the float tensors of every operation, and replace narrower dtypes.

    Modules are not modified: each weight is upcast, without loss, only for the operation that uses it, so a
    tower is never in memory twice. Explicit casts to float32 also become float64.
    """
    with torch.no_grad(), _AlikeArguments(), _WidenedOperations():  # type: ignore[no-untyped-call]
        yield


class _WidenedOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that runs each ATen operation in float64."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default:  # look up first, so that only the rows are upcast
            return _widened(func(*args, **kwargs))
        return tree_map(_widened, func(*tree_map(_widened, tuple(args)), **tree_map(_widened, kwargs)))


class _AlikeArguments(TorchFunctionMode):
    """Function mode that upcasts mixed arguments early, since some functions check dtypes before dispatch."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((tuple(args), kwargs))
        if any(isinstance(leaf, Tensor) and leaf.dtype is torch.float64 for leaf in leaves):
            args, kwargs = tree_map(_widened, tuple(args)), tree_map(_widened, kwargs)
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.to(torch.float64)
    return value
