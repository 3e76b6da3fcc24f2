"""What the element-wise losses share: a walk over all elements in one order, in tiles of BLOCK.

A program visits up to `trips` tiles side by side: whole ones, and the last one of all with a mask. Partial sums, one a
program, are added up by a second kernel in a fixed order: sums have the same bits on every run.

The order is that of `outer` x `rows` x `cols` elements. Element i, in row R = i // cols of all and outer index O = R //
rows, lies i col + R row + O outer elements behind a tensor's first: `row` and `outer` are what the end of a row, or of
all rows of an outer index, adds to the way. Tensors without any of it are FLAT. A run is V elements that a thread has
side by side; with one tensor loaded in whole runs (WIDE), all have their elements in these places.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .layout import contiguous_plane
from .numerics import APPROXIMATE

TILE = 2048 if APPROXIMATE.value else 1024  # before Triton 3.9, 2048 takes up to 168 registers a thread
NUM_WARPS = 4
MAX_SHARE = 16384  # elements a program
MAX_LANE = 120  # elements: a lane's product of 1 + e, e in [0, 1], stays finite
FILL = 1024  # programs that fill the largest GPU: with fewer, a program takes fewer tiles
VECTOR = 8
# How a tensor is read: as it lies; a value a run; whole runs that lie apart; element by element
FLAT, SAME, RUNS, APART = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LONG = tl.constexpr(MAX_SHARE)  # columns of which a program sees the end of one row at most
FAR = tl.constexpr(2**30)  # further than a program goes


@triton.constexpr_function
def mode(modes, k):
    """How tensor number k is read: the mode, and four times how many of its last two strides, row and outer, count."""
    return modes >> 4 * k & 15


@triton.jit
def tiles_of(n, trips, period, BLOCK: tl.constexpr, DEPTH: tl.constexpr, gap=None):
    """This program's (first element, elements from there on, tiles that exist as a whole, and that do in part), its
    row, outer index, and what is left of the row and of the outer index; the gap, and elements of a tile before the
    next program's. period: (rows, cols, and reciprocals of both); DEPTH: 0 where all is one row, 1 where all has one
    outer index. Tiles lie side by side, or a gap apart."""
    rows, cols, _, _ = period
    if gap is None:
        start, inside = tl.program_id(0).to(tl.int64) * (trips * BLOCK), BLOCK
        before = tl.minimum(n - start, trips * BLOCK).to(tl.int32)
        whole = (before.to(tl.uint32) // BLOCK).to(tl.int32)
        masked = ((before.to(tl.uint32) + (BLOCK - 1)) // BLOCK).to(tl.int32) - whole
    else:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        before, inside = n - start, tl.minimum(gap - start, BLOCK).to(tl.int32)
        last = (trips - 1) * gap.to(tl.int64)  # where a tile would begin that not all programs have
        tiles, rest = trips - tl.where(last < before, 0, 1), before - tl.where(last < before, last, last - gap)
        whole = tl.where(inside < BLOCK, 0, tiles - tl.where(rest < BLOCK, 1, 0))
        masked = tiles - whole
    row, outer, left, rows_left = start * 0, start * 0, 0, 0
    if DEPTH > 0:
        row = start // cols
        left = tl.minimum((row + 1) * cols - start, FAR).to(tl.int32)
    if DEPTH > 1:
        outer = row // rows
        rows_left = tl.minimum((outer + 1) * rows - row, FAR).to(tl.int32)
    return start, before, whole, masked, row, outer, left, rows_left, gap, inside


@triton.jit
def tile_at(i, plan, period, BLOCK: tl.constexpr):
    """Tile i: its first element, of all and of this program's, and its elements [1, BLOCK] within it."""
    first = (tl.full([], 0, tl.int64) + i) * (BLOCK if plan[8] is None else plan[8])
    return plan[0] + first, i * BLOCK, tl.arange(0, BLOCK)[None, :], plan, period


@triton.jit
def limit_of(i, plan, BLOCK: tl.constexpr):
    """How many elements tile i has, where it exists in part."""
    if plan[8] is None:
        return plan[1] - i * BLOCK
    else:
        return tl.minimum(plan[1] - (tl.full([], 0, tl.int64) + i) * plan[8], plan[9]).to(tl.int32)


