"""Binary cross entropy on probabilities."""

from __future__ import annotations

import torch

from fusedloss import reference
from fusedloss.kernels import operators

from .gradient import gradients


class BCE(torch.autograd.Function):
    """Saved for backward: the arguments alone."""

    @staticmethod
    def forward(ctx, x, target, weight, reduction, dtype):
        ctx.save_for_backward(x, target, weight)
        ctx.options = (reduction,)
        ctx.dtype = dtype
        return operators.bce_forward(x, target, weight, reduction, dtype)

    @staticmethod
    def backward(ctx, dloss):
        x, target, weight = ctx.saved_tensors
        (reduction,) = ctx.options
        input_grad, target_grad = ctx.needs_input_grad[:2]

        def launch(dloss):
            dx, dtarget = operators.bce_backward(
                dloss, x, target, weight, reduction, input_grad, target_grad
            )
            return dx if input_grad else None, dtarget if target_grad else None

        def composed(x, target):
            return reference.bce(x, target, weight, reduction, ctx.dtype)

        return *gradients(launch, composed, dloss, x, target), None, None, None
