"""Cross entropy of logits with class indices or class probabilities."""

from __future__ import annotations

from fusedloss import reference
from fusedloss.kernels import operators

from .gradient import Fused, gradients, overwritten, writable


class CrossEntropy(Fused):
    """Saved for backward: the arguments, and one vector: two or three numbers a row, the mean's factors."""

    @staticmethod
    def forward(
        ctx, x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, inplace, dtype
    ):
        loss, z, saved = operators.cross_entropy_forward(
            x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, dtype
        )
        ctx.save_for_backward(x, target, weight, saved)
        ctx.options = ignore_index, label_smoothing, z_loss, softcap, reduction
        ctx.inplace, ctx.dtype = inplace, dtype
        if not z_loss:
            return loss, None
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx, dloss, _):
        x, target, weight, saved = ctx.saved_tensors
        target_grad = ctx.needs_input_grad[1]
        inplace = ctx.inplace and writable(x, target_grad)

        def launch(dloss):
            if inplace:
                operators.cross_entropy_backward_(dloss, x, target, weight, saved, *ctx.options, False)
                return overwritten(x), None
            dx, dtarget = operators.cross_entropy_backward(
                dloss, x, target, weight, saved, *ctx.options, target_grad
            )
            return dx, dtarget if target_grad else None

        def composed(x, target):
            return reference.cross_entropy(x, target, weight, *ctx.options, ctx.inplace, ctx.dtype)

        return *gradients(launch, composed, dloss, x, target), *[None] * 8
