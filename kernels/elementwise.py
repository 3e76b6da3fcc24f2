"""What the element-wise losses share: a walk over a plane of rows x cols in tiles [ROWS, BLOCK].

A program visits up to `trips` tiles side by side: whole ones without a mask, then those with one. Partial
sums, one a program, are added up by a second kernel in a fixed order: sums have the same bits on every run.
"""

from __future__ import annotations

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


@triton.jit
def tiles_of(n_rows, n_cols, chunks, trips, ROWS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """(row, start, before, whole, masked): this program's first row and column, the columns from there on
    that it covers, its tiles that exist as a whole, and those that do in part. FLAT: there is one row."""
    row, chunk = tl.full([], 0, tl.int64), tl.program_id(0)
    if not FLAT:
        row, chunk = (tl.program_id(0) // chunks).to(tl.int64) * ROWS, tl.program_id(0) % chunks
    start = chunk.to(tl.int64) * trips * BLOCK
    before = tl.minimum(n_cols - start, trips * BLOCK).to(tl.int32).to(tl.uint32)
    whole = (before // BLOCK).to(tl.int32)
    if not FLAT:
        whole = tl.where(row + ROWS <= n_rows, whole, 0)
    return row, start, before.to(tl.int32), whole, ((before + (BLOCK - 1)) // BLOCK).to(tl.int32) - whole


@triton.jit
def tile_at(i, plan, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Tile i: its rows [ROWS, 1] and columns [1, BLOCK] within it, its first row and column."""
    start = plan[1] + (tl.full([], 0, tl.int64) + i) * BLOCK
    return tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :], plan[0], start


@triton.jit
def tile_mask(i, plan, n_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of tile i exist."""
    mask = tl.arange(0, BLOCK)[None, :] < plan[2] - i * BLOCK
    if ROWS > 1:
        mask &= plan[0] + tl.arange(0, ROWS)[:, None] < n_rows
    return mask


@triton.jit
def first_of(source, at, WIDE: tl.constexpr):
    """Pointers to the first element of each row of a tile [ROWS, 1]; a scalar where it has one row. WIDE:
    rows are contiguous and aligned."""
    ptr, row_stride, col_stride = source
    start = ptr + (at[2] * row_stride + at[3] * col_stride)
    if at[0].shape[0] > 1:
        start += at[0] * row_stride
    if WIDE:
        start = tl.multiple_of(start, 16 if at[0].shape[0] == 1 else [16, 16])
    return start


@triton.jit
def load(source, at, mask, WIDE: tl.constexpr, OTHER: tl.constexpr = 0.0):
    """A tile of (pointer, row stride, column stride) in float32: all of it, or what the mask lets, OTHER
    elsewhere. Wide bfloat16 is read in pairs, widened by a shift and a mask."""
    first = first_of(source, at, WIDE)
    if mask is not None:
        value = tl.load(first + at[1] * source[2], mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value, OTHER)
    elif WIDE and source[0].dtype.element_ty == tl.bfloat16:
        half: tl.constexpr = at[1].shape[1] // 2
        pairs = first.to(tl.pointer_type(tl.int32), bitcast=True)
        pairs = tl.multiple_of(pairs, 16 if at[0].shape[0] == 1 else [16, 16])
        both = tl.load(pairs + tl.arange(0, half)[None, :])
        low = (both << 16).to(tl.float32, bitcast=True)
        high = (both & -65536).to(tl.float32, bitcast=True)
        value = tl.reshape(tl.join(low, high), [at[0].shape[0], 2 * half])
    else:
        value = tl.load(first + at[1] * source[2]).to(tl.float32)
    return value


@triton.jit
def store(to, value, at, mask, WIDE: tl.constexpr):
    place = first_of(to, at, WIDE) + at[1] * to[2]
    value = value.to(to[0].dtype.element_ty)
    if mask is None:
        tl.store(place, value)
    else:
        tl.store(place, value, mask=mask)


@triton.jit
def lanes(tile, V: tl.constexpr, WIDE: tl.constexpr):
    """[ROWS, BLOCK] -> [lanes, V], a lane's elements in one thread: neighbours where accesses are wide."""
    LANES: tl.constexpr = tile.shape[0] * tile.shape[1] // V
    if WIDE:
        return tl.reshape(tile, [LANES, V])
    else:
        return tl.trans(tl.reshape(tile, [V, LANES]))


@triton.jit
def twos(x):
    """[N, V] -> [N, ..., 2], to be split again and again: the compiler is slow where each split has its reshape."""
    if x.shape[1] == 8:
        return tl.reshape(x, [x.shape[0], 2, 2, 2])
    elif x.shape[1] == 4:
        return tl.reshape(x, [x.shape[0], 2, 2])
    else:
        return tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])


@triton.jit
def add_dot(total, a, b):
    """total [lanes] + the sums of a b [lanes, V] over a lane, one multiplication and addition each."""
    if len(a.shape) == 1:
        return tl.fma(a, b, total)
    elif a.shape[1] == 1:
        return tl.fma(tl.reshape(a, [a.shape[0]]), tl.reshape(b, [a.shape[0]]), total)
    elif len(a.shape) == 2 and a.shape[1] > 2:
        return add_dot(total, twos(a), twos(b))
    else:
        a0, a1 = tl.split(a)
        b0, b1 = tl.split(b)
        return add_dot(add_dot(total, a0, b0), a1, b1)


class Walk(NamedTuple):
    """How a launch covers its tensors: sizes and tile depend on the row length's class alone."""

    rows: int
    cols: int
    strides: list[tuple[int, int]]
    tensors: list[torch.Tensor | None]
    tile_rows: int
    block: int
    chunks: int
    trips: int
    programs: int
    wide: bool

    @property
    def scalars(self) -> dict[str, int]:
        return dict(n_rows=self.rows, n_cols=self.cols, chunks=self.chunks, trips=self.trips)

    @property
    def constants(self) -> dict[str, int | bool]:
        return dict(ROWS=self.tile_rows, BLOCK=self.block, FLAT=self.rows == 1, WIDE=self.wide)

    @property
    def lane(self) -> int:
        """The elements of a lane: those that a thread loads at once, or all that it has."""
        first = next(t for t in self.tensors if t is not None)
        return 16 // first.element_size() if self.wide else min(8, self.tile_rows * self.block // (32 * NUM_WARPS))

    def stride_scalars(self, *names: str) -> dict[str, int]:
        return {
            f"{name}_{axis}": stride
            for name, pair in zip(names, self.strides, strict=True)
            for axis, stride in zip(("row", "col_stride"), pair, strict=True)
        }

    def restore(self, *outputs: torch.Tensor | None) -> None:
        """Copy outputs that had to be computed elsewhere back to where they belong."""
        for computed, wanted in zip(self.tensors, outputs, strict=False):
            if wanted is not None and computed is not None and computed is not wanted:
                wanted.copy_(computed)


def trips_of(tiles: int, tile: int) -> int:
    """Tiles a program: as many as leave enough programs to fill a GPU. A lane has up to VECTOR elements of each."""
    return max(1, min(MAX_SHARE // tile, MAX_LANE // VECTOR, tiles // FILL))


def walk(*tensors: torch.Tensor | None, tile: int = TILE) -> Walk:
    """Cover tensors of one shape (None where there is none); copied only where no plane fits all. A tile is half
    as large of float32, and with more than three tensors; kernels that keep more an element ask for a smaller one."""
    there = [t for t in tensors if t is not None]
    if len(there) > 3 or there[0].element_size() > 2:
        tile = min(tile, TILE // 2)
    flat, there = contiguous_plane(there)
    rest, strides = iter(there), iter(flat.strides)
    placed = [None if t is None else next(rest) for t in tensors]
    pairs = [(0, 0) if t is None else next(strides) for t in tensors]
    rows, cols = flat.rows, flat.cols
    wide = (rows == 1 or cols > 128) and all(
        col == 1 and row % VECTOR == 0 and t.data_ptr() % 16 == 0
        for t, (row, col) in zip(there, flat.strides, strict=True)
    )
    if rows > 1:  # for the addresses
        tile = min(tile, TILE // 2 if wide else TILE // 4 if len(there) <= 3 else TILE // 8)
    if wide:  # 16 bytes a thread
        tile = max(tile, 512 * NUM_WARPS // there[0].element_size())
    block = tile
    if rows > 1 and cols <= 1024:
        block = 16 if cols <= 16 else 128 if cols <= 128 else min(tile, 1024)
    tile_rows = max(1, tile // block)
    row_tiles, col_tiles = triton.cdiv(rows, tile_rows), triton.cdiv(cols, block)
    trips = trips_of(row_tiles * col_tiles, tile)
    chunks = triton.cdiv(col_tiles, trips)
    return Walk(rows, cols, pairs, placed, tile_rows, block, chunks, trips, row_tiles * chunks, wide)
