"""A large CPU tensor piece by piece: all operations on a piece while it is in cache.

Eager torch walks over the whole tensor once an operation. Its threads wait for each other after every one, which
costs many small operations all they gain as soon as another process takes a core. Here each thread has pieces of its
own, and the next one when it is done; but for tensors of few pieces, which take no longer than threads to start.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 18  # elements
APART = 1 << 21  # elements: of smaller tensors all threads share the pieces, as starting them takes longer
WORKERS = 8  # at most: each has buffers, and Python runs one at a time
SINGLE = torch.float32
KEPT = 2  # workers' buffers that are kept from walk to walk: pages that malloc gave back cost as much as the arithmetic

Taken = tuple[Tensor, tuple[int, ...], tuple[Tensor, ...]]
_kept: list[Taken] = []


@cache
def _set_own_threads() -> Callable | None:
    """OpenMP's function that sets how many threads the calling thread's operations are divided among, from the library
    that torch is linked with. torch.set_num_threads would set the process's."""
    try:
        return ctypes.CDLL(torch._C.__file__).omp_set_num_threads
    except (AttributeError, OSError):
        return None


@cache
def constant(value: float) -> Tensor:
    """A number as a tensor: operations read it sooner than Python's."""
    with torch.inference_mode(False):
        return torch.full((1,), value, dtype=SINGLE, device="cpu")


def _taken(shape: tuple[int, ...]) -> Taken:
    """A worker's memory, and buffers in it, shape[0] of them: what an earlier walk left, where it is enough."""
    size, memory = math.prod(shape), None
    try:
        memory, before, _ = kept = _kept.pop()
        if before == shape:
            return kept
    except IndexError:
        pass
    with torch.inference_mode(False):
        if memory is None or len(memory) < size:
            memory = torch.empty(size, dtype=SINGLE, device="cpu")
        return memory, shape, memory[:size].view(shape).unbind()


def _keep(*taken: Taken) -> None:
    for some in taken:
        if len(_kept) < KEPT and some[0].numel() <= 8 * PIECE:
            _kept.append(some)


def walk(formula: Callable, rows: int, tensors: list[Any], spares: int) -> float:
    """formula(a piece of every tensor, `spares` buffers) for `rows` rows at a time, and the sum of what it returns.

    The first tensor sets how many rows there are; a shorter one serves every piece. The first two are converted.
    """
    length, width = tensors[0].shape[0], tensors[0].shape[1:]
    convert = [i for i, t in enumerate(tensors[:2]) if t.dtype in (torch.float16, torch.bfloat16)]
    shape = spares + len(convert), min(rows, length), *width
    if length <= rows:
        whole = _taken(shape)
        buffers = whole[2]
        if convert:
            for i, buffer in zip(convert, buffers[spares:], strict=True):
                tensors[i] = buffer.copy_(tensors[i])
            buffers = buffers[:spares]
        total = formula(*tensors, *buffers)
        _keep(whole)
        return total
    cut = [t is not None and len(t) == length for t in tensors]
    starts = range(0, length, rows)
    threads, set_own_threads = torch.get_num_threads(), _set_own_threads()
    workers = min(threads, WORKERS, len(starts)) if set_own_threads and tensors[0].numel() >= APART else 1
    sums, turn, inference = [0.0] * len(starts), count(), torch.is_inference_mode_enabled()

    def work(buffers: tuple[Tensor, ...]) -> None:
        if set_own_threads and workers > 1:
            torch.get_num_threads()  # torch's own setting for a new thread comes first
            set_own_threads(threads // workers)
        with torch.inference_mode(inference), torch.no_grad():
            while (k := next(turn)) < len(starts):
                n = min(rows, length - starts[k])
                given: list[Any] = [
                    t if t is None else t.narrow(0, starts[k], n) if c else t[:n]
                    for t, c in zip(tensors, cut, strict=True)
                ]
                own = buffers if n == rows else [b[:n] for b in buffers]
                for i, buffer in zip(convert, own[spares:], strict=True):
                    given[i] = buffer.copy_(given[i])
                sums[k] = formula(*given, *own[:spares])

    taken = [_taken(shape) for _ in range(workers)]
    if workers == 1:
        work(taken[0][2])
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, [buffers for _, _, buffers in taken]))
    _keep(*taken)
    return sum(sums)
