"""Adoption without edits: our functions and modules in the place of torch's."""

import copyreg
import sys
from typing import Any

import torch

from . import functional, nn

FUNCTIONS = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "kl_div",
    "nll_loss",
)
MODULES = ("BCELoss", "BCEWithLogitsLoss", "CrossEntropyLoss", "KLDivLoss", "NLLLoss")

_TORCH: dict[str, Any] = {name: getattr(torch.nn.functional, name) for name in FUNCTIONS}
_TORCH |= {name: getattr(torch.nn.modules.loss, name) for name in MODULES}
_OURS: dict[str, Any] = {name: getattr(functional, name) for name in FUNCTIONS}
_OURS |= {name: getattr(nn, name) for name in MODULES}


class patch_torch:
    """Put fusedloss's functions and modules in the place of torch's, at once; or inside a `with` block.

    The names are replaced in ``torch.nn.functional``, ``torch.nn``, ``torch.nn.modules.loss`` and every
    other module of torch that holds them. Names that a program imported before (``from torch.nn import
    CrossEntropyLoss``) stay torch's, but modules made from them compute with fusedloss all the same,
    since they call ``torch.nn.functional``.

    Modules made in either state can be pickled, copied and loaded in either state. A second call changes
    nothing; leaving the `with` block, or :func:`unpatch_torch`, restores torch's names.

    Example::

        fusedloss.patch_torch()            # from here on

        with fusedloss.patch_torch():      # or for a while
            train(model)
    """

    def __init__(self) -> None:
        self._was_patched = is_patched()
        _swap(_TORCH, _OURS)
        for name in MODULES:  # pickle looks a class up by its name, which now finds ours
            copyreg.pickle(_TORCH[name], _reduce)

    def __enter__(self) -> "patch_torch":
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._was_patched:
            unpatch_torch()


def unpatch_torch() -> None:
    """Undo :class:`patch_torch`: torch's own functions and modules are back under their names."""
    _swap(_OURS, _TORCH)
    for name in MODULES:
        copyreg.dispatch_table.pop(_TORCH[name], None)


def is_patched() -> bool:
    return torch.nn.functional.cross_entropy is functional.cross_entropy


def _swap(old: dict[str, Any], new: dict[str, Any]) -> None:
    for module_name, module in list(sys.modules.items()):
        if module_name != "torch" and not module_name.startswith("torch."):
            continue
        names = getattr(module, "__dict__", {})
        for name, value in old.items():
            if names.get(name) is value:
                setattr(module, name, new[name])


def _new(name: str) -> Any:
    """An empty instance of torch's own class."""
    return _TORCH[name].__new__(_TORCH[name])


def _reduce(module: Any) -> tuple[Any, tuple[str], dict[str, Any]]:
    return _new, (type(module).__name__,), module.__dict__
