"""A mode of PyTorch under which everything is computed in float64, whatever a module asks for."""

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
    """Widen the float tensors of every operation to float64, and read any narrower dtype as float64.

    A module stays as it is: each weight is widened, without loss, for the one operation that takes it, and no
    tower has to fit into memory twice. Explicit casts to float32 are computed in float64 too.
    """
    with torch.no_grad(), _AlikeArguments(), _WidenedOperations():  # type: ignore[no-untyped-call]
        yield


class _WidenedOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs each of PyTorch's own operations in float64."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.embedding.default:  # a table is looked up in before it is widened
            return _widened(func(*args, **kwargs))
        return tree_map(_widened, func(*tree_map(_widened, tuple(args)), **tree_map(_widened, kwargs)))


class _AlikeArguments(TorchFunctionMode):
    """Widens narrow arguments beside wide ones early: some functions compare dtypes before they run."""

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
