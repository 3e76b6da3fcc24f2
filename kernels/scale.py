"""A gradient that forward computed, times the upstream gradient: in place, and nothing at all where that is 1."""

from __future__ import annotations

import triton.language as tl

from .elementwise import NUM_WARPS, limit_of, load, mode, store, tile_at, tiles_of, walk
from .launch import kernel, launch


@kernel
def scale_kernel(
    grad_ptr, dloss_ptr,
    n, rows, cols, per_row, per_col, trips, grad_outer, grad_row, grad_stride,
    MODES: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    g = tl.load(dloss_ptr).to(tl.float32)
    if g != 1.0:
        grad = (grad_ptr, grad_outer, grad_row, grad_stride)
        period = (rows, cols, per_row, per_col)
        plan = tiles_of(n, trips, period, BLOCK, DEPTH)
        for i in range(plan[2]):
            at = tile_at(i, plan, period, BLOCK)
            store(grad, load(grad, at, None, mode(MODES, 0), WIDE, V) * g, at, None, mode(MODES, 0), WIDE)
        for i in range(plan[2], plan[2] + plan[3]):
            at, limit = tile_at(i, plan, period, BLOCK), limit_of(i, plan, BLOCK)
            store(grad, load(grad, at, limit, mode(MODES, 0), WIDE, V) * g, at, limit, mode(MODES, 0), WIDE)


def scale(outputs, dloss, grad):
    to = walk(grad)
    launch(
        scale_kernel, (to.programs,), to.tensors[0], dloss,
        scalars=to.scalars | to.stride_scalars("grad"), constants=to.constants, num_warps=NUM_WARPS,
    )  # fmt: skip
    to.restore(grad)
