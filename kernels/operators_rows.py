"""The operators of nll_loss, kl_div_with_logits and entropy_with_logits."""

from __future__ import annotations

import torch

from .operators import NONE, _gradients, _rows_shape, operator


@operator(
    "nll_loss",
    "nll_loss_forward(Tensor x, Tensor target, Tensor? weight, int ignore_index, int reduction,"
    " ScalarType dtype) -> (Tensor loss, Tensor scale)",
)
def nll_loss_forward(x, target, weight, ignore_index, reduction, dtype):
    """The loss, and for backward the mean's factor."""
    shape = _rows_shape(x, min(1, x.dim() - 1)) if reduction == NONE else ()
    return x.new_empty(shape, dtype=dtype), x.new_empty(2, dtype=torch.float32)


@operator(
    "nll_loss",
    "nll_loss_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor scale,"
    " int ignore_index, int reduction) -> Tensor",
)
def nll_loss_backward(dloss, x, target, weight, scale, ignore_index, reduction):
    return torch.empty_like(x)


@operator(
    "kl_div_with_logits",
    "kl_div_with_logits_forward(Tensor x, Tensor target, int dim, float temperature, bool reverse,"
    " int reduction, ScalarType dtype) -> (Tensor loss, Tensor stats)",
)
def kl_div_with_logits_forward(x, target, dim, temperature, reverse, reduction, dtype):
    stats = x.new_empty([5, *_rows_shape(x, dim)], dtype=torch.float32)
    return x.new_empty((), dtype=dtype), stats


@operator(
    "kl_div_with_logits",
    "kl_div_with_logits_backward(Tensor dloss, Tensor x, Tensor target, Tensor stats, int dim,"
    " float temperature, bool reverse, int reduction, bool input_grad, bool target_grad)"
    " -> (Tensor, Tensor)",
)
def kl_div_with_logits_backward(
    dloss, x, target, stats, dim, temperature, reverse, reduction, input_grad, target_grad
):
    return _gradients(x, target, input_grad, target_grad)


@operator(
    "entropy_with_logits",
    "entropy_with_logits_forward(Tensor x, int dim, int reduction, ScalarType dtype)"
    " -> (Tensor loss, Tensor stats)",
)
def entropy_with_logits_forward(x, dim, reduction, dtype):
    rows = _rows_shape(x, dim)
    loss = x.new_empty(rows if reduction == NONE else (), dtype=dtype)
    return loss, x.new_empty([3, *rows], dtype=torch.float32)


@operator(
    "entropy_with_logits",
    "entropy_with_logits_backward(Tensor dloss, Tensor x, Tensor stats, int dim, int reduction) -> Tensor",
)
def entropy_with_logits_backward(dloss, x, stats, dim, reduction):
    return torch.empty_like(x)
