"""Binary cross entropy on probabilities: -t max(log p, -100) - (1 - t) max(log(1 - p), -100);
dp = (p - t) / max((1 - p) p, 1e-12), dt = log(1 - p) - log p (as in torch, without the bounds).

Nothing is saved beside the arguments. Both logarithms are taken of s = min(p, 1 - p), which is exact:
log(1 - s) needs no exponent, and s >= 0 says that p is a probability. Where it is none, all is nan.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import NUM_WARPS, TILE, hold, lanes, limit_of, load, mode, store, tile_at, tiles_of, walk
from .launch import kernel, launch, scratch
from .numerics import LN2, add_dot, log, log1m_ratio, log2_approx, log_any, quotient
from .operators import MEAN, NONE
from .reduce import reduce_sum

BOUND: tl.constexpr = tl.constexpr(3.720075976020836e-44)  # exp(-100)


@triton.jit
def bce_terms(p, t, HALF: tl.constexpr):
    """(s, f, d, r): the loss is s r - f d, to be nan where s is negative. HALF: p is half precision, of which none lies
    between 0 and exp(-93): log(s + exp(-100)) has the bound of -100, and is off by the last digits of subnormal s; and
    so is the loss. The logarithm there is nan itself where s is negative."""
    s = tl.minimum(p, 1.0 - p)
    f = tl.where(p <= 0.5, t, 1.0 - t)
    scaled = tl.fma(s, 16777216.0, 16777216.0 * BOUND if HALF else 0.0)  # no subnormal number, and no -0
    log_s = tl.fma(log2_approx(scaled, False), LN2, -24 * LN2) if HALF else tl.maximum(log(scaled, 24), -100.0)
    r = log1m_ratio(s, HALF)
    return s, f, tl.fma(s, r, log_s), r


@triton.jit
def add_loss(total, likely, least, out, p_from, t_from, w_from, held, at, limit, WEIGHT: tl.constexpr,
             REDUCE: tl.constexpr, HALF: tl.constexpr, MODES: tl.constexpr, WIDE: tl.constexpr,
             V: tl.constexpr):  # fmt: skip
    """A tile's loss, written or added to the lanes' sums: total, and likely, which is subtracted in the end; with them
    the least s of a lane. Where there is no element, p = t = 0 adds 0."""
    p, t = load(p_from, at, limit, mode(MODES, 1), WIDE, V), load(t_from, at, limit, mode(MODES, 2), WIDE, V)
    s, f, d, r = bce_terms(p, t, HALF)
    w = load(w_from, at, limit, mode(MODES, 3), WIDE, V, 0.0, held) if WEIGHT else 1.0
    if REDUCE and not HALF:
        least = tl.minimum(least, tl.min(lanes(s, V, WIDE), 1))
    if REDUCE and WEIGHT:
        total = add_dot(total, lanes(tl.fma(s, r, -f * d), V, WIDE), lanes(w, V, WIDE))
    elif REDUCE:
        total = add_dot(total, lanes(s, V, WIDE), lanes(r, V, WIDE))
        likely = add_dot(likely, lanes(f, V, WIDE), lanes(d, V, WIDE))
    else:
        loss = tl.fma(s, r, -f * d) * w
        store(out, loss if HALF else tl.where(s >= 0, loss, float("nan")), at, limit, mode(MODES, 0), WIDE)
    return total, likely, least


@kernel
def bce_forward_kernel(
    out_ptr, x_ptr, target_ptr, weight_ptr,
    n, rows, cols, per_row, per_col, trips, gap,
    out_outer, out_row, out_stride, x_outer, x_row, x_stride, target_outer, target_row, target_stride,
    weight_outer, weight_row, weight_stride,
    WEIGHT: tl.constexpr, REDUCE: tl.constexpr, HALF: tl.constexpr, HELD: tl.constexpr, MODES: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    out = (out_ptr, out_outer, out_row, out_stride)
    p = (x_ptr, x_outer, x_row, x_stride)
    t = (target_ptr, target_outer, target_row, target_stride)
    w = (weight_ptr, weight_outer, weight_row, weight_stride)
    total = tl.zeros([BLOCK // V], tl.float32)
    likely, least = total, total
    period = (rows, cols, per_row, per_col)
    plan = tiles_of(n, trips, period, BLOCK, DEPTH, gap if HELD else None)
    held = hold(w, plan, period, BLOCK, mode(MODES, 3), WIDE, V) if WEIGHT else None
    for i in range(plan[2]):
        at = tile_at(i, plan, period, BLOCK)
        total, likely, least = add_loss(total, likely, least, out, p, t, w, held, at, None,
                                        WEIGHT, REDUCE, HALF, MODES, WIDE, V)  # fmt: skip
    for i in range(plan[2], plan[2] + plan[3]):
        at, limit = tile_at(i, plan, period, BLOCK), limit_of(i, plan, BLOCK)
        total, likely, least = add_loss(total, likely, least, out, p, t, w, held, at, limit,
                                        WEIGHT, REDUCE, HALF, MODES, WIDE, V)  # fmt: skip
    if REDUCE:
        total = tl.where(least < 0, float("nan"), total - likely)
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def put_gradients(dx, dt, dloss, p_from, t_from, w_from, held, g, at, limit, WEIGHT: tl.constexpr,
                  REDUCE: tl.constexpr, INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr,
                  MODES: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr):  # fmt: skip
    p = load(p_from, at, limit, mode(MODES, 3), WIDE, V)
    if not REDUCE:
        g = load(dloss, at, limit, mode(MODES, 2), WIDE, V)
    if WEIGHT:
        g *= load(w_from, at, limit, mode(MODES, 5), WIDE, V, 0.0, held)
    q = 1.0 - p
    s = tl.minimum(p, q)
    if INPUT_GRAD:
        t = load(t_from, at, limit, mode(MODES, 4), WIDE, V)
        dp = quotient(p - t, tl.maximum(p * q, 1e-12))
        store(dx, tl.where(s >= 0, dp, float("nan")) * g, at, limit, mode(MODES, 0), WIDE)
    if TARGET_GRAD:
        value = tl.fma(-s, log1m_ratio(s), -log_any(s))
        store(dt, tl.where(p <= 0.5, value, -value) * g, at, limit, mode(MODES, 1), WIDE)


@kernel
def bce_backward_kernel(
    dx_ptr, dtarget_ptr, dloss_ptr, x_ptr, target_ptr, weight_ptr,
    n, rows, cols, per_row, per_col, trips, gap, scale,
    dx_outer, dx_row, dx_stride, dtarget_outer, dtarget_row, dtarget_stride,
    dloss_outer, dloss_row, dloss_stride, x_outer, x_row, x_stride, target_outer, target_row, target_stride,
    weight_outer, weight_row, weight_stride,
    WEIGHT: tl.constexpr, REDUCE: tl.constexpr, INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr,
    HELD: tl.constexpr, MODES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    dx = (dx_ptr, dx_outer, dx_row, dx_stride)
    dt = (dtarget_ptr, dtarget_outer, dtarget_row, dtarget_stride)
    dloss = (dloss_ptr, dloss_outer, dloss_row, dloss_stride)
    p = (x_ptr, x_outer, x_row, x_stride)
    t = (target_ptr, target_outer, target_row, target_stride)
    w = (weight_ptr, weight_outer, weight_row, weight_stride)
    g = tl.load(dloss_ptr).to(tl.float32) * scale if REDUCE else 0.0
    period = (rows, cols, per_row, per_col)
    plan = tiles_of(n, trips, period, BLOCK, DEPTH, gap if HELD else None)
    held = hold(w, plan, period, BLOCK, mode(MODES, 5), WIDE, V) if WEIGHT else None
    for i in range(plan[2]):
        put_gradients(dx, dt, dloss, p, t, w, held, g, tile_at(i, plan, period, BLOCK), None,
                      WEIGHT, REDUCE, INPUT_GRAD, TARGET_GRAD, MODES, WIDE, V)  # fmt: skip
    for i in range(plan[2], plan[2] + plan[3]):
        limit = limit_of(i, plan, BLOCK)
        put_gradients(dx, dt, dloss, p, t, w, held, g, tile_at(i, plan, period, BLOCK), limit,
                      WEIGHT, REDUCE, INPUT_GRAD, TARGET_GRAD, MODES, WIDE, V)  # fmt: skip


def bce_forward(out, x, target, weight, reduction, dtype):
    reduce, half = reduction != NONE, x.element_size() == dtype.itemsize == 2
    to = walk(None if reduce else out, x, target, weight, tile=TILE if half and reduce else TILE // 2, held=1)
    parts = scratch(x, to.programs) if reduce else to.tensors[0]
    launch(
        bce_forward_kernel, (to.programs,), parts, *to.tensors[1:],
        scalars=to.scalars | dict(gap=to.gap) | to.stride_scalars("out", "x", "target", "weight"),
        constants=dict(WEIGHT=weight is not None, REDUCE=reduce, HALF=half, HELD=to.gap > 0, **to.constants),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    if reduce:
        reduce_sum(out, parts, 1.0 / x.numel() if reduction == MEAN else 1.0)
    else:
        to.restore(out)


def bce_backward(outputs, dloss, x, target, weight, reduction, input_grad, target_grad):
    reduce = reduction != NONE
    dx, dtarget = outputs[0] if input_grad else None, outputs[1] if target_grad else None
    to = walk(dx, dtarget, None if reduce else dloss, x, target if input_grad else None, weight, tile=TILE // 2, held=1)
    launch(
        bce_backward_kernel, (to.programs,),
        *to.tensors[:2], dloss if reduce else to.tensors[2], *to.tensors[3:],
        scalars=to.scalars | dict(gap=to.gap, scale=1.0 / x.numel() if reduction == MEAN else 1.0)
        | to.stride_scalars("dx", "dtarget", "dloss", "x", "target", "weight"),
        constants=dict(
            WEIGHT=weight is not None, REDUCE=reduce,
            INPUT_GRAD=input_grad, TARGET_GRAD=target_grad, HELD=to.gap > 0, **to.constants,
        ),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(dx, dtarget)
