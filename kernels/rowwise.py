"""What the losses over rows of logits share: which rows and columns a program visits, and how.

A long row has a program of its own. It starts with its first 16-byte aligned element: blocks of U loads of T
lanes of V elements without a mask, then what is left of the label's block and of the tail load by load, two of
them with a mask (the label's, which leaves the label out, and the last), then the edges, at most seven
elements before and behind. Short rows, and rows whose classes lie apart, stand several in a tile, masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

EDGE: tl.constexpr = tl.constexpr(16)


@triton.jit
def rows_at(inner, ROWS: tl.constexpr):
    """This program's outer index and its rows within it: [ROWS], or a scalar where it has one."""
    tiles = tl.cdiv(inner, ROWS)
    program = tl.program_id(0)
    d = (program % tiles).to(tl.int64) * ROWS
    if ROWS > 1:
        d += tl.arange(0, ROWS)
    return (program // tiles).to(tl.int64), d


@triton.jit
def column(v):
    """A value a row, against columns: [ROWS, 1]; a scalar stays one."""
    if len(v.shape) == 0:
        return v
    else:
        return v[:, None]


@triton.jit
def row_max(v):
    """Lanes [ROWS, T] to rows [ROWS], or to a scalar where there is one row."""
    return tl.max(v, 1) if v.shape[0] > 1 else tl.max(v)


@triton.jit
def row_sum(v):
    return tl.sum(v, 1) if v.shape[0] > 1 else tl.sum(v)


@triton.jit
def total(v):
    """The sum of a value a row."""
    if len(v.shape) == 0:
        return v
    else:
        return tl.sum(v)


@triton.jit
def schedule(x_at, n_cols, label, wanted, ROWS: tl.constexpr, U: tl.constexpr, T: tl.constexpr,
             V: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """(first, end, full, label_block, clean, loads, masked, label_load, n_loads): aligned blocks lie between
    columns first and end. `clean` of the `full` whole ones are those without the label. The label's block
    and the tail are cut into loads (a block is U of them): `loads` whole ones without the label, then
    `masked` ones, with it or not whole. label_block is `full`, and label_load `n_loads`, the whole loads, where
    the label is in none. Unwanted rows, and tiles of several rows, have masked loads alone (of U there)."""
    if ROWS > 1:
        return 0, n_cols, 0, 0, 0, 0, tl.cdiv(n_cols, U * T * V), 0, 0
    else:
        first = tl.minimum((-x_at & (HINT - 1)).to(tl.int32), n_cols)
        end = n_cols - (n_cols - first) % HINT
        n_loads = tl.where(wanted, (end - first) // (T * V), 0)
        at = label - first
        label_load = tl.where((at >= 0) & (at // (T * V) < n_loads), at // (T * V), n_loads)
        full, label_block = n_loads // U, label_load // U
        label_block = tl.where((label_load < n_loads) & (label_block < full), label_block, full)
        here, one = tl.where(label_block < full, 1, 0), tl.where(label_load < n_loads, 1, 0)
        loads = n_loads - (full - here) * U - one
        masked = tl.cdiv(end - first, T * V) - n_loads + one
        return first, end, full, label_block, full - here, loads, masked, label_load, n_loads


@triton.jit
def clean_col(i, plan, BLOCK: tl.constexpr):
    """The first column of clean block i: the label's block is passed over."""
    return plan[0] + (i + (i >= plan[3]).to(tl.int32)) * BLOCK


@triton.jit
def load_col(i, plan, U: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """The first column of whole load i: those of the label's block, then of the tail, without the label's."""
    here = tl.where(plan[3] < plan[2], 1, 0)
    label = plan[7] - tl.where(here > 0, plan[3], plan[2]) * U  # its place among them
    i += tl.where(i >= label, 1, 0)
    load = tl.where(i < U * here, plan[3] * U + i, plan[2] * U + i - U * here)
    return plan[0] + load * (T * V)


@triton.jit
def masked_col(i, plan, BLOCK: tl.constexpr):
    """The first column of masked load i, of BLOCK columns: the label's, then the last; all if none is whole."""
    label = tl.where(plan[7] < plan[8], 1, 0)
    return plan[0] + tl.where(i < label, plan[7], plan[8] + i - label) * BLOCK


@triton.jit
def block_lanes(U: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """A block's columns [1, BLOCK]; in 64 bits where classes lie apart (V is 1 there, and U is not)."""
    lane = tl.arange(0, U * T * V)[None, :]
    if V == 1 and U > 1:
        lane = lane.to(tl.int64)
    return lane


@triton.jit
def at_label(col, label, U: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """Which elements [ROWS, BLOCK] of the block at `col` are the row's label (a scalar or [ROWS])."""
    if len(label.shape) == 0:
        run = tl.reshape(label - col - V * tl.arange(0, U * T), [1, U * T, 1])
    else:
        run = tl.reshape(label[:, None] - col - V * tl.arange(0, U * T)[None, :], [label.shape[0], U * T, 1])
    return tl.reshape(run == tl.arange(0, V)[None, None, :], [run.shape[0], U * T * V])


@triton.jit
def block_at(ptr, at, col, lane, class_stride, HINT: tl.constexpr):
    """Pointers to a block's elements: rows at `at` (scalar or [ROWS, 1]), columns col + lane [1, BLOCK]."""
    start = at + (tl.full([], 0, tl.int64) + col) * class_stride
    if HINT > 1:
        start = tl.multiple_of(start, HINT if len(at.shape) == 0 else [HINT, HINT])
    return ptr + start + lane * class_stride


@triton.jit
def load_run(ptr, at, col, lane, class_stride, bounds, HINT: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """A block in float32: all of it, or what lies within bounds (rows, first, end), OTHER beyond.

    bfloat16 is the upper half of float32: aligned runs are read as pairs, and a shift or a mask widens
    each half, where a conversion would unpack it first."""
    if HINT > 1 and ptr.dtype.element_ty == tl.bfloat16:
        half: tl.constexpr = lane.shape[1] // 2
        pair = tl.arange(0, half)[None, :]
        start = at + (tl.full([], 0, tl.int64) + col) * class_stride
        place = (ptr + start).to(tl.pointer_type(tl.int32), bitcast=True)
        place = tl.multiple_of(place, 16 if len(at.shape) == 0 else [16, 16]) + pair
        if bounds is None:
            both = tl.load(place)
        else:
            rows, first, end = bounds
            before = (end - first) // HINT * (HINT // 2)
            mask = rows_mask(rows, tl.multiple_of((col - first) // 2, HINT // 2) + pair, before)
            both = tl.load(place, mask=mask, other=-8323200 if OTHER < 0 else 0)  # a pair of -inf, or of 0
        low = (both << 16).to(tl.float32, bitcast=True)
        high = (both & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), [both.shape[0], 2 * half])
    else:
        place = block_at(ptr, at, col, lane, class_stride, HINT)
        if bounds is None:
            return tl.load(place).to(tl.float32)
        else:
            rows, first, end = bounds
            mask = block_mask(rows, col, lane, (first, end), HINT)
            return tl.load(place, mask=mask, other=OTHER).to(tl.float32)


@triton.jit
def store_block(place, value, mask):
    value = value.to(place.dtype.element_ty)
    if mask is None:
        tl.store(place, value)
    else:
        tl.store(place, value, mask=mask)


@triton.jit
def rows_mask(rows, place, limit):
    """Columns at `place` before `limit`, in the rows that are asked for (a scalar or [ROWS])."""
    if len(rows.shape) == 0:
        return place < limit * rows.to(tl.int32)
    else:
        return rows[:, None] & (place < limit)


@triton.jit
def block_mask(rows, col, lane, plan, HINT: tl.constexpr):
    """A block's columns before `end`, told so that the mask never splits an aligned vector."""
    first, end = plan[0], plan[1]
    return rows_mask(rows, tl.multiple_of(col - first, HINT) + lane, (end - first) // HINT * HINT)


@triton.jit
def edge_cols(plan):
    """The columns outside [first, end) [1, EDGE]; beyond every row where there are fewer."""
    lane = tl.arange(0, EDGE)[None, :]
    return tl.where(lane < EDGE // 2, tl.where(lane < plan[0], lane, 2147483647), plan[1] + lane - EDGE // 2)