@triton.jit
def ends(place, left, size, reciprocal):
    """How many stretches of `size` end at or before `place`, up to MAX_SHARE, the first of them after `left`."""
    place_of_all = place + (tl.minimum(size, FAR).to(tl.int32) - left)
    many = tl.umulhi((2 * place_of_all).to(tl.uint32), reciprocal.to(tl.uint32)).to(tl.int32)
    return tl.where(size < LONG, many, (place >= left).to(tl.int32))


@triton.jit
def row_ends(place, at, MODE: tl.constexpr):
    """How many rows end at or before the program's element `place`; 0 where that doesn't count."""
    if MODE < 4:
        return place * 0
    else:
        return ends(place, at[3][6], at[4][1], at[4][3])


@triton.jit
def place_of(source, place, row_end, at, MODE: tl.constexpr):
    """Pointers to the program's elements `place`, in which so many rows have ended before."""
    ptr, outer, row, stride = source
    plan, period = at[3], at[4]
    start, way = plan[0] * stride, place.to(tl.int64) * stride
    if MODE >= 4:
        start += plan[4] * row
        way += row_end.to(tl.int64) * row
    if MODE >= 8:
        start += plan[5] * outer
        way += ends(row_end, plan[7], period[0], period[2]).to(tl.int64) * outer
    return (ptr + start) + way


@triton.jit
def read(place, mask):
    """What lies there, or 0 where the mask, if there is one, is not set."""
    return tl.load(place) if mask is None else tl.load(place, mask=mask, other=0)


