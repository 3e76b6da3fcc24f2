"""Entropy of probabilities over one dimension: -sum p log p; dp = -(log p + 1).

Nothing is saved beside the arguments. As torch.special.entr: 0 at p = 0 with gradient inf, -inf at p < 0.
A sum or a mean over rows, and any gradient, don't care where a row ends: they visit elements, not rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .elementwise import NUM_WARPS, TILE, lanes, limit_of, load, mode, store, tile_at, tiles_of, walk
from .launch import kernel, launch, scratch
from .numerics import LN2, add_dot, lanes_dot, lanes_min, log, log2_approx, log_any
from .operators import MEAN, NONE
from .reduce import reduce_sum
from .rowwise import (
    block_lanes, clean_col, column, edge_cols, has_edges, load_run, masked_col, part_col, row_min, row_sum, rows_at,
    schedule,
)  # fmt: skip
from .tiling import row_walk, stride_scalars


@triton.jit
def log_finite(p, HALF: tl.constexpr):
    """A logarithm that is finite at 0, where 0 log 0 = 0; where the loss is HALF precision, in base 2."""
    return tl.maximum(log2_approx(p, False), -127.0) if HALF else log(p)


@triton.jit
def entropy_of(total, least, HALF: tl.constexpr):
    """From the sum of p log p, and the least p."""
    return tl.where(least < 0, float("-inf"), 0.0 - (total * LN2 if HALF else total))  # of 0, not -0


@triton.jit
def add_entropy(total, least, p_from, at, limit, HALF: tl.constexpr, MODES: tl.constexpr, WIDE: tl.constexpr,
                V: tl.constexpr):  # fmt: skip
    """A tile into the lanes' sums and least elements."""
    p = load(p_from, at, limit, mode(MODES, 0), WIDE, V)
    total = add_dot(total, lanes(p, V, WIDE), lanes(log_finite(p, HALF), V, WIDE))
    return total, tl.minimum(least, tl.min(lanes(p, V, WIDE), 1))


