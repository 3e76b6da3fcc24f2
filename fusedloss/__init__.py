"""torch's loss functions as fused Triton kernels, forward and backward: a drop-in.

``fusedloss.cross_entropy`` stands where ``torch.nn.functional.cross_entropy`` stood, and
``fusedloss.CrossEntropyLoss`` where ``torch.nn.CrossEntropyLoss`` did; ``fusedloss.patch_torch()`` swaps
all of them at once. Importing needs neither a GPU nor Triton.
"""

from typing import Any

from . import functional, nn
from .dispatch import path, use
from .functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    entropy,
    entropy_with_logits,
    kl_div,
    kl_div_with_logits,
    nll_loss,
)
from .nn import BCELoss, BCEWithLogitsLoss, CrossEntropyLoss, KLDivLoss, KLDivWithLogitsLoss, NLLLoss
from .patch import patch_torch, unpatch_torch

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "KLDivWithLogitsLoss",
    "NLLLoss",
    "__version__",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "entropy",
    "entropy_with_logits",
    "functional",
    "kl_div",
    "kl_div_with_logits",
    "nll_loss",
    "nn",
    "patch_torch",
    "path",
    "unpatch_torch",
    "use",
]

__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":  # importlib.metadata is slow to import
        from importlib.metadata import version

        globals()[name] = version("fusedloss")
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
