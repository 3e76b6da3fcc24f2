"""A gradient that forward computed, times the upstream gradient: in place, and nothing at all where that is 1."""

from __future__ import annotations

import triton.language as tl

from .elementwise import NUM_WARPS, load, store, tile_at, tile_mask, tiles_of, walk
from .launch import kernel, launch


@kernel
def scale_kernel(
    grad_ptr, dloss_ptr,
    n_rows, n_cols, chunks, trips, grad_row, grad_col_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    g = tl.load(dloss_ptr).to(tl.float32)
    if g != 1.0:
        grad = (grad_ptr, grad_row, grad_col_stride)
        plan = tiles_of(n_rows, n_cols, chunks, trips, ROWS, BLOCK, FLAT)
        for i in range(plan[3]):
            at = tile_at(i, plan, ROWS, BLOCK)
            store(grad, load(grad, at, None, WIDE) * g, at, None, WIDE)
        for i in range(plan[3], plan[3] + plan[4]):
            at, mask = tile_at(i, plan, ROWS, BLOCK), tile_mask(i, plan, n_rows, ROWS, BLOCK)
            store(grad, load(grad, at, mask, WIDE) * g, at, mask, WIDE)


def scale(outputs, dloss, grad):
    to = walk(grad)
    launch(
        scale_kernel, (to.programs,), to.tensors[0], dloss,
        scalars=to.scalars | to.stride_scalars("grad"), constants=to.constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(grad)
