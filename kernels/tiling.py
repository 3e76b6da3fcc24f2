"""Host side of the losses over rows: the size classes, and how a launch covers its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .layout import TILED, Rows, contiguous_rows

FILL = 2048  # warps that fill the largest GPU: long rows are split until there are as many
SHORT = 8192  # classes of a row that one warp reads
HELD = 16384, 40960  # bytes of a row that is read twice, of all tensors, by one warp, or four: all rows in flight
# (some 32, 10, and 2 an SM) stay in a GPU's second-level cache
FEW = 48  # bytes of a row, of all tensors, that one thread reads: the tiles of 32 warps fit the L1 cache
TINY = 12  # classes a thread of a row that four threads write, or two where more tensors are read
APART = 256  # classes that lie apart, of a row that one thread reads
SHARE = 16  # blocks of a very long row that one of its programs reads in forward, or nearly so many


class Tiling(NamedTuple):
    """The compile-time sizes of a row's class, and the warps of a program (rowwise.py)."""

    ROWS: int
    U: int
    UP: int
    T: int
    V: int
    HINT: int
    num_warps: int

    @property
    def block(self) -> int:
        return self.U * self.T * self.V

    @property
    def constants(self) -> dict[str, int]:
        return dict(ROWS=self.ROWS, U=self.U, UP=self.UP, T=self.T, V=self.V, HINT=self.HINT)


