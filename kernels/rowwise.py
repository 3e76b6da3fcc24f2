"""What the losses over rows of logits share: which rows and columns a program visits, and how.

A long row has a program of its own. It starts with its first 16-byte aligned element: blocks of U loads of T
lanes of V elements without a mask, then what is left of the label's block and of the tail in parts of UP loads,
two of them with a mask (the label's, which leaves the label out, and the last), then the edges, at most seven
elements before and behind. Parts are blocks where a row has one warp, and else one load. Short rows, and rows
whose classes lie apart, stand several in a tile, masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

EDGE: tl.constexpr = tl.constexpr(16)


@triton.jit
def rows_at(inner, ROWS: tl.constexpr):
    """This program's outer index, its rows within it ([ROWS], or a scalar where it has one), and which exist."""
    tiles = tl.cdiv(inner, ROWS)
    outer, tile = tl.full([], 0, tl.int32), tl.program_id(0)
    if tile >= tiles:  # most tensors have one outer index, and a division is many instructions
        outer = tile // tiles
        tile -= outer * tiles
    d, live = tile.to(tl.int64) * ROWS, tl.full([], True, tl.int1)
    if ROWS > 1:
        d += tl.arange(0, ROWS)
        live = d < inner
    return outer.to(tl.int64), d, live


@triton.jit
def column(v):
    """A value a row, against columns: [ROWS, 1], and that against blocks: [ROWS, 1, 1]; a scalar stays one."""
    if len(v.shape) == 0:
        return v
    else:
        return tl.expand_dims(v, len(v.shape))


@triton.jit
def row_max(v):
    """Lanes [ROWS, T] to rows [ROWS], or to a scalar where there is one row."""
    return tl.max(v, 1) if v.shape[0] > 1 else tl.max(v)


