"""The losses that are computed in pieces, on large CPU tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedloss import blocked

from .gradient import by_reference, gradients


class Blocked(torch.autograd.Function):
    """Saved for backward: the arguments, and the gradient under an upstream of 1, which the first backward takes.
    It is computed in backward where the upstream cannot wait: one of float16 would vanish without the loss's scale,
    and unreduced losses have one each."""

    @staticmethod
    def forward(ctx, name, reference, x, *others):
        now = x.dtype is not torch.float16 and not blocked.unreduced(name, others)
        loss, ctx.dx = blocked.compute(name, x.detach(), others, now)
        ctx.save_for_backward(x, *[o if isinstance(o, Tensor) else None for o in others])
        ctx.call = name, reference, [None if isinstance(o, Tensor) else o for o in others]
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, *saved = ctx.saved_tensors
        name, reference, numbers = ctx.call
        none = [None] * len(saved)

        def launch(dloss):
            dx, ctx.dx = ctx.dx, None
            if dx is None:
                return (blocked.gradient(name, x.detach(), others(), dloss),)
            factor = dloss.item()
            return (dx if factor == 1.0 else dx.mul_(factor),)

        def others():
            return [number if t is None else t for t, number in zip(saved, numbers, strict=True)]

        def composed(x, _=None):
            loss = reference(x, *others())
            return loss[0] if isinstance(loss, tuple) else loss

        if not blocked.ordinary(dloss):
            return None, None, by_reference(composed, dloss, x), *none
        return None, None, *gradients(launch, composed, dloss, x)[:1], *none
