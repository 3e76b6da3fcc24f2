"""Cross entropy of logits with class indices or class probabilities."""

from __future__ import annotations

import torch

from fusedloss import reference
from fusedloss.kernels import operators
from fusedloss.reference import FORWARD

from .gradient import gradients, handed_over, overwritten, writable


class CrossEntropy(torch.autograd.Function):
    """Saved for backward: the arguments, and one vector: two or three numbers a row, the mean's factors;
    and the gradient, where forward was to compute it."""

    @staticmethod
    def forward(
        ctx, x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, place, dtype
    ):
        arguments = x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, dtype
        if place == FORWARD:
            loss, z, saved, ctx.dx = operators.cross_entropy_forward_grad(*arguments)
        else:
            loss, z, saved = operators.cross_entropy_forward(*arguments)
        ctx.save_for_backward(x, target, weight, saved)
        ctx.options = ignore_index, label_smoothing, z_loss, softcap, reduction
        ctx.place, ctx.dtype = place, dtype
        if not z_loss:
            return loss
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx, dloss, *_):
        x, target, weight, saved = ctx.saved_tensors
        target_grad = ctx.needs_input_grad[1]
        inplace = writable(ctx.place, x, target_grad)

        def launch(dloss):
            if (dx := handed_over(ctx, dloss)) is not None:
                return dx, None
            if inplace:
                operators.cross_entropy_backward_(dloss, x, target, weight, saved, *ctx.options, False)
                return overwritten(x), None
            dx, dtarget = operators.cross_entropy_backward(
                dloss, x, target, weight, saved, *ctx.options, target_grad
            )
            return dx, dtarget if target_grad else None

        def composed(x, target):
            return reference.cross_entropy(x, target, weight, *ctx.options, ctx.place, ctx.dtype)

        return *gradients(launch, composed, dloss, x, target), *[None] * 8
