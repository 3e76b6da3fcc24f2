"""Device functions of cross entropy: blocks of logits and of target weights, a row's label (its weight, its
logit, what it adds to the others' log-sum-exp), and a row's gradient."""

import triton
import triton.language as tl

from .numerics import LN2, LOWEST, add_softplus, log_sum, scale2, soft_cap, softplus
from .rowwise import (
    at_label, block_at, block_lanes, block_mask, clean_col, column, edge_cols, has_edges, load_run, load_weights,
    masked_col, part_col, schedule, store_block,
)  # fmt: skip


@triton.jit
def load_x(source, col, lane, bounds, CAP: tl.constexpr, HINT: tl.constexpr):
    """A block of logits in float32, capped; beyond the bounds (None: all is within) -inf."""
    x_ptr, x_at, class_stride, softcap = source
    x = load_run(x_ptr, x_at, col, lane, class_stride, bounds, HINT, -float("inf"))
    if CAP:
        x = soft_cap(x, softcap, x_ptr.dtype.element_ty != tl.float32, HINT > 1)
    return x


@triton.jit
def load_q(source, col, lane, bounds, PROBS: tl.constexpr, WEIGHT: tl.constexpr, HINT: tl.constexpr,
           WRITES: tl.constexpr = False):  # fmt: skip
    """(q, w) of a block: q = w (keep t + shift), and for labels w alone: shift is the row's."""
    target_ptr, t_at, class_stride, weight_ptr, keep, shift = source
    q, w = 1.0, 1.0
    if PROBS:
        t = load_run(target_ptr, t_at, col, lane, class_stride, bounds, HINT)
        q = tl.fma(t, keep, shift)
    if WEIGHT:
        w = load_weights(weight_ptr, col, lane, bounds, HINT, WRITES)
        q = q * w if PROBS else w
    return q, w


