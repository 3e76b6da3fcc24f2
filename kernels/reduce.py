"""The second launch of a reduced loss: partial sums to sum(loss) / sum(weight) + sum(z) / count."""

from __future__ import annotations

import torch
import triton.language as tl

from .launch import kernel, launch
from .targets import load_label

BLOCK = 4096


@kernel
def sum_kernel(out_ptr, part_ptr, n, scale, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + lane
        total += tl.load(part_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr, (tl.sum(total) * scale).to(out_ptr.dtype.element_ty))


def reduce_sum(out: torch.Tensor, parts: torch.Tensor, scale: float) -> None:
    """out <- scale * sum(parts), in one program and one order."""
    launch(
        sum_kernel, (1,), out, parts,
        scalars=dict(n=parts.numel(), scale=scale), constants=dict(BLOCK=BLOCK), num_warps=8,
    )  # fmt: skip


@kernel
def means_kernel(
    loss_ptr, z_ptr, scale_ptr, part_ptr, n, at, Z: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    loss, weight, z, count = zero, zero, zero, zero
    for start in range(0, n, BLOCK):
        place = part_ptr + start + lane
        mask = start + lane < n
        loss += tl.load(place, mask=mask, other=0.0)
        weight += tl.load(place + n, mask=mask, other=0.0)
        if Z:
            z += tl.load(place + 2 * n, mask=mask, other=0.0)
            count += tl.load(place + 3 * n, mask=mask, other=0.0)
    scale, z_scale, total = 1.0, 1.0, tl.sum(loss)
    if MEAN:
        scale = 1.0 / tl.sum(weight)
        total = total / tl.sum(weight)
        z_scale = scale
    if Z:
        if MEAN:
            z_scale = 1.0 / tl.sum(count)
        z_total = tl.sum(z) * z_scale
        tl.store(z_ptr, z_total.to(z_ptr.dtype.element_ty))
        total += z_total
    tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))
    tl.store(scale_ptr + at, scale)
    tl.store(scale_ptr + at + 1, z_scale)


def reduce_means(loss, z, saved, at: int, parts: torch.Tensor, with_z: bool, mean: bool) -> None:
    """loss, z <- sums of the parts' rows (loss, weight, z, count), divided where `mean`; saved[at:] <-
    the factors of both, for backward."""
    launch(
        means_kernel, (1,), loss, z, saved, parts, scalars=dict(n=parts.shape[1], at=at),
        constants=dict(Z=with_z, MEAN=mean, BLOCK=1024), num_warps=8,
    )  # fmt: skip


@kernel
def factors_kernel(
    scale_ptr, target_ptr, weight_ptr, n, n_cols, ignore_index, label_stride, at,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    weight, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        row = start + tl.arange(0, BLOCK)
        place = row.to(tl.int64) * label_stride
        label, w_y, kept = load_label(target_ptr, weight_ptr, place, row < n, n_cols, ignore_index, WEIGHT)
        weight += w_y
        count += kept.to(tl.float32)
    tl.store(scale_ptr + at, 1.0 / tl.sum(weight))
    tl.store(scale_ptr + at + 1, 1.0 / tl.sum(count))


def count_factors(saved, at: int, labels: torch.Tensor, weight, n_cols: int, ignore_index: int) -> None:
    """saved[at:] <- the factors of a mean that reduce_means will find, from the labels (one dimension) alone."""
    launch(
        factors_kernel, (1,), saved, labels, weight,
        scalars=dict(n=labels.numel(), n_cols=n_cols, ignore_index=ignore_index, label_stride=labels.stride(0), at=at),
        constants=dict(WEIGHT=int(weight is not None), BLOCK=4096), num_warps=16,
    )  # fmt: skip
