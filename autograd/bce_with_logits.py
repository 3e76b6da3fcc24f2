"""Binary cross entropy on logits."""

from __future__ import annotations

import torch

from fusedloss import reference
from fusedloss.kernels import operators
from fusedloss.reference import FORWARD

from .gradient import gradients, handed_over, overwritten, writable


class BCEWithLogits(torch.autograd.Function):
    """Saved for backward: the arguments; and the gradient, where forward was to compute it."""

    @staticmethod
    def forward(ctx, x, target, weight, pos_weight, label_smoothing, reduction, place, dtype):
        ctx.save_for_backward(x, target, weight, pos_weight)
        ctx.options = (label_smoothing, reduction)
        ctx.place, ctx.dtype = place, dtype
        arguments = x, target, weight, pos_weight, label_smoothing, reduction, dtype
        if place != FORWARD:
            return operators.bce_with_logits_forward(*arguments)
        loss, ctx.dx = operators.bce_with_logits_forward_grad(*arguments)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, weight, pos_weight = ctx.saved_tensors
        label_smoothing, reduction = ctx.options
        input_grad, target_grad = ctx.needs_input_grad[:2]
        inplace = input_grad and writable(ctx.place, x, target_grad)

        def launch(dloss):
            if (dx := handed_over(ctx, dloss)) is not None:
                return dx, None
            if inplace:
                operators.bce_with_logits_backward_(
                    dloss, x, target, weight, pos_weight, label_smoothing, reduction, True, False
                )
                return overwritten(x), None
            dx, dtarget = operators.bce_with_logits_backward(
                dloss, x, target, weight, pos_weight, label_smoothing, reduction, input_grad, target_grad
            )
            return dx if input_grad else None, dtarget if target_grad else None

        def composed(x, target):
            return reference.bce_with_logits(
                x, target, weight, pos_weight, label_smoothing, reduction, ctx.place, ctx.dtype
            )

        return *gradients(launch, composed, dloss, x, target), *[None] * 6