@triton.jit
def load_others(x_from, q_from, col, lane, bounds, left_out, DENSE: tl.constexpr, PROBS: tl.constexpr,
                WEIGHT: tl.constexpr, CAP: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """x and q of a block without the label, and without what lies beyond the bounds: `left_out` says which, but
    need not know the bounds where logits are plain."""
    x, q = load_x(x_from, col, lane, bounds, CAP, HINT), 0.0
    if DENSE:
        x = tl.where(left_out, LOWEST, x)
        if len(lane.shape) == 3 and lane.shape[0] * lane.shape[2] > 1 and not (PROBS or WEIGHT):
            left_out |= x != x  # for q to be made by the threads that have x; a row with NaN is NaN either way
        q = tl.where(left_out, 0.0, load_q(q_from, col, lane, bounds, PROBS, WEIGHT, HINT)[0])
    else:
        x = tl.where(left_out, -float("inf"), x)
    return x, q


@triton.jit
def load_label(target_ptr, weight_ptr, at, live, n_cols, ignore_index, WEIGHT: tl.constexpr):
    """(label, w_label, kept): a row with ignore_index is not kept; any other label out of range
    weighs NaN. The label is -1 where there is none."""
    label = tl.load(target_ptr + at, mask=live, other=0).to(tl.int64)
    kept = live & (label != ignore_index)
    valid = (label >= 0) & (label < n_cols)
    label = tl.where(kept & valid, label, -1).to(tl.int32)
    weight = tl.where(valid, 1.0, float("nan"))
    if WEIGHT:
        weight *= tl.load(weight_ptr + label, mask=label >= 0, other=1.0).to(tl.float32)
    return label, tl.where(kept, weight, 0.0), kept


@triton.jit
def load_label_logit(x_ptr, x_at, label, class_stride, softcap, CAP: tl.constexpr):
    x = tl.load(x_ptr + x_at + label.to(tl.int64) * class_stride, mask=label >= 0, other=0.0).to(tl.float32)
    if CAP:
        x = soft_cap(x, softcap, x_ptr.dtype.element_ty != tl.float32, False)
    return x


@triton.jit
def meet_label(x_y, m, s):
    """From a label's logit and the others' (m, s): z = lse of the others - x_y (NaN for a logit of +inf), and
    the row's lse: less m, and as it is."""
    u_y = scale2(x_y, m)
    others = log_sum(s)
    z = tl.where(x_y == float("inf"), float("nan"), tl.fma(u_y, -LN2, others))
    lse = add_softplus(z, tl.maximum(others, u_y * LN2))
    return z, lse, tl.where(s > 0, tl.fma(m, LN2, lse), x_y)


@triton.jit
def row_loss(state, x_y, w_y, kept, keep, shift, z_factor, PROBS: tl.constexpr, SMOOTH: tl.constexpr,
             Z: tl.constexpr):  # fmt: skip
    """(loss, z loss) of rows with the sums (m, s, a, b), 0 of those that are not kept."""
    m, s, a, b = state
    if PROBS:
        lse = log_sum(s)
        full_lse = tl.fma(m, LN2, lse)
        loss = tl.fma(b, lse, a * -LN2)
    else:
        z, lse, full_lse = meet_label(x_y, m, s)
        loss = w_y * softplus(z)
        if SMOOTH:
            loss = tl.fma(keep + shift, loss, tl.fma(b, lse, a * -LN2))  # the label's, and the others'
    loss = tl.where(kept, loss, 0.0)
    return loss, tl.where(kept, z_factor * full_lse * full_lse, 0.0) if Z else loss * 0.0


@triton.jit
def probabilities_gradient(g, g_z, m, s, b, z_factor, Z: tl.constexpr):
    """(P / s, P, lse less m) for probability targets; P = g sum(q) + 2 z g lse."""
    dense, lse = g * b, log_sum(s)
    if Z:
        dense = tl.fma(2.0 * z_factor * g_z, tl.fma(m, LN2, lse), dense)
    return dense / s, dense, lse


@triton.jit
def label_gradient(g, g_z, w_y, m, s, b, x_y, keep, shift, z_factor, SMOOTH: tl.constexpr,
                   Z: tl.constexpr):  # fmt: skip
    """(P / the sum of all classes, the label's gradient), s being the sum of the others. With e the label's
    power, s / (s + e) and e / (s + e) keep their relative accuracy, however far the label is from the others."""
    hard = g * w_y * keep if SMOOTH else g * w_y
    e = tl.where(x_y == float("inf"), float("nan"), tl.exp2(scale2(x_y, m)))
    whole = s + e  # inf from a lead of 88 nats on, when the others' share is 0
    dy, p = -hard * (s / whole), hard
    if SMOOTH or Z:
        dense = tl.fma(g * w_y, shift, g * b) if SMOOTH else 0.0
        if Z:
            dense = tl.fma(2.0 * z_factor * g_z, meet_label(x_y, m, s)[2], dense)
        dy, p = tl.fma(dense, tl.where(whole < float("inf"), e / whole, 1.0), dy), hard + dense
    if SMOOTH:
        dy = tl.fma(-g * w_y, shift, dy)
    return p / whole, dy


@triton.jit
def put_gradients(to, x_from, q_from, col, lane, bounds, live, is_label, row_values,
                  PROBS: tl.constexpr, WEIGHT: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr,
                  TARGET_GRAD: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """dx = P 2^u - g q, and dy at the label, for one block; dtarget = g keep w (lse - x). Bounds None: a
    whole block without the label. Rows that are not kept read nothing, and -inf gives 0."""
    dx_ptr, dx_at, dx_stride, dt_ptr, dt_at, dt_stride = to
    m, p, g, dy, lse = row_values
    x = load_x(x_from, col, lane, bounds, CAP, HINT)
    u = scale2(x, m)
    if PROBS or SMOOTH:
        q, w = load_q(q_from, col, lane, bounds, PROBS, WEIGHT, HINT, True)
        dx = tl.fma(p, tl.exp2(u), -g * q)
    else:
        dx = p * tl.exp2(u)
    mask = None
    if bounds is not None:
        dx = tl.where(is_label, dy, dx)
        mask = block_mask(live, col, lane, (bounds[1], bounds[2]), HINT)
    if CAP:
        share = x * (1.0 / x_from[3])
        dx *= tl.fma(-share, share, 1.0)
        if bounds is not None and len(live.shape) == 0:  # in forward an ignored row has a maximum in tiles alone
            dx = tl.where(bounds[0], dx, 0.0)
    store_block(block_at(dx_ptr, dx_at, col, lane, dx_stride, HINT), dx, mask)
    if TARGET_GRAD:
        dt = g * q_from[4] * tl.fma(u, -LN2, lse)
        if WEIGHT:
            dt *= w
        store_block(block_at(dt_ptr, dt_at, col, lane, dt_stride, HINT), dt, mask)


@triton.jit
def put_rows(to, x_from, q_from, row_values, rows, PROBS: tl.constexpr, WEIGHT: tl.constexpr,
             SMOOTH: tl.constexpr, CAP: tl.constexpr, TARGET_GRAD: tl.constexpr, ROWS: tl.constexpr,
             U: tl.constexpr, UP: tl.constexpr, T: tl.constexpr, V: tl.constexpr,
             HINT: tl.constexpr):  # fmt: skip
    """The gradients of this program's rows: the whole blocks of a long row from its end, which was read
    last, dealt out among the programs of the second grid axis."""
    x_at, n_cols, label, kept, live = rows
    m, p, g, dy, lse = row_values
    values = (column(m), column(p), column(g), column(dy), column(lse))
    plan = schedule(x_from[0] + x_at, n_cols, label, kept, ROWS, U, UP, T, V, HINT)
    lane, part = block_lanes(ROWS, U, T, V, HINT), block_lanes(ROWS, UP, T, V, HINT)
    for i in range(plan[4], plan[5], tl.num_programs(1)):
        col = clean_col(plan[5] - 1 - i, plan, U * T * V)
        put_gradients(to, x_from, q_from, col, lane, None, live, None, values,
                      PROBS, WEIGHT, SMOOTH, CAP, TARGET_GRAD, HINT)  # fmt: skip
    for i in range(plan[6]):
        put_gradients(to, x_from, q_from, part_col(i, plan, U // UP, UP * T * V), part, None, live, None, values,
                      PROBS, WEIGHT, SMOOTH, CAP, TARGET_GRAD, HINT)  # fmt: skip
    for i in range(plan[7]):
        col = masked_col(i, plan, UP * T * V)
        put_gradients(to, x_from, q_from, col, part, (kept, plan[0], plan[1]), live,
                      at_label(col, label, None, UP, T, V), values,
                      PROBS, WEIGHT, SMOOTH, CAP, TARGET_GRAD, HINT)  # fmt: skip
    if ROWS == 1 and HINT > 1 and has_edges(plan, n_cols):
        edge = edge_cols(plan)
        put_gradients(to, x_from, q_from, 0, edge, (kept, 0, n_cols), live, edge == label, values,
                      PROBS, WEIGHT, SMOOTH, CAP, TARGET_GRAD, 1)  # fmt: skip