@kernel
def entropy_forward_kernel(
    out_ptr, p_ptr,
    n, rows, cols, per_row, per_col, trips, p_outer, p_row, p_stride,
    HALF: tl.constexpr, MODES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    p_from = (p_ptr, p_outer, p_row, p_stride)
    total, least = tl.zeros([BLOCK // V], tl.float32), tl.zeros([BLOCK // V], tl.float32)
    period = (rows, cols, per_row, per_col)
    plan = tiles_of(n, trips, period, BLOCK, DEPTH)
    for i in range(plan[2]):
        at = tile_at(i, plan, period, BLOCK)
        total, least = add_entropy(total, least, p_from, at, None, HALF, MODES, WIDE, V)
    for i in range(plan[2], plan[2] + plan[3]):
        at, limit = tile_at(i, plan, period, BLOCK), limit_of(i, plan, BLOCK)
        total, least = add_entropy(total, least, p_from, at, limit, HALF, MODES, WIDE, V)
    tl.store(out_ptr + tl.program_id(0), tl.sum(entropy_of(total, least, HALF)))


@triton.jit
def add_block(p, state, HALF: tl.constexpr, U: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """A block [ROWS, BLOCK] into the lanes [ROWS, T]: the sum of p log p, and the least p."""
    p = tl.reshape(p, [p.shape[0], U, T, V])
    return state[0] + lanes_dot(p, log_finite(p, HALF)), tl.minimum(state[1], lanes_min(p))


@kernel
def entropy_rows_forward_kernel(
    out_ptr, p_ptr,
    inner, n_cols, p_outer, p_inner, p_class_stride,
    HALF: tl.constexpr, ROWS: tl.constexpr, U: tl.constexpr, UP: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
    HINT: tl.constexpr,
):  # fmt: skip
    outer, d, live = rows_at(inner, ROWS)
    p_at = outer * p_outer + d * p_inner
    at = column(p_at)
    plan = schedule(p_ptr + p_at, n_cols, tl.full(d.shape, -1, tl.int32), live, ROWS, U, UP, T, V, HINT)
    state = tl.zeros([ROWS, T], tl.float32), tl.zeros([ROWS, T], tl.float32)
    lane, part = block_lanes(ROWS, U, T, V, HINT), block_lanes(ROWS, UP, T, V, HINT)
    for i in range(plan[4], plan[5], tl.num_programs(1)):
        p = load_run(p_ptr, at, clean_col(i, plan, U * T * V), lane, p_class_stride, None, HINT)
        state = add_block(p, state, HALF, U, T, V)
    for i in range(plan[6]):
        p = load_run(p_ptr, at, part_col(i, plan, U // UP, UP * T * V), part, p_class_stride, None, HINT)
        state = add_block(p, state, HALF, UP, T, V)
    for i in range(plan[7]):
        bounds = (live, plan[0], plan[1])
        p = load_run(p_ptr, at, masked_col(i, plan, UP * T * V), part, p_class_stride, bounds, HINT)
        state = add_block(p, state, HALF, UP, T, V)
    total, least = row_sum(state[0]), row_min(state[1])
    if ROWS == 1 and HINT > 1 and has_edges(plan, n_cols):
        p = load_run(p_ptr, at, 0, edge_cols(plan), p_class_stride, (live, 0, n_cols), 1)
        total += tl.sum(p * log_finite(p, HALF))
        least = tl.minimum(least, tl.min(p))
    value = entropy_of(total, least, HALF).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + outer * inner + d, value, mask=live)


@triton.jit
def put_gradient(dp, dloss, p_from, g, at, limit, REDUCE: tl.constexpr, MODES: tl.constexpr, WIDE: tl.constexpr,
                 V: tl.constexpr):  # fmt: skip
    p = load(p_from, at, limit, mode(MODES, 2), WIDE, V, 1.0)
    if not REDUCE:
        g = load(dloss, at, limit, mode(MODES, 1), WIDE, V)
    if dp[0].dtype.element_ty == tl.float32:
        value = -(log_any(p) + 1.0) * g
    else:
        value = tl.fma(log2_approx(p, True), -LN2 * g, -g)
    store(dp, value, at, limit, mode(MODES, 0), WIDE)


@kernel
def entropy_backward_kernel(
    dp_ptr, dloss_ptr, p_ptr,
    n, rows, cols, per_row, per_col, trips, scale,
    dp_outer, dp_row, dp_stride, dloss_outer, dloss_row, dloss_stride, p_outer, p_row, p_stride,
    REDUCE: tl.constexpr, MODES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    dp, dloss = (dp_ptr, dp_outer, dp_row, dp_stride), (dloss_ptr, dloss_outer, dloss_row, dloss_stride)
    p_from = (p_ptr, p_outer, p_row, p_stride)
    g = tl.load(dloss_ptr).to(tl.float32) * scale if REDUCE else 0.0
    period = (rows, cols, per_row, per_col)
    plan = tiles_of(n, trips, period, BLOCK, DEPTH)
    for i in range(plan[2]):
        at = tile_at(i, plan, period, BLOCK)
        put_gradient(dp, dloss, p_from, g, at, None, REDUCE, MODES, WIDE, V)
    for i in range(plan[2], plan[2] + plan[3]):
        at, limit = tile_at(i, plan, period, BLOCK), limit_of(i, plan, BLOCK)
        put_gradient(dp, dloss, p_from, g, at, limit, REDUCE, MODES, WIDE, V)


def _scale(p: torch.Tensor, dim: int, reduction: int) -> float:
    return p.size(dim) / p.numel() if reduction == MEAN else 1.0


def entropy_forward(out, p, dim, reduction, dtype):
    half = p.element_size() == dtype.itemsize == 2
    if reduction == NONE:
        rows = row_walk(dim, p, narrow=4, writes=False)
        launch(
            entropy_rows_forward_kernel, (rows.programs,), out, *rows.tensors,
            scalars=dict(inner=rows.inner, n_cols=rows.cols, **stride_scalars(("p", rows.strides[0]))),
            constants=dict(HALF=half, **rows.shape.constants), num_warps=rows.shape.num_warps,
        )  # fmt: skip
    else:
        to = walk(p)
        parts = scratch(p, to.programs)
        launch(
            entropy_forward_kernel, (to.programs,), parts, *to.tensors,
            scalars=to.scalars | to.stride_scalars("p"),
            constants=dict(HALF=half, **to.constants), num_warps=NUM_WARPS,
        )  # fmt: skip
        reduce_sum(out, parts, _scale(p, dim, reduction))


def entropy_backward(dp, dloss, p, dim, reduction):
    reduce = reduction != NONE
    each = None if reduce else dloss.unsqueeze(dim).expand_as(p)
    to = walk(dp, each, p, tile=TILE // 2)
    dloss = dloss if to.tensors[1] is each else to.tensors[1]  # an argument is known to tapes, a view of it is not
    launch(
        entropy_backward_kernel, (to.programs,), to.tensors[0], dloss, to.tensors[2],
        scalars=to.scalars | dict(scale=_scale(p, dim, reduction)) | to.stride_scalars("dp", "dloss", "p"),
        constants=dict(REDUCE=reduce, **to.constants), num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(dp)
