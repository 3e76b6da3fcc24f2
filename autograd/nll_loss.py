"""Negative log-likelihood of log-probabilities."""

from __future__ import annotations

import torch

from fusedloss import reference
from fusedloss.kernels import operators

from .gradient import gradients


class NLLLoss(torch.autograd.Function):
    """Saved for backward: the arguments (x for its shape alone), and the mean's factor."""

    @staticmethod
    def forward(ctx, x, target, weight, ignore_index, reduction, dtype):
        loss, scale = operators.nll_loss_forward(x, target, weight, ignore_index, reduction, dtype)
        ctx.save_for_backward(x, target, weight, scale)
        ctx.options = ignore_index, reduction
        ctx.dtype = dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, weight, scale = ctx.saved_tensors

        def launch(dloss):
            return (operators.nll_loss_backward(dloss, x, target, weight, scale, *ctx.options),)

        def composed(x, _):
            return reference.nll_loss(x, target, weight, *ctx.options, ctx.dtype)

        return *gradients(launch, composed, dloss, x), None, None, None, None, None
