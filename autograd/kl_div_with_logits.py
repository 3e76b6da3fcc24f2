"""KL divergence between the softmax of two sets of logits."""

from __future__ import annotations

from fusedloss import reference
from fusedloss.kernels import operators

from .gradient import Fused, gradients


class KLDivWithLogits(Fused):
    """Saved for backward: the arguments, and five numbers a row."""

    @staticmethod
    def forward(ctx, x, target, dim, temperature, reverse, reduction, dtype):
        loss, rows = operators.kl_div_with_logits_forward(
            x, target, dim, temperature, reverse, reduction, dtype
        )
        ctx.save_for_backward(x, target, rows)
        ctx.options = dim, temperature, reverse, reduction
        ctx.dtype = dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, target, rows = ctx.saved_tensors
        input_grad, target_grad = ctx.needs_input_grad[:2]

        def launch(dloss):
            dx, dtarget = operators.kl_div_with_logits_backward(
                dloss, x, target, rows, *ctx.options, input_grad, target_grad
            )
            return dx if input_grad else None, dtarget if target_grad else None

        def composed(x, target):
            return reference.kl_div_with_logits(x, target, *ctx.options, ctx.dtype)

        return *gradients(launch, composed, dloss, x, target), None, None, None, None, None
