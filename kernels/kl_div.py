"""Kullback-Leibler divergence on log-probabilities: t (log t - x), or with t a logarithm exp(t) (t - x);
dx = -t, dt = log t + 1 - x, and with t a logarithm dx = -exp(t), dt = exp(t) (t + 1 - x).

Nothing is saved beside the arguments; dx does not read x. As in torch, dt at t = 0 is nan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .elementwise import NUM_WARPS, TILE, lanes, limit_of, load, mode, store, tile_at, tiles_of, walk
from .launch import kernel, launch, scratch
from .numerics import LOG2E, add_dot, log, log_positive
from .operators import BATCHMEAN, MEAN, NONE
from .reduce import reduce_sum


@triton.jit
def add_loss(total, least, out, x_from, t_from, at, limit, LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr,
             MODES: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """A tile's loss, added to the lanes' totals or written; with the totals, the least target of a lane."""
    x, t = load(x_from, at, limit, mode(MODES, 1), WIDE, V), load(t_from, at, limit, mode(MODES, 2), WIDE, V)
    if LOG_TARGET:
        p, d = tl.exp2(t * LOG2E), t - x
    else:
        p, d = t, log(t) - x  # log(0) is finite: 0 log 0 = 0
        least = tl.minimum(least, tl.min(lanes(t, V, WIDE), 1)) if REDUCE else least
    if REDUCE:
        total = add_dot(total, lanes(p, V, WIDE), lanes(d, V, WIDE))
    else:
        store(out, p * d if LOG_TARGET else tl.where(t < 0, float("nan"), p * d), at, limit, mode(MODES, 0), WIDE)
    return total, least


@kernel
def kl_div_forward_kernel(
    out_ptr, x_ptr, target_ptr,
    n, rows, cols, per_row, per_col, trips,
    out_outer, out_row, out_stride, x_outer, x_row, x_stride, target_outer, target_row, target_stride,
    LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr, MODES: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    out = (out_ptr, out_outer, out_row, out_stride)
    x = (x_ptr, x_outer, x_row, x_stride)
    t = (target_ptr, target_outer, target_row, target_stride)
    total, least = tl.zeros([BLOCK // V], tl.float32), tl.zeros([BLOCK // V], tl.float32)
    period = (rows, cols, per_row, per_col)
    plan = tiles_of(n, trips, period, BLOCK, DEPTH)
    for i in tl.range(plan[2], loop_unroll_factor=UNROLL):
        at = tile_at(i, plan, period, BLOCK)
        total, least = add_loss(total, least, out, x, t, at, None, LOG_TARGET, REDUCE, MODES, WIDE, V)
    for i in range(plan[2], plan[2] + plan[3]):
        at, limit = tile_at(i, plan, period, BLOCK), limit_of(i, plan, BLOCK)
        total, least = add_loss(total, least, out, x, t, at, limit, LOG_TARGET, REDUCE, MODES, WIDE, V)
    if REDUCE:
        total = tl.where(least < 0, float("nan"), total)
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def put_gradients(dx, dt, dloss, x_from, t_from, g, at, limit, LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr,
                  INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr, MODES: tl.constexpr,
                  WIDE: tl.constexpr, V: tl.constexpr):  # fmt: skip
    t = load(t_from, at, limit, mode(MODES, 4), WIDE, V)
    p = tl.exp2(t * LOG2E) if LOG_TARGET else t
    if not REDUCE:
        g = load(dloss, at, limit, mode(MODES, 2), WIDE, V)
    if INPUT_GRAD:
        store(dx, -g * p, at, limit, mode(MODES, 0), WIDE)
    if TARGET_GRAD:
        x = load(x_from, at, limit, mode(MODES, 3), WIDE, V)
        if LOG_TARGET:
            value = p * (t + 1.0 - x)
        else:
            value = tl.where((t > 0) & (t < float("inf")), log_positive(t) + 1.0 - x, float("nan"))
        store(dt, value * g, at, limit, mode(MODES, 1), WIDE)


@kernel
def kl_div_backward_kernel(
    dx_ptr, dtarget_ptr, dloss_ptr, x_ptr, target_ptr,
    n, rows, cols, per_row, per_col, trips, scale,
    dx_outer, dx_row, dx_stride, dtarget_outer, dtarget_row, dtarget_stride,
    dloss_outer, dloss_row, dloss_stride, x_outer, x_row, x_stride, target_outer, target_row, target_stride,
    LOG_TARGET: tl.constexpr, REDUCE: tl.constexpr,
    INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr, MODES: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    dx = (dx_ptr, dx_outer, dx_row, dx_stride)
    dt = (dtarget_ptr, dtarget_outer, dtarget_row, dtarget_stride)
    dloss = (dloss_ptr, dloss_outer, dloss_row, dloss_stride)
    x = (x_ptr, x_outer, x_row, x_stride)
    t = (target_ptr, target_outer, target_row, target_stride)
    g = tl.load(dloss_ptr).to(tl.float32) * scale if REDUCE else 0.0
    period = (rows, cols, per_row, per_col)
    plan = tiles_of(n, trips, period, BLOCK, DEPTH)
    for i in tl.range(plan[2], loop_unroll_factor=UNROLL):
        put_gradients(dx, dt, dloss, x, t, g, tile_at(i, plan, period, BLOCK), None,
                      LOG_TARGET, REDUCE, INPUT_GRAD, TARGET_GRAD, MODES, WIDE, V)  # fmt: skip
    for i in range(plan[2], plan[2] + plan[3]):
        put_gradients(dx, dt, dloss, x, t, g, tile_at(i, plan, period, BLOCK), limit_of(i, plan, BLOCK),
                      LOG_TARGET, REDUCE, INPUT_GRAD, TARGET_GRAD, MODES, WIDE, V)  # fmt: skip


def _scale(x: torch.Tensor, reduction: int) -> float:
    count = {MEAN: x.numel(), BATCHMEAN: x.size(0) if x.dim() else 1}
    return 1.0 / count.get(reduction, 1)


def _unroll(log_target: bool) -> int:
    """Whole tiles a trip of the loop: an exponential is so little work that the loop's own counts beside it."""
    return 4 if log_target else 1


def kl_div_forward(out, x, target, log_target, reduction, dtype):
    reduce = reduction != NONE
    to = walk(None if reduce else out, x, target, tile=TILE if reduce else TILE // 2)
    parts = scratch(x, to.programs) if reduce else to.tensors[0]
    launch(
        kl_div_forward_kernel, (to.programs,), parts, *to.tensors[1:],
        scalars=to.scalars | to.stride_scalars("out", "x", "target"),
        constants=dict(LOG_TARGET=log_target, REDUCE=reduce, **to.constants, UNROLL=_unroll(log_target)),
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
            INPUT_GRAD=input_grad, TARGET_GRAD=target_grad, **to.constants, UNROLL=_unroll(log_target),
        ),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(dx, dtarget)
