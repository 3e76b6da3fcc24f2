"""Cross entropy: sum(q) lse(x) - sum(q x) over a row's classes, and z lse(x)^2; q the target distribution.

q = w (keep t + shift) for class probabilities t; for a label y it is w_y keep at y plus w shift
everywhere (keep = 1 - label smoothing, shift = label smoothing / C). dx = P softmax(x) - g q with
P = g sum(q) + 2 z g lse. All in logits shifted by the row's maximum and scaled by log2(e).

Saved a row: m and s (logsumexp.py), and b = sum(q) without the label's own part. A label is left out of s:
its part of the loss is softplus(lse of the others - x_y), which a confident label does not round to 0.
"""

from __future__ import annotations

import triton.language as tl

from .launch import kernel, launch, scratch
from .layout import vector
from .logsumexp import lse_join, lse_meet, lse_start, lse_update
from .operators import MEAN, NONE
from .reduce import count_factors, join_rows
from .rowwise import (
    EDGE, at_label, block_lanes, clean_col, column, edge_cols, has_edges, masked_col, may_split, others_of,
    part_col, rows_at, schedule, total,
)  # fmt: skip
from .targets import (
    label_gradient, load_label, load_label_logit, load_others, load_q, load_x, probabilities_gradient, put_rows,
    row_loss,
)  # fmt: skip
from .tiling import row_walk, stride_scalars


