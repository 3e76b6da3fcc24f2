"""Compile once, then launch with as little host work as Triton's own launcher allows.

A launcher (Python that lays out tensors and chooses tiles) runs once for each layout of its arguments.
What it launched is kept as a tape, and played from then on: `perform` is what the operators call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, empty_strided
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .layout import empty


class Launch(NamedTuple):
    """One launch, as `recording` hands it out."""

    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    scalars: dict[str, int | float]
    constants: dict[str, Any]
    num_warps: int


INTERPRETED = knobs.runtime.interpret  # read once: Triton reads it when it decorates
WARP = 64 if torch.version.hip else 32  # threads
TAPES = 4096  # kept at most; then all are dropped, as sizes seem to change with every call
_compiled: dict[tuple, Any] = {}
_tapes: dict[tuple, Any] = {}
_recorder: Callable[[Launch], None] | None = None
_thread = threading.local()
_runtime = knobs.runtime


def hooked() -> bool:
    """Whether a profiler wants to see launches: a chain of hooks, or one, by Triton's version."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


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


def bare(compiled: Any) -> tuple[Callable, tuple]:
    """What runs a compiled kernel, and its arguments between the stream and a tuple of the kernel's own. On
    NVIDIA's backend of the versions that were read, that is the C function under Triton's launcher, which in
    Python only looks for scratch memory and instrumentation; these kernels have none."""
    run, fixed = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
    if (
        triton.__version__[:4] in ("3.7.", "3.9.")
        and f"{type(run).__module__}.{type(run).__name__}" == "triton.backends.nvidia.driver.CudaLauncher"
        and not (run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False))
    ):
        function, metadata, *hooks = fixed
        switches = run.launch_cooperative_grid, run.launch_pdl
        return run.launch, (
            function, *switches, metadata, *hooks, None, None, run.arg_annotations, run.kernel_signature
        )  # fmt: skip
    return lambda *arguments: run(*arguments[:-1], *arguments[-1]), fixed


def nothing() -> None:
    """An output that nobody asked for."""


class Tape:
    """The launches of one launcher, with its tensors as places in (arguments, outputs, scratch), and how the
    latter two are made."""

    def __init__(self, given: tuple, outputs: Any) -> None:
        self.single = not isinstance(outputs, tuple)
        made = [o for o in ((outputs,) if self.single else outputs) if not any(o is g for g in given if g is not None)]
        self.tensors: list[Any] = list(given)
        self.made: list[Callable] = []
        for o in made:
            self.make(o)
        self.outputs = len(given), len(given) + len(made)
        self.launches: list[tuple] = []
        self.playable = True

    def make(self, tensor: Tensor | None) -> None:
        """Have every play make one like it."""
        self.tensors.append(tensor)
        if tensor is None:
            self.made.append(nothing)
        else:
            size, stride, device = tensor.shape, tensor.stride(), tensor.device
            self.made.append(partial(empty_strided, size, stride, dtype=tensor.dtype, device=device))

    def add(self, compiled: Any, grid: tuple[int, ...], tensors: tuple, numbers: tuple) -> None:
        places = []
        for t in tensors:
            place = next((k for k, known in enumerate(self.tensors) if known is t), None)
            if place is None:  # a copy: what it holds is not known the next time
                self.playable = False
                return
            places.append(place)
        gx, gy, gz = (*grid, 1, 1)[:3]
        self.launches.append((*bare(compiled), (gx, gy, gz), itemgetter(*places), numbers))

    def play(self, given: tuple, stream: Any) -> Any:
        tensors = (*given, *[make() for make in self.made])
        for run, fixed, grid, places, numbers in self.launches:
            run(*grid, stream, *fixed, places(tensors) + numbers)
        first, last = self.outputs
        return tensors[first] if self.single else tensors[first:last]


def scratch(like: Tensor, *size: int) -> Tensor:
    """Memory for partial sums: float32, beside `like`."""
    memory = empty(like, size, torch.float32)
    tape = getattr(_thread, "tape", None)
    if tape is not None:
        tape.make(memory)
    return memory


def perform(launcher: Callable, allocate: Callable, arguments: tuple, tensors: int) -> Any:
    """The outputs of allocate(*arguments), filled by launcher(outputs, *arguments), or by what it launched the last
    time for the same layout. The leading `tensors` arguments are tensors or None."""
    if _recorder is not None or INTERPRETED or hooked():
        outputs = allocate(*arguments)
        launcher(outputs, *arguments)
        return outputs
    active = driver.active
    current = active.get_current_device()
    given = arguments[:tensors]
    key = (
        launcher, allocate, active, current, arguments[tensors:], given[0].get_device(),
        *[t is not None and (t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in given],
    )  # fmt: skip
    tape = _tapes.get(key)
    if tape is not None and tape.playable:
        return tape.play(given, active.get_current_stream(current))
    outputs = allocate(*arguments)
    if tape is None:
        if len(_tapes) >= TAPES:
            _tapes.clear()
        tape = Tape(given, outputs)
        tape.playable = given[0].get_device() in (-1, current)
    before, _thread.tape = getattr(_thread, "tape", None), tape if key not in _tapes else None
    try:
        launcher(outputs, *arguments)
        tape.tensors = []
        _tapes[key] = tape
    finally:
        _thread.tape = before
    return outputs


def warps(num_warps: int, constants: dict[str, Any], size: int) -> int:
    """The warps of a program on a GPU whose warps have `size` threads: as many, unless a thread would be left
    with less than 16 bytes of each aligned tile."""
    one_load = constants.get("U") == 1 and constants["ROWS"] == 1
    return num_warps * 32 // size if constants.get("WIDE") or one_load else num_warps


def _class(name: str, value: int | float) -> object:
    """What of a scalar's value the compiled code depends on."""
    if isinstance(value, float):
        return float
    fits = -(2**31) <= value < 2**31
    return (value == 1, value % 16 == 0, fits) if name.endswith("_stride") else fits


def specialisation(launch: Launch) -> tuple:
    """What the compiled code of a launch depends on: launches that agree in it compile once."""
    return (
        launch.kernel, launch.num_warps,
        *[t is not None and (t.dtype, t.data_ptr() % 16 == 0) for t in launch.tensors],
        *[_class(name, value) for name, value in launch.scalars.items()],
        *launch.constants.values(),
    )  # fmt: skip


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *tensors: Tensor | None,
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
    active = driver.active
    device = next(t for t in tensors if t is not None).get_device()
    if device >= 0 and device != active.get_current_device():
        with torch.get_device_module().device(device):
            return launch(
                kernel, grid, *tensors, scalars=scalars, constants=constants, num_warps=num_warps
            )
    key = active, device, specialisation(Launch(kernel, grid, tensors, scalars, constants, num_warps))
    numbers = (*scalars.values(), *constants.values())
    compiled = _compiled.get(key)
    if compiled is None or hooked():
        compiled = _compiled[key] = kernel[grid](
            *tensors, **scalars, **constants, num_warps=warps(num_warps, constants, WARP), enable_fp_fusion=False
        )
    else:
        stream = active.get_current_stream(active.get_current_device())
        compiled.run(
            *(*grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None,
            *tensors, *numbers,
        )  # fmt: skip
    if (tape := getattr(_thread, "tape", None)) is not None:
        tape.add(compiled, grid, tensors, numbers)
