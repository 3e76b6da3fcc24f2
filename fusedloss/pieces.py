"""A large CPU tensor piece by piece: all operations on a piece while it is in cache, the pieces shared by threads.

Eager torch walks over the whole tensor once an operation, and divides each among its threads, which wait for each
other after every one. With small pieces that collapses when another process takes a core. So a piece is too small
for torch to divide, and Python threads, as many as torch's, take one group of pieces after another: the one that
has to share its core takes fewer. What else starts threads: `exp`, `log` and `sqrt` (MKL's, from 256 elements on),
`log1p` from LOG1P on, `softmax` of more than one row.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

PIECE = 32640  # elements, a little below 32768, from which on torch divides an operation
LOG1P = 2048  # the same for log1p
GROUP = 1 << 19  # elements that a thread takes at a time
SINGLE = torch.float32


def share(work: Callable[[Any], None], count: int) -> None:
    """work(an iterator over numbers below `count` that all threads take from), in every thread and in this one."""
    left, errors = deque(range(count)), []

    def numbers() -> Any:
        while True:
            try:
                yield left.popleft()
            except IndexError:
                return

    def run() -> None:
        try:
            with torch.inference_mode():  # which may write into tensors of either kind
                work(numbers())
        except BaseException as error:
            left.clear()
            errors.append(error)

    helpers = [threading.Thread(target=run, daemon=True) for _ in range(min(torch.get_num_threads(), count) - 1)]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]


def walk(formula: Callable, rows: int, tensors: list[Any], spares: int) -> float:
    """formula(a piece of every tensor, `spares` buffers) for `rows` rows at a time, and the sum of what it returns.

    The first tensor sets how many rows there are; a shorter one serves every piece. The first two are converted.
    """
    count, width = tensors[0].shape[0], tensors[0].shape[1:]
    group = rows * max(1, GROUP // (rows * width.numel()))
    sums = [0.0] * -(-count // group)
    convert = [i for i, t in enumerate(tensors[:2]) if t.dtype in (torch.float16, torch.bfloat16)]

    def work(numbers: Any) -> None:
        buffers = [torch.empty((rows, *width), dtype=SINGLE, device="cpu") for _ in range(spares + len(convert))]
        for number in numbers:
            start = number * group
            size = min(group, count - start)
            split = [
                repeat(t) if t is None or len(t) < count else t.narrow(0, start, size).split(rows) for t in tensors
            ]
            for piece in zip(*split, strict=False):
                given, own = list(piece), buffers
                n = len(given[0])
                if n < rows:
                    given, own = [t if t is None else t[:n] for t in given], [b[:n] for b in own]
                for i, buffer in zip(convert, own[spares:], strict=True):
                    for half, single in columns(given[i], buffer):
                        single.copy_(half)
                    given[i] = buffer
                sums[number] += formula(*given, *own[:spares])

    share(work, len(sums))
    return sum(sums)


def columns(*tensors: Any) -> Any:
    """Pieces of rows that are longer than one; a column or None serves them all."""
    if tensors[0].numel() <= PIECE:
        return (tensors,)
    return zip(*(t.split(PIECE, 1) if t is not None and t.shape[1] > 1 else repeat(t) for t in tensors), strict=False)


def log1p_(x: Tensor) -> Tensor:
    """In place, by calls that start no threads."""
    for part in x.split(LOG1P):
        part.log1p_()
    return x


def log1p_sum(e: Tensor, buffer: Tensor) -> float:
    """The sum of log(1 + e), of fewer logarithms: (1 + e) (1 + f) is 1 + (e + f + e f), and nothing is rounded off."""
    n, rest = len(e), None
    while n > LOG1P and n % 2 == 0:
        n //= 2
        if rest is None:
            rest = torch.addcmul(e[n:], e[n:], e[:n], out=buffer[:n]).add_(e[:n])
        else:
            low, high = rest[:n], rest[n:]
            rest = low.add_(high.addcmul_(high, low))
    return log1p_(buffer.copy_(e) if rest is None else rest).sum().item()


def store(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """x times factor, through x where `out` is of another dtype: torch would allocate."""
    if out.dtype is SINGLE:
        torch.mul(x, factor, out=out)
    else:
        out.copy_(x.mul_(factor))
