"""Kullback-Leibler divergence on log-probabilities: t (log t - x), or with t a logarithm exp(t) (t - x);
dx = -t, dt = log t + 1 - x, and with t a logarithm dx = -exp(t), dt = exp(t) (t + 1 - x).

Nothing is saved beside the arguments; dx does not read x. As in torch, dt at t = 0 is nan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .elementwise import NUM_WARPS, load, store, tile_at, walk
from .launch import kernel, launch, scratch
from .numerics import LOG2E
from .numerics import log, log_positive
from .operators import BATCHMEAN, MEAN, NONE
from .reduce import reduce_sum


@triton.jit
def kl_term(x, t, LOG_TARGET: tl.constexpr):
    if LOG_TARGET:
        return tl.exp2(t * LOG2E) * (t - x)
    else:
        return tl.where(t < 0, float("nan"), t * (log(t) - x))  # log(0) is finite: 0 log 0 = 0


@kernel
def kl_div_forward_kernel(
    out_ptr, x_ptr, target_ptr,
    n_rows, n_cols, chunks, trips,
    out_row_stride, out_col_stride, x_row_stride, x_col_stride, target_row_stride, target_col_stride,
    LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(trips):
        at = tile_at(i, n_rows, n_cols, chunks, trips, ROWS, BLOCK, WIDE)
        x = load(x_ptr, at, x_row_stride, x_col_stride)
        t = load(target_ptr, at, target_row_stride, target_col_stride)
        loss = kl_term(x, t, LOG_TARGET)
        if REDUCE:
            total += loss
        else:
            store(out_ptr, loss, at, out_row_stride, out_col_stride)
    if REDUCE:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@kernel
def kl_div_backward_kernel(
    dx_ptr, dtarget_ptr, dloss_ptr, x_ptr, target_ptr,
    n_rows, n_cols, chunks, trips, scale,
    dx_row_stride, dx_col_stride, dtarget_row_stride, dtarget_col_stride,
    dloss_row_stride, dloss_col_stride, x_row_stride, x_col_stride, target_row_stride, target_col_stride,
    LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr,
    INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    if REDUCE:
        g = tl.load(dloss_ptr).to(tl.float32) * scale
    for i in range(trips):
        at = tile_at(i, n_rows, n_cols, chunks, trips, ROWS, BLOCK, WIDE)
        t = load(target_ptr, at, target_row_stride, target_col_stride)
        p = tl.exp2(t * LOG2E) if LOG_TARGET else t
        if not REDUCE:
            g = load(dloss_ptr, at, dloss_row_stride, dloss_col_stride)
        if INPUT_GRAD:
            store(dx_ptr, -g * p, at, dx_row_stride, dx_col_stride)
        if TARGET_GRAD:
            x = load(x_ptr, at, x_row_stride, x_col_stride)
            if LOG_TARGET:
                dt = p * (t + 1.0 - x)
            else:
                dt = tl.where((t > 0) & (t < float("inf")), log_positive(t) + 1.0 - x, float("nan"))
            store(dtarget_ptr, dt * g, at, dtarget_row_stride, dtarget_col_stride)


def _scale(x: torch.Tensor, reduction: int) -> float:
    count = {MEAN: x.numel(), BATCHMEAN: x.size(0) if x.dim() else 1}
    return 1.0 / count.get(reduction, 1)


def kl_div_forward(out, x, target, log_target, reduction, dtype):
    reduce = reduction != NONE
    to = walk(None if reduce else out, x, target)
    parts = scratch(x, to.programs) if reduce else to.tensors[0]
    launch(
        kl_div_forward_kernel, (to.programs,), parts, *to.tensors[1:],
        scalars=to.scalars | to.stride_scalars("out", "x", "target"),
        constants=dict(LOG_TARGET=log_target, REDUCE=reduce, **to.constants),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    if reduce:
        reduce_sum(out, parts, _scale(x, reduction))
    else:
        to.restore(out)


def kl_div_backward(outputs, dloss, x, target, log_target, reduction, input_grad, target_grad):
    reduce = reduction != NONE
    dx, dtarget = outputs[0] if input_grad else None, outputs[1] if target_grad else None
    to = walk(dx, dtarget, None if reduce else dloss, x if target_grad else None, target)
    launch(
        kl_div_backward_kernel, (to.programs,),
        *to.tensors[:2], dloss if reduce else to.tensors[2], *to.tensors[3:],
        scalars=to.scalars | dict(scale=_scale(x, reduction))
        | to.stride_scalars("dx", "dtarget", "dloss", "x", "target"),
        constants=dict(
            LOG_TARGET=log_target, REDUCE=reduce,
            INPUT_GRAD=input_grad, TARGET_GRAD=target_grad, **to.constants,
        ),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(dx, dtarget)
