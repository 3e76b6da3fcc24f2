"""The second launch of a reduced loss: partial sums to sum(loss) / sum(weight) + sum(z) / count. Losses from logits
have their own (`*_join_kernel`), which also joins the parts of very long rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import kernel, launch
from .logsumexp import lse_meet
from .numerics import LOWEST
from .rowwise import over
from .targets import load_label, row_loss

FEW: tl.constexpr = tl.constexpr(4096)


@triton.jit
def sum_parts(part_ptr, n, TWO: tl.constexpr):
    """The sums of n numbers and, where TWO, of the n behind them (else 1), each in one order: many at a time, as one
    program waits for memory at each step."""
    MANY: tl.constexpr = 2 * FEW
    one, two, whole = tl.zeros([FEW], tl.float32), tl.zeros([FEW], tl.float32), over(n, MANY) * MANY
    if whole > 0:
        ones, twos = tl.zeros([MANY], tl.float32), tl.zeros([MANY], tl.float32)
        for start in range(0, whole, MANY):
            at = part_ptr + start + tl.arange(0, MANY)
            ones += tl.load(at)
            if TWO:
                twos += tl.load(at + n)
        one = tl.sum(tl.reshape(ones, [2, FEW]), 0)
        if TWO:
            two = tl.sum(tl.reshape(twos, [2, FEW]), 0)
    for start in range(whole, n, FEW):
        at = start + tl.arange(0, FEW)
        one += tl.load(part_ptr + at, mask=at < n, other=0.0)
        if TWO:
            two += tl.load(part_ptr + n + at, mask=at < n, other=0.0)
    return tl.sum(one), tl.sum(two) if TWO else 1.0


@kernel
def sum_kernel(out_ptr, part_ptr, n, scale):
    tl.store(out_ptr, (sum_parts(part_ptr, n, False)[0] * scale).to(out_ptr.dtype.element_ty))


def reduce_sum(out: torch.Tensor, parts: torch.Tensor, scale: float) -> None:
    """out <- scale * sum(parts), in one program and one order."""
    launch(
        sum_kernel, (1,), out, parts,
        scalars=dict(n=parts.numel(), scale=scale), constants={}, num_warps=16,
    )  # fmt: skip


@triton.jit
def put_means(to, loss, weight, z, count, Z: tl.constexpr, MEAN: tl.constexpr):
    """loss, z <- their sums, divided by those of the weights and of the count where MEAN; and both factors."""
    loss_ptr, z_ptr, scale_ptr = to
    scale, z_scale, total = 1.0, 1.0, loss
    if MEAN:
        scale = 1.0 / weight
        total = total / weight
        z_scale = scale
    if Z:
        if MEAN:
            z_scale = 1.0 / count
        z_total = z * z_scale
        tl.store(z_ptr, z_total.to(z_ptr.dtype.element_ty))
        total += z_total
    tl.store(loss_ptr, total.to(loss_ptr.dtype.element_ty))
    tl.store(scale_ptr, scale)
    tl.store(scale_ptr + 1, z_scale)


@kernel
def means_kernel(loss_ptr, scale_ptr, part_ptr, n, MEAN: tl.constexpr):
    loss, weight = sum_parts(part_ptr, n, MEAN)
    put_means((loss_ptr, loss_ptr, scale_ptr), loss, weight, 0.0, 1.0, False, MEAN)


def reduce_means(loss, scale, parts: torch.Tensor, mean: bool) -> None:
    """loss <- the sum of parts[0], divided by that of parts[1] where `mean`; scale <- the factor, twice."""
    launch(
        means_kernel, (1,), loss, scale, parts, scalars=dict(n=parts.shape[1]),
        constants=dict(MEAN=mean), num_warps=16,
    )  # fmt: skip


@kernel
def cross_entropy_join_kernel(
    loss_ptr, z_ptr, saved_ptr, part_ptr, split_ptr, n, factors_at, splits, keep, shift, z_factor,
    PROBS: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The means of the parts, which are a row each where rows are split: those are joined first."""
    DENSE: tl.constexpr = PROBS or SMOOTH
    loss, weight, z, count = 0.0, 1.0, 0.0, 1.0
    if splits > 1:
        if MEAN:
            weight, _ = sum_parts(part_ptr + n, n, False)
            if Z:
                count, _ = sum_parts(part_ptr + 3 * n, n, False)
        zero = tl.zeros([BLOCK], tl.float32)
        losses, zs = zero, zero
        for start in range(0, n, BLOCK):
            row = start + tl.arange(0, BLOCK)
            there, part = row < n, part_ptr + row
            x_y, w_y = tl.load(part, mask=there, other=0.0), tl.load(part + n, mask=there, other=0.0)
            m, s, a, b = zero + LOWEST, zero, zero, zero
            for k in range(splits):
                at, a2, b2 = split_ptr + k * (n * (4 if DENSE else 2)) + row, zero, zero
                m2, s2 = tl.load(at, mask=there, other=LOWEST), tl.load(at + n, mask=there, other=0.0)
                if DENSE:
                    b2 = tl.load(at + 2 * n, mask=there, other=0.0)
                    a2 = tl.load(at + 3 * n, mask=there, other=0.0)
                m, s, a, b = lse_meet(m, s, a, b, m2, s2, a2, b2)
            tl.store(saved_ptr + row, m, mask=there)
            tl.store(saved_ptr + n + row, s, mask=there)
            if DENSE:
                tl.store(saved_ptr + 2 * n + row, b, mask=there)
            # an ignored row's weight and sums are 0, and so is its loss
            loss_here, z_here = row_loss((m, s, a, b), x_y, w_y, there, keep, shift, z_factor, PROBS, SMOOTH, Z)
            losses, zs = losses + loss_here, zs + z_here
        loss, z = tl.sum(losses), tl.sum(zs)
    else:
        loss, weight = sum_parts(part_ptr, n, MEAN)
        if Z:
            z, count = sum_parts(part_ptr + 2 * n, n, MEAN)
    put_means((loss_ptr, z_ptr, saved_ptr + factors_at), loss, weight, z, count, Z, MEAN)


def join_rows(
    loss, z, saved, parts: torch.Tensor, stats: torch.Tensor, splits: int, options: dict,
    probs: bool, smooth: bool, mean: bool,
) -> None:  # fmt: skip
    """Cross entropy's loss and z from what a launch left in `parts`: sums of (loss, weight, z, count), or, where rows
    are split, each row's (label's logit, weight, nothing, count), and in `stats` what each split found.
    saved <- what backward needs: m, s and b of split rows, and a mean's factors."""
    launch(
        cross_entropy_join_kernel, (1,), loss, z, saved, parts, stats,
        scalars=dict(
            n=parts.shape[1], factors_at=saved.numel() - 2, splits=splits,
            **{k: options[k] for k in ("keep", "shift", "z_factor")},
        ),
        constants=dict(PROBS=probs, SMOOTH=smooth, Z=options["z_factor"] != 0.0, MEAN=mean, BLOCK=1024),
        num_warps=16,
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
