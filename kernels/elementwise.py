"""What the element-wise losses share: a walk over a plane of rows x cols in tiles [ROWS, BLOCK].

A program visits `trips` tiles side by side. Partial sums, one a program, are added up by a second kernel
in a fixed order, so that sums have the same bits on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .layout import contiguous_plane

TILE = 2048
NUM_WARPS = 4
MAX_TRIPS = 8  # a lane's product of 1 + e stays below 2^(MAX_TRIPS * 8)
FILL = 1024  # programs that fill the largest GPU: with fewer, a program takes fewer tiles
VECTOR = 8


@triton.jit
def tile_at(i, n_rows, n_cols, chunks, trips, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Tile i of this program: its rows [ROWS, 1] and columns [1, BLOCK] within it, its first row and
    column, the sizes, whether all of it exists, and whether its rows are contiguous and aligned."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * ROWS
    start = ((program % chunks).to(tl.int64) * trips + i) * BLOCK
    whole = (row + ROWS <= n_rows) & (start + BLOCK <= n_cols)
    rows, cols = tl.arange(0, ROWS)[:, None].to(tl.int64), tl.arange(0, BLOCK)[None, :]
    return rows, cols, row, start, n_rows, n_cols, whole, WIDE


@triton.jit
def tile_mask(at):
    rows, cols, row, start, n_rows, n_cols, _whole, _wide = at
    before = tl.minimum(n_cols - start, cols.shape[1]).to(tl.int32)
    if rows.shape[0] == 1:
        return cols < before
    else:
        return (row + rows < n_rows) & (cols < before)


@triton.jit
def first_of(ptr, at, row_stride, col_stride):
    """Pointers to the first element of each row of a tile [ROWS, 1]."""
    start = ptr + (at[2] * row_stride + at[3] * col_stride)
    if at[0].shape[0] == 1:
        return start
    else:
        return start + at[0] * row_stride


@triton.jit
def load(ptr, at, row_stride, col_stride, OTHER: tl.constexpr = 0.0):
    """A tile in float32; OTHER where there is no element. A whole tile is read without a mask, and where
    its rows are contiguous and aligned bfloat16 in pairs, widened by a shift and a mask."""
    half: tl.constexpr = at[1].shape[1] // 2
    first = first_of(ptr, at, row_stride, col_stride)
    if at[6]:
        if at[7] and ptr.dtype.element_ty == tl.bfloat16:
            pairs = first.to(tl.pointer_type(tl.int32), bitcast=True)
            pairs = tl.multiple_of(pairs, 16 if at[0].shape[0] == 1 else [16, 16])
            both = tl.load(pairs + tl.arange(0, half)[None, :])
            low = (both << 16).to(tl.float32, bitcast=True)
            high = (both & -65536).to(tl.float32, bitcast=True)
            value = tl.reshape(tl.join(low, high), [at[0].shape[0], 2 * half])
        else:
            value = tl.load(first + at[1] * col_stride).to(tl.float32)
    else:
        mask = tile_mask(at)
        value = tl.load(first + at[1] * col_stride, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value, OTHER)
    return value


@triton.jit
def store(ptr, value, at, row_stride, col_stride):
    to = first_of(ptr, at, row_stride, col_stride) + at[1] * col_stride
    value = value.to(ptr.dtype.element_ty)
    if at[6]:
        tl.store(to, value)
    else:
        tl.store(to, value, mask=tile_mask(at))


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
        return dict(ROWS=self.tile_rows, BLOCK=self.block, WIDE=self.wide)

    def stride_scalars(self, *names: str) -> dict[str, int]:
        return {
            f"{name}_{axis}_stride": stride
            for name, pair in zip(names, self.strides, strict=True)
            for axis, stride in zip(("row", "col"), pair, strict=True)
        }

    def restore(self, *outputs: torch.Tensor | None) -> None:
        """Copy outputs that had to be computed elsewhere back to where they belong."""
        for computed, wanted in zip(self.tensors, outputs, strict=False):
            if wanted is not None and computed is not None and computed is not wanted:
                wanted.copy_(computed)


def walk(*tensors: torch.Tensor | None) -> Walk:
    """Cover tensors of one shape (None where there is none); copied only where no plane fits all."""
    there = [t for t in tensors if t is not None]
    flat, there = contiguous_plane(there)
    rest, strides = iter(there), iter(flat.strides)
    placed = [None if t is None else next(rest) for t in tensors]
    pairs = [(0, 0) if t is None else next(strides) for t in tensors]
    rows, cols = flat.rows, flat.cols
    block = TILE
    if rows > 1 and cols <= 1024:
        block = 16 if cols <= 16 else 128 if cols <= 128 else 1024
    tile_rows = TILE // block if rows == 1 else max(1, TILE // block // 2)  # fewer, for their addresses
    row_tiles, col_tiles = triton.cdiv(rows, tile_rows), triton.cdiv(cols, block)
    trips = max(1, min(MAX_TRIPS, row_tiles * col_tiles // FILL))
    chunks = triton.cdiv(col_tiles, trips)
    wide = all(
        col == 1 and row % VECTOR == 0 and t.data_ptr() % 16 == 0
        for t, (row, col) in zip(there, flat.strides, strict=True)
    )
    programs = row_tiles * chunks
    return Walk(rows, cols, pairs, placed, tile_rows, block, chunks, trips, programs, wide)
