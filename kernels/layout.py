"""Host-side layouts: how a kernel walks tensors of any shape and strides without copying them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

TILED = 112  # runs of 16 bytes of a row that stands with others in a tile, without regard to where it begins


def empty(beside: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of a size above 0; torch.empty_strided is the cheapest way to one, and cheapest where all
    are made that way."""
    step, strides = 1, []
    for n in reversed(size):
        strides.append(step)
        step *= n
    return torch.empty_strided(size, strides[::-1], dtype=dtype, device=beside.device)


def placed(size: Sequence[int], strides: Sequence[int], behind: int | torch.SymInt, **how) -> torch.Tensor:
    """An uninitialised tensor, so many elements behind the start of its memory."""
    if not behind:
        return torch.empty_strided(size, strides, **how)
    last = sum((n - 1) * s for n, s in zip(size, strides, strict=True))
    return torch.empty(behind + last + 1, **how).as_strided(size, strides, behind)


def empty_rows(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A tensor like x. Its rows over `dim`, where their classes lie together and are many, start as far behind a
    multiple of 16 bytes as those of x, for accesses of 16 bytes to fit both: a slice's gradient may have up to 15
    bytes before its first row, and behind each."""
    run = 16 // x.element_size()
    if x.is_contiguous() and x.storage_offset() % run == 0:
        return torch.empty_like(x)
    if x.dim() == 0 or x.stride(dim) != 1 or x.size(dim) <= TILED * run:
        return torch.empty_like(x)
    if rows(dim, x) is None:  # it is copied to be read
        return torch.empty_like(x)
    step, strides = 1, list(x.stride())
    for d in sorted(range(x.dim()), key=lambda d: (d != dim % x.dim(), strides[d])):
        if x.size(d) > 1:
            strides[d] = step + (strides[d] - step) % run
            step = strides[d] * x.size(d)
    return placed(x.shape, strides, x.storage_offset() % run, dtype=x.dtype, device=x.device)


class Plane(NamedTuple):
    """`sizes` = (outer, rows, cols), and (outer, row, column) strides for each tensor."""

    sizes: tuple[int, int, int]
    strides: list[tuple[int, int, int]]


def plane(*tensors: torch.Tensor) -> Plane | None:
    """One common walk of up to three dimensions over tensors of one shape, or None where they have none."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return Plane((1, 1, first.numel()), [(0, 0, 1)] * len(tensors))
    lengths = first.stride()
    order = sorted(range(first.dim()), key=lambda d: lengths[d], reverse=True)
    merged: list[list[int]] = []  # [size, stride of each tensor]
    for d in order:
        size, strides = first.size(d), [t.stride(d) for t in tensors]
        if size == 1:
            continue
        if merged and all(
            outer == inner * size for outer, inner in zip(merged[-1][1:], strides, strict=True)
        ):
            merged[-1] = [merged[-1][0] * size, *strides]
        else:
            merged.append([size, *strides])
    if len(merged) > 3:
        return None
    merged = [[1, *[0] * len(tensors)]] * (3 - len(merged)) + merged
    outer, row, col = merged
    return Plane((outer[0], row[0], col[0]), list(zip(outer[1:], row[1:], col[1:], strict=True)))


def contiguous_plane(tensors: Sequence[torch.Tensor]) -> tuple[Plane, list[torch.Tensor]]:
    """A walk over the tensors, or over contiguous copies where no other fits them all."""
    if (walk := plane(*tensors)) is not None:
        return walk, list(tensors)
    copies = [t.contiguous() for t in tensors]
    return Plane((1, 1, copies[0].numel()), [(0, 0, 1)] * len(copies)), copies


class Rows(NamedTuple):
    """`outer` x `inner` rows of `cols` classes; for each tensor (outer, inner, class) strides."""

    outer: int
    inner: int
    cols: int
    strides: list[tuple[int, int, int]]


def _collapse(sizes: list[int], strides: list[list[int]]) -> tuple[int, list[int]] | None:
    """(size, strides) of dimensions that every tensor can walk as one."""
    size, walked = 1, [0] * len(strides)
    for k in reversed(range(len(sizes))):
        if sizes[k] == 1:
            continue
        at = [s[k] for s in strides]
        if size == 1:
            walked = at
        elif any(a != w * size for a, w in zip(at, walked, strict=True)):
            return None
        size *= sizes[k]
    return size, walked


def rows(dim: int, *tensors: torch.Tensor) -> Rows | None:
    """The rows of tensors of one shape over `dim`, or None where only copies can be walked."""
    sizes, strides = list(tensors[0].shape), [list(t.stride()) for t in tensors]
    cols, classes = sizes.pop(dim), [s.pop(dim) for s in strides]
    dim %= len(sizes) + 1
    if (whole := _collapse(sizes, strides)) is not None:
        return Rows(1, whole[0], cols, list(zip([0] * len(tensors), whole[1], classes, strict=True)))
    outer = _collapse(sizes[:dim], [s[:dim] for s in strides])
    inner = _collapse(sizes[dim:], [s[dim:] for s in strides])
    if outer is None or inner is None:
        return None
    return Rows(outer[0], inner[0], cols, list(zip(outer[1], inner[1], classes, strict=True)))


def contiguous_rows(dim: int, tensors: Sequence[torch.Tensor]) -> tuple[Rows, list[torch.Tensor]]:
    """The rows of the tensors, or of contiguous copies where only those can be walked."""
    if (walk := rows(dim, *tensors)) is not None:
        return walk, list(tensors)
    copies = [t.contiguous() for t in tensors]
    walk = rows(dim, *copies)
    if walk is None:
        raise RuntimeError(f"no rows over dimension {dim} of contiguous tensors of shape {tuple(copies[0].shape)}")
    return walk, copies


def vector(t: torch.Tensor, outer: int, inner: int) -> tuple[torch.Tensor, int, int]:
    """A value a row as (tensor, outer stride, inner stride)."""
    if t.dim() <= 1 and outer == 1:
        return t, 0, t.stride(0) if t.dim() else 0
    if t.is_contiguous():
        return t, inner, 1
    if t.dim() == 2 and outer > 1:
        return t, t.stride(0), t.stride(1)
    if all(s == 0 for s in t.stride()):
        return t, 0, 0
    return t.contiguous(), inner, 1
