"""What the element-wise losses share: a walk over a plane of rows x cols in tiles [ROWS, BLOCK].

A program visits `trips` tiles side by side. Partial sums, one a program, are added up by a second kernel
in a fixed order, so that sums have the same bits on every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .layout import plane

TILE = 2048
NUM_WARPS = 8
MAX_TRIPS = 8  # a lane's product of 1 + e stays below 2^(MAX_TRIPS * 8)
FILL = 1024  # programs that fill the largest GPU: with fewer, a program takes fewer tiles


@triton.jit
def tile_at(i, n_rows, n_cols, chunks, trips, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Tile i of this program: rows, first column, columns, which elements exist, whether all do."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64) * ROWS
    start = ((program % chunks).to(tl.int64) * trips + i) * BLOCK
    rows = row + tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    whole = (row + ROWS <= n_rows) & (start + BLOCK <= n_cols)
    return rows, start, lanes, (rows < n_rows) & (start + lanes < n_cols), whole


@triton.jit
def load(ptr, at, row_stride, col_stride, OTHER: tl.constexpr = 0.0):
    """A tile in float32, unmasked where it is whole, so that accesses stay wide."""
    rows, start, lanes, mask, whole = at
    place = ptr + start * col_stride + rows * row_stride + lanes * col_stride
    if whole:
        value = tl.load(place).to(tl.float32)
    else:
        value = tl.where(mask, tl.load(place, mask=mask, other=0.0).to(tl.float32), OTHER)
    return value


@triton.jit
def store(ptr, value, at, row_stride, col_stride):
    rows, start, lanes, mask, whole = at
    place = ptr + start * col_stride + rows * row_stride + lanes * col_stride
    value = value.to(ptr.dtype.element_ty)
    if whole:
        tl.store(place, value)
    else:
        tl.store(place, value, mask=mask)


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

    @property
    def scalars(self) -> dict[str, int]:
        return dict(n_rows=self.rows, n_cols=self.cols, chunks=self.chunks, trips=self.trips)

    @property
    def constants(self) -> dict[str, int]:
        return dict(ROWS=self.tile_rows, BLOCK=self.block)

    def stride_scalars(self, *names: str) -> dict[str, int]:
        return {
            f"{name}_{axis}_stride": stride
            for name, pair in zip(names, self.strides, strict=True)
            for axis, stride in zip(("row", "col"), pair, strict=True)
        }

    def restore(self, *outputs: torch.Tensor | None) -> None:
        """Copy outputs that had to be computed elsewhere back to where they belong."""
        for computed, wanted in zip(self.tensors, outputs, strict=False):
            if wanted is not None and computed is not wanted:
                wanted.copy_(computed)


def walk(*tensors: torch.Tensor | None) -> Walk:
    """Cover tensors of one shape (None where there is none); copied only where no plane fits all."""
    there = [t for t in tensors if t is not None]
    flat = plane(*there)
    if flat is None:
        there = [t.contiguous() for t in there]
        flat = plane(*there)
    rest, strides = iter(there), iter(flat.strides)
    placed = [None if t is None else next(rest) for t in tensors]
    pairs = [(0, 0) if t is None else next(strides) for t in tensors]
    rows, cols = flat.rows, flat.cols
    block = TILE
    if rows > 1 and cols <= 1024:
        block = 16 if cols <= 16 else 128 if cols <= 128 else 1024
    tile_rows = TILE // block
    row_tiles, col_tiles = triton.cdiv(rows, tile_rows), triton.cdiv(cols, block)
    trips = max(1, min(MAX_TRIPS, row_tiles * col_tiles // FILL))
    chunks = triton.cdiv(col_tiles, trips)
    return Walk(
        rows, cols, pairs, placed, tile_rows, block, chunks, trips, row_tiles * chunks
    )
