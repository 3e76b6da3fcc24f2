"""Entropy of softmax(x) over one dimension: lse(x) - sum(p x); dx = -p (log p + entropy).

With u = (x - m) log2(e), m the row's maximum, s = sum 2^u and a = sum 2^u u: entropy = ln s - (a / s) ln 2
and dx = -(ln 2 / s) 2^u (u - a / s). Saved a row: m, s and a / s. A logit of -inf adds 0. The maximum's own u is
exactly 0: with a scaled m it would not be, and what it left would hide the entropy of a confident row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import kernel, launch, scratch
from .layout import vector
from .numerics import LN2, LOG2E, LOWEST, lanes_dots, lanes_max, lanes_sum, log_sum, spread
from .operators import MEAN, NONE
from .reduce import sum_parts
from .rowwise import (
    EDGE, block_at, block_lanes, block_mask, clean_col, column, edge_cols, has_edges, load_run, masked_col,
    may_split, part_col, row_max, row_sum, rows_at, schedule, store_block, total,
)  # fmt: skip
from .tiling import row_walk, stride_scalars


@triton.jit
def load_x(source, col, lane, bounds, HINT: tl.constexpr):
    """A block of logits in float32, -inf beyond the bounds (None: all is within)."""
    x_ptr, x_at, class_stride = source
    return load_run(x_ptr, x_at, col, lane, class_stride, bounds, HINT, -float("inf"))


@triton.jit
def entropy_start(ROWS: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    a = tl.zeros([ROWS, T, 2 if V > 1 else 1], tl.float32)
    return tl.full([ROWS, T], LOWEST, tl.float32), tl.zeros([ROWS, T], tl.float32), a


@triton.jit
def entropy_move(state, top):
    """s and a relative to a new maximum."""
    m, s, a = state
    shift = (m - top) * LOG2E
    down = tl.exp2(shift)
    return s * down, tl.fma(s, shift, a) * down


@triton.jit
def entropy_update(x, state, U: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """One block [ROWS, BLOCK] into the lanes [ROWS, T], whose a is of two parts: machines that add pairs do so."""
    x = tl.reshape(x, [x.shape[0], U, T, V])
    m, s, a = state
    top = tl.maximum(m, lanes_max(x))
    shift = (m - top) * LOG2E
    down = tl.exp2(shift)
    u = (x - spread(top)) * LOG2E
    w = tl.exp2(u)
    if V == 1:
        a = tl.expand_dims(tl.fma(s, shift, tl.reshape(a, s.shape)), 2)
    else:
        first, second = tl.split(a)
        a = tl.join(tl.fma(s, shift, first), second)
    a = tl.fma(a, tl.expand_dims(down, 2), lanes_dots(w, tl.maximum(u, LOWEST)))
    return top, tl.fma(s, down, lanes_sum(w)), a


@triton.jit
def entropy_join(state):
    """Lanes [ROWS, T] to rows."""
    top = row_max(state[0])
    s, a = entropy_move((state[0], state[1], tl.sum(state[2], 2)), column(top))
    return top, row_sum(s), row_sum(a)


@triton.jit
def entropy_meet(one, other):
    """Two parts of the same rows to one."""
    top = tl.maximum(one[0], other[0])
    s, a = entropy_move(one, top)
    t, b = entropy_move(other, top)
    return top, s + t, a + b


@triton.jit
def row_loss(s, mean):
    loss = tl.fma(mean, -LN2, log_sum(s))
    return tl.where(loss < 0, 0.0, loss)


@triton.jit
def put_gradient(to, x_from, col, lane, bounds, values, HINT: tl.constexpr):
    """dx = k 2^u (u - mean) for one block."""
    dx_ptr, dx_at, dx_stride = to
    m, mean, k = values
    u = (load_x(x_from, col, lane, bounds, HINT) - m) * LOG2E
    dx = k * tl.exp2(u) * (tl.maximum(u, LOWEST) - mean)
    mask = None if bounds is None else block_mask(bounds[0], col, lane, (bounds[1], bounds[2]), HINT)
    store_block(block_at(dx_ptr, dx_at, col, lane, dx_stride, HINT), dx, mask)


@triton.jit
def put_rows(to, x_from, values, rows, ROWS: tl.constexpr, U: tl.constexpr, UP: tl.constexpr,
             T: tl.constexpr, V: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """The gradients of this program's rows: the whole blocks of a long row from its end, which was read
    last, dealt out among the programs of the second grid axis."""
    x_at, n_cols, live = rows
    plan = schedule(x_from[0] + x_at, n_cols, tl.full(live.shape, -1, tl.int32), live, ROWS, U, UP, T, V, HINT)
    lane, part = block_lanes(ROWS, U, T, V, HINT), block_lanes(ROWS, UP, T, V, HINT)
    for i in range(plan[4], plan[5], tl.num_programs(1)):
        put_gradient(to, x_from, clean_col(plan[5] - 1 - i, plan, U * T * V), lane, None, values, HINT)
    for i in range(plan[6]):
        put_gradient(to, x_from, part_col(i, plan, U // UP, UP * T * V), part, None, values, HINT)
    for i in range(plan[7]):
        col = masked_col(i, plan, UP * T * V)
        put_gradient(to, x_from, col, part, (live, plan[0], plan[1]), values, HINT)
    if ROWS == 1 and HINT > 1 and has_edges(plan, n_cols):
        edge = edge_cols(plan)
        put_gradient(to, x_from, 0, edge, (live, 0, n_cols), values, 1)


@kernel
def entropy_with_logits_forward_kernel(
    loss_ptr, stats_ptr, dx_ptr, x_ptr,
    inner, n_cols, n_rows, scale, dx_outer, dx_inner, dx_class_stride, x_outer, x_inner, x_class_stride,
    REDUCE: tl.constexpr, GRAD: tl.constexpr, ROWS: tl.constexpr, U: tl.constexpr, UP: tl.constexpr,
    T: tl.constexpr, V: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    outer, d, live = rows_at(inner, ROWS)
    n_rows = n_rows.to(tl.int64)  # several times as many may not fit 32 bits
    x_at = outer * x_outer + d * x_inner
    x_from = (x_ptr, column(x_at), x_class_stride)
    label = tl.full(d.shape, -1, tl.int32)
    plan = schedule(x_ptr + x_at, n_cols, label, live, ROWS, U, UP, T, V, HINT)
    state = entropy_start(ROWS, T, V)
    lane, part = block_lanes(ROWS, U, T, V, HINT), block_lanes(ROWS, UP, T, V, HINT)
    for i in range(plan[4], plan[5], tl.num_programs(1)):
        x = load_x(x_from, clean_col(i, plan, U * T * V), lane, None, HINT)
        state = entropy_update(x, state, U, T, V)
    for i in range(plan[6]):
        x = load_x(x_from, part_col(i, plan, U // UP, UP * T * V), part, None, HINT)
        state = entropy_update(x, state, UP, T, V)
    for i in range(plan[7]):
        col = masked_col(i, plan, UP * T * V)
        x = load_x(x_from, col, part, (live, plan[0], plan[1]), HINT)
        state = entropy_update(x, state, UP, T, V)
    m, s, a = entropy_join(state)
    if ROWS == 1 and HINT > 1 and has_edges(plan, n_cols):
        edge = edge_cols(plan)
        x = load_x(x_from, 0, edge, (live, 0, n_cols), 1)
        m, s, a = entropy_meet((m, s, a), entropy_join(entropy_update(x, entropy_start(1, EDGE, 1), 1, EDGE, 1)))
    mean, row = a / s, outer * inner + d
    at, third = stats_ptr + row, mean
    if may_split(T):
        at += tl.program_id(1) * n_rows * 3
        third = tl.where(tl.num_programs(1) > 1, a, mean)
    tl.store(at, m, mask=live)
    tl.store(at + n_rows, s, mask=live)
    tl.store(at + 2 * n_rows, third, mask=live)
    loss = tl.where(live, row_loss(s, mean), 0.0)
    if REDUCE:
        tl.store(loss_ptr + tl.program_id(0), total(loss), mask=tl.program_id(1) == 0)
    else:
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=live)
    if GRAD:
        values = (column(m), column(mean), column(scale / s * -LN2))
        to = (dx_ptr, column(outer * dx_outer + d * dx_inner), dx_class_stride)
        put_rows(to, x_from, values, (x_at, n_cols, live), ROWS, U, UP, T, V, HINT)


@kernel
def entropy_with_logits_join_kernel(loss_ptr, stats_ptr, part_ptr, split_ptr, n, splits, scale, BLOCK: tl.constexpr):
    """The sum of the parts, which are a row each where rows are split: those are joined first."""
    loss = 0.0
    if splits > 1:
        zero = tl.zeros([BLOCK], tl.float32)
        losses = zero
        for start in range(0, n, BLOCK):
            row = start + tl.arange(0, BLOCK)
            there = row < n
            state = zero + LOWEST, zero, zero
            for k in range(splits):
                at = split_ptr + k * (n * 3) + row
                m, s = tl.load(at, mask=there, other=LOWEST), tl.load(at + n, mask=there, other=0.0)
                state = entropy_meet(state, (m, s, tl.load(at + 2 * n, mask=there, other=0.0)))
            m, s, a = state
            mean, at = a / s, stats_ptr + row
            tl.store(at, m, mask=there)
            tl.store(at + n, s, mask=there)
            tl.store(at + 2 * n, mean, mask=there)
            losses += tl.where(there, row_loss(s, mean), 0.0)
        loss = tl.sum(losses)
    else:
        loss, _ = sum_parts(part_ptr, n, False)
    tl.store(loss_ptr, (loss * scale).to(loss_ptr.dtype.element_ty))


@kernel
def entropy_with_logits_backward_kernel(
    dx_ptr, dloss_ptr, stats_ptr, x_ptr,
    inner, n_cols, n_rows, scale, dloss_outer, dloss_inner,
    dx_outer, dx_inner, dx_class_stride, x_outer, x_inner, x_class_stride,
    REDUCE: tl.constexpr, ROWS: tl.constexpr, U: tl.constexpr, UP: tl.constexpr, T: tl.constexpr,
    V: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    outer, d, live = rows_at(inner, ROWS)
    n_rows = n_rows.to(tl.int64)  # several times as many may not fit 32 bits
    row = outer * inner + d
    if REDUCE:
        g = tl.load(dloss_ptr).to(tl.float32) * scale
    else:
        g_at = dloss_ptr + outer * dloss_outer + d * dloss_inner
        g = tl.load(g_at, mask=live, other=0.0).to(tl.float32)
    m = tl.load(stats_ptr + row, mask=live, other=0.0)
    s = tl.load(stats_ptr + n_rows + row, mask=live, other=1.0)
    mean = tl.load(stats_ptr + 2 * n_rows + row, mask=live, other=0.0)
    values = (column(m), column(mean), column(g * -LN2 / s))
    x_at = outer * x_outer + d * x_inner
    x_from = (x_ptr, column(x_at), x_class_stride)
    to = (dx_ptr, column(outer * dx_outer + d * dx_inner), dx_class_stride)
    put_rows(to, x_from, values, (x_at, n_cols, live), ROWS, U, UP, T, V, HINT)


def _scale(x: torch.Tensor, dim: int, reduction: int) -> float:
    return x.size(dim) / x.numel() if reduction == MEAN else 1.0


def entropy_with_logits_forward(outputs, x, dim, reduction, dtype):
    _forward(*outputs, None, x, dim, reduction)


def entropy_with_logits_forward_grad(outputs, x, dim, reduction, dtype):
    """With the gradient of x."""
    _forward(*outputs, x, dim, reduction)


def _forward(loss, stats, dx, x, dim, reduction):
    walk = row_walk(dim, x, dx, narrow=4, loads=2 if dx is None else 4, writes=False, twice=dx is not None)
    reduce = reduction != NONE
    parts, splits = scratch(x, walk.programs) if reduce else loss, walk.splits if reduce and dx is None else 1
    split = scratch(x, splits, 3, walk.rows) if splits > 1 else stats
    launch(
        entropy_with_logits_forward_kernel, (walk.programs, splits), parts, split, walk.tensors[1], walk.tensors[0],
        scalars=dict(
            inner=walk.inner, n_cols=walk.cols, n_rows=walk.rows, scale=_scale(x, dim, reduction),
            **stride_scalars(("dx", walk.strides[1]), ("x", walk.strides[0])),
        ),
        constants=dict(REDUCE=reduce, GRAD=dx is not None, **walk.shape.constants),
        num_warps=walk.shape.num_warps,
    )  # fmt: skip
    if reduce:
        launch(
            entropy_with_logits_join_kernel, (1,), loss, stats, parts, split,
            scalars=dict(n=walk.programs, splits=splits, scale=_scale(x, dim, reduction)),
            constants=dict(BLOCK=1024), num_warps=16,
        )  # fmt: skip
    walk.restore(1, dx)


def entropy_with_logits_backward(dx, dloss, x, stats, dim, reduction):
    walk = row_walk(dim, x, dx, narrow=4)
    dloss, dloss_outer, dloss_inner = vector(dloss, walk.outer, walk.inner)
    launch(
        entropy_with_logits_backward_kernel, (walk.programs, walk.chunks),
        walk.tensors[1], dloss, stats, walk.tensors[0],
        scalars=dict(
            inner=walk.inner, n_cols=walk.cols, n_rows=walk.rows,
            scale=_scale(x, dim, reduction), dloss_outer=dloss_outer, dloss_inner=dloss_inner,
            **stride_scalars(("dx", walk.strides[1]), ("x", walk.strides[0])),
        ),
        constants=dict(REDUCE=reduction != NONE, **walk.shape.constants),
        num_warps=walk.shape.num_warps,
    )  # fmt: skip
    walk.restore(1, dx)
