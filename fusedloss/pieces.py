"""A large CPU tensor piece by piece: all operations on a piece while it is in cache.

Eager torch walks over the whole tensor once an operation. Pieces are large enough for torch to divide each
operation among its threads: many small ones would wait for each other more than they compute.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 19  # elements
SINGLE = torch.float32


def walk(formula: Callable, rows: int, tensors: list[Any], spares: int) -> float:
    """formula(a piece of every tensor, `spares` buffers) for `rows` rows at a time, and the sum of what it returns.

    The first tensor sets how many rows there are; a shorter one serves every piece. The first two are converted.
    """
    count, width = tensors[0].shape[0], tensors[0].shape[1:]
    convert = [i for i, t in enumerate(tensors[:2]) if t.dtype in (torch.float16, torch.bfloat16)]
    total = 0.0
    with torch.no_grad():
        buffers = [torch.empty((rows, *width), dtype=SINGLE, device="cpu") for _ in range(spares + len(convert))]
        split = [repeat(t) if t is None or len(t) < count else t.split(rows) for t in tensors]
        for piece in zip(*split, strict=False):
            given, own = list(piece), buffers
            n = len(given[0])
            if n < rows:
                given, own = [t if t is None else t[:n] for t in given], [b[:n] for b in own]
            for i, buffer in zip(convert, own[spares:], strict=True):
                given[i] = buffer.copy_(given[i])
            total += formula(*given, *own[:spares])
    return total


def log1p_sum(e: Tensor, buffer: Tensor) -> float:
    """The sum of log(1 + e), of fewer logarithms: (1 + e) (1 + f) is 1 + (e + f + e f), and nothing is rounded off."""
    n, rest = len(e), None
    while n > PIECE // 16 and n % 2 == 0:
        n //= 2
        if rest is None:
            rest = torch.addcmul(e[n:], e[n:], e[:n], out=buffer[:n]).add_(e[:n])
        else:
            low, high = rest[:n], rest[n:]
            rest = low.add_(high.addcmul_(high, low))
    return (buffer.copy_(e) if rest is None else rest).log1p_().sum().item()


def store(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """x times factor, through x where `out` is of another dtype: torch would allocate."""
    if out.dtype is SINGLE:
        torch.mul(x, factor, out=out)
    else:
        out.copy_(x.mul_(factor))
