"""Entropy of probabilities, and of the softmax of logits."""

from __future__ import annotations

import torch

from fusedloss import reference
from fusedloss.kernels import operators
from fusedloss.reference import FORWARD

from .gradient import gradients, handed_over


class Entropy(torch.autograd.Function):
    """Saved for backward: the probabilities."""

    @staticmethod
    def forward(ctx, p, dim, reduction, dtype):
        ctx.save_for_backward(p)
        ctx.options = dim, reduction
        ctx.dtype = dtype
        return operators.entropy_forward(p, dim, reduction, dtype)

    @staticmethod
    def backward(ctx, dloss):
        (p,) = ctx.saved_tensors

        def launch(dloss):
            return (operators.entropy_backward(dloss, p, *ctx.options),)

        def composed(p, _):
            return reference.entropy(p, *ctx.options, ctx.dtype)

        return *gradients(launch, composed, dloss, p), None, None, None


class EntropyWithLogits(torch.autograd.Function):
    """Saved for backward: the logits, three numbers a row; and the gradient, where forward was to compute it."""

    @staticmethod
    def forward(ctx, x, dim, reduction, place, dtype):
        if place == FORWARD:
            loss, rows, ctx.dx = operators.entropy_with_logits_forward_grad(x, dim, reduction, dtype)
        else:
            loss, rows = operators.entropy_with_logits_forward(x, dim, reduction, dtype)
        ctx.save_for_backward(x, rows)
        ctx.options = dim, reduction
        ctx.place, ctx.dtype = place, dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, rows = ctx.saved_tensors

        def launch(dloss):
            if (dx := handed_over(ctx, dloss)) is not None:
                return (dx,)
            return (operators.entropy_with_logits_backward(dloss, x, rows, *ctx.options),)

        def composed(x, _):
            return reference.entropy_with_logits(x, *ctx.options, ctx.place, ctx.dtype)

        return *gradients(launch, composed, dloss, x), *[None] * 4
