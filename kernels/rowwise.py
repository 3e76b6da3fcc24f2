"""What the losses over rows of logits share: which rows and columns a program visits, and how.

A long row has a program of its own. It starts with its first 16-byte aligned element: `full` blocks
without a mask, then blocks with one (the label's block, which leaves the label out, and the tail), then
the edges, at most seven elements before and behind. Short rows, and rows whose classes lie apart, stand
several in a tile [ROWS, BLOCK], every block of it masked. BLOCK is U loads of T lanes of V elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .layout import Rows, rows
from .numerics import LOG2E, LOWEST, lanes_max, lanes_sum, scale2, spread

FILL = 512  # programs that fill the largest GPU: long rows are split until there are as many
VECTOR = 8  # elements in a run that every supported dtype loads in 16 or 32 bytes
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
def total(v):
    """The sum of a value a row."""
    if len(v.shape) == 0:
        return v
    else:
        return tl.sum(v)


@triton.jit
def schedule(x_at, n_cols, label, wanted, ROWS: tl.constexpr, BLOCK: tl.constexpr, HINT: tl.constexpr):
    """(first, end, full, label_block, clean, masked): aligned blocks lie between columns first and end,
    `full` of them whole; `clean` blocks need no mask, those without the label (label_block is `full`
    where the label is in none), and `masked` blocks do. Unwanted rows have masked blocks alone."""
    if ROWS > 1:
        return 0, n_cols, 0, 0, 0, tl.cdiv(n_cols, BLOCK)
    else:
        first = tl.minimum((-x_at & (HINT - 1)).to(tl.int32), n_cols)
        end = n_cols - (n_cols - first) % HINT
        full = (end - first) // BLOCK
        at = label - first
        label_block = tl.where((at >= 0) & (at // BLOCK < full), at // BLOCK, full)
        here = (label_block < full).to(tl.int32)
        blocks = tl.cdiv(end - first, BLOCK)
        clean = tl.where(wanted, full - here, 0)
        return first, end, full, label_block, clean, blocks - clean


@triton.jit
def clean_col(i, plan, BLOCK: tl.constexpr):
    """The first column of clean block i: the label's block is passed over."""
    return plan[0] + (i + (i >= plan[3]).to(tl.int32)) * BLOCK