@kernel
def cross_entropy_forward_kernel(
    loss_ptr, z_ptr, rows_ptr, dx_ptr, x_ptr, target_ptr, weight_ptr,
    inner, n_cols, n_rows, ignore_index, keep, shift, z_factor, softcap, factor,
    dx_outer, dx_inner, dx_class_stride,
    x_outer, x_inner, x_class_stride, target_outer, target_inner, target_class_stride,
    PROBS: tl.constexpr, WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr,
    REDUCE: tl.constexpr, GRAD: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, U: tl.constexpr,
    UP: tl.constexpr, T: tl.constexpr, V: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    DENSE: tl.constexpr = PROBS or SMOOTH
    SAME_WEIGHT: tl.constexpr = SMOOTH and not (PROBS or WEIGHT)
    outer, d, live = rows_at(inner, ROWS)
    n_rows = n_rows.to(tl.int64)  # several times as many may not fit 32 bits
    row = outer * inner + d
    x_at, t_at = outer * x_outer + d * x_inner, outer * target_outer + d * target_inner
    label, w_y, kept = tl.full(d.shape, -1, tl.int32), tl.where(live, 1.0, 0.0), live
    if not PROBS:
        label, w_y, kept = load_label(target_ptr, weight_ptr, t_at, live, n_cols, ignore_index, WEIGHT)
    x_from = (x_ptr, column(x_at), x_class_stride, softcap)
    q_from = (target_ptr, column(t_at), target_class_stride, weight_ptr, keep, shift)
    plan = schedule(x_ptr + x_at, n_cols, label, kept, ROWS, U, UP, T, V, HINT)
    beyond = None
    if DENSE or CAP:
        beyond = n_cols if ROWS > 1 else tl.where(kept, plan[1], 0)  # nothing of other rows in a tile is used
    m, s, a, b = lse_start(ROWS, T)
    lane, part = block_lanes(ROWS, U, T, V, HINT), block_lanes(ROWS, UP, T, V, HINT)
    for i in range(plan[4], plan[5], tl.num_programs(1)):
        col = clean_col(i, plan, U * T * V)
        x = load_x(x_from, col, lane, None, CAP, HINT)
        q = load_q(q_from, col, lane, None, PROBS, WEIGHT, HINT)[0] if DENSE else 0.0
        m, s, a, b = lse_update(x, q, None, m, s, a, b, DENSE, U, T, V)
    for i in range(plan[6]):
        col = part_col(i, plan, U // UP, UP * T * V)
        x = load_x(x_from, col, part, None, CAP, HINT)
        q = load_q(q_from, col, part, None, PROBS, WEIGHT, HINT)[0] if DENSE else 0.0
        m, s, a, b = lse_update(x, q, None, m, s, a, b, DENSE, UP, T, V)
    for i in range(plan[7]):
        col = masked_col(i, plan, UP * T * V)
        x, q = load_others(x_from, q_from, col, part, (kept, plan[0], plan[1]),
                           at_label(col, label, beyond, UP, T, V), DENSE, PROBS, WEIGHT, CAP, HINT)  # fmt: skip
        q_sum = others_of(col, label, beyond, UP, T, V) if SAME_WEIGHT and ROWS == 1 else None
        m, s, a, b = lse_update(x, q, q_sum, m, s, a, b, DENSE, UP, T, V)
    m, s, a, b = lse_join(m, s, a, b)
    if ROWS == 1 and HINT > 1 and has_edges(plan, n_cols):
        edge = edge_cols(plan)
        left_out = (edge == label) | (edge >= tl.where(kept, n_cols, 0))
        x, q = load_others(x_from, q_from, 0, edge, (kept, 0, n_cols), left_out, DENSE, PROBS, WEIGHT, CAP, 1)
        m2, s2, a2, b2 = lse_start(1, EDGE)
        m2, s2, a2, b2 = lse_update(x, q, None, m2, s2, a2, b2, DENSE, 1, EDGE, 1)
        m2, s2, a2, b2 = lse_join(m2, s2, a2, b2)
        m, s, a, b = lse_meet(m, s, a, b, m2, s2, a2, b2)
    if SMOOTH and not PROBS:
        a, b = a * shift, b * shift
    x_y = 0.0 if PROBS else load_label_logit(x_ptr, x_at, label, x_class_stride, softcap, CAP)
    loss, z_loss = row_loss((m, s, a, b), x_y, w_y, kept, keep, shift, z_factor, PROBS, SMOOTH, Z)
    at = rows_ptr + row
    if REDUCE and may_split(T):
        split = tl.num_programs(1) > 1
        at += tl.program_id(1) * n_rows * (4 if DENSE else 2)
        if DENSE:
            tl.store(at + 3 * n_rows, a, mask=split)
    tl.store(at, m, mask=live)
    tl.store(at + n_rows, s, mask=live)
    if DENSE:
        tl.store(at + 2 * n_rows, b, mask=live)
    if REDUCE:
        part, parts, first = loss_ptr + tl.program_id(0), tl.num_programs(0), tl.program_id(1) == 0
        tl.store(part, tl.where(split, x_y, loss) if may_split(T) else total(loss), mask=first)
        tl.store(part + parts, total(w_y), mask=first)
        if Z:
            tl.store(part + 2 * parts, total(z_loss), mask=first)
            tl.store(part + 3 * parts, total(tl.where(kept, 1.0, 0.0)), mask=first)
    else:
        if Z:
            loss += z_loss
            tl.store(z_ptr + row, z_loss.to(z_ptr.dtype.element_ty), mask=live)
        tl.store(loss_ptr + row, loss.to(loss_ptr.dtype.element_ty), mask=live)
    if GRAD:
        scale_ptr = rows_ptr + (3 if DENSE else 2) * n_rows
        g = tl.where(kept, tl.load(scale_ptr) if COUNTED else factor, 0.0)
        g_z = tl.where(kept, tl.load(scale_ptr + 1) if COUNTED else factor, 0.0)
        if PROBS:
            p, dy, lse = probabilities_gradient(g, g_z, m, s, b, z_factor, Z)
        else:
            p, dy = label_gradient(g, g_z, w_y, m, s, b, x_y, keep, shift, z_factor, SMOOTH, Z)
            lse = m  # not asked for
        to = (dx_ptr, outer * dx_outer + column(d) * dx_inner, dx_class_stride, None, 0, 0)
        put_rows(to, x_from, q_from, (m, p, g if PROBS else g * shift, dy, lse), (x_at, n_cols, label, kept, live),
                 PROBS, WEIGHT, SMOOTH, CAP, False, ROWS, U, UP, T, V, HINT)  # fmt: skip


@kernel
def cross_entropy_backward_kernel(
    dx_ptr, dt_ptr, dloss_ptr, rows_ptr, x_ptr, target_ptr, weight_ptr,
    inner, n_cols, n_rows, ignore_index, keep, shift, z_factor, softcap, dloss_outer, dloss_inner,
    dx_outer, dx_inner, dx_class_stride, dt_outer, dt_inner, dt_class_stride,
    x_outer, x_inner, x_class_stride, target_outer, target_inner, target_class_stride,
    PROBS: tl.constexpr, WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr,
    REDUCE: tl.constexpr, TARGET_GRAD: tl.constexpr, IN_PLACE: tl.constexpr, ROWS: tl.constexpr,
    U: tl.constexpr, UP: tl.constexpr, T: tl.constexpr, V: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    outer, d, live = rows_at(inner, ROWS)
    n_rows = n_rows.to(tl.int64)  # several times as many may not fit 32 bits
    row = outer * inner + d
    x_at, t_at = outer * x_outer + d * x_inner, outer * target_outer + d * target_inner
    label, w_y, kept = tl.full(d.shape, -1, tl.int32), tl.full(d.shape, 1.0, tl.float32), live
    if not PROBS:
        label, w_y, kept = load_label(target_ptr, weight_ptr, t_at, live, n_cols, ignore_index, WEIGHT)
    x_from = (x_ptr, column(x_at), x_class_stride, softcap)
    q_from = (target_ptr, column(t_at), target_class_stride, weight_ptr, keep, shift)
    at = rows_ptr + row
    m, s = tl.load(at, mask=kept, other=0.0), tl.load(at + n_rows, mask=kept, other=1.0)
    if REDUCE:
        scale_ptr = rows_ptr + (3 if PROBS or SMOOTH else 2) * n_rows
        g = tl.load(dloss_ptr).to(tl.float32) * tl.load(scale_ptr)
        g_z = tl.load(dloss_ptr).to(tl.float32) * tl.load(scale_ptr + 1)
    else:
        g = tl.load(dloss_ptr + outer * dloss_outer + d * dloss_inner, mask=live, other=0.0).to(tl.float32)
        g_z = g
    g, g_z = tl.where(kept, g, 0.0), tl.where(kept, g_z, 0.0)
    b = tl.load(at + 2 * n_rows, mask=kept, other=0.0) if PROBS or SMOOTH else 0.0
    if PROBS:
        p, dy, lse = probabilities_gradient(g, g_z, m, s, b, z_factor, Z)
    else:
        x_y = load_label_logit(x_ptr, x_at, label, x_class_stride, softcap, CAP)
        if IN_PLACE:
            tl.debug_barrier()  # every thread has read the label's logit before one writes there
        p, dy = label_gradient(g, g_z, w_y, m, s, b, x_y, keep, shift, z_factor, SMOOTH, Z)
        lse = m  # not asked for
    to = (dx_ptr, outer * dx_outer + column(d) * dx_inner, dx_class_stride,
          dt_ptr, outer * dt_outer + column(d) * dt_inner, dt_class_stride)  # fmt: skip
    put_rows(to, x_from, q_from, (m, p, g if PROBS else g * shift, dy, lse), (x_at, n_cols, label, kept, live),
             PROBS, WEIGHT, SMOOTH, CAP, TARGET_GRAD, ROWS, U, UP, T, V, HINT)  # fmt: skip


def _options(n_cols, label_smoothing, z_loss, softcap) -> dict[str, float]:
    keep, shift = 1.0 - label_smoothing, label_smoothing / n_cols
    return dict(keep=keep, shift=shift, z_factor=float(z_loss), softcap=float(softcap))


def _targets(walk, target):
    """The target a launch reads, and its strides: probabilities walk with the logits, labels a row."""
    if target.is_floating_point():
        return walk.tensors[1], walk.strides[1]
    labels, *strides = vector(target, walk.outer, walk.inner)
    return labels, (*strides, 0)


def cross_entropy_forward(
    outputs, x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, dtype
):
    loss, z, saved = outputs
    _forward(loss, z, saved, None, x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction)


def cross_entropy_forward_grad(
    outputs, x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, dtype
):
    """With the gradient of x. A mean's factor is known first: labels are counted, or weighed, before."""
    loss, z, saved, dx = outputs
    weight = None if weight is None else weight.contiguous()
    if reduction == MEAN and not target.is_floating_point():
        labels = target if target.dim() == 1 else target.reshape(-1)
        count_factors(saved, saved.numel() - 2, labels, weight, x.size(min(1, x.dim() - 1)), ignore_index)
    _forward(loss, z, saved, dx, x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction)


def _forward(loss, z, saved, dx, x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction):
    dense = target.is_floating_point() or label_smoothing != 0.0
    probs, reduce = target.is_floating_point(), reduction != NONE
    weight = None if weight is None else weight.contiguous()
    more = (weight is not None) + (dx is not None and not probs) if dense else softcap != 0.0 and dx is not None
    walk = row_walk(
        min(1, x.dim() - 1), x, target if probs else None, dx,
        narrow=4 << more, loads=1 if probs and weight is not None else 2 if dense or softcap else 4,
        writes=False, twice=dx is not None,
    )  # fmt: skip
    target, target_strides = _targets(walk, target)
    parts, splits = scratch(x, 4, walk.programs) if reduce else loss, walk.splits if reduce and dx is None else 1
    stats = scratch(x, splits, 4 if dense else 2, walk.rows) if splits > 1 else saved
    options = _options(walk.cols, label_smoothing, z_loss, softcap)
    launch(
        cross_entropy_forward_kernel, (walk.programs, splits),
        parts, z, stats, walk.tensors[2], walk.tensors[0], target, weight,
        scalars=dict(
            inner=walk.inner, n_cols=walk.cols, n_rows=walk.rows, ignore_index=ignore_index, **options,
            factor=1.0 / walk.rows if reduction == MEAN else 1.0,
            **stride_scalars(("dx", walk.strides[2]), ("x", walk.strides[0]), ("target", target_strides)),
        ),
        constants=dict(
            PROBS=probs, WEIGHT=weight is not None, SMOOTH=label_smoothing != 0.0, Z=z_loss != 0.0,
            CAP=softcap != 0.0, REDUCE=reduce, GRAD=dx is not None,
            COUNTED=reduction == MEAN and not probs, **walk.shape.constants,
        ),
        num_warps=walk.shape.num_warps,
    )  # fmt: skip
    if reduce:
        smooth = label_smoothing != 0.0
        join_rows(loss, z, saved, parts, stats, splits, options, probs, smooth, reduction == MEAN)
    walk.restore(2, dx)


def cross_entropy_backward(
    outputs, dloss, x, target, weight, saved,
    ignore_index, label_smoothing, z_loss, softcap, reduction, target_grad,
):  # fmt: skip
    dx, dt, probs = outputs[0], outputs[1] if target_grad else None, target.is_floating_point()
    weight = None if weight is None else weight.contiguous()
    dense = probs or label_smoothing != 0.0
    walk = row_walk(
        min(1, x.dim() - 1), x, target if probs else None, dx, dt, narrow=4 if dense else 2,
        loads=1 if weight is not None and dense and (target_grad or reduction == NONE)
        else 2 if weight is not None or target_grad or softcap or x.element_size() > 2 else 4,
    )  # fmt: skip
    target, target_strides = _targets(walk, target)
    dloss, dloss_outer, dloss_inner = vector(dloss, walk.outer, walk.inner)
    launch(
        cross_entropy_backward_kernel, (walk.programs, 1 if dx is x else walk.chunks),
        *walk.tensors[2:], dloss, saved, walk.tensors[0], target, weight,
        scalars=dict(
            inner=walk.inner, n_cols=walk.cols, n_rows=walk.rows, ignore_index=ignore_index,
            **_options(walk.cols, label_smoothing, z_loss, softcap),
            dloss_outer=dloss_outer, dloss_inner=dloss_inner,
            **stride_scalars(
                ("dx", walk.strides[2]), ("dt", walk.strides[3]),
                ("x", walk.strides[0]), ("target", target_strides),
            ),
        ),
        constants=dict(
            PROBS=probs, WEIGHT=weight is not None, SMOOTH=label_smoothing != 0.0, Z=z_loss != 0.0,
            CAP=softcap != 0.0, REDUCE=reduction != NONE, TARGET_GRAD=target_grad,
            IN_PLACE=dx is x, **walk.shape.constants,
        ),
        num_warps=walk.shape.num_warps,
    )  # fmt: skip
    walk.restore(2, dx, dt)
