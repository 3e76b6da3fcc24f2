"""The public functions: torch.nn.functional's losses with torch's arguments, and a few that torch lacks.

Each one checks its arguments, chooses the result's dtype and hands over to :mod:`fusedloss.dispatch`.
Losses are in nats. Every function is differentiable with respect to the arguments that torch
differentiates, and takes ``dtype=`` for the result: ``dtype=torch.float32`` gives the unrounded loss of
half-precision inputs.
"""

import warnings
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import checks, reference
from .checks import given
from .dispatch import place, readable, run, run_short, small
from .divergence import entropy, entropy_with_logits, kl_div_with_logits
from .reference import BATCHMEAN, SUM

__all__ = [
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy", "entropy",
    "entropy_with_logits", "kl_div", "kl_div_with_logits", "nll_loss",
]  # fmt: skip


def _number(reduction: str, size_average: bool | None, reduce: bool | None) -> int:
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    return reference.MEAN if reduction == "mean" else _Reduction.get_enum(reduction)


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
    inplace: bool = False,
    grad_in_forward: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Binary cross entropy between logits and target probabilities, in nats.

    .. math:: l = w [ (1 - t) \log(1 + e^x) + p\, t \log(1 + e^{-x}) ]

    Computed in this form, which keeps its relative accuracy in both tails, where
    ``torch.nn.functional.binary_cross_entropy_with_logits`` cancels; the gradient is
    :math:`(1 - t) \sigma(x) - p\, t\, \sigma(-x)`.

    Args:
        input: logits :math:`x`.
        target: probabilities :math:`t`, hard or soft.
        weight: :math:`w`, which multiplies the loss of each element; broadcasts to the input.
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"mean"`` (over all elements) or ``"sum"``.
        pos_weight: :math:`p`, which multiplies the loss of positive targets; broadcasts to the input.
        label_smoothing: targets become ``t (1 - label_smoothing) + label_smoothing / 2``.
        inplace: let backward write the input's gradient over the input, which saves its memory: in eager
            code, for a contiguous input and a target that needs no gradient. The input's version then
            tells: autograd raises where its old values are needed. The reference never does it.
        grad_in_forward: as in :func:`cross_entropy`.
        dtype: of the result. Default: torch's, the target's dtype (float32 for half precision under
            autocast).

    Shape:
        ``input`` and ``target`` have one shape of any number of dimensions.

    Returns:
        The loss: one value, or with ``reduction="none"`` one an element. Differentiable with respect to
        ``input`` and ``target``.

    Raises:
        ValueError: for shapes that differ, an unknown reduction, ``label_smoothing`` outside [0, 1].
        RuntimeError: for a weight that does not broadcast or requires a gradient, an integer target,
            tensors on two devices.

    Example::

        loss = fusedloss.binary_cross_entropy_with_logits(model(x), labels, pos_weight=imbalance)
    """
    if has_torch_function_variadic(input, target, weight, pos_weight):
        return handle_torch_function(
            binary_cross_entropy_with_logits, (input, target, weight, pos_weight), input, target,
            weight=weight, size_average=size_average, reduce=reduce, reduction=reduction,
            pos_weight=pos_weight, **given(
                label_smoothing=label_smoothing, inplace=inplace, grad_in_forward=grad_in_forward, dtype=dtype
            ),
        )  # fmt: skip
    number = _number(reduction, size_average, reduce)
    if (
        weight is pos_weight is dtype is None
        and not (label_smoothing or inplace or grad_in_forward)
        and readable("BCEWithLogits", input, target)
    ):
        return run_short("BCEWithLogits", input, target, number)
    checks.bce_with_logits(input, target, weight, pos_weight, label_smoothing)
    result = target.dtype
    if dtype is not None or result is not torch.float32:
        result = checks.result_dtype(dtype, result, input)
    return run(
        "BCEWithLogits", reference.bce_with_logits,
        input, target, weight, pos_weight, label_smoothing, number,
        place(input, target, number, inplace, grad_in_forward), result,
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
    r"""Binary cross entropy between probabilities, in nats.

    .. math:: l = -w [ t \log x + (1 - t) \log(1 - x) ]

    Each logarithm is at least -100, as in ``torch.nn.functional.binary_cross_entropy``. From logits,
    :func:`binary_cross_entropy_with_logits` is the accurate form.

    Args:
        input: probabilities :math:`x` in [0, 1].
        target: probabilities :math:`t` in [0, 1], of the input's dtype.
        weight: :math:`w`, which multiplies the loss of each element; broadcasts to the input.
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"mean"`` (over all elements) or ``"sum"``.
        dtype: of the result. Default: torch's, the input's dtype (float32 for half precision under
            autocast on a CPU).

    Shape:
        ``input`` and ``target`` have one shape of any number of dimensions.

    Returns:
        The loss: one value, or with ``reduction="none"`` one an element. Differentiable with respect to
        ``input`` and ``target``.

    Raises:
        ValueError: for shapes that differ, an unknown reduction.
        RuntimeError: for dtypes that differ, a weight that does not broadcast or requires a gradient,
            autocast on a GPU; on the reference path for values outside [0, 1].

    Example::

        loss = fusedloss.binary_cross_entropy(probabilities, labels)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            binary_cross_entropy, (input, target, weight), input, target,
            weight=weight, size_average=size_average, reduce=reduce, reduction=reduction,
            **given(dtype=dtype),
        )  # fmt: skip
    number = _number(reduction, size_average, reduce)
    if dtype is None and small("BCE", input, target, weight) and target.size() == input.size():
        return reference.torch_bce(input, target, weight if weight is None else weight.expand_as(input), number)
    checks.bce(input, target, weight)
    result = input.dtype
    if dtype is not None or result is not torch.float32:
        result = checks.result_dtype(dtype, result, input)
    return run("BCE", reference.bce, input, target, weight, number, result)


