"""Kullback-Leibler divergence between two softmaxes of logits at a temperature T: T^2 KL(p || q), where
p = softmax(target / T) and q = softmax(x / T); `reverse` swaps them. The kernels know a first and a second.

With u = y log2(e) / T - m for logits y, m the row's scaled maximum, s = sum 2^u, a = sum 2^u1 (u1 - u2):
KL = (a / s1) ln 2 + ln(s2 / s1), so that a common offset cancels. Its gradients in the logits, times T:
d1 = p1 ln 2 ((u1 - u2) - a / s1), d2 = p2 - p1. Saved a row: m1, s1, m2, s2, a / s1.

Where p1 is 0 in float32 the term is 0, whatever the second's logit is (torch's kl_div is nan where p2
is 0 as well).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import kernel, launch, scratch
from .numerics import LN2, LOG2E, LOWEST, lanes_dot, lanes_max, lanes_sum, log_sum, spread
from .operators import BATCHMEAN, MEAN
from .reduce import sum_parts
from .rowwise import (
    EDGE, block_at, block_lanes, block_mask, clean_col, column, edge_cols, has_edges, load_run, masked_col,
    may_split, part_col, row_max, row_sum, rows_at, schedule, store_block, total,
)  # fmt: skip
from .tiling import row_walk, stride_scalars


@triton.jit
def load_pair(pair_from, col, lane, bounds, HINT: tl.constexpr):
    """A block of both logits in float32, -inf beyond the bounds (None: all is within)."""
    first_ptr, first_at, first_stride, second_ptr, second_at, second_stride = pair_from
    first = load_run(first_ptr, first_at, col, lane, first_stride, bounds, HINT, -float("inf"))
    return first, load_run(second_ptr, second_at, col, lane, second_stride, bounds, HINT, -float("inf"))


@triton.jit
def kl_start(ROWS: tl.constexpr, T: tl.constexpr):
    low, zero = tl.full([ROWS, T], LOWEST, tl.float32), tl.zeros([ROWS, T], tl.float32)
    return low, zero, low, zero, zero


@triton.jit
def kl_move(state, top1, top2):
    """s1, s2 and a relative to new maxima; what has vanished beside the first's maximum adds 0."""
    m1, s1, m2, s2, a = state
    shift1, shift2 = m1 - top1, m2 - top2
    down = tl.exp2(shift1)
    a = tl.where(down > 0, down * tl.fma(s1, shift1 - shift2, a), 0.0)
    return s1 * down, s2 * tl.exp2(shift2), a


