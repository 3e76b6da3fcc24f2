"""Public functions that torch has not: the divergence of two sets of logits, and entropies, in nats."""

from math import isfinite

import torch
from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import checks, reference, short
from .checks import given
from .dispatch import place, readable, run, run_short
from .reference import BATCHMEAN, NONE


def kl_div_with_logits(
    input: Tensor,
    target: Tensor,
    *,
    dim: int = -1,
    temperature: float = 1.0,
    reverse: bool = False,
    reduction: str = "batchmean",
    grad_in_forward: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence between the softmax of two sets of logits, in nats: for distillation.

    .. math::
        l = T^2 \sum_c p_c (\log p_c - \log q_c), \quad
        p = \mathrm{softmax}(\mathrm{target} / T),\; q = \mathrm{softmax}(\mathrm{input} / T)

    The factor :math:`T^2` keeps the gradient's size independent of the temperature (Hinton et al.,
    arXiv:1503.02531). A class with :math:`p_c = 0` adds nothing, even where :math:`q_c = 0` too.

    Args:
        input: the student's logits.
        target: the teacher's logits; detach them, or run the teacher under no_grad, if it is not trained.
        dim: the class dimension.
        temperature: :math:`T`.
        reverse: compute KL(input || target) instead of KL(target || input).
        reduction: ``"batchmean"`` (the sum divided by ``input.shape[0]``), ``"sum"``, ``"mean"`` (over all
            elements) or ``"none"`` (one value an element, computed by the reference).
        grad_in_forward: as in :func:`cross_entropy`.
        dtype: of the result. Default: the promoted dtype of both (float32 for half precision under
            autocast).

    Shape:
        ``input`` and ``target`` have one shape.

    Returns:
        The loss. Differentiable with respect to ``input`` and ``target``.

    Raises:
        TypeError: for tensors that are not of a floating point dtype.
        ValueError: for shapes that differ, an unknown reduction, a temperature that is not positive.
        IndexError: for a dimension out of range.

    Example::

        loss = fusedloss.kl_div_with_logits(student(x), teacher(x).detach(), temperature=2.0)
    """
    if has_torch_function_variadic(input, target):
        return handle_torch_function(
            kl_div_with_logits, (input, target), input, target,
            dim=dim, temperature=temperature, reverse=reverse, reduction=reduction,
            **given(grad_in_forward=grad_in_forward, dtype=dtype),
        )  # fmt: skip
    number = BATCHMEAN if reduction == "batchmean" else _Reduction.get_enum(reduction)
    if (
        dtype is None
        and number != NONE
        and type(temperature) in (float, int)
        and temperature > 0.0
        and not grad_in_forward
        and readable("KLDivWithLogits", input, target)
        and type(dim) is int
    ):
        loss = short.kl_div_with_logits(input, target, dim, temperature, reverse, number)
        if isfinite(loss.item()):
            return loss
    dim = checks.kl_div_with_logits(input, target, dim, temperature)
    result = checks.result_dtype(dtype, torch.promote_types(input.dtype, target.dtype), input)
    where = place(input, target, number, False, grad_in_forward)
    arguments = (input, target, dim, temperature, reverse, number, where, result)
    if number == NONE:  # one value an element is no fusion: nothing is saved over the composition
        return reference.kl_div_with_logits(*arguments)
    return run("KLDivWithLogits", reference.kl_div_with_logits, *arguments)


def entropy(input: Tensor, *, dim: int = -1, reduction: str = "none", dtype: torch.dtype | None = None) -> Tensor:
    r"""Entropy of probabilities, in nats.

    .. math:: H(p) = -\sum_c p_c \log p_c

    With :math:`0 \log 0 = 0`, and the gradient of ``torch.special.entr``.

    Args:
        input: probabilities :math:`p`.
        dim: the class dimension.
        reduction: ``"none"`` (one value a row), ``"mean"`` or ``"sum"`` over the rows.
        dtype: of the result. Default: the input's (float32 for half precision under autocast).

    Shape:
        ``input`` of any shape; the result lacks ``dim``.

    Returns:
        The entropy. Differentiable with respect to ``input``.

    Raises:
        TypeError: for a tensor that is not of a floating point dtype.
        ValueError: for an unknown reduction.
        IndexError: for a dimension out of range.

    Example::

        bonus = fusedloss.entropy(policy, reduction="mean")
    """
    if has_torch_function_variadic(input):
        return handle_torch_function(entropy, (input,), input, dim=dim, reduction=reduction, **given(dtype=dtype))
    number = _Reduction.get_enum(reduction)
    dim = checks.class_dim("entropy", input, dim)
    return run("Entropy", reference.entropy, input, dim, number, checks.result_dtype(dtype, input.dtype, input))


def entropy_with_logits(
    input: Tensor,
    *,
    dim: int = -1,
    reduction: str = "none",
    grad_in_forward: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Entropy of the softmax of logits, in nats.

    .. math:: H(x) = \mathrm{lse}(x) - \sum_c \mathrm{softmax}(x)_c\, x_c

    Args:
        input: logits :math:`x`; a class of -inf has probability 0 and adds nothing.
        dim: the class dimension.
        reduction: ``"none"`` (one value a row), ``"mean"`` or ``"sum"`` over the rows.
        grad_in_forward: as in :func:`cross_entropy`.
        dtype: of the result. Default: the input's (float32 for half precision under autocast).

    Shape:
        ``input`` of any shape; the result lacks ``dim``.

    Returns:
        The entropy. Differentiable with respect to ``input``.

    Raises:
        TypeError: for a tensor that is not of a floating point dtype.
        ValueError: for an unknown reduction.
        IndexError: for a dimension out of range.

    Example::

        bonus = fusedloss.entropy_with_logits(logits, reduction="mean")
    """
    if has_torch_function_variadic(input):
        return handle_torch_function(
            entropy_with_logits, (input,), input, dim=dim, reduction=reduction,
            **given(grad_in_forward=grad_in_forward, dtype=dtype),
        )  # fmt: skip
    number = _Reduction.get_enum(reduction)
    if (
        dtype is None
        and not grad_in_forward
        and readable("EntropyWithLogits", input)
        and type(dim) is int
    ):
        loss = run_short("EntropyWithLogits", input, None, dim, number)
        if isfinite((loss.detach().sum() if number == NONE else loss).item()):
            return loss
    dim = checks.class_dim("entropy_with_logits", input, dim)
    where = place(input, None, number, False, grad_in_forward)
    result = checks.result_dtype(dtype, input.dtype, input)
    return run("EntropyWithLogits", reference.entropy_with_logits, input, dim, number, where, result)
