"""torch.nn's loss modules, computed by :mod:`fusedloss.functional`.

Each class is a subclass of torch's, with its constructor, buffers, state_dict and repr; the keywords
that torch lacks come after torch's arguments. Their defaults are class attributes too, so that a module
pickled by torch, or before a keyword existed, works.
"""

import torch
from torch import Tensor, nn

from . import functional as F

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "CrossEntropyLoss",
    "KLDivLoss",
    "KLDivWithLogitsLoss",
    "NLLLoss",
]


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """:class:`torch.nn.BCEWithLogitsLoss` on :func:`fusedloss.binary_cross_entropy_with_logits`.

    Args:
        weight, size_average, reduce, reduction, pos_weight: torch's.
        label_smoothing: targets become ``t (1 - label_smoothing) + label_smoothing / 2``.
        inplace: let backward write the gradient over the input.
        grad_in_forward: compute the gradient in the forward kernel.
        dtype: of the result; ``torch.float32`` gives the unrounded loss of half-precision inputs.
    """

    label_smoothing: float = 0.0
    inplace: bool = False
    grad_in_forward: bool = False
    dtype: torch.dtype | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        inplace: bool = False,
        grad_in_forward: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        self.label_smoothing, self.dtype = label_smoothing, dtype
        self.inplace, self.grad_in_forward = inplace, grad_in_forward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, None, None, self.reduction, self.pos_weight,
            label_smoothing=self.label_smoothing, inplace=self.inplace, grad_in_forward=self.grad_in_forward,
            dtype=self.dtype,
        )  # fmt: skip


class BCELoss(nn.BCELoss):
    """:class:`torch.nn.BCELoss` on :func:`fusedloss.binary_cross_entropy`; ``dtype`` is the result's."""

    dtype: torch.dtype | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        self.dtype = dtype

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(input, target, self.weight, None, None, self.reduction, dtype=self.dtype)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss` on :func:`fusedloss.cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: torch's.
        z_loss: the factor of ``lse^2``, which is added to the loss.
        softcap: logits become ``softcap tanh(x / softcap)``.
        return_z_loss: return ``(loss, z term)``.
        inplace: let backward write the gradient over the input.
        grad_in_forward: compute the gradient in the forward kernel.
        dtype: of the result; ``torch.float32`` gives the unrounded loss of half-precision inputs.
    """

    z_loss: float = 0.0
    softcap: float | None = None
    return_z_loss: bool = False
    inplace: bool = False
    grad_in_forward: bool = False
    dtype: torch.dtype | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_z_loss: bool = False,
        inplace: bool = False,
        grad_in_forward: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.return_z_loss = z_loss, softcap, return_z_loss
        self.inplace, self.grad_in_forward, self.dtype = inplace, grad_in_forward, dtype

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.cross_entropy(  # type: ignore[call-overload]
            input, target, self.weight, None, self.ignore_index, None, self.reduction, self.label_smoothing,
            z_loss=self.z_loss, softcap=self.softcap, return_z_loss=self.return_z_loss,
            inplace=self.inplace, grad_in_forward=self.grad_in_forward, dtype=self.dtype,
        )  # fmt: skip


class NLLLoss(nn.NLLLoss):
    """:class:`torch.nn.NLLLoss` on :func:`fusedloss.nll_loss`; ``dtype`` is the result's."""

    dtype: torch.dtype | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction)
        self.dtype = dtype

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(input, target, self.weight, None, self.ignore_index, None, self.reduction, dtype=self.dtype)


class KLDivLoss(nn.KLDivLoss):
    """:class:`torch.nn.KLDivLoss` on :func:`fusedloss.kl_div`; ``dtype`` is the result's."""

    dtype: torch.dtype | None = None

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size_average, reduce, reduction, log_target)
        self.dtype = dtype

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(input, target, None, None, self.reduction, self.log_target, dtype=self.dtype)


class KLDivWithLogitsLoss(nn.Module):
    """:func:`fusedloss.kl_div_with_logits` as a module, for distillation: ``loss(student, teacher)``."""

    def __init__(
        self,
        *,
        dim: int = -1,
        temperature: float = 1.0,
        reverse: bool = False,
        reduction: str = "batchmean",
        grad_in_forward: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.temperature, self.reverse = dim, temperature, reverse
        self.reduction, self.grad_in_forward, self.dtype = reduction, grad_in_forward, dtype

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.kl_div_with_logits(
            input, target,
            dim=self.dim, temperature=self.temperature, reverse=self.reverse,
            reduction=self.reduction, grad_in_forward=self.grad_in_forward, dtype=self.dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"dim={self.dim}, temperature={self.temperature}, reverse={self.reverse}"
