"""KL divergence of log-probabilities."""

from __future__ import annotations

import torch

from fusedloss import reference
from fusedloss.kernels import operators

from .gradient import gradients


class KLDiv(torch.autograd.Function):
    """Saved for backward: the arguments alone."""

    @staticmethod
    def forward(ctx, x, target, log_target, reduction, dtype):
        ctx.save_for_backward(x, target)
        ctx.options = (log_target, reduction)
        ctx.dtype = dtype
        return operators.kl_div_forward(x, target, log_target, reduction, dtype)

    @staticmethod
    def backward(ctx, dloss):
        x, target = ctx.saved_tensors
        log_target, reduction = ctx.options
        input_grad, target_grad = ctx.needs_input_grad[:2]

        def launch(dloss):
            dx, dtarget = operators.kl_div_backward(
                dloss, x, target, log_target, reduction, input_grad, target_grad
            )
            return dx if input_grad else None, dtarget if target_grad else None

        def composed(x, target):
            return reference.kl_div(x, target, log_target, reduction, ctx.dtype)

        return *gradients(launch, composed, dloss, x, target), None, None, None
