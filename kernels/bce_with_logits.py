"""Binary cross entropy on logits: max(x, 0) - x t + log1p(exp(-|x|)), and with a positive weight p
(1 - t) max(x, 0) + p t max(-x, 0) + (1 - t + p t) log1p(exp(-|x|)); dx = sigmoid(x) (1 - t - p t exp(-x)).

Nothing is saved beside the arguments. A plain sum takes no logarithm an element: a lane's sum of
log1p(e) is log1p(q) with q <- q + e + q e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementwise import NUM_WARPS, TILE, add_dot, lanes, load, store, tile_at, tile_mask, tiles_of, walk
from .launch import kernel, launch, scratch
from .numerics import LOG2E, log1p, log1p_ratio, quotient
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
    """(a, f, e): the loss is a + f log1p(e)."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    if POS_WEIGHT:
        positive, negative = p * t, 1.0 - t
        return tl.abs(x) * tl.where(x > 0, negative, positive), negative + positive, e
    else:
        return tl.fma(x, -t, tl.maximum(x, 0.0)), 1.0, e


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
def add_loss(total, q, out, dx, sources, smooth, g, at, mask, WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr,
             SMOOTH: tl.constexpr, REDUCE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr,
             V: tl.constexpr):  # fmt: skip
    """A tile's loss, added to the lanes' totals or written; of a plain sum, log1p(e) goes into q instead.
    With GRAD, its gradient times g as well."""
    x = load(sources[0], at, mask, WIDE, -1e30)  # adds nothing where there is none
    t = load(sources[1], at, mask, WIDE)
    p = load(sources[3], at, mask, WIDE) if POS_WEIGHT else 1.0
    if SMOOTH:
        t = tl.fma(t, smooth[0], smooth[1])
        if mask is not None:
            t = tl.where(mask, t, 0.0)
    a, factor, e = bce_terms(x, t, p, POS_WEIGHT)
    if REDUCE and not WEIGHT and not POS_WEIGHT:
        q_tile = fold_product(lanes(e, V, WIDE), V)
        q = tl.fma(q, q_tile, q + q_tile)
    else:
        a = tl.fma(e * factor, log1p_ratio(e), a)
    w = load(sources[2], at, mask, WIDE) if WEIGHT else 1.0
    if GRAD:
        store(dx, input_gradient(x, t, p, g * w, POS_WEIGHT), at, mask, WIDE)
    if REDUCE and WEIGHT:
        total = add_dot(total, lanes(a, V, WIDE), lanes(w, V, WIDE))
    elif REDUCE:
        total += tl.sum(lanes(a, V, WIDE), 1)
    else:
        store(out, a * w, at, mask, WIDE)
    return total, q


