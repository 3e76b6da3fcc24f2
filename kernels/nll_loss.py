"""Negative log-likelihood of labels: -w_y x_y for log-probabilities x; dx = -w_y at the label, else 0.

Forward gathers one element a row, and backward reads no element of x. Saved is the mean's factor. A label
out of range makes the loss and the row's whole gradient NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import kernel, launch, scratch
from .layout import contiguous_rows, vector
from .operators import MEAN, NONE
from .reduce import reduce_means
from .rowwise import (
    at_label, block_at, block_lanes, block_mask, clean_col, column, edge_cols, has_edges, masked_col, part_col,
    rows_at, schedule, store_block,
)  # fmt: skip
from .targets import load_label
from .tiling import row_walk, stride_scalars

GATHER = 256  # rows a program gathers


@kernel
def nll_loss_forward_kernel(
    loss_ptr, x_ptr, target_ptr, weight_ptr,
    n_rows, inner, n_cols, ignore_index,
    x_outer, x_inner, x_class_stride, target_outer, target_inner,
    WEIGHT: tl.constexpr, REDUCE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < n_rows
    outer, d = row // inner, row % inner
    t_at = outer * target_outer + d * target_inner
    label, w_y, kept = load_label(target_ptr, weight_ptr, t_at, live, n_cols, ignore_index, WEIGHT)
    x_at = outer * x_outer + d * x_inner + label.to(tl.int64) * x_class_stride
    x_y = tl.load(x_ptr + x_at, mask=label >= 0, other=0.0).to(tl.float32)
    loss = tl.where(kept, -w_y * x_y, 0.0)
    if REDUCE:
        part = loss_ptr + tl.program_id(0)
        tl.store(part, tl.sum(loss))
        tl.store(part + tl.num_programs(0), tl.sum(w_y))
    else:
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=live)


@triton.jit
def put_gradient(to, col, lane, bounds, is_label, dy, rest, HINT: tl.constexpr):
    """One block: `rest`, and dy at the label; bounds and is_label None: a whole block without it."""
    dx_ptr, dx_at, class_stride = to
    value, mask = tl.full(lane.shape, 0.0, tl.float32) + rest, None
    if bounds is not None:
        value = tl.where(is_label, dy, rest)
        mask = block_mask(bounds[0], col, lane, (bounds[1], bounds[2]), HINT)
    store_block(block_at(dx_ptr, dx_at, col, lane, class_stride, HINT), value, mask)


@kernel
def nll_loss_backward_kernel(
    dx_ptr, dloss_ptr, scale_ptr, target_ptr, weight_ptr,
    inner, n_cols, ignore_index, dloss_outer, dloss_inner,
    dx_outer, dx_inner, dx_class_stride, target_outer, target_inner,
    WEIGHT: tl.constexpr, REDUCE: tl.constexpr, ROWS: tl.constexpr, U: tl.constexpr, UP: tl.constexpr,
    T: tl.constexpr, V: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    outer, d, live = rows_at(inner, ROWS)
    t_at, dx_at = outer * target_outer + d * target_inner, outer * dx_outer + d * dx_inner
    label, w_y, kept = load_label(target_ptr, weight_ptr, t_at, live, n_cols, ignore_index, WEIGHT)
    if REDUCE:
        g = tl.load(dloss_ptr).to(tl.float32) * tl.load(scale_ptr)
    else:
        g_at = dloss_ptr + outer * dloss_outer + d * dloss_inner
        g = tl.load(g_at, mask=live, other=0.0).to(tl.float32)
    dy = column(-g * w_y)
    rest = column(tl.where(kept & (label < 0), float("nan"), 0.0))
    to = (dx_ptr, column(dx_at), dx_class_stride)
    plan = schedule(dx_ptr + dx_at, n_cols, label, live, ROWS, U, UP, T, V, HINT)
    lane, part = block_lanes(ROWS, U, T, V, HINT), block_lanes(ROWS, UP, T, V, HINT)
    for i in range(plan[4], plan[5], tl.num_programs(1)):
        put_gradient(to, clean_col(i, plan, U * T * V), lane, None, None, dy, rest, HINT)
    for i in range(plan[6]):
        put_gradient(to, part_col(i, plan, U // UP, UP * T * V), part, None, None, dy, rest, HINT)
    for i in range(plan[7]):
        col = masked_col(i, plan, UP * T * V)
        is_label = at_label(col, label, None, UP, T, V)
        put_gradient(to, col, part, (live, plan[0], plan[1]), is_label, dy, rest, HINT)
    if ROWS == 1 and HINT > 1 and has_edges(plan, n_cols):
        edge = edge_cols(plan)
        put_gradient(to, 0, edge, (live, 0, n_cols), edge == label, dy, rest, 1)


def nll_loss_forward(outputs, x, target, weight, ignore_index, reduction, dtype):
    weight = None if weight is None else weight.contiguous()
    loss, scale = outputs
    walk, (x,) = contiguous_rows(min(1, x.dim() - 1), [x])
    target, *target_strides = vector(target, walk.outer, walk.inner)
    n_rows, reduce = walk.outer * walk.inner, reduction != NONE
    programs = triton.cdiv(n_rows, GATHER)
    parts = scratch(x, 2, programs) if reduce else loss
    launch(
        nll_loss_forward_kernel, (programs,), parts, x, target, weight,
        scalars=dict(
            n_rows=n_rows, inner=walk.inner, n_cols=walk.cols, ignore_index=ignore_index,
            **stride_scalars(("x", walk.strides[0])),
            target_outer=target_strides[0], target_inner=target_strides[1],
        ),
        constants=dict(WEIGHT=weight is not None, REDUCE=reduce, ROWS=GATHER),
        num_warps=4,
    )  # fmt: skip
    if reduce:
        reduce_means(loss, scale, parts, reduction == MEAN)


def nll_loss_backward(dx, dloss, x, target, weight, scale, ignore_index, reduction):
    weight = None if weight is None else weight.contiguous()
    walk = row_walk(min(1, dx.dim() - 1), dx, narrow=2)
    target, *target_strides = vector(target, walk.outer, walk.inner)
    dloss, dloss_outer, dloss_inner = vector(dloss, walk.outer, walk.inner)
    launch(
        nll_loss_backward_kernel, (walk.programs, walk.chunks), *walk.tensors, dloss, scale, target, weight,
        scalars=dict(
            inner=walk.inner, n_cols=walk.cols, ignore_index=ignore_index,
            dloss_outer=dloss_outer, dloss_inner=dloss_inner, **stride_scalars(("dx", walk.strides[0])),
            target_outer=target_strides[0], target_inner=target_strides[1],
        ),
        constants=dict(WEIGHT=weight is not None, REDUCE=reduction != NONE, **walk.shape.constants),
        num_warps=walk.shape.num_warps,
    )  # fmt: skip
    walk.restore(0, dx)