@triton.jit
def masked_col(i, plan, BLOCK: tl.constexpr):
    """The first column of masked block i: the label's block, then the tail; all blocks if none is clean."""
    _first, _end, full, label_block, clean, _masked = plan
    block = tl.where((i == 0) & (label_block < full), label_block, full)
    return plan[0] + tl.where(clean > 0, block, i) * BLOCK


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
def load_block(place, mask):
    """Elements in float32; mask None reads them all."""
    if mask is None:
        return tl.load(place).to(tl.float32)
    else:
        return tl.load(place, mask=mask, other=0.0).to(tl.float32)


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
            before = tl.multiple_of((end - first) // 2, HINT // 2)
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
    return rows_mask(rows, tl.multiple_of(col - first, HINT) + lane, tl.multiple_of(end - first, HINT))


@triton.jit
def edge_cols(plan):
    """The columns outside [first, end) [1, EDGE]; beyond every row where there are fewer."""
    lane = tl.arange(0, EDGE)[None, :]
    return tl.where(lane < EDGE // 2, tl.where(lane < plan[0], lane, 2**30), plan[1] + lane - EDGE // 2)


@triton.jit
def lse_start(ROWS: tl.constexpr, T: tl.constexpr):
    zero = tl.zeros([ROWS, T], tl.float32)
    return tl.full([ROWS, T], LOWEST, tl.float32), zero, zero, zero


@triton.jit
def lse_update(x, q, m, s, a, b, DENSE: tl.constexpr, U: tl.constexpr, T: tl.constexpr,
               V: tl.constexpr):  # fmt: skip
    """One block [ROWS, BLOCK] into the lanes [ROWS, T]: m the maximum, s = sum 2^(x log2(e) - m), and
    where DENSE a = sum q (x log2(e) - m), b = sum q. An element with x = LOWEST, q = 0 adds nothing."""
    x = tl.reshape(x, [x.shape[0], U, T, V])
    top = tl.maximum(m, lanes_max(x) * LOG2E)
    u = scale2(x, spread(top))
    s = tl.fma(s, tl.exp2(m - top), lanes_sum(tl.exp2(u)))
    if DENSE:
        q = tl.reshape(q, [x.shape[0], U, T, V])
        a = a + tl.fma(b, m - top, lanes_sum(q * u))
        b = b + lanes_sum(q)
    return top, s, a, b


@triton.jit
def lse_join(m, s, a, b):
    """Lanes [ROWS, T] to rows [ROWS], or to scalars where there is one row."""
    top = tl.max(m, 1)
    down = m - top[:, None]
    s, a, b = tl.sum(s * tl.exp2(down), 1), tl.sum(tl.fma(b, down, a), 1), tl.sum(b, 1)
    if m.shape[0] == 1:
        return tl.max(top, 0), tl.sum(s, 0), tl.sum(a, 0), tl.sum(b, 0)
    else:
        return top, s, a, b


@triton.jit
def lse_meet(m, s, a, b, m2, s2, a2, b2):
    """Two parts of the same rows to one."""
    top = tl.maximum(m, m2)
    s = s * tl.exp2(m - top) + s2 * tl.exp2(m2 - top)
    return top, s, tl.fma(b, m - top, a) + tl.fma(b2, m2 - top, a2), b + b2


class Tiling(NamedTuple):
    """The compile-time sizes of a row's class, and the warps of a program."""

    ROWS: int
    U: int
    T: int
    V: int
    HINT: int
    num_warps: int

    @property
    def block(self) -> int:
        return self.U * self.T * self.V

    @property
    def constants(self) -> dict[str, int]:
        return dict(ROWS=self.ROWS, U=self.U, T=self.T, V=self.V, HINT=self.HINT)


def tiling(walk: Rows, element_size: int) -> Tiling:
    """Four classes by row length: to 16, to 128, to 1024 where rows are aligned, and longer.

    Classes that lie apart (class stride not 1) have a table of their own: positions side by side."""
    v = 16 // element_size
    if any(c != 1 for _, _, c in walk.strides) and walk.cols > 1:
        return Tiling(256, 4, 2, 1, 1, 4) if walk.inner >= 256 else Tiling(32, 4, 8, 1, 1, 4)
    first = walk.strides[0]
    together = all(s[k] % VECTOR == first[k] % VECTOR for s in walk.strides for k in (0, 1))
    aligned = together and walk.cols % VECTOR == first[0] % VECTOR == first[1] % VECTOR == 0
    if walk.cols <= 16:
        return Tiling(128, 1, 16, 1, 1, 4)
    if walk.cols <= 128:
        return Tiling(16, 1, 128, 1, 1, 4)
    if walk.cols <= 1024 and aligned:
        return Tiling(2, 1, 1024 // v, v, VECTOR, 4)
    return Tiling(1, 4, 128, v, VECTOR if together else 1, 4)


def row_walk(
    dim: int, *tensors: torch.Tensor | None
) -> tuple[Rows, Tiling, int, list[torch.Tensor | None]]:
    """Cover the rows of tensors of one shape: (walk, tiling, programs, tensors to use, in their order;
    those that no common walk fits are contiguous copies)."""
    there = [t for t in tensors if t is not None]
    walk = rows(dim, *there)
    if walk is None:
        there = [t.contiguous() for t in there]
        walk = rows(dim, *there)
    shape = tiling(walk, there[0].element_size())
    rest, strides = iter(there), iter(walk.strides)
    placed = [None if t is None else next(rest) for t in tensors]
    all_strides = [(0, 0, 0) if t is None else next(strides) for t in tensors]
    programs = walk.outer * triton.cdiv(walk.inner, shape.ROWS)
    return walk._replace(strides=all_strides), shape, programs, placed


def stride_scalars(*named: tuple[str, tuple[int, int, int]]) -> dict[str, int]:
    return {
        f"{name}_{part}": stride
        for name, strides in named
        for part, stride in zip(("outer", "inner", "class_stride"), strides, strict=True)
    }


def restore(computed: list[torch.Tensor | None], wanted: list[torch.Tensor | None]) -> None:
    """Copy outputs that had to be computed elsewhere back to where they belong."""
    for c, w in zip(computed, wanted, strict=False):
        if w is not None and c is not w:
            w.copy_(c)
