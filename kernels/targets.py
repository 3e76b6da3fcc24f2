"""Device functions: blocks of logits and of target weights, and a row's label: its weight, its logit, and
what it adds to the others' log-sum-exp."""

import triton
import triton.language as tl

from .numerics import LN2, LOG2E, LOWEST, log1p_unit, log_sum, scale2, tanh
from .rowwise import block_mask, load_run


@triton.jit
def load_x(source, col, lane, bounds, CAP: tl.constexpr, HINT: tl.constexpr):
    """A block of logits in float32, capped; beyond the bounds (None: all is within) -inf."""
    x_ptr, x_at, class_stride, softcap = source
    x = load_run(x_ptr, x_at, col, lane, class_stride, bounds, HINT, -float("inf"))
    if CAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def load_q(source, col, lane, bounds, PROBS: tl.constexpr, WEIGHT: tl.constexpr, HINT: tl.constexpr):
    """A block of w (keep t + shift); for labels, of w shift. WEIGHT: the run of class weights that is aligned
    wherever a row's is, 0 where there are none."""
    target_ptr, t_at, class_stride, weight_ptr, keep, shift = source
    q = shift
    if PROBS:
        t = load_run(target_ptr, t_at, col, lane, class_stride, bounds, HINT)
        q = tl.fma(t, keep, shift)
    if WEIGHT:
        q *= load_run(weight_ptr, tl.full([], 0, tl.int64), col, lane, 1, bounds, WEIGHT if HINT > 1 else 1)
    return q


@triton.jit
def load_others(x_from, q_from, col, lane, bounds, is_label, DENSE: tl.constexpr, PROBS: tl.constexpr,
                WEIGHT: tl.constexpr, CAP: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """x and q of a block without what lies beyond the bounds and without the label."""
    x, q = load_x(x_from, col, lane, bounds, CAP, HINT), 0.0
    if DENSE or CAP:
        is_label |= block_mask(bounds[0], col, lane, (bounds[1], bounds[2]), HINT) == 0
    if DENSE:
        x = tl.where(is_label, LOWEST, x)
        q = tl.where(is_label, 0.0, load_q(q_from, col, lane, bounds, PROBS, WEIGHT, HINT))
    else:
        x = tl.where(is_label, -float("inf"), x)
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
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def meet_label(x_y, m, s):
    """From a label's logit and the others' (m, s): its scaled and shifted logit u_y, z = lse of the
    others - x_y (NaN for a logit of +inf), and the row's lse: less m, and as it is."""
    u_y = scale2(x_y, m)
    others = log_sum(s)
    z = tl.where(x_y == float("inf"), float("nan"), tl.fma(u_y, -LN2, others))
    lse = tl.maximum(others, u_y * LN2) + log1p_unit(tl.exp2(-tl.abs(z) * LOG2E))
    return u_y, z, lse, tl.where(s > 0, tl.fma(m, LN2, lse), x_y)
