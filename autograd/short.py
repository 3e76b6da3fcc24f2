"""The losses of small CPU tensors whose gradients are written out."""

from __future__ import annotations

import torch

from fusedloss import blocked
from fusedloss.short import LOSSES

from .gradient import by_reference, gradients


class Short(torch.autograd.Function):
    """Saved for backward: the input and the target, and what the gradient is computed from."""

    @staticmethod
    def forward(ctx, name, x, target, *numbers):
        loss, kept = LOSSES[name][0](x, target, *numbers)
        ctx.save_for_backward(x, target, *kept)
        ctx.call = name, numbers
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, *kept = ctx.saved_tensors
        name, numbers = ctx.call
        none = (None,) * (1 + len(numbers))
        ordinary = blocked.ordinary(dloss)
        if ordinary and not torch.is_grad_enabled():
            return None, LOSSES[name][1](dloss, x, kept, *numbers), *none

        def launch(dloss):
            return (LOSSES[name][1](dloss, x, kept, *numbers),)

        def composed(x, _=None):
            return LOSSES[name][0](x, target, *numbers)[0]

        if ordinary:
            return None, *gradients(launch, composed, dloss, x)[:1], *none
        return None, by_reference(composed, dloss, x), *none
