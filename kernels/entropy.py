"""Entropy of probabilities over one dimension: -sum p log p; dp = -(log p + 1).

Nothing is saved beside the arguments. As torch.special.entr: 0 at p = 0 with gradient inf, -inf at p < 0.
A sum or a mean over rows, and its gradient, don't care where a row ends: dense tensors are one long row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .elementwise import NUM_WARPS, VECTOR, add_dot, lanes, load, store, tile_at, tile_mask, trips_of
from .launch import kernel, launch, scratch
from .layout import Rows, contiguous_rows, plane
from .numerics import log, log_any
from .operators import MEAN, NONE
from .reduce import reduce_sum

TILE = 1024


@triton.jit
def entropy_tiles(n_inner, n_cols, row_tiles, chunks, trips, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's outer index, and its rows and tiles as elementwise.tiles_of gives them."""
    outer, tile, chunk = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.program_id(0)
    if chunk >= chunks:  # not in one long row: a division is many instructions
        tile = chunk // chunks
        chunk -= tile * chunks
        outer = tile // row_tiles
        tile -= outer * row_tiles
    row = tile.to(tl.int64) * ROWS
    start = chunk.to(tl.int64) * trips * BLOCK
    before = tl.minimum(n_cols - start, trips.to(tl.int64) * BLOCK).to(tl.int32)
    whole = tl.where(row + ROWS <= n_inner, before // BLOCK, 0)
    return outer.to(tl.int64), (row, start, before, whole, tl.cdiv(before, BLOCK) - whole)


@triton.jit
def add_entropy(total, least, p_from, at, mask, REDUCE: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr):
    """Into the totals, an element's or (REDUCE) a lane's: p log p, and the least p."""
    p = load(p_from, at, mask, WIDE)
    x = log(p)  # log(0) is finite: 0 log 0 = 0
    if REDUCE:
        return add_dot(total, lanes(p, V, WIDE), lanes(x, V, WIDE)), tl.minimum(least, tl.min(lanes(p, V, WIDE), 1))
    else:
        return tl.fma(p, x, total), tl.minimum(least, p)


@kernel
def entropy_forward_kernel(
    out_ptr, p_ptr,
    n_inner, n_cols, row_tiles, chunks, trips,
    p_outer, p_inner, p_class_stride,
    REDUCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    outer, plan = entropy_tiles(n_inner, n_cols, row_tiles, chunks, trips, ROWS, BLOCK)
    p_from = (p_ptr + outer * p_outer, p_inner, p_class_stride)
    total = tl.zeros([ROWS * BLOCK // V] if REDUCE else [ROWS, BLOCK], tl.float32)
    least = total
    for i in range(plan[3]):
        total, least = add_entropy(total, least, p_from, tile_at(i, plan, ROWS, BLOCK), None, REDUCE, WIDE, V)
    for i in range(plan[3], plan[3] + plan[4]):
        mask = tile_mask(i, plan, n_inner, ROWS, BLOCK)
        total, least = add_entropy(total, least, p_from, tile_at(i, plan, ROWS, BLOCK), mask, REDUCE, WIDE, V)
    total = tl.where(least < 0, float("-inf"), 0.0 - total)  # of 0, not -0
    if REDUCE:
        tl.store(out_ptr + tl.program_id(0), tl.sum(total))
    else:
        lane = plan[0] + tl.arange(0, ROWS)
        value = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + outer * n_inner + lane, value, mask=lane < n_inner)


@triton.jit
def put_gradient(dp, p_from, g, at, mask, WIDE: tl.constexpr):
    p = load(p_from, at, mask, WIDE, 1.0)
    store(dp, -(log_any(p) + 1.0) * g, at, mask, WIDE)


@kernel
def entropy_backward_kernel(
    dp_ptr, dloss_ptr, p_ptr,
    n_inner, n_cols, row_tiles, chunks, trips, scale,
    dp_outer, dp_inner, dp_class_stride, p_outer, p_inner, p_class_stride,
    REDUCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    outer, plan = entropy_tiles(n_inner, n_cols, row_tiles, chunks, trips, ROWS, BLOCK)
    p_from = (p_ptr + outer * p_outer, p_inner, p_class_stride)
    dp = (dp_ptr + outer * dp_outer, dp_inner, dp_class_stride)
    if REDUCE:
        g = tl.load(dloss_ptr).to(tl.float32) * scale
    else:
        lane = plan[0] + tl.arange(0, ROWS)
        g = tl.load(dloss_ptr + outer * n_inner + lane, mask=lane < n_inner, other=0.0)
        g = g.to(tl.float32)[:, None]
    for i in range(plan[3]):
        put_gradient(dp, p_from, g, tile_at(i, plan, ROWS, BLOCK), None, WIDE)
    for i in range(plan[3], plan[3] + plan[4]):
        mask = tile_mask(i, plan, n_inner, ROWS, BLOCK)
        put_gradient(dp, p_from, g, tile_at(i, plan, ROWS, BLOCK), mask, WIDE)


class Tiling(NamedTuple):
    """How a launch covers its tensors."""

    tensors: list[torch.Tensor]
    walk: Rows
    tile_rows: int
    block: int
    row_tiles: int
    chunks: int
    trips: int

    @property
    def programs(self) -> int:
        return self.walk.outer * self.row_tiles * self.chunks

    @property
    def scalars(self) -> dict[str, int]:
        return dict(
            n_inner=self.walk.inner, n_cols=self.walk.cols,
            row_tiles=self.row_tiles, chunks=self.chunks, trips=self.trips,
        )  # fmt: skip

    @property
    def wide(self) -> bool:
        return self.block >= 1024 and all(
            t.data_ptr() % 16 == 0 and outer % VECTOR == inner % VECTOR == 0 and classes == 1
            for t, (outer, inner, classes) in zip(self.tensors, self.walk.strides, strict=True)
        )

    @property
    def constants(self) -> dict[str, int | bool]:
        return dict(ROWS=self.tile_rows, BLOCK=self.block, WIDE=self.wide)

    @property
    def lane(self) -> int:
        """The elements of a lane's sum: those that a thread loads at once, or all that it has."""
        return 16 // self.tensors[0].element_size() if self.wide else self.tile_rows * self.block // (32 * NUM_WARPS)

    def stride_scalars(self, *names: str) -> dict[str, int]:
        return {
            f"{name}_{axis}": stride
            for name, strides in zip(names, self.walk.strides, strict=True)
            for axis, stride in zip(("outer", "inner", "class_stride"), strides, strict=True)
        }


def _tiling(dim: int, *tensors: torch.Tensor, join: bool, split: bool, tile: int = TILE) -> Tiling:
    """Cover the rows of tensors of one shape, copied where no common walk fits them. `join`: where a row
    ends doesn't matter; `split`: several programs may share a row."""
    flat = plane(*tensors) if join else None
    if flat is not None and flat.rows == 1:
        walk = Rows(1, 1, flat.cols, [(0, 0, stride) for _, stride in flat.strides])
        block = tile
    else:
        walk, copies = contiguous_rows(dim, tensors)
        tensors = tuple(copies)
        block = 1024 if walk.cols > 128 else 128 if walk.cols > 16 else 16
    cols = walk.cols
    if walk.inner >= 64 and any(classes > inner for _, inner, classes in walk.strides):
        block = 16  # neighbours in memory are rows
    tile_rows = tile // block
    row_tiles, col_tiles = triton.cdiv(walk.inner, tile_rows), triton.cdiv(cols, block)
    trips = col_tiles
    if split:
        trips = min(trips_of(walk.outer * row_tiles * col_tiles, tile), col_tiles)
    chunks = triton.cdiv(col_tiles, trips)
    return Tiling(list(tensors), walk, tile_rows, block, row_tiles, chunks, trips)


def _scale(p: torch.Tensor, dim: int, reduction: int) -> float:
    return p.size(dim) / p.numel() if reduction == MEAN else 1.0


def entropy_forward(out, p, dim, reduction, dtype):
    reduce = reduction != NONE
    tile = 2 * TILE if reduce and p.element_size() == 2 else TILE
    to = _tiling(dim, p, join=reduce, split=reduce, tile=tile)
    parts = scratch(p, to.programs) if reduce else out
    launch(
        entropy_forward_kernel, (to.programs,), parts, *to.tensors,
        scalars=to.scalars | to.stride_scalars("p"),
        constants=dict(REDUCE=reduce, **to.constants, V=to.lane),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    if reduce:
        reduce_sum(out, parts, _scale(p, dim, reduction))


def entropy_backward(dp, dloss, p, dim, reduction):
    reduce = reduction != NONE
    to = _tiling(dim, dp, p, join=reduce, split=True)
    computed, placed = to.tensors
    launch(
        entropy_backward_kernel, (to.programs,), computed, dloss.contiguous(), placed,
        scalars=to.scalars | dict(scale=_scale(p, dim, reduction)) | to.stride_scalars("dp", "p"),
        constants=dict(REDUCE=reduce, **to.constants),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    if computed is not dp:
        dp.copy_(computed)
