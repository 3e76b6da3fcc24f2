"""The losses of small CPU tensors whose gradients are written out."""

from __future__ import annotations

import torch

from fusedloss import blocked
from fusedloss.short import LOSSES

from .gradient import by_reference, gradients


class Short(torch.autograd.Function):
    """Saved for backward: the input, the target and the gradient of the sum."""

    @staticmethod
    def forward(ctx, name, x, target, *numbers):
        loss, dx = LOSSES[name][0](x, target, *numbers, True)
        ctx.save_for_backward(x, target, dx)
        ctx.call = name, numbers
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, dx = ctx.saved_tensors
        name, numbers = ctx.call
        _, gradient, reference = LOSSES[name]
        none = (None,) * len(numbers)
        if not torch.is_grad_enabled():
            return None, gradient(dloss, x, dx, *numbers), None, *none

        def launch(dloss):
            return (gradient(dloss, x, dx, *numbers),)

        def composed(x, _=None):
            return reference(x, target, *numbers)

        if blocked.ordinary(dloss):
            return None, *gradients(launch, composed, dloss, x)[:1], None, *none
        return None, by_reference(composed, dloss, x), None, *none