def _positions(inner: int, cols: int, narrow: int, loads: int, writes: bool, twice: bool) -> Tiling:
    """Tiles of positions whose classes lie apart: a thread has 4 positions (2 where it keeps much of each), a class at
    a time, or two threads have two where classes are many (or one, where they keep more); the widest that hardly pads
    the positions."""

    def padded(shape: Tiling) -> int:
        return triton.cdiv(inner, shape.ROWS) * shape.ROWS

    if cols <= APART:
        few = twice or (writes and loads < 4)
        shapes = [Tiling(n, 1, 1, 1, 1, 0, min(2, n // 32)) for n in (256, 128, 32)[few:]]
    else:
        u = 1 if writes and loads == 1 else 2
        least = 1 if narrow > 4 and loads > 1 else u
        shapes = [*(Tiling(32 * w, u, u, 2, 1, 0, w) for w in (4, 2)), Tiling(16, least, least, 4, 1, 0, 1)]
    return next(s for s in shapes if 3 * padded(s) <= 4 * padded(shapes[-1]))


def tiling(
    walk: Rows, sizes: list[int], addresses: list[int], narrow: int, loads: int, writes: bool, twice: bool
) -> Tiling:
    """Four classes by row length: to 24 of half precision (48 or 24 where rows are written), to 896 (448 of float32),
    to 8192 (a warp a row), and longer (four warps a row). Rows that are read `twice` have no class of the shortest,
    and of the others three by their bytes: a warp, four, or sixteen a row, for fewer rows at a time.
    In the first two a warp has a tile of rows, and few threads a row, which pads it little: one of the shortest, which
    takes a class at a time; more where it is written, for a store to fill half a sector.

    Classes that lie apart (class stride not 1) have tiles of their own, and HINT 0. Else HINT is the run of elements
    known to be aligned, where all tensors' rows share an alignment."""
    v, hint = 16 // sizes[0], 16 // min(sizes)
    if any(c != 1 for _, _, c in walk.strides) and walk.cols > 1:
        return _positions(walk.inner, walk.cols, narrow, loads, writes, twice)
    if walk.cols <= TILED * v:
        return _short(walk.cols, sizes, narrow, loads, writes, twice)
    places = {
        (address // size % hint, s[0] % hint, s[1] % hint)
        for address, size, s in zip(addresses, sizes, walk.strides, strict=True)
    }
    warps = 1 if walk.cols <= SHORT else 4
    if twice:
        row = walk.cols * sum(sizes)
        warps = 1 if row <= HELD[0] else 4 if row <= HELD[1] else 16
    if len(places) == 1:
        u = min(4, loads)
        shape = Tiling(1, u, u if warps == 1 else 1, 32 * warps, v, hint, warps)
    else:
        u = min(8, 2 * loads)
        shape = Tiling(1, u, u, 32 * warps, 1, 1, warps)
    if shape.U == 1 and warps == 1:  # two warps, or one of 64 threads
        shape = shape._replace(T=64, num_warps=2)
    return shape


def _short(cols: int, sizes: list[int], narrow: int, loads: int, writes: bool, twice: bool) -> Tiling:
    if writes:
        u, t = max(2, 8 // narrow), 4 if len(sizes) < 3 else 2
        if cols <= TINY * t:
            return Tiling(32, 1, 1, t, 1, 1, 1) if t == 4 else Tiling(32, u, u, t, 1, 1, 1)
        return Tiling(8, u, u, 16 if len(sizes) == 1 else 8, 1, 1, 1)  # 16: a whole sector, where nothing is read
    if twice:
        u = 4 if narrow <= 4 and loads > 1 else 2 if narrow <= 8 else 1
        return Tiling(16, u, u, 4, 1, 1, 1)
    if cols * sum(sizes) <= FEW:
        return Tiling(256 if narrow <= 4 else 128, 1, 1, 1, 1, 1, 2)
    return Tiling(32, 4, 4, 2, 1, 1, 1)


class Walk(NamedTuple):
    """How a launch covers the rows of its tensors (in their order; copies of those that no common walk
    fits), and for each tensor (outer, inner, class) strides."""

    outer: int
    inner: int
    cols: int
    strides: list[tuple[int, int, int]]
    shape: Tiling
    tensors: list[torch.Tensor | None]

    @property
    def programs(self) -> int:
        return self.outer * triton.cdiv(self.inner, self.shape.ROWS)

    @property
    def chunks(self) -> int:
        """Programs a row, where each element is written apart and rows are few and long."""
        if self.shape.ROWS > 1:
            return 1
        return max(1, min(self.cols // self.shape.block // 4, FILL // (self.programs * self.shape.num_warps)))

    @property
    def splits(self) -> int:
        """Programs a row in forward: from its length alone, as its bits must not depend on the other rows."""
        each = max(SHARE * self.shape.block, 4 * SHORT)
        return 1 if self.shape.T < 128 else min(max(1, (self.cols + each // 4) // each), 65535)

    @property
    def rows(self) -> int:
        return self.outer * self.inner

    def restore(self, first: int, *wanted: torch.Tensor | None) -> None:
        """Copy outputs, tensors `first` on, that had to be computed elsewhere back to where they belong."""
        for c, w in zip(self.tensors[first:], wanted, strict=False):
            if w is not None and c is not None and c is not w:
                w.copy_(c)


def row_walk(
    dim: int,
    *tensors: torch.Tensor | None,
    narrow: int = 1,
    loads: int = 4,
    writes: bool = True,
    twice: bool = False,
) -> Walk:
    """Cover the rows over `dim` of tensors of one shape (None where there is none). Kernels that keep more a lane
    ask for tiles `narrow` times smaller, as far as tiles depend on it, and for fewer `loads` a thread in long rows;
    those that `writes` no elements give a row fewer threads in a tile; those that read a row `twice` give a long one
    more threads, so that the rows in flight stay in the cache, and the shortest no class of their own."""
    there = [t for t in tensors if t is not None]
    common, there = contiguous_rows(dim, there)
    sizes, addresses = [t.element_size() for t in there], [t.data_ptr() for t in there]
    shape = tiling(common, sizes, addresses, narrow, loads, writes, twice)
    rest, strides = iter(there), iter(common.strides)
    placed = [None if t is None else next(rest) for t in tensors]
    all_strides = [(0, 0, 0) if t is None else next(strides) for t in tensors]
    return Walk(common.outer, common.inner, common.cols, all_strides, shape, placed)


def stride_scalars(*named: tuple[str, tuple[int, int, int]]) -> dict[str, int]:
    return {
        f"{name}_{part}": stride
        for name, strides in named
        for part, stride in zip(("outer", "inner", "class_stride"), strides, strict=True)
    }
