"""Binary cross entropy on logits: max(x, 0) - x t + log1p(exp(-|x|)), and with a positive weight p
(1 - t) max(x, 0) + p t max(-x, 0) + (1 - t + p t) log1p(exp(-|x|)); dx = sigmoid(x) (1 - t - p t exp(-x)).

Nothing is saved beside the arguments. A plain sum takes no logarithm an element: a lane's sum of
log1p(e) is log1p(q) with q <- q + e + q e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import NUM_WARPS, TILE, hold, lanes, limit_of, load, mode, store, tile_at, tiles_of, walk
from .launch import kernel, launch, scratch
from .numerics import LOG2E, add_dot, log1p, log1p_ratio, quotient
from .operators import MEAN, NONE
from .reduce import reduce_sum


@triton.jit
def fold_product(e, V: tl.constexpr):
    """[T, V] -> [T]: prod(1 + e) - 1 over the last dimension."""
    if V == 1:
        return tl.reshape(e, [e.shape[0]])
    else:
        a, b = tl.split(tl.reshape(e, [e.shape[0], V // 2, 2]))
        return fold_product(tl.fma(a, b, a + b), V // 2)


@triton.jit
def bce_terms(x, t, p, POS_WEIGHT: tl.constexpr):
    """(a, b, f, e): the loss is a b + f log1p(e)."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    if POS_WEIGHT:
        positive, negative = p * t, 1.0 - t
        return tl.abs(x), tl.where(x > 0, negative, positive), negative + positive, e
    else:
        return tl.fma(x, -t, tl.maximum(x, 0.0)), 1.0, 1.0, e


@triton.jit
def input_gradient(x, t, p, g, POS_WEIGHT: tl.constexpr):
    # exp(-x) and its bound, at which sigmoid(x) is still a normal number: g, and p, are multiplied last
    u = tl.exp2(tl.minimum(x * -LOG2E, 125.0, propagate_nan=tl.PropagateNan.ALL))
    if POS_WEIGHT:
        s = quotient(1.0, 1.0 + u)
        return tl.fma(t * p, u * s, (t - 1.0) * s) * -g
    else:
        return quotient(tl.fma(t, u, t - 1.0), 1.0 + u) * -g


