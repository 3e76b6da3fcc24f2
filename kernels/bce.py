"""Binary cross entropy on probabilities: -t max(log p, -100) - (1 - t) max(log(1 - p), -100);
dp = (p - t) / max((1 - p) p, 1e-12), dt = log(1 - p) - log p (as in torch, without the bounds).

Nothing is saved beside the arguments. Both logarithms are taken of s = min(p, 1 - p), which is exact:
log(1 - s) needs no exponent, and s >= 0 says that p is a probability. Where it is none, all is nan.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import NUM_WARPS, TILE, add_dot, lanes, load, store, tile_at, tile_mask, tiles_of, walk
from .launch import kernel, launch, scratch
from .numerics import log, log1m_ratio, log_any, quotient
from .operators import MEAN, NONE
from .reduce import reduce_sum

BOUND: tl.constexpr = tl.constexpr(3.720075976020836e-44)  # exp(-100)


@triton.jit
def bce_terms(p, t, HALF: tl.constexpr):
    """(s, f, d, r): the loss is s r - f d, and nan where s is negative. HALF: p was half precision, of which none lies
    between 0 and exp(-93): log(s + exp(-100)) has the bound of -100, and is off by the last digits of subnormal s."""
    s = tl.minimum(p, 1.0 - p)
    f = tl.where(p <= 0.5, t, 1.0 - t)
    log_s = log(tl.fma(s, 16777216.0, 16777216.0 * BOUND if HALF else 0.0), 24)  # of no subnormal number, and no -0
    r = log1m_ratio(s)
    return s, f, tl.fma(s, r, log_s if HALF else tl.maximum(log_s, -100.0)), r


@triton.jit
def add_loss(total, likely, least, out, p_from, t_from, w_from, at, mask, WEIGHT: tl.constexpr, REDUCE: tl.constexpr,
             WIDE: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """A tile's loss, written or added to the lanes' sums: total, and likely, which is subtracted in the end; with them
    the least s of a lane. Where there is no element, p = t = 0 adds 0."""
    HALF: tl.constexpr = p_from[0].dtype.element_ty != tl.float32
    s, f, d, r = bce_terms(load(p_from, at, mask, WIDE), load(t_from, at, mask, WIDE), HALF)
    w = load(w_from, at, mask, WIDE) if WEIGHT else 1.0
    if REDUCE:
        least = tl.minimum(least, tl.min(lanes(s, V, WIDE), 1))
    if REDUCE and WEIGHT:
        total = add_dot(total, lanes(tl.fma(s, r, -f * d), V, WIDE), lanes(w, V, WIDE))
    elif REDUCE:
        total = add_dot(total, lanes(s, V, WIDE), lanes(r, V, WIDE))
        likely = add_dot(likely, lanes(f, V, WIDE), lanes(d, V, WIDE))
    else:
        store(out, tl.where(s >= 0, tl.fma(s, r, -f * d) * w, float("nan")), at, mask, WIDE)
    return total, likely, least


@kernel
def bce_forward_kernel(
    out_ptr, x_ptr, target_ptr, weight_ptr,
    n_rows, n_cols, chunks, trips,
    out_row, out_col_stride, x_row, x_col_stride, target_row, target_col_stride,
    weight_row, weight_col_stride,
    WEIGHT: tl.constexpr, REDUCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    out = (out_ptr, out_row, out_col_stride)
    p, t = (x_ptr, x_row, x_col_stride), (target_ptr, target_row, target_col_stride)
    w = (weight_ptr, weight_row, weight_col_stride)
    total = tl.zeros([ROWS * BLOCK // V], tl.float32)
    likely, least = total, total
    plan = tiles_of(n_rows, n_cols, chunks, trips, ROWS, BLOCK, FLAT)
    for i in range(plan[3]):
        at = tile_at(i, plan, ROWS, BLOCK)
        total, likely, least = add_loss(total, likely, least, out, p, t, w, at, None, WEIGHT, REDUCE, WIDE, V)
    for i in range(plan[3], plan[3] + plan[4]):
        at, mask = tile_at(i, plan, ROWS, BLOCK), tile_mask(i, plan, n_rows, ROWS, BLOCK)
        total, likely, least = add_loss(total, likely, least, out, p, t, w, at, mask, WEIGHT, REDUCE, WIDE, V)
    if REDUCE:
        total = tl.where(least < 0, float("nan"), total - likely)
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def put_gradients(dx, dt, dloss, p_from, t_from, w_from, g, at, mask, WEIGHT: tl.constexpr,
                  REDUCE: tl.constexpr, INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr,
                  WIDE: tl.constexpr):  # fmt: skip
    p = load(p_from, at, mask, WIDE)
    if not REDUCE:
        g = load(dloss, at, mask, WIDE)
    if WEIGHT:
        g *= load(w_from, at, mask, WIDE)
    q = 1.0 - p
    s = tl.minimum(p, q)
    if INPUT_GRAD:
        t = load(t_from, at, mask, WIDE)
        dp = quotient(p - t, tl.maximum(p * q, 1e-12))
        store(dx, tl.where(s >= 0, dp, float("nan")) * g, at, mask, WIDE)
    if TARGET_GRAD:
        value = tl.fma(-s, log1m_ratio(s), -log_any(s))
        store(dt, tl.where(p <= 0.5, value, -value) * g, at, mask, WIDE)


@kernel
def bce_backward_kernel(
    dx_ptr, dtarget_ptr, dloss_ptr, x_ptr, target_ptr, weight_ptr,
    n_rows, n_cols, chunks, trips, scale,
    dx_row, dx_col_stride, dtarget_row, dtarget_col_stride,
    dloss_row, dloss_col_stride, x_row, x_col_stride, target_row, target_col_stride,
    weight_row, weight_col_stride,
    WEIGHT: tl.constexpr, REDUCE: tl.constexpr, INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dx, dt = (dx_ptr, dx_row, dx_col_stride), (dtarget_ptr, dtarget_row, dtarget_col_stride)
    dloss = (dloss_ptr, dloss_row, dloss_col_stride)
    p, t = (x_ptr, x_row, x_col_stride), (target_ptr, target_row, target_col_stride)
    w = (weight_ptr, weight_row, weight_col_stride)
    g = tl.load(dloss_ptr).to(tl.float32) * scale if REDUCE else 0.0
    plan = tiles_of(n_rows, n_cols, chunks, trips, ROWS, BLOCK, FLAT)
    for i in range(plan[3]):
        put_gradients(dx, dt, dloss, p, t, w, g, tile_at(i, plan, ROWS, BLOCK), None,
                      WEIGHT, REDUCE, INPUT_GRAD, TARGET_GRAD, WIDE)  # fmt: skip
    for i in range(plan[3], plan[3] + plan[4]):
        mask = tile_mask(i, plan, n_rows, ROWS, BLOCK)
        put_gradients(dx, dt, dloss, p, t, w, g, tile_at(i, plan, ROWS, BLOCK), mask,
                      WEIGHT, REDUCE, INPUT_GRAD, TARGET_GRAD, WIDE)  # fmt: skip


def bce_forward(out, x, target, weight, reduction, dtype):
    reduce = reduction != NONE
    to = walk(None if reduce else out, x, target, weight, tile=TILE // 2)
    parts = scratch(x, to.programs) if reduce else to.tensors[0]
    launch(
        bce_forward_kernel, (to.programs,), parts, *to.tensors[1:],
        scalars=to.scalars | to.stride_scalars("out", "x", "target", "weight"),
        constants=dict(WEIGHT=weight is not None, REDUCE=reduce, **to.constants, V=to.lane),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    if reduce:
        reduce_sum(out, parts, 1.0 / x.numel() if reduction == MEAN else 1.0)
    else:
        to.restore(out)


def bce_backward(outputs, dloss, x, target, weight, reduction, input_grad, target_grad):
    reduce = reduction != NONE
    dx, dtarget = outputs[0] if input_grad else None, outputs[1] if target_grad else None
    to = walk(dx, dtarget, None if reduce else dloss, x, target if input_grad else None, weight, tile=TILE // 2)
    launch(
        bce_backward_kernel, (to.programs,),
        *to.tensors[:2], dloss if reduce else to.tensors[2], *to.tensors[3:],
        scalars=to.scalars | dict(scale=1.0 / x.numel() if reduction == MEAN else 1.0)
        | to.stride_scalars("dx", "dtarget", "dloss", "x", "target", "weight"),
        constants=dict(
            WEIGHT=weight is not None, REDUCE=reduce,
            INPUT_GRAD=input_grad, TARGET_GRAD=target_grad, **to.constants,
        ),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(dx, dtarget)
