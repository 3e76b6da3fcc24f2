"""Compile once, then launch with as little host work as Triton's own launcher allows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """One launch, as `recording` hands it out."""

    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[torch.Tensor | None, ...]
    scalars: dict[str, int | float]
    constants: dict[str, Any]
    num_warps: int


_compiled: dict[tuple, Any] = {}
_recorder: Callable[[Launch], None] | None = None
CACHE_KEY_TYPES = (int, float)


def kernel(function: Callable) -> Any:
    """triton.jit for our kernels: a scalar's value compiles nothing new, except that a `*_stride` of 1
    or of a multiple of 16 is known to the compiler (it is what makes accesses wide)."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    constant = [n for n, a in function.__annotations__.items() if "constexpr" in str(a)]
    scalars = [n for n in names if not n.endswith(("_ptr", "_stride")) and n not in constant]
    return triton.jit(function, do_not_specialize=scalars)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of running them: results are uninitialised memory."""
    global _recorder
    launches: list[Launch] = []
    before, _recorder = _recorder, launches.append
    try:
        yield launches
    finally:
        _recorder = before


def _class(name: str, value: int | float) -> object:
    """What of a scalar's value the compiled code depends on."""
    if isinstance(value, float):
        return float
    if name.endswith("_stride"):
        return 1 if value == 1 else (value % 16 == 0, -(2**31) <= value < 2**31)
    return -(2**31) <= value < 2**31


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *tensors: torch.Tensor | None,
    scalars: dict[str, int | float],
    constants: dict[str, Any],
    num_warps: int,
) -> None:
    """Run `kernel` over `grid`; arguments stand in the order tensors, scalars, constants."""
    if _recorder is not None:
        _recorder(Launch(kernel, grid, tensors, scalars, constants, num_warps))
        return
    if not isinstance(kernel, JITFunction):  # the interpreter
        kernel[grid](*tensors, **scalars, **constants)
        return
    device = next(t for t in tensors if t is not None).get_device()
    driver = triton.runtime.driver.active
    if device >= 0 and device != driver.get_current_device():
        with torch.get_device_module().device(device):
            return launch(
                kernel, grid, *tensors, scalars=scalars, constants=constants, num_warps=num_warps
            )
    key = (
        kernel,
        driver,
        device,
        num_warps,
        *[t is not None and (t.dtype, t.data_ptr() % 16) for t in tensors],
        *[_class(name, value) for name, value in scalars.items()],
        *constants.values(),
    )
    compiled = _compiled.get(key)
    if compiled is None or knobs.runtime.launch_enter_hook or knobs.runtime.launch_exit_hook:
        _compiled[key] = kernel[grid](
            *tensors, **scalars, **constants, num_warps=num_warps, enable_fp_fusion=False
        )
        return
    gx, gy, gz = (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device if device >= 0 else driver.get_current_device())
    compiled.run(
        gx, gy, gz, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *tensors, *scalars.values(), *constants.values(),
    )  # fmt: skip