@triton.jit
def kl_update(pair, factor, state, U: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """One block of both logits [ROWS, BLOCK] into the lanes [ROWS, T]; factor = log2(e) / temperature."""
    y1 = tl.reshape(pair[0], [pair[0].shape[0], U, T, V])
    y2 = tl.reshape(pair[1], [pair[1].shape[0], U, T, V])
    top1 = tl.maximum(state[0], lanes_max(y1) * factor)
    top2 = tl.maximum(state[2], lanes_max(y2) * factor)
    s1, s2, a = kl_move(state, top1, top2)
    u1, u2 = tl.fma(y1, factor, -spread(top1)), tl.fma(y2, factor, -spread(top2))
    w = tl.exp2(u1)
    a += lanes_dot(w, tl.where(w > 0, u1 - u2, 0.0))
    return top1, s1 + lanes_sum(w), top2, s2 + lanes_sum(tl.exp2(u2)), a


@triton.jit
def kl_join(state):
    """Lanes [ROWS, T] to rows."""
    top1, top2 = row_max(state[0]), row_max(state[2])
    s1, s2, a = kl_move(state, column(top1), column(top2))
    return top1, row_sum(s1), top2, row_sum(s2), row_sum(a)


@triton.jit
def kl_meet(one, other):
    """Two parts of the same rows to one."""
    top1, top2 = tl.maximum(one[0], other[0]), tl.maximum(one[2], other[2])
    s1, s2, a = kl_move(one, top1, top2)
    t1, t2, b = kl_move(other, top1, top2)
    return top1, s1 + t1, top2, s2 + t2, a + b


@triton.jit
def row_loss(s1, s2, mean):
    loss = tl.fma(mean, LN2, log_sum(s2 / s1))
    return tl.where(loss < 0, 0.0, loss)


@triton.jit
def put_gradients(to, pair_from, factor, col, lane, bounds, values, FIRST_GRAD: tl.constexpr,
                  SECOND_GRAD: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """d1 = k1 ln 2 2^u1 ((u1 - u2) - mean) and d2 = k2 2^u2 - k1 2^u1 for one block, k = g / s."""
    d1_ptr, d1_at, d1_stride, d2_ptr, d2_at, d2_stride = to
    m1, k1, m2, k2, mean = values
    y1, y2 = load_pair(pair_from, col, lane, bounds, HINT)
    mask = None if bounds is None else block_mask(bounds[0], col, lane, (bounds[1], bounds[2]), HINT)
    u1, u2 = tl.fma(y1, factor, -m1), tl.fma(y2, factor, -m2)
    w = tl.exp2(u1)
    if FIRST_GRAD:
        d1 = tl.where(w > 0, k1 * LN2 * w * (u1 - u2 - mean), k1 * w)
        store_block(block_at(d1_ptr, d1_at, col, lane, d1_stride, HINT), d1, mask)
    if SECOND_GRAD:
        d2 = k2 * tl.exp2(u2) - k1 * w  # exactly 0 where the logits are equal
        store_block(block_at(d2_ptr, d2_at, col, lane, d2_stride, HINT), d2, mask)


@triton.jit
def put_rows(to, pair_from, factor, values, rows, FIRST_GRAD: tl.constexpr, SECOND_GRAD: tl.constexpr,
             ROWS: tl.constexpr, U: tl.constexpr, UP: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
             HINT: tl.constexpr):  # fmt: skip
    """The gradients of this program's rows: the whole blocks of a long row from its end, which was read
    last, dealt out among the programs of the second grid axis."""
    first_at, n_cols, live = rows
    plan = schedule(pair_from[0] + first_at, n_cols, tl.full(live.shape, -1, tl.int32), live, ROWS, U, UP, T, V, HINT)
    lane, part = block_lanes(ROWS, U, T, V, HINT), block_lanes(ROWS, UP, T, V, HINT)
    for i in range(plan[4], plan[5], tl.num_programs(1)):
        put_gradients(to, pair_from, factor, clean_col(plan[5] - 1 - i, plan, U * T * V), lane, None, values,
                      FIRST_GRAD, SECOND_GRAD, HINT)  # fmt: skip
    for i in range(plan[6]):
        put_gradients(to, pair_from, factor, part_col(i, plan, U // UP, UP * T * V), part, None, values,
                      FIRST_GRAD, SECOND_GRAD, HINT)  # fmt: skip
    for i in range(plan[7]):
        col = masked_col(i, plan, UP * T * V)
        put_gradients(to, pair_from, factor, col, part, (live, plan[0], plan[1]), values,
                      FIRST_GRAD, SECOND_GRAD, HINT)  # fmt: skip
    if ROWS == 1 and HINT > 1 and has_edges(plan, n_cols):
        edge = edge_cols(plan)
        put_gradients(to, pair_from, factor, 0, edge, (live, 0, n_cols), values,
                      FIRST_GRAD, SECOND_GRAD, 1)  # fmt: skip


@kernel
def kl_div_with_logits_forward_kernel(
    loss_ptr, stats_ptr, d1_ptr, d2_ptr, first_ptr, second_ptr,
    inner, n_cols, n_rows, factor, scale,
    d1_outer, d1_inner, d1_class_stride, d2_outer, d2_inner, d2_class_stride,
    first_outer, first_inner, first_class_stride, second_outer, second_inner, second_class_stride,
    FIRST_GRAD: tl.constexpr, SECOND_GRAD: tl.constexpr, ROWS: tl.constexpr, U: tl.constexpr,
    UP: tl.constexpr, T: tl.constexpr, V: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    outer, d, live = rows_at(inner, ROWS)
    n_rows = n_rows.to(tl.int64)  # several times as many may not fit 32 bits
    first_at, second_at = outer * first_outer + d * first_inner, outer * second_outer + d * second_inner
    pair_from = (first_ptr, column(first_at), first_class_stride,
                 second_ptr, column(second_at), second_class_stride)  # fmt: skip
    label = tl.full(d.shape, -1, tl.int32)
    plan = schedule(first_ptr + first_at, n_cols, label, live, ROWS, U, UP, T, V, HINT)
    state = kl_start(ROWS, T)
    lane, part = block_lanes(ROWS, U, T, V, HINT), block_lanes(ROWS, UP, T, V, HINT)
    for i in range(plan[4], plan[5], tl.num_programs(1)):
        pair = load_pair(pair_from, clean_col(i, plan, U * T * V), lane, None, HINT)
        state = kl_update(pair, factor, state, U, T, V)
    for i in range(plan[6]):
        pair = load_pair(pair_from, part_col(i, plan, U // UP, UP * T * V), part, None, HINT)
        state = kl_update(pair, factor, state, UP, T, V)
    for i in range(plan[7]):
        col = masked_col(i, plan, UP * T * V)
        pair = load_pair(pair_from, col, part, (live, plan[0], plan[1]), HINT)
        state = kl_update(pair, factor, state, UP, T, V)
    state = kl_join(state)
    if ROWS == 1 and HINT > 1 and has_edges(plan, n_cols):
        edge = edge_cols(plan)
        pair = load_pair(pair_from, 0, edge, (live, 0, n_cols), 1)
        state = kl_meet(state, kl_join(kl_update(pair, factor, kl_start(1, EDGE), 1, EDGE, 1)))
    m1, s1, m2, s2, a = state
    mean, at = a / s1, stats_ptr + outer * inner + d
    fifth = mean
    if may_split(T):
        at += tl.program_id(1) * n_rows * 5
        fifth = tl.where(tl.num_programs(1) > 1, a, mean)
    tl.store(at, m1, mask=live)
    tl.store(at + n_rows, s1, mask=live)
    tl.store(at + 2 * n_rows, m2, mask=live)
    tl.store(at + 3 * n_rows, s2, mask=live)
    tl.store(at + 4 * n_rows, fifth, mask=live)
    loss = total(tl.where(live, row_loss(s1, s2, mean), 0.0))
    tl.store(loss_ptr + tl.program_id(0), loss, mask=tl.program_id(1) == 0)
    if FIRST_GRAD or SECOND_GRAD:
        values = (column(m1), column(scale / s1), column(m2), column(scale / s2), column(mean))
        to = (d1_ptr, column(outer * d1_outer + d * d1_inner), d1_class_stride,
              d2_ptr, column(outer * d2_outer + d * d2_inner), d2_class_stride)  # fmt: skip
        put_rows(to, pair_from, factor, values, (first_at, n_cols, live),
                 FIRST_GRAD, SECOND_GRAD, ROWS, U, UP, T, V, HINT)  # fmt: skip


@kernel
def kl_div_with_logits_join_kernel(loss_ptr, stats_ptr, part_ptr, split_ptr, n, splits, scale, BLOCK: tl.constexpr):
    """The sum of the parts, which are a row each where rows are split: those are joined first."""
    loss = 0.0
    if splits > 1:
        zero = tl.zeros([BLOCK], tl.float32)
        losses = zero
        for start in range(0, n, BLOCK):
            row = start + tl.arange(0, BLOCK)
            there = row < n
            state = zero + LOWEST, zero, zero + LOWEST, zero, zero
            for k in range(splits):
                at = split_ptr + k * (n * 5) + row
                m1, s1 = tl.load(at, mask=there, other=LOWEST), tl.load(at + n, mask=there, other=0.0)
                m2, s2 = tl.load(at + 2 * n, mask=there, other=LOWEST), tl.load(at + 3 * n, mask=there, other=0.0)
                state = kl_meet(state, (m1, s1, m2, s2, tl.load(at + 4 * n, mask=there, other=0.0)))
            m1, s1, m2, s2, a = state
            mean, at = a / s1, stats_ptr + row
            tl.store(at, m1, mask=there)
            tl.store(at + n, s1, mask=there)
            tl.store(at + 2 * n, m2, mask=there)
            tl.store(at + 3 * n, s2, mask=there)
            tl.store(at + 4 * n, mean, mask=there)
            losses += tl.where(there, row_loss(s1, s2, mean), 0.0)
        loss = tl.sum(losses)
    else:
        loss, _ = sum_parts(part_ptr, n, False)
    tl.store(loss_ptr, (loss * scale).to(loss_ptr.dtype.element_ty))


@kernel
def kl_div_with_logits_backward_kernel(
    d1_ptr, d2_ptr, dloss_ptr, stats_ptr, first_ptr, second_ptr,
    inner, n_cols, n_rows, factor, scale,
    d1_outer, d1_inner, d1_class_stride, d2_outer, d2_inner, d2_class_stride,
    first_outer, first_inner, first_class_stride, second_outer, second_inner, second_class_stride,
    FIRST_GRAD: tl.constexpr, SECOND_GRAD: tl.constexpr, ROWS: tl.constexpr, U: tl.constexpr,
    UP: tl.constexpr, T: tl.constexpr, V: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    outer, d, live = rows_at(inner, ROWS)
    n_rows = n_rows.to(tl.int64)  # several times as many may not fit 32 bits
    at = stats_ptr + outer * inner + d
    m1, s1 = tl.load(at, mask=live, other=0.0), tl.load(at + n_rows, mask=live, other=1.0)
    m2, s2 = tl.load(at + 2 * n_rows, mask=live, other=0.0), tl.load(at + 3 * n_rows, mask=live, other=1.0)
    mean = tl.load(at + 4 * n_rows, mask=live, other=0.0)
    g = tl.load(dloss_ptr).to(tl.float32) * scale
    values = (column(m1), column(g / s1), column(m2), column(g / s2), column(mean))
    first_at, second_at = outer * first_outer + d * first_inner, outer * second_outer + d * second_inner
    pair_from = (first_ptr, column(first_at), first_class_stride,
                 second_ptr, column(second_at), second_class_stride)  # fmt: skip
    to = (d1_ptr, column(outer * d1_outer + d * d1_inner), d1_class_stride,
          d2_ptr, column(outer * d2_outer + d * d2_inner), d2_class_stride)  # fmt: skip
    put_rows(to, pair_from, factor, values, (first_at, n_cols, live),
             FIRST_GRAD, SECOND_GRAD, ROWS, U, UP, T, V, HINT)  # fmt: skip


def _scale(x: torch.Tensor, reduction: int) -> float:
    return 1.0 / {MEAN: x.numel(), BATCHMEAN: x.size(0)}.get(reduction, 1)


def _sides(x, target, reverse: bool):
    """(first, second) of KL(first || second)."""
    return (x, target) if reverse else (target, x)


def kl_div_with_logits_forward(outputs, x, target, dim, temperature, reverse, reduction, dtype):
    _forward(*outputs, None, x, target, dim, temperature, reverse, reduction)


def kl_div_with_logits_forward_grad(outputs, x, target, dim, temperature, reverse, reduction, dtype):
    """With the gradient of x."""
    _forward(*outputs, x, target, dim, temperature, reverse, reduction)


def _forward(loss, stats, dx, x, target, dim, temperature, reverse, reduction):
    walk = row_walk(dim, x, target, dx, narrow=4, loads=2, writes=False, twice=dx is not None)
    nothing = (0, 0, 0)
    strides = [*_sides(walk.strides[2], nothing, reverse), *_sides(*walk.strides[:2], reverse)]
    grads = _sides(walk.tensors[2], None, reverse)
    parts, splits = scratch(x, walk.programs), walk.splits if dx is None else 1
    split = scratch(x, splits, 5, walk.rows) if splits > 1 else stats
    launch(
        kl_div_with_logits_forward_kernel, (walk.programs, splits),
        parts, split, *grads, *_sides(*walk.tensors[:2], reverse),
        scalars=dict(
            inner=walk.inner, n_cols=walk.cols, n_rows=walk.rows,
            factor=LOG2E.value / temperature, scale=float(temperature * _scale(x, reduction)),
            **stride_scalars(*zip(("d1", "d2", "first", "second"), strides, strict=True)),
        ),
        constants=dict(
            FIRST_GRAD=grads[0] is not None, SECOND_GRAD=grads[1] is not None, **walk.shape.constants
        ),
        num_warps=walk.shape.num_warps,
    )  # fmt: skip
    launch(
        kl_div_with_logits_join_kernel, (1,), loss, stats, parts, split,
        scalars=dict(n=walk.programs, splits=splits, scale=float(temperature * temperature * _scale(x, reduction))),
        constants=dict(BLOCK=512), num_warps=16,
    )  # fmt: skip
    walk.restore(2, dx)


def kl_div_with_logits_backward(
    outputs, dloss, x, target, stats, dim, temperature, reverse, reduction, input_grad, target_grad
):
    wanted = [outputs[0] if input_grad else None, outputs[1] if target_grad else None]
    walk = row_walk(dim, x, target, *wanted, narrow=4, loads=2)
    strides = [*_sides(*walk.strides[2:], reverse), *_sides(*walk.strides[:2], reverse)]
    grads = _sides(*walk.tensors[2:], reverse)
    launch(
        kl_div_with_logits_backward_kernel, (walk.programs, walk.chunks),
        *grads, dloss, stats, *_sides(*walk.tensors[:2], reverse),
        scalars=dict(
            inner=walk.inner, n_cols=walk.cols, n_rows=walk.rows,
            factor=LOG2E.value / temperature, scale=float(temperature * _scale(x, reduction)),
            **stride_scalars(*zip(("d1", "d2", "first", "second"), strides, strict=True)),
        ),
        constants=dict(
            FIRST_GRAD=grads[0] is not None, SECOND_GRAD=grads[1] is not None, **walk.shape.constants
        ),
        num_warps=walk.shape.num_warps,
    )  # fmt: skip
    walk.restore(2, *wanted)