@triton.jit
def add_loss(total, q, out, dx, sources, held, smooth, g, at, limit, WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr,
             SMOOTH: tl.constexpr, REDUCE: tl.constexpr, GRAD: tl.constexpr, HALF: tl.constexpr,
             MODES: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """A tile's loss, added to the lanes' totals or written; of a plain sum, log1p(e) goes into q instead.
    HALF: the loss is half precision. With GRAD, its gradient times g as well."""
    x = load(sources[0], at, limit, mode(MODES, 2), WIDE, V, -1e30)  # adds nothing where there is none
    t = load(sources[1], at, limit, mode(MODES, 3), WIDE, V)
    p = load(sources[3], at, limit, mode(MODES, 5), WIDE, V, 0.0, held[1]) if POS_WEIGHT else 1.0
    if SMOOTH:
        t = tl.fma(t, smooth[0], smooth[1])
        if limit is not None:
            t = tl.where(at[2] < limit, t, 0.0)
    a, b, f, e = bce_terms(x, t, p, POS_WEIGHT)
    w = load(sources[2], at, limit, mode(MODES, 4), WIDE, V, 0.0, held[0]) if WEIGHT else 1.0
    if REDUCE and POS_WEIGHT and not WEIGHT:
        total = add_dot(total, lanes(a, V, WIDE), lanes(b, V, WIDE))
        total = add_dot(total, lanes(e * f, V, WIDE), lanes(log1p_ratio(e, HALF), V, WIDE))
    elif REDUCE and not WEIGHT:
        q_tile = fold_product(lanes(e, V, WIDE), V)
        q = tl.fma(q, q_tile, q + q_tile)
        total += tl.sum(lanes(a, V, WIDE), 1)
    else:
        loss = tl.fma(e * f, log1p_ratio(e, HALF), a * b)
        if REDUCE:
            total = add_dot(total, lanes(loss, V, WIDE), lanes(w, V, WIDE))
        else:
            store(out, loss * w, at, limit, mode(MODES, 0), WIDE)
    if GRAD:
        store(dx, input_gradient(x, t, p, g * w, POS_WEIGHT), at, limit, mode(MODES, 1), WIDE)
    return total, q


@kernel
def bce_with_logits_forward_kernel(
    out_ptr, dx_ptr, x_ptr, target_ptr, weight_ptr, pos_weight_ptr,
    n, rows, cols, per_row, per_col, trips, gap, keep, shift, scale,
    out_outer, out_row, out_stride, dx_outer, dx_row, dx_stride,
    x_outer, x_row, x_stride, target_outer, target_row, target_stride,
    weight_outer, weight_row, weight_stride, pos_weight_outer, pos_weight_row, pos_weight_stride,
    WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, REDUCE: tl.constexpr,
    GRAD: tl.constexpr, HALF: tl.constexpr, HELD: tl.constexpr, MODES: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    out = (out_ptr, out_outer, out_row, out_stride)
    dx = (dx_ptr, dx_outer, dx_row, dx_stride)
    x = (x_ptr, x_outer, x_row, x_stride)
    t = (target_ptr, target_outer, target_row, target_stride)
    w = (weight_ptr, weight_outer, weight_row, weight_stride)
    p = (pos_weight_ptr, pos_weight_outer, pos_weight_row, pos_weight_stride)
    sources = (x, t, w, p)
    q = tl.zeros([BLOCK // V], tl.float32)
    total = tl.zeros([BLOCK // V, 2], tl.float32) if V > 1 and POS_WEIGHT and not WEIGHT else q
    period = (rows, cols, per_row, per_col)
    plan = tiles_of(n, trips, period, BLOCK, DEPTH, gap if HELD else None)
    held = (hold(w, plan, period, BLOCK, mode(MODES, 4), WIDE, V) if WEIGHT else None,
            hold(p, plan, period, BLOCK, mode(MODES, 5), WIDE, V) if POS_WEIGHT else None)  # fmt: skip
    for i in range(plan[2]):
        at = tile_at(i, plan, period, BLOCK)
        total, q = add_loss(total, q, out, dx, sources, held, (keep, shift), scale, at, None,
                            WEIGHT, POS_WEIGHT, SMOOTH, REDUCE, GRAD, HALF, MODES, WIDE, V)  # fmt: skip
    for i in range(plan[2], plan[2] + plan[3]):
        at, limit = tile_at(i, plan, period, BLOCK), limit_of(i, plan, BLOCK)
        total, q = add_loss(total, q, out, dx, sources, held, (keep, shift), scale, at, limit,
                            WEIGHT, POS_WEIGHT, SMOOTH, REDUCE, GRAD, HALF, MODES, WIDE, V)  # fmt: skip
    if REDUCE and not WEIGHT and not POS_WEIGHT:
        total += log1p(q)
    if REDUCE:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def put_gradients(dx, dt, dloss, sources, held, smooth, g, at, limit, WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr,
                  SMOOTH: tl.constexpr, REDUCE: tl.constexpr, INPUT_GRAD: tl.constexpr,
                  TARGET_GRAD: tl.constexpr, MODES: tl.constexpr, WIDE: tl.constexpr,
                  V: tl.constexpr):  # fmt: skip
    x = load(sources[0], at, limit, mode(MODES, 3), WIDE, V)
    p = load(sources[3], at, limit, mode(MODES, 6), WIDE, V, 0.0, held[1]) if POS_WEIGHT else 1.0
    if not REDUCE:
        g = load(dloss, at, limit, mode(MODES, 2), WIDE, V)
    if WEIGHT:
        g *= load(sources[2], at, limit, mode(MODES, 5), WIDE, V, 0.0, held[0])
    if INPUT_GRAD:
        t = load(sources[1], at, limit, mode(MODES, 4), WIDE, V)
        if SMOOTH:
            t = tl.fma(t, smooth[0], smooth[1])
        store(dx, input_gradient(x, t, p, g, POS_WEIGHT), at, limit, mode(MODES, 0), WIDE)
    if TARGET_GRAD:
        value = -x
        if POS_WEIGHT:
            e = tl.exp2(-tl.abs(x) * LOG2E)
            value = tl.fma((p - 1.0) * e, log1p_ratio(e), p * tl.maximum(-x, 0.0) - tl.maximum(x, 0.0))
        if SMOOTH:
            value *= smooth[0]
        store(dt, value * g, at, limit, mode(MODES, 1), WIDE)


@kernel
def bce_with_logits_backward_kernel(
    dx_ptr, dtarget_ptr, dloss_ptr, x_ptr, target_ptr, weight_ptr, pos_weight_ptr,
    n, rows, cols, per_row, per_col, trips, gap, keep, shift, scale,
    dx_outer, dx_row, dx_stride, dtarget_outer, dtarget_row, dtarget_stride,
    dloss_outer, dloss_row, dloss_stride, x_outer, x_row, x_stride, target_outer, target_row, target_stride,
    weight_outer, weight_row, weight_stride, pos_weight_outer, pos_weight_row, pos_weight_stride,
    WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, REDUCE: tl.constexpr,
    INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr, HELD: tl.constexpr, MODES: tl.constexpr,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    dx = (dx_ptr, dx_outer, dx_row, dx_stride)
    dt = (dtarget_ptr, dtarget_outer, dtarget_row, dtarget_stride)
    dloss = (dloss_ptr, dloss_outer, dloss_row, dloss_stride)
    x = (x_ptr, x_outer, x_row, x_stride)
    t = (target_ptr, target_outer, target_row, target_stride)
    w = (weight_ptr, weight_outer, weight_row, weight_stride)
    p = (pos_weight_ptr, pos_weight_outer, pos_weight_row, pos_weight_stride)
    sources = (x, t, w, p)
    g = tl.load(dloss_ptr).to(tl.float32) * scale if REDUCE else 0.0
    period = (rows, cols, per_row, per_col)
    plan = tiles_of(n, trips, period, BLOCK, DEPTH, gap if HELD else None)
    held = (hold(w, plan, period, BLOCK, mode(MODES, 5), WIDE, V) if WEIGHT else None,
            hold(p, plan, period, BLOCK, mode(MODES, 6), WIDE, V) if POS_WEIGHT else None)  # fmt: skip
    for i in range(plan[2]):
        put_gradients(dx, dt, dloss, sources, held, (keep, shift), g, tile_at(i, plan, period, BLOCK), None,
                      WEIGHT, POS_WEIGHT, SMOOTH, REDUCE, INPUT_GRAD, TARGET_GRAD, MODES, WIDE, V)  # fmt: skip
    for i in range(plan[2], plan[2] + plan[3]):
        limit = limit_of(i, plan, BLOCK)
        put_gradients(dx, dt, dloss, sources, held, (keep, shift), g, tile_at(i, plan, period, BLOCK), limit,
                      WEIGHT, POS_WEIGHT, SMOOTH, REDUCE, INPUT_GRAD, TARGET_GRAD, MODES, WIDE, V)  # fmt: skip


def _smoothing(label_smoothing: float) -> dict[str, float]:
    return dict(keep=1.0 - label_smoothing, shift=0.5 * label_smoothing)


def bce_with_logits_forward(out, x, target, weight, pos_weight, label_smoothing, reduction, dtype):
    _forward(out, None, x, target, weight, pos_weight, label_smoothing, reduction, dtype)


def bce_with_logits_forward_grad(outputs, x, target, weight, pos_weight, label_smoothing, reduction, dtype):
    """With the gradient of x."""
    _forward(*outputs, x, target, weight, pos_weight, label_smoothing, reduction, dtype)


def _forward(out, dx, x, target, weight, pos_weight, label_smoothing, reduction, dtype):
    reduce, scale = reduction != NONE, 1.0 / x.numel() if reduction == MEAN else 1.0
    tile = TILE if dx is pos_weight is None else TILE // 2  # for the registers
    to = walk(None if reduce else out, dx, x, target, weight, pos_weight, tile=tile, held=2)
    parts = scratch(x, to.programs) if reduce else to.tensors[0]
    launch(
        bce_with_logits_forward_kernel, (to.programs,), parts, *to.tensors[1:],
        scalars=to.scalars | dict(gap=to.gap) | _smoothing(label_smoothing) | dict(scale=scale)
        | to.stride_scalars("out", "dx", "x", "target", "weight", "pos_weight"),
        constants=dict(
            WEIGHT=weight is not None, POS_WEIGHT=pos_weight is not None, SMOOTH=label_smoothing != 0.0,
            REDUCE=reduce, GRAD=dx is not None, HALF=x.element_size() == dtype.itemsize == 2,
            HELD=to.gap > 0, **to.constants,
        ),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    if reduce:
        reduce_sum(out, parts, scale)
    to.restore(None if reduce else out, dx)


def bce_with_logits_backward(
    outputs, dloss, x, target, weight, pos_weight, label_smoothing, reduction, input_grad, target_grad
):
    reduce = reduction != NONE
    dx, dtarget = outputs[0] if input_grad else None, outputs[1] if target_grad else None
    to = walk(dx, dtarget, None if reduce else dloss, x, target, weight, pos_weight, held=2)
    launch(
        bce_with_logits_backward_kernel, (to.programs,),
        *to.tensors[:2], dloss if reduce else to.tensors[2], *to.tensors[3:],
        scalars=to.scalars | dict(gap=to.gap) | _smoothing(label_smoothing)
        | dict(scale=1.0 / x.numel() if reduction == MEAN else 1.0)
        | to.stride_scalars("dx", "dtarget", "dloss", "x", "target", "weight", "pos_weight"),
        constants=dict(
            WEIGHT=weight is not None, POS_WEIGHT=pos_weight is not None, SMOOTH=label_smoothing != 0.0,
            REDUCE=reduce, INPUT_GRAD=input_grad, TARGET_GRAD=target_grad, HELD=to.gap > 0,
            **to.constants,
        ),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(dx, dtarget)