@kernel
def bce_with_logits_forward_kernel(
    out_ptr, dx_ptr, x_ptr, target_ptr, weight_ptr, pos_weight_ptr,
    n_rows, n_cols, chunks, trips, keep, shift, scale,
    out_row, out_col_stride, dx_row, dx_col_stride,
    x_row, x_col_stride, target_row, target_col_stride,
    weight_row, weight_col_stride, pos_weight_row, pos_weight_col_stride,
    WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, REDUCE: tl.constexpr,
    GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    out, dx = (out_ptr, out_row, out_col_stride), (dx_ptr, dx_row, dx_col_stride)
    sources = ((x_ptr, x_row, x_col_stride), (target_ptr, target_row, target_col_stride),
               (weight_ptr, weight_row, weight_col_stride),
               (pos_weight_ptr, pos_weight_row, pos_weight_col_stride))  # fmt: skip
    total, q = tl.zeros([ROWS * BLOCK // V], tl.float32), tl.zeros([ROWS * BLOCK // V], tl.float32)
    plan = tiles_of(n_rows, n_cols, chunks, trips, ROWS, BLOCK, FLAT)
    for i in range(plan[3]):
        total, q = add_loss(total, q, out, dx, sources, (keep, shift), scale, tile_at(i, plan, ROWS, BLOCK), None,
                            WEIGHT, POS_WEIGHT, SMOOTH, REDUCE, GRAD, WIDE, V)  # fmt: skip
    for i in range(plan[3], plan[3] + plan[4]):
        mask = tile_mask(i, plan, n_rows, ROWS, BLOCK)
        total, q = add_loss(total, q, out, dx, sources, (keep, shift), scale, tile_at(i, plan, ROWS, BLOCK), mask,
                            WEIGHT, POS_WEIGHT, SMOOTH, REDUCE, GRAD, WIDE, V)  # fmt: skip
    if REDUCE and not WEIGHT and not POS_WEIGHT:
        total += log1p(q)
    if REDUCE:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def put_gradients(dx, dt, dloss, sources, smooth, g, at, mask, WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr,
                  SMOOTH: tl.constexpr, REDUCE: tl.constexpr, INPUT_GRAD: tl.constexpr,
                  TARGET_GRAD: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    x = load(sources[0], at, mask, WIDE)
    p = load(sources[3], at, mask, WIDE) if POS_WEIGHT else 1.0
    if not REDUCE:
        g = load(dloss, at, mask, WIDE)
    if WEIGHT:
        g *= load(sources[2], at, mask, WIDE)
    if INPUT_GRAD:
        t = load(sources[1], at, mask, WIDE)
        if SMOOTH:
            t = tl.fma(t, smooth[0], smooth[1])
        store(dx, input_gradient(x, t, p, g, POS_WEIGHT), at, mask, WIDE)
    if TARGET_GRAD:
        value = -x
        if POS_WEIGHT:
            e = tl.exp2(-tl.abs(x) * LOG2E)
            value = tl.fma((p - 1.0) * e, log1p_ratio(e), p * tl.maximum(-x, 0.0) - tl.maximum(x, 0.0))
        if SMOOTH:
            value *= smooth[0]
        store(dt, value * g, at, mask, WIDE)


@kernel
def bce_with_logits_backward_kernel(
    dx_ptr, dtarget_ptr, dloss_ptr, x_ptr, target_ptr, weight_ptr, pos_weight_ptr,
    n_rows, n_cols, chunks, trips, keep, shift, scale,
    dx_row, dx_col_stride, dtarget_row, dtarget_col_stride,
    dloss_row, dloss_col_stride, x_row, x_col_stride, target_row, target_col_stride,
    weight_row, weight_col_stride, pos_weight_row, pos_weight_col_stride,
    WEIGHT: tl.constexpr, POS_WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, REDUCE: tl.constexpr,
    INPUT_GRAD: tl.constexpr, TARGET_GRAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dx, dt = (dx_ptr, dx_row, dx_col_stride), (dtarget_ptr, dtarget_row, dtarget_col_stride)
    dloss = (dloss_ptr, dloss_row, dloss_col_stride)
    sources = ((x_ptr, x_row, x_col_stride), (target_ptr, target_row, target_col_stride),
               (weight_ptr, weight_row, weight_col_stride),
               (pos_weight_ptr, pos_weight_row, pos_weight_col_stride))  # fmt: skip
    g = tl.load(dloss_ptr).to(tl.float32) * scale if REDUCE else 0.0
    plan = tiles_of(n_rows, n_cols, chunks, trips, ROWS, BLOCK, FLAT)
    for i in range(plan[3]):
        put_gradients(dx, dt, dloss, sources, (keep, shift), g, tile_at(i, plan, ROWS, BLOCK), None,
                      WEIGHT, POS_WEIGHT, SMOOTH, REDUCE, INPUT_GRAD, TARGET_GRAD, WIDE)  # fmt: skip
    for i in range(plan[3], plan[3] + plan[4]):
        mask = tile_mask(i, plan, n_rows, ROWS, BLOCK)
        put_gradients(dx, dt, dloss, sources, (keep, shift), g, tile_at(i, plan, ROWS, BLOCK), mask,
                      WEIGHT, POS_WEIGHT, SMOOTH, REDUCE, INPUT_GRAD, TARGET_GRAD, WIDE)  # fmt: skip


def _smoothing(label_smoothing: float) -> dict[str, float]:
    return dict(keep=1.0 - label_smoothing, shift=0.5 * label_smoothing)


def bce_with_logits_forward(out, x, target, weight, pos_weight, label_smoothing, reduction, dtype):
    _forward(out, None, x, target, weight, pos_weight, label_smoothing, reduction)


def bce_with_logits_forward_grad(outputs, x, target, weight, pos_weight, label_smoothing, reduction, dtype):
    """With the gradient of x."""
    _forward(*outputs, x, target, weight, pos_weight, label_smoothing, reduction)


def _forward(out, dx, x, target, weight, pos_weight, label_smoothing, reduction):
    reduce, scale = reduction != NONE, 1.0 / x.numel() if reduction == MEAN else 1.0
    tile = TILE if dx is None else TILE // 2
    to = walk(None if reduce else out, dx, x, target, weight, pos_weight, tile=tile)
    parts = scratch(x, to.programs) if reduce else to.tensors[0]
    launch(
        bce_with_logits_forward_kernel, (to.programs,), parts, *to.tensors[1:],
        scalars=to.scalars | _smoothing(label_smoothing) | dict(scale=scale)
        | to.stride_scalars("out", "dx", "x", "target", "weight", "pos_weight"),
        constants=dict(
            WEIGHT=weight is not None, POS_WEIGHT=pos_weight is not None, SMOOTH=label_smoothing != 0.0,
            REDUCE=reduce, GRAD=dx is not None, **to.constants, V=to.lane,
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
    to = walk(dx, dtarget, None if reduce else dloss, x, target, weight, pos_weight)
    launch(
        bce_with_logits_backward_kernel, (to.programs,),
        *to.tensors[:2], dloss if reduce else to.tensors[2], *to.tensors[3:],
        scalars=to.scalars | _smoothing(label_smoothing)
        | dict(scale=1.0 / x.numel() if reduction == MEAN else 1.0)
        | to.stride_scalars("dx", "dtarget", "dloss", "x", "target", "weight", "pos_weight"),
        constants=dict(
            WEIGHT=weight is not None, POS_WEIGHT=pos_weight is not None, SMOOTH=label_smoothing != 0.0,
            REDUCE=reduce, INPUT_GRAD=input_grad, TARGET_GRAD=target_grad, **to.constants,
        ),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(dx, dtarget)
