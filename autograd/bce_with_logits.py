"""Binary cross entropy on logits."""

from __future__ import annotations

from fusedloss import reference
from fusedloss.kernels import operators

from .gradient import Fused, gradients, overwritten, writable


class BCEWithLogits(Fused):
    """Saved for backward: the arguments alone."""

    @staticmethod
    def forward(ctx, x, target, weight, pos_weight, label_smoothing, reduction, inplace, dtype):
        ctx.save_for_backward(x, target, weight, pos_weight)
        ctx.options = (label_smoothing, reduction)
        ctx.inplace, ctx.dtype = inplace, dtype
        return operators.bce_with_logits_forward(x, target, weight, pos_weight, label_smoothing, reduction, dtype)

    @staticmethod
    def backward(ctx, dloss):
        x, target, weight, pos_weight = ctx.saved_tensors
        label_smoothing, reduction = ctx.options
        input_grad, target_grad = ctx.needs_input_grad[:2]
        inplace = ctx.inplace and input_grad and writable(x, target_grad)

        def launch(dloss):
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
                x, target, weight, pos_weight, label_smoothing, reduction, ctx.inplace, ctx.dtype
            )

        return *gradients(launch, composed, dloss, x, target), *[None] * 6