@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ...,
    *, z_loss: float = ..., softcap: float | None = ..., return_z_loss: Literal[False] = ...,
    inplace: bool = ..., grad_in_forward: bool = ..., dtype: torch.dtype | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = ..., size_average: bool | None = ...,
    ignore_index: int = ..., reduce: bool | None = ..., reduction: str = ..., label_smoothing: float = ...,
    *, z_loss: float = ..., softcap: float | None = ..., return_z_loss: Literal[True],
    inplace: bool = ..., grad_in_forward: bool = ..., dtype: torch.dtype | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
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
    inplace: bool = False,
    grad_in_forward: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross entropy between logits and class indices or class probabilities, in nats.

    .. math::
        l = w_y (\mathrm{lse}(x) - x_y) \quad\text{or}\quad
        l = \sum_c w_c t_c (\mathrm{lse}(x) - x_c), \qquad \mathrm{lse}(x) = \log \sum_c e^{x_c}

    The definition of ``torch.nn.functional.cross_entropy``, with two terms that large language models
    train with: ``z_loss`` (ST-MoE, arXiv:2202.08906) and ``softcap`` (Gemma 2, arXiv:2408.00118).

    Args:
        input: logits :math:`x`, the class dimension being 1 (0 where there is one dimension).
        target: class indices (int64; uint8 for inputs of one or two dimensions), or probabilities
            :math:`t` of the input's shape.
        weight: :math:`w`, one value a class.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this index have no loss and no gradient, and do not count in a mean.
        reduction: ``"none"``, ``"mean"`` (weighted by :math:`w_y`, of rows that are not ignored) or
            ``"sum"``.
        label_smoothing: the share of each target that is spread evenly over the classes.
        z_loss: the factor of :math:`\mathrm{lse}(x)^2`, which is added to the loss of every row that is
            not ignored; a mean divides it by their plain number.
        softcap: logits become ``softcap * tanh(x / softcap)`` first; None leaves them.
        return_z_loss: return ``(loss, z term)``; the loss contains the term, the term has no gradient.
        inplace: let backward write the input's gradient over the input, which saves its memory: in eager
            code, for a contiguous input and a target that needs no gradient. The input's version then
            tells: autograd raises where its old values are needed. The reference never does it.
        grad_in_forward: compute the input's gradient in the forward kernel, while its rows are on the chip:
            loss and gradient then read the logits once. Forward allocates the gradient; backward hands it
            over, and multiplies it only where the upstream gradient is not 1; a second backward computes it
            again. For eager calls with a reduction and a target that needs no gradient; not for float16,
            whose gradients may need a scale before they are rounded. The reference never does it.
        dtype: of the result. Default: torch's, the input's dtype, promoted with that of probability
            targets and their weight (float32 for half precision under autocast).

    Shape:
        ``input`` (C), (N, C) or (N, C, d1, ...); ``target`` (), (N) or (N, d1, ...), or the input's shape.

    Returns:
        The loss: one value, or with ``reduction="none"`` one a row, in the shape of the indices.
        Differentiable with respect to ``input`` and, with probability targets, ``target`` and ``weight``.

    Raises:
        ValueError: for a batch size that differs, an unknown reduction, ``z_loss < 0``, ``softcap <= 0``.
        RuntimeError: for other shapes, a weight of another length or dtype, integer targets of another
            dtype, ``label_smoothing > 1``, tensors on two devices.
        IndexError: on the reference path, for an index outside [0, C). On the Triton path the row's loss
            and gradient are NaN.

    Example::

        loss = fusedloss.cross_entropy(logits, labels, ignore_index=-100, dtype=torch.float32)
        loss, z = fusedloss.cross_entropy(logits, labels, z_loss=1e-4, return_z_loss=True)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy, (input, target, weight), input, target,  # type: ignore[arg-type]
            weight=weight, size_average=size_average, ignore_index=ignore_index, reduce=reduce,
            reduction=reduction, label_smoothing=label_smoothing,
            **given(z_loss=z_loss, softcap=softcap, return_z_loss=return_z_loss, inplace=inplace,
                     grad_in_forward=grad_in_forward, dtype=dtype),
        )  # fmt: skip
    number = _number(reduction, size_average, reduce)
    dense = target if isinstance(target, Tensor) and target.is_floating_point() else None
    if softcap is dtype is None and not (z_loss or return_z_loss or inplace or grad_in_forward) and small(
        "CrossEntropy", input, weight, dense
    ):
        return reference.torch_cross_entropy(input, target, weight, number, ignore_index, label_smoothing)
    checks.cross_entropy(input, target, weight, ignore_index, label_smoothing, z_loss, softcap)
    result = input.dtype
    if dense is not None:
        result = torch.promote_types(result, target.dtype)
        if weight is not None:
            result = torch.promote_types(result, weight.dtype)
    elif input.dim() == 1 and target.dim() == 1:
        target = target.squeeze(0)  # one row, whose result has no dimensions
    if dtype is not None or result is not torch.float32:
        result = checks.result_dtype(dtype, result, input)
    outcome = run(
        "CrossEntropy", reference.cross_entropy,
        input, target, weight, ignore_index, label_smoothing, z_loss, softcap or 0.0, number,
        place(input, target, number, inplace, grad_in_forward), result,
    )  # fmt: skip
    loss, z = outcome if isinstance(outcome, tuple) else (outcome, None)
    if not return_z_loss:
        return loss
    return loss, torch.zeros_like(loss) if z is None else z


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
    """Negative log-likelihood of class indices under log-probabilities, in nats.

    .. math:: l = -w_y x_y

    The definition of ``torch.nn.functional.nll_loss``.

    Args:
        input: log-probabilities :math:`x`, the class dimension being 1 (0 where there is one dimension).
        target: class indices (int64; uint8 for inputs of one or two dimensions).
        weight: :math:`w`, one value a class.
        size_average, reduce: deprecated, as in torch.
        ignore_index: rows with this index have no loss and no gradient, and do not count in a mean.
        reduction: ``"none"``, ``"mean"`` (weighted by :math:`w_y`, of rows that are not ignored) or
            ``"sum"``.
        dtype: of the result. Default: torch's, the input's dtype (float32 for half precision under
            autocast).

    Shape:
        ``input`` (C), (N, C) or (N, C, d1, ...); ``target`` (), (N) or (N, d1, ...).

    Returns:
        The loss: one value, or with ``reduction="none"`` one a row. Differentiable with respect to
        ``input``.

    Raises:
        ValueError: for a batch size that differs, an unknown reduction.
        RuntimeError: for other shapes, a weight of another length or dtype or one that requires a
            gradient, targets of another dtype, tensors on two devices.
        IndexError: on the reference path, for an index outside [0, C). On the Triton path the row's loss
            and gradient are NaN.

    Example::

        loss = fusedloss.nll_loss(logits.log_softmax(-1), labels)
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            nll_loss, (input, target, weight), input, target,
            weight=weight, size_average=size_average, ignore_index=ignore_index, reduce=reduce,
            reduction=reduction, **given(dtype=dtype),
        )  # fmt: skip
    number = _number(reduction, size_average, reduce)
    if dtype is None and small("NLLLoss", input, weight):
        return reference.torch_nll_loss(input, target, weight, number, ignore_index)
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
    r"""Kullback-Leibler divergence KL(target || input) from log-probabilities, in nats.

    .. math:: l = t (\log t - x) \quad\text{or with log\_target}\quad l = e^t (t - x)

    The definition of ``torch.nn.functional.kl_div``; where :math:`t = 0` the loss is :math:`-t x`. From
    two sets of logits, :func:`kl_div_with_logits` needs no intermediate tensors.

    Args:
        input: log-probabilities :math:`x`.
        target: probabilities :math:`t`, or log-probabilities with ``log_target``.
        size_average, reduce: deprecated, as in torch.
        reduction: ``"none"``, ``"batchmean"`` (the sum divided by ``input.shape[0]``: the divergence),
            ``"sum"`` or ``"mean"`` (over all elements; warns, as in torch).
        log_target: whether the target is given as logarithms.
        dtype: of the result. Default: torch's, the promoted dtype of both (float32 for half precision
            under autocast).

    Shape:
        ``input`` and ``target`` broadcast to one shape.

    Returns:
        The loss: one value, or with ``reduction="none"`` one an element. Differentiable with respect to
        ``input`` and ``target``.

    Raises:
        ValueError: for an unknown reduction.
        RuntimeError: for shapes that do not broadcast, integer or complex tensors, tensors on two devices.

    Example::

        loss = fusedloss.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            kl_div, (input, target), input, target,
            size_average=size_average, reduce=reduce, reduction=reduction, log_target=log_target,
            **given(dtype=dtype),
        )  # fmt: skip
    batchmean = reduction == "batchmean"
    if size_average is not None or reduce is not None:
        number = _number(reduction, size_average, reduce)
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
    if dtype is None and small("KLDiv", input, target):
        loss = reference.torch_kl_div(input, target, number, log_target=log_target)
        return loss / input.shape[0] if batchmean else loss
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
