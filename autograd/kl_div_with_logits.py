"""KL divergence between the softmax of two sets of logits."""

from __future__ import annotations

import torch

from fusedloss import reference
from fusedloss.kernels import operators
from fusedloss.reference import FORWARD

from .gradient import gradients, handed_over


class KLDivWithLogits(torch.autograd.Function):
    """Saved for backward: the arguments, five numbers a row; and the gradient, where forward was to compute it."""

    @staticmethod
    def forward(ctx, x, target, dim, temperature, reverse, reduction, place, dtype):
        arguments = x, target, dim, temperature, reverse, reduction, dtype
        if place == FORWARD:
            loss, rows, ctx.dx = operators.kl_div_with_logits_forward_grad(*arguments)
        else:
            loss, rows = operators.kl_div_with_logits_forward(*arguments)
        ctx.save_for_backward(x, target, rows)
        ctx.options = dim, temperature, reverse, reduction
        ctx.place, ctx.dtype = place, dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, rows = ctx.saved_tensors
        input_grad, target_grad = ctx.needs_input_grad[:2]

        def launch(dloss):
            if (dx := handed_over(ctx, dloss)) is not None:
                return dx, None
            dx, dtarget = operators.kl_div_with_logits_backward(
                dloss, x, target, rows, *ctx.options, input_grad, target_grad
            )
            return dx if input_grad else None, dtarget if target_grad else None

        def composed(x, target):
            return reference.kl_div_with_logits(x, target, *ctx.options, ctx.place, ctx.dtype)

        return *gradients(launch, composed, dloss, x, target), *[None] * 6