@triton.jit
def gather_runs(here, behind, left, limit, V: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, stride):
    """[N] pointers -> [N, V] in float32, `stride` apart: from `behind` on where no more than `left` are left of a row;
    without a mask, or 0 from element `limit` of the run on."""
    if V == 1:
        place = here if behind is None else tl.where(left <= FIRST, behind, here)
        return read(place + FIRST * stride, None if limit is None else limit > FIRST).to(tl.float32)
    else:
        even = gather_runs(here, behind, left, limit, V // 2, FIRST, 2 * STEP, stride)
        odd = gather_runs(here, behind, left, limit, V // 2, FIRST + STEP, 2 * STEP, stride)
        return tl.reshape(tl.join(even, odd), [here.shape[0], V])


@triton.jit
def load_pairs(place, mask):
    """Aligned bfloat16 as pairs in float32, [..., P] -> [..., 2 P]: a shift or a mask widens each half."""
    both = read(place, mask)
    low = (both << 16).to(tl.float32, bitcast=True)
    high = (both & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [both.shape[0], 2 * both.shape[1]])


@triton.jit
def load_runs(source, at, limit, MODE: tl.constexpr, V: tl.constexpr):
    """A tile of a tensor that is not FLAT, run by run: [N, V] in float32."""
    ptr, stride = source[0], source[3]
    N: tl.constexpr = at[2].shape[1] // V
    first = V * tl.arange(0, N)
    run = at[1] + first
    row_end = row_ends(run, at, MODE)
    here = place_of(source, run, row_end, at, MODE)
    if MODE % 4 == SAME:
        value = read(here, None if limit is None else first < limit).to(tl.float32)
        return tl.broadcast_to(tl.expand_dims(value, 1), [N, V])
    elif MODE % 4 == RUNS:
        here = tl.multiple_of(tl.expand_dims(here, 1), [16, 16])
        mask = None if limit is None else tl.expand_dims(first, 1) < limit
        if ptr.dtype.element_ty == tl.bfloat16:
            return load_pairs(here.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, V // 2)[None, :], mask)
        else:
            return read(here + tl.arange(0, V)[None, :], mask).to(tl.float32)
    else:
        behind, left = None, None
        if MODE >= 4:
            cols = tl.minimum(at[4][1], FAR).to(tl.int32)
            left = at[3][6] + row_end * cols - run
            behind = place_of(source, run, row_end + 1, at, MODE)
        return gather_runs(here, behind, left, None if limit is None else limit - first, V, 0, 1, stride)


@triton.jit
def load(source, at, limit, MODE: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr, OTHER: tl.constexpr = 0.0,
         held=None):  # fmt: skip
    """A tile of (pointer, outer, row, column stride) in float32: all of it, or its first `limit` elements, OTHER
    behind them. `held`: it is known already."""
    ptr = source[0]
    if held is not None:
        value = held
    elif MODE == SAME:
        value = tl.full(at[2].shape, tl.load(ptr).to(tl.float32), tl.float32)
    elif MODE != FLAT and WIDE:
        value = tl.reshape(load_runs(source, at, limit, MODE, V), at[2].shape)
    elif MODE != FLAT:
        place = at[1] + at[2]
        place = place_of(source, place, row_ends(place, at, MODE), at, MODE)
        value = read(place, None if limit is None else at[2] < limit).to(tl.float32)
    else:
        first = ptr + at[0]
        if WIDE:
            first = tl.multiple_of(first, 16)
        if limit is None and WIDE and ptr.dtype.element_ty == tl.bfloat16:
            pairs = tl.multiple_of(first.to(tl.pointer_type(tl.int32), bitcast=True), 16)
            value = load_pairs(pairs + tl.arange(0, at[2].shape[1] // 2)[None, :], None)
        else:
            value = read(first + at[2], None if limit is None else at[2] < limit).to(tl.float32)
    return value if limit is None else tl.where(at[2] < limit, value, OTHER)


@triton.jit
def hold(source, plan, period, BLOCK: tl.constexpr, MODE: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr):
    """What all tiles of a program, a gap apart, have of a tensor that repeats; None of one that doesn't."""
    if plan[8] is None or MODE < 4:
        return None
    else:
        return load(source, tile_at(0, plan, period, BLOCK), None, MODE, WIDE, V)


@triton.jit
def store(to, value, at, limit, MODE: tl.constexpr, WIDE: tl.constexpr):
    if MODE == FLAT:
        first = to[0] + at[0]
        place = (tl.multiple_of(first, 16) if WIDE else first) + at[2]
    else:
        place = at[1] + at[2]
        place = place_of(to, place, row_ends(place, at, MODE), at, MODE)
    value = value.to(to[0].dtype.element_ty)
    if limit is None:
        tl.store(place, value)
    else:
        tl.store(place, value, mask=at[2] < limit)


@triton.jit
def lanes(tile, V: tl.constexpr, WIDE: tl.constexpr):
    """[1, BLOCK] -> [lanes, V], a lane's elements in one thread: neighbours where accesses are wide."""
    LANES: tl.constexpr = tile.shape[1] // V
    if WIDE:
        return tl.reshape(tile, [LANES, V])
    else:
        return tl.trans(tl.reshape(tile, [V, LANES]))


class Walk(NamedTuple):
    """How a launch covers its tensors (None where there is none): sizes, and for each tensor (outer, row, column)
    strides and how it is read."""

    sizes: tuple[int, int, int]
    strides: list[tuple[int, int, int]]
    modes: list[int]
    tensors: list[torch.Tensor | None]
    block: int
    trips: int
    gap: int
    wide: bool
    lane: int

    @property
    def programs(self) -> int:
        n = math.prod(self.sizes)
        return triton.cdiv(min(n, self.gap or n), self.block * (1 if self.gap else self.trips))

    @property
    def scalars(self) -> dict[str, int]:
        outer, rows, cols = self.sizes
        per_row, per_col = (2**31 // max(size, 2) + 1 for size in (rows, cols))
        return dict(n=outer * rows * cols, rows=rows, cols=cols, per_row=per_row, per_col=per_col, trips=self.trips)

    @property
    def constants(self) -> dict[str, int | bool]:
        outer, rows, _ = self.sizes
        modes = sum(mode << 4 * k for k, mode in enumerate(self.modes))
        return dict(MODES=modes, DEPTH=2 if outer > 1 else 1 if rows > 1 else 0, BLOCK=self.block, WIDE=self.wide,
                    V=self.lane)  # fmt: skip

    def stride_scalars(self, *names: str) -> dict[str, int]:
        return {
            f"{name}_{axis}": stride
            for name, strides in zip(names, self.strides, strict=True)
            for axis, stride in zip(("outer", "row", "stride"), strides, strict=True)
        }

    def restore(self, *outputs: torch.Tensor | None) -> None:
        """Copy outputs that had to be computed elsewhere back to where they belong."""
        for computed, wanted in zip(self.tensors, outputs, strict=False):
            if wanted is not None and computed is not None and computed is not wanted:
                wanted.copy_(computed)


def trips_of(tiles: int, tile: int) -> int:
    """Tiles a program: as many as leave enough programs to fill a GPU. A lane has up to VECTOR elements of each."""
    return max(1, min(MAX_SHARE // tile, MAX_LANE // VECTOR, tiles // FILL))


def _mode(t: torch.Tensor, strides: tuple[int, int, int], cols: int, run: int, wide: bool) -> int:
    """How a tensor is read, in runs (wide) of so many elements, or element by element."""
    outer, row, col = strides
    depth = 4 * (2 if outer else 1 if row else 0)
    aligned = t.data_ptr() % 16 == 0
    if depth == 0 and col == 1 and (aligned or not wide):
        return FLAT.value
    if col == 0 and (depth == 0 or (wide and cols % run == 0)):
        return SAME.value + depth
    if wide and aligned and col == 1 and cols % run == outer % VECTOR == row % VECTOR == 0:
        return RUNS.value + depth
    return APART.value + depth


def _gap(sizes: tuple[int, int, int], repeated: list[tuple[int, int, int]], run: int, trips: int) -> int:
    """The elements from a tile of a program to its next, for all to have the same of tensors with these (outer, row,
    column) strides, and to begin with a run; 0 where they don't repeat."""
    (outer, rows, cols), by_row = sizes, any(s[1] for s in repeated)
    if not repeated or any(s[0] for s in repeated) or (by_row and outer == 1):
        return 0
    step = math.lcm(rows * cols if by_row else cols, run)
    return triton.cdiv(outer * rows * cols, trips * step) * step


def walk(*tensors: torch.Tensor | None, tile: int = TILE, held: int = 0) -> Walk:
    """Cover tensors of one shape (None where there is none); copied only where no walk fits all. A tile is half
    as large of float32, and with more than three tensors; kernels that keep more an element ask for a smaller one.
    Where what is not flat is among the last `held` tensors, and repeats, the tiles of a program lie a gap apart."""
    there = [t for t in tensors if t is not None]
    if len(there) > 3 or there[0].element_size() > 2:
        tile = min(tile, TILE // 2)
    plane, there = contiguous_plane(there)
    outer, rows, cols = plane.sizes
    run = 16 // there[0].element_size()
    steps = [((o - rows * r) * (outer > 1), (r - cols * c) * (rows > 1), c) for o, r, c in plane.strides]
    modes = [_mode(t, s, cols, run, True) for t, s in zip(there, steps, strict=True)]
    whole = {FLAT.value, RUNS.value} & {m % 4 for m in modes}
    wide = bool(whole) and (cols >= run or all(m % 4 != APART.value or m < 4 for m in modes))
    if not wide:
        modes = [_mode(t, s, cols, run, False) for t, s in zip(there, steps, strict=True)]
        tile = min(tile, TILE // 2)  # for the registers
    if any(m > SAME.value for m in modes):  # for the addresses
        tile = min(tile, TILE // 2 if wide else TILE // 4)
    tile = max(tile, 32 * NUM_WARPS * run) if wide else tile  # 16 bytes a thread
    n, first = outer * rows * cols, len(there) - sum(t is not None for t in tensors[len(tensors) - held :])
    trips, gap = trips_of(triton.cdiv(n, tile), tile), 0
    if all(m <= SAME.value or (m >= 4 and k >= first) for k, m in enumerate(modes)):
        gap = _gap(plane.sizes, [s for s, m in zip(plane.strides, modes, strict=True) if m >= 4], run, trips)
    trips = triton.cdiv(n, gap) if gap else trips
    rest = iter(zip(there, steps, modes, strict=True))
    placed, strides, ways = zip(*((None, (0, 0, 0), 0) if t is None else next(rest) for t in tensors), strict=True)
    lane = run if wide else min(8, tile // (32 * NUM_WARPS))
    return Walk(plane.sizes, list(strides), list(ways), list(placed), tile, trips, gap, wide, lane)
