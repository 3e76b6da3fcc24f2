"""The public functions: torch.nn.functional's losses with torch's arguments, and a few that torch lacks.

Each one checks its arguments, chooses the result's dtype and hands over to :mod:`fusedloss.dispatch`.
Losses are in nats. Every function is differentiable with respect to the arguments that torch
differentiates, and takes ``dtype=`` for the result: ``dtype=torch.float32`` gives the unrounded loss of
half-precision inputs.
"""

import warnings
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import checks, reference
from .dispatch import run
from .reference import BATCHMEAN, NONE, SUM

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "entropy",
    "entropy_with_logits",
    "kl_div",
    "kl_div_with_logits",
    "nll_loss",
]


def _given(**extras: Any) -> dict[str, Any]:
    """The keywords that torch's function has not, where the caller used them: an override knows torch's."""
    return {name: value for name, value in extras.items() if value not in (None, False, 0.0)}


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return handle_torch_function(
            binary_cross_entropy_with_logits, (input, target, weight, pos_weight), input, target,
            weight=weight, size_average=size_average, reduce=reduce, reduction=reduction,
            pos_weight=pos_weight, **_given(label_smoothing=label_smoothing, dtype=dtype),
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    number = _Reduction.get_enum(reduction)
    checks.bce_with_logits(input, target, weight, pos_weight, label_smoothing)
    result = target.dtype
    if dtype is not None or result is not torch.float32:
        result = checks.result_dtype(dtype, result, input)
    if weight is not None:
        weight = weight.expand_as(input)
    if pos_weight is not None:
        pos_weight = pos_weight.expand_as(input)
    return run(
        "BCEWithLogits", reference.bce_with_logits,
        input, target, weight, pos_weight, label_smoothing, number, result,
    )  # fmt: skip


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            binary_cross_entropy, (input, target, weight), input, target,
            weight=weight, size_average=size_average, reduce=reduce, reduction=reduction,
            **_given(dtype=dtype),
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    number = _Reduction.get_enum(reduction)
    checks.bce(input, target, weight)
    result = input.dtype
    if dtype is not None or result is not torch.float32:
        result = checks.result_dtype(dtype, result, input)
    if weight is not None:
        weight = weight.expand_as(input)
    return run("BCE", reference.bce, input, target, weight, number, result)


@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float | None = ...,
    return_z_loss: Literal[False] = ...,
    dtype: torch.dtype | None = ...,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = ...,
    size_average: bool | None = ...,
    ignore_index: int = ...,
    reduce: bool | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    *,
    z_loss: float = ...,
    softcap: float | None = ...,
    return_z_loss: bool,
    dtype: torch.dtype | None = ...,
) -> Any: ...
def cross_entropy(
    input: Tensor,
    target: Tensor,
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
    dtype: torch.dtype | None = None,
) -> Any:
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target,
            weight=weight, size_average=size_average, ignore_index=ignore_index, reduce=reduce,
            reduction=reduction, label_smoothing=label_smoothing,
            **_given(z_loss=z_loss, softcap=softcap, return_z_loss=return_z_loss, dtype=dtype),
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    number = _Reduction.get_enum(reduction)
    checks.cross_entropy(input, target, weight, ignore_index, label_smoothing, z_loss, softcap)
    result = input.dtype
    if target.is_floating_point():
        result = torch.promote_types(result, target.dtype)
        if weight is not None:
            result = torch.promote_types(result, weight.dtype)
    elif input.dim() == 1 and target.dim() == 1:
        target = target.squeeze(0)  # one row, whose result has no dimensions
    if dtype is not None or result is not torch.float32:
        result = checks.result_dtype(dtype, result, input)
    loss, z = run(
        "CrossEntropy", reference.cross_entropy,
        input, target, weight, ignore_index, label_smoothing, z_loss, softcap or 0.0, number, result,
    )  # fmt: skip
    if not return_z_loss:
        return loss
    return loss, torch.zeros_like(loss, requires_grad=False) if z is None else z


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            nll_loss, (input, target, weight), input, target,
            weight=weight, size_average=size_average, ignore_index=ignore_index, reduce=reduce,
            reduction=reduction, **_given(dtype=dtype),
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    number = _Reduction.get_enum(reduction)
    checks.nll_loss(input, target, weight, ignore_index)
    result = input.dtype
    if dtype is not None or result is not torch.float32:
        result = checks.result_dtype(dtype, result, input)
    if input.dim() == 1 and target.dim() == 1:
        target = target.squeeze(0)  # one row, whose result has no dimensions
    return run("NLLLoss", reference.nll_loss, input, target, weight, ignore_index, number, result)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            kl_div, (input, target), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction, log_target=log_target,
            **_given(dtype=dtype),
        )  # fmt: skip
    batchmean = reduction == "batchmean"
    if size_average is not None or reduce is not None:
        number = _Reduction.get_enum(_Reduction.legacy_get_string(size_average, reduce))
    elif batchmean:
        number = SUM
    else:
        if reduction == "mean":
            warnings.warn(
                "reduction: 'mean' divides the total loss by both the batch size and the support size."
                "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
                "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
                stacklevel=2,
            )
        number = _Reduction.get_enum(reduction)
    checks.kl_div(input, target)
    result = input.dtype
    if result is not target.dtype:
        result = torch.promote_types(result, target.dtype)
    if dtype is not None or result is not torch.float32:
        result = checks.result_dtype(dtype, result, input)
    batch = input.shape[0] if batchmean and input.dim() else None
    if input.shape != target.shape:
        input, target = torch.broadcast_tensors(input, target)
    elif batch is not None and number == SUM:
        number, batch = BATCHMEAN, None
    loss = run("KLDiv", reference.kl_div, input, target, log_target, number, result)
    return loss if batch is None else loss / batch


def kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    reverse: bool = False,
    reduction: str = "batchmean",
    dtype: torch.dtype | None = None,
) -> Tensor:
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            kl_div_with_logits, (input, target), input, target,
            dim=dim, temperature=temperature, reverse=reverse, reduction=reduction, **_given(dtype=dtype),
        )  # fmt: skip
    number = BATCHMEAN if reduction == "batchmean" else _Reduction.get_enum(reduction)
    dim = checks.kl_div_with_logits(input, target, dim, temperature)
    result = checks.result_dtype(dtype, torch.promote_types(input.dtype, target.dtype), input)
    arguments = (input, target, dim, temperature, reverse, number, result)
    if number == NONE:  # one value an element is no fusion: nothing is saved over the composition
        return reference.kl_div_with_logits(*arguments)
    return run("KLDivWithLogits", reference.kl_div_with_logits, *arguments)


def entropy(
    input: Tensor, *, dim: int = -1, reduction: str = "none", dtype: torch.dtype | None = None
) -> Tensor:
    if has_torch_function_variadic(input):
        return handle_torch_function(
            entropy, (input,), input, dim=dim, reduction=reduction, **_given(dtype=dtype)
        )
    number = _Reduction.get_enum(reduction)
    dim = checks.class_dim("entropy", input, dim)
    return run(
        "Entropy", reference.entropy, input, dim, number, checks.result_dtype(dtype, input.dtype, input)
    )


def entropy_with_logits(
    input: Tensor, *, dim: int = -1, reduction: str = "none", dtype: torch.dtype | None = None
) -> Tensor:
    if has_torch_function_variadic(input):
        return handle_torch_function(
            entropy_with_logits, (input,), input, dim=dim, reduction=reduction, **_given(dtype=dtype)
        )
    number = _Reduction.get_enum(reduction)
    dim = checks.class_dim("entropy_with_logits", input, dim)
    result = checks.result_dtype(dtype, input.dtype, input)
    return run("EntropyWithLogits", reference.entropy_with_logits, input, dim, number, result)
