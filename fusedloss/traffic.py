"""The bytes that a call's torch operators read and write: what eager torch moves where nothing is fused.

Counted, not measured: each operator is taken to read the memory of every tensor that it is given once, and to write
that of every new or changed one once; views are free, and so is what an operator does inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _memory(t: Tensor) -> int:
    """Bytes that t covers: expanded dimensions count once."""
    elements = 1
    for size, stride in zip(t.shape, t.stride(), strict=True):
        elements *= size if stride else 1
    return elements * t.element_size()


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        returned = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        view = all(t.untyped_storage().data_ptr() in storages for t in returned) and not func._schema.is_mutable
        if not view and not func._schema.name.startswith("aten::empty"):
            self.bytes += sum(map(_memory, given)) + sum(map(_memory, returned))
        return result


def traffic(call: Callable[[], Any]) -> int:
    """The bytes of every operator that `call` runs, backward among them."""
    with _Traffic() as counted:
        call()
    return counted.bytes