@triton.jit
def row_min(v):
    return tl.min(v, 1) if v.shape[0] > 1 else tl.min(v)


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
def over(n, SIZE: tl.constexpr):
    """n // SIZE of n >= 0: a shift, as there is no sign to look after."""
    return (n.to(tl.uint32) // SIZE).to(tl.int32)


@triton.jit
def schedule(row_ptr, n_cols, label, wanted, ROWS: tl.constexpr, U: tl.constexpr, UP: tl.constexpr, T: tl.constexpr,
             V: tl.constexpr, HINT: tl.constexpr):  # fmt: skip
    """(first, end, full, label_block, begin, clean, parts, masked, label_part, n_parts) of the row at row_ptr: aligned
    blocks lie between columns first and end. `clean` of the `full` whole ones are those without the label, dealt out
    among the programs of the second grid axis: this one takes the first at `begin`. The label's block and the tail,
    the first program's alone, are cut into parts: `parts` whole ones without the label, then `masked` ones, with it or
    not whole. label_block is `full`, and label_part `n_parts`, the whole parts, where the label is in none. Unwanted
    rows, and tiles of several rows, have masked parts alone."""
    PART: tl.constexpr = UP * T * V
    if ROWS > 1:
        return 0, n_cols, 0, 0, 0, 0, 0, tl.cdiv(n_cols, PART), 0, 0
    else:
        SIZE: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        behind = (row_ptr.to(tl.int64) & (HINT * SIZE - 1)).to(tl.uint32) // SIZE
        first = tl.minimum((HINT - behind).to(tl.int32) & (HINT - 1), n_cols)
        end = first + over(n_cols - first, HINT) * HINT
        n_parts = tl.where(wanted, over(end - first, PART), 0)
        label_part = tl.minimum((label - first).to(tl.uint32) // PART, n_parts.to(tl.uint32)).to(tl.int32)
        full = over(n_parts, U // UP)
        label_block = tl.where(label_part < n_parts, tl.minimum(over(label_part, U // UP), full), full)
        here, one = tl.where(label_block < full, 1, 0), tl.where(label_part < n_parts, 1, 0)
        begin = tl.program_id(1)
        clean, rest = full - here, tl.where(begin == 0, 1, 0)
        parts = (n_parts - clean * (U // UP) - one) * rest if U > UP else 0
        masked = (over(end - first + (PART - 1), PART) - n_parts + one) * rest
        return first, end, full, label_block, begin, clean, parts, masked, label_part, n_parts


@triton.jit
def may_split(T: tl.constexpr):
    """Whether a row may have several programs in forward: those of one warp have not."""
    return T >= 128


@triton.jit
def clean_col(i, plan, BLOCK: tl.constexpr):
    """The first column of clean block i: the label's block is passed over."""
    return plan[0] + (i + (i >= plan[3]).to(tl.int32)) * BLOCK


@triton.jit
def part_col(i, plan, EACH: tl.constexpr, PART: tl.constexpr):
    """The first column of whole part i, EACH a block: those of the label's block, then of the tail, without the
    label's."""
    here = tl.where(plan[3] < plan[2], 1, 0)
    label = plan[8] - tl.where(here > 0, plan[3], plan[2]) * EACH  # its place among them
    i += tl.where(i >= label, 1, 0)
    part = tl.where(i < EACH * here, plan[3] * EACH + i, plan[2] * EACH + i - EACH * here)
    return plan[0] + part * PART


@triton.jit
def masked_col(i, plan, PART: tl.constexpr):
    """The first column of masked part i: the label's, then the last; all if none is whole."""
    label = tl.where(plan[8] < plan[9], 1, 0)
    return plan[0] + tl.where(i < label, plan[8], plan[9] + i - label) * PART


@triton.jit
def block_lanes(ROWS: tl.constexpr, U: tl.constexpr, T: tl.constexpr, V: tl.constexpr, HINT: tl.constexpr):
    """A block's columns [1, BLOCK]. Those of several rows are [U, 1, T], and pointers made of them [U, ROWS, T], for
    T threads to have a row, and each U of its columns; or, where classes lie apart (HINT 0), 64 bits wide."""
    lane = tl.arange(0, U * T * V)[None, :]
    if ROWS > 1:
        lane = tl.reshape(lane, [U, 1, T])
        if HINT == 0:
            lane = lane.to(tl.int64)
    return lane


@triton.jit
def at_label(col, label, beyond, U: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """Which elements [ROWS, BLOCK] of the block at `col` are the row's label; or, where `beyond` is given, from that
    column on (which splits no run of V). Both are scalars or [ROWS]."""
    run, place = tl.reshape(V * tl.arange(0, U * T), [1, U * T, 1]), tl.arange(0, V)[None, None, :]
    if len(label.shape) > 0 and U * T <= 4:  # what threads exchange of the rows does not change from block to block
        found = column(column(label)) - run == col + place
    else:
        found = column(column(label - col)) - run == place
    if beyond is not None:
        found |= column(column(beyond - col)) - run <= 0
    return tl.reshape(found, [found.shape[0], U * T * V])


@triton.jit
def others_of(col, label, beyond, U: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """How many elements a lane [1, T] of a row has in the block at `col`, without those that at_label finds."""
    t = tl.arange(0, T)[None, :]
    to_label, to_end = label - col, tl.maximum(beyond - col, 0)
    runs = tl.minimum(over(over(to_end, V) - t + (T - 1), T), U)
    here = (to_label >= 0) & (to_label < tl.minimum(to_end, U * T * V)) & ((over(to_label, V) & (T - 1)) == t)
    return (runs * V - tl.where(here, 1, 0)).to(tl.float32)


@triton.jit
def block_at(ptr, at, col, lane, class_stride, HINT: tl.constexpr):
    """Pointers to a block's elements: rows at `at` (scalar or [ROWS, 1]), columns col + lane."""
    start = ptr + (at + (tl.full([], 0, tl.int64) + col) * class_stride)
    if HINT > 1:
        start = tl.multiple_of(start, 16)
    if len(lane.shape) == 3 and len(at.shape) > 0:
        start = start[None, :, :]
    return start + lane * class_stride


@triton.jit
def load_run(ptr, at, col, lane, class_stride, bounds, HINT: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """A block in float32: all of it, or what lies within bounds (rows, first, end), OTHER beyond.

    bfloat16 is the upper half of float32: aligned runs are read as pairs, and a shift or a mask widens
    each half, where a conversion would unpack it first."""
    if HINT > 1 and ptr.dtype.element_ty == tl.bfloat16:
        half: tl.constexpr = lane.shape[1] // 2
        pair = tl.arange(0, half)[None, None, :]  # of a shape of its own: accesses of one shape get one layout
        start = at + (tl.full([], 0, tl.int64) + col) * class_stride
        place = (ptr + start).to(tl.pointer_type(tl.int32), bitcast=True)
        place = tl.multiple_of(place, 16) + pair
        if bounds is None:
            both = tl.load(place)
        else:
            rows, first, end = bounds
            before = over(end - first, HINT) * (HINT // 2)
            mask = rows_mask(rows, tl.multiple_of(over(col - first, 2), HINT // 2) + pair, before)
            both = tl.load(place, mask=mask, other=-8323200 if OTHER < 0 else 0)  # a pair of -inf, or of 0
        low = (both << 16).to(tl.float32, bitcast=True)
        high = (both & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), [1, 2 * half])
    else:
        place = block_at(ptr, at, col, lane, class_stride, HINT)
        if bounds is None:
            value = tl.load(place).to(tl.float32)
        else:
            rows, first, end = bounds
            mask = block_mask(rows, col, lane, (first, end), HINT)
            value = tl.load(place, mask=mask, other=OTHER).to(tl.float32)
        if len(lane.shape) == 3:
            value = tl.reshape(tl.permute(value, 1, 0, 2), [value.shape[1], value.shape[0] * value.shape[2]])
        return value


@triton.jit
def gather_runs(place, left, V: tl.constexpr, STEP: tl.constexpr):
    """[N] pointers -> [N, V] in float32: V elements each, STEP apart, one load each; with `left`, of the first `left`
    elements [N] alone."""
    if V == 1:
        if left is None:
            return tl.load(place).to(tl.float32)
        else:
            return tl.load(place, mask=left > 0, other=0.0).to(tl.float32)
    else:
        even = gather_runs(place, left, V // 2, 2 * STEP)
        odd = gather_runs(place + STEP, None if left is None else left - STEP, V // 2, 2 * STEP)
        return tl.reshape(tl.join(even, odd), [place.shape[0], V])


@triton.jit
def load_weights(ptr, col, lane, bounds, HINT: tl.constexpr, WRITES: tl.constexpr):
    """A block of class weights in float32. Where a row is read in wide runs, a thread reads one by one the weights of
    its own columns, as any other layout would be exchanged between threads; or wide, where they too are aligned. In
    tiles, threads of many a row, or of rows that are written, read those of their own columns too."""
    if HINT > 1:
        V: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        if ((ptr + col).to(tl.int64) & 15) == 0:
            value = load_run(ptr, tl.full([], 0, tl.int64), col, lane, 1, bounds, V)
        else:
            run = V * tl.arange(0, lane.shape[1] // V)
            left = None if bounds is None else tl.where(bounds[0], bounds[2] - col, 0) - run
            value = tl.reshape(gather_runs(ptr + col + run, left, V, 1), [1, lane.shape[1]])
        return value
    elif len(lane.shape) == 3 and (WRITES or lane.shape[len(lane.shape) - 1] > 2):
        left = 0 if bounds is None else bounds[2] - col
        value = tl.load(ptr + col + lane, mask=lane < left, other=0.0).to(tl.float32)
        return tl.reshape(value, [1, lane.shape[0] * lane.shape[2]])
    else:
        return load_run(ptr, tl.full([], 0, tl.int64), col, lane, 1, bounds, 1)


@triton.jit
def store_block(place, value, mask):
    value = value.to(place.dtype.element_ty)
    if len(place.shape) == 3:
        U: tl.constexpr = place.shape[0]
        value = tl.permute(tl.reshape(value, [place.shape[1], U, place.shape[2]]), 1, 0, 2)
    if mask is None:
        tl.store(place, value)
    else:
        tl.store(place, value, mask=mask)


@triton.jit
def rows_mask(rows, place, limit):
    """Columns at `place` before `limit`, in the rows that are asked for (a scalar or [ROWS])."""
    if len(rows.shape) == 0:
        return place < limit * rows.to(tl.int32)
    elif len(place.shape) == 3:
        return rows[None, :, None] & (place < limit)
    else:
        return rows[:, None] & (place < limit)


@triton.jit
def block_mask(rows, col, lane, plan, HINT: tl.constexpr):
    """A block's columns before `end`, told so that the mask never splits an aligned vector."""
    first, end = plan[0], plan[1]
    if HINT > 1:
        return rows_mask(rows, tl.multiple_of(col - first, HINT) + lane, over(end - first, HINT) * HINT)
    else:
        return rows_mask(rows, col - first + lane, end - first)


@triton.jit
def has_edges(plan, n_cols):
    """Whether there are columns outside [first, end) for this program to see to."""
    return (tl.program_id(1) == 0) & ((plan[0] > 0) | (plan[1] < n_cols))


@triton.jit
def edge_cols(plan):
    """The columns outside [first, end) [1, EDGE]; beyond every row where there are fewer."""
    lane = tl.arange(0, EDGE)[None, :]
    return tl.where(lane < EDGE // 2, tl.where(lane < plan[0], lane, 2147483647), plan[1] + lane - EDGE // 2)
