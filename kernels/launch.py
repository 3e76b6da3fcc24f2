"""Compile once, then launch with as little host work as Triton's own launcher allows.

A launcher (Python that lays out tensors and chooses tiles) runs once for each layout of its arguments.
What it launched is kept as a tape, and played from then on: `perform` is what the operators call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .layout import empty, placed


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
ALIGNED = 31  # the bits of an address that a tape knows: float32 beside half precision is aligned by eight elements
TAPES = 4096  # kept at most; then all are dropped, as sizes seem to change with every call
_compiled: dict[tuple, Any] = {}
_tapes: dict[tuple, Any] = {}
_recorder: Callable[[Launch], None] | None = None
_thread = threading.local()
_runtime = knobs.runtime
address_of = Tensor.data_ptr
guards: Any = getattr(torch._C._dynamo, "guards", None)  # Dynamo's; a torch with others finds its tapes by their keys


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


def bare(compiled: Any) -> tuple[Callable, tuple, bool]:
    """What runs a compiled kernel, its arguments between the stream and a tuple of the kernel's own, and whether
    addresses will do for tensors. On NVIDIA's backend of the versions that were read, that is the C function under
    Triton's launcher, which in Python only looks for scratch memory and instrumentation; these kernels have none."""
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
        ), True  # fmt: skip
    return lambda *arguments: run(*arguments[:-1], *arguments[-1]), fixed, False


def getter(places: Sequence[int]) -> Callable[[Sequence], tuple]:
    """What stands at these places, as a tuple."""
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple(values[k] for k in places)


def nothing(*_: Any) -> None:
    """An output that nobody asked for, or no answer."""


class Tape:
    """The launches of one operator for one layout of its arguments, with tensors as places in (arguments, outputs,
    scratch, None), and how outputs and scratch are made."""

    def __init__(self, arguments: tuple, tensors: int, outputs: Any, active: Any, current: int) -> None:
        given = [k for k in range(tensors) if arguments[k] is not None]
        self.given, self.others = getter(given), getter([k for k in range(len(arguments)) if k not in given])
        self.rest = self.others(arguments)
        self.active, self.current = active, current
        self.tensors: list[Any] = list(self.given(arguments))
        self.playable = self.tensors[0].get_device() in (-1, current)
        self.by_address = True
        self.like_these: Any = None
        self.made: list[Callable] = []
        self.single = not isinstance(outputs, tuple)
        for output in (outputs,) if self.single else outputs:
            if output is None or not any(output is t for t in self.tensors):  # else it is written in place
                self.make(output)
        self.outputs = len(self.made)
        self.launches: list[tuple] = []

    def make(self, tensor: Tensor | None) -> None:
        """Have every play make one like it."""
        self.tensors.append(tensor)
        if tensor is None:
            self.made.append(nothing)
            return
        layout = tuple(tensor.shape), tensor.stride()
        behind = tensor.storage_offset()
        kind = f"_empty_strided_{tensor.device.type}"  # on the current device: half of what the general one takes
        if hasattr(guards, kind) and not behind:
            self.made.append(partial(getattr(guards, kind), *layout, tensor.dtype))
        else:
            how: dict[str, Any] = dict(dtype=tensor.dtype, device=tensor.device)
            self.made.append(partial(placed, layout[0], layout[1], behind, **how))

    def add(self, compiled: Any, grid: tuple[int, ...], tensors: tuple, numbers: tuple) -> None:
        places = []
        for t in tensors:
            place = -1 if t is None else next((k for k, known in enumerate(self.tensors) if known is t), None)
            if place is None:  # a copy: what it holds is not known the next time
                self.playable = False
                return
            places.append(place)
        run, fixed, by_address = bare(compiled)
        self.by_address &= by_address
        gx, gy, gz = (*grid, 1, 1)[:3]
        self.launches.append((run, fixed, (gx, gy, gz), getter(places), numbers))

    def watch(self, arguments: tuple) -> None:
        """Let `replay` know arguments like these: types, layouts, dtypes, devices and torch's modes."""
        tensors, free = self.given(arguments), dict(dynamic_dims_sizes=None, dynamic_dims_strides=None)
        try:
            self.like_these = guards.TensorGuards(*tensors, **free).check
        except (AttributeError, TypeError):
            self.like_these = nothing

    def replay(self, arguments: tuple) -> Any:
        """What `play` returns, or None where arguments, or what surrounds the call, are not those of the last time."""
        tensors = self.given(arguments)
        if (
            self.like_these(*tensors)
            and self.others(arguments) == self.rest
            and driver.active is self.active
            and self.active.get_current_device() == self.current
            and not (_recorder or hooked())
        ):
            addresses = [*map(address_of, tensors)]
            if not reduce(or_, addresses) & ALIGNED:
                return self.play(tensors, addresses)
        return None

    def play(self, tensors: tuple, addresses: list[int]) -> Any:
        made = [make() for make in self.made]
        values: Sequence = (*tensors, *made, None)
        if self.by_address:  # a launcher would ask each tensor, and the driver, at each launch
            values = [*addresses, *[None if t is None else t.data_ptr() for t in made], None]
        stream = self.active.get_current_stream(self.current)
        for run, fixed, grid, places, numbers in self.launches:
            run(*grid, stream, *fixed, places(values) + numbers)
        return made[0] if self.single else tuple(made[: self.outputs])


def scratch(like: Tensor, *size: int) -> Tensor:
    """Memory for partial sums: float32, beside `like`."""
    memory = empty(like, size, torch.float32)
    tape = getattr(_thread, "tape", None)
    if tape is not None:
        tape.make(memory)
    return memory


def perform(operator: Any, arguments: tuple) -> Any:
    """The outputs of operator.allocate(*arguments), filled by operator.launcher(outputs, *arguments), or by what that
    launched the last time for the same layout. The leading `operator.tensors` arguments are tensors or None."""
    if _recorder is not None or INTERPRETED or hooked():
        outputs = operator.allocate(*arguments)
        operator.launcher(outputs, *arguments)
        return outputs
    active = driver.active
    current = active.get_current_device()
    given = arguments[: operator.tensors]
    key = (
        operator, active, current, arguments[operator.tensors :],
        *[t is not None and (t.shape, t.stride(), t.dtype, t.get_device(), t.data_ptr() & ALIGNED) for t in given],
    )  # fmt: skip
    tape = _tapes.get(key)
    if tape is not None and tape.playable:
        tensors = tape.given(arguments)
        addresses = [*map(address_of, tensors)]
        if not reduce(or_, addresses) & ALIGNED:
            if operator.latest is tape or tape.like_these is None:  # it was, but not known again: other modes
                tape.watch(arguments)
            operator.latest = tape
        return tape.play(tensors, addresses)
    outputs = operator.allocate(*arguments)
    there, new = [id(t) for t in given if t is not None], None
    if tape is None and len(there) == len(set(there)):  # a tensor in two places has no tape
        new = Tape(arguments, operator.tensors, outputs, active, current)
    before, _thread.tape = getattr(_thread, "tape", None), new
    try:
        operator.launcher(outputs, *arguments)
    finally:
        _thread.tape = before
    if new is not None:
        new.tensors = []
        if len(_tapes) >= TAPES:
            _tapes.clear()
        _tapes[key] = new
    return outputs


def warps(num_warps: int, constants: dict[str, Any], size: int) -> int:
    """The warps of a program on a GPU whose warps have `size` threads: as many, unless a thread would be left
    with less than 16 bytes of each aligned tile."""
    one_load = constants.get("U") == 1 and constants["ROWS"] == 1
    return num_warps * 32 // size if constants.get("WIDE") or one_load else num_warps


def compile_options(num_warps: int, constants: dict[str, Any], size: int) -> dict[str, Any]:
    """How a launch's kernel is compiled for a GPU whose warps have `size` threads. Very many threads a row have 64
    registers each, for two rows an SM, but where all of cross entropy's options would spill. So have rows of two
    logits that a warp reads, and rows of all those options in backward: 32 warps an SM, as else they take up to 80."""
    more = constants.get("CAP") and constants["SMOOTH"] and constants["WEIGHT"]
    threads = constants.get("T", 1)
    many, two = threads > 128, threads == 32 and "FIRST_GRAD" in constants
    tight = constants.get("HINT", 0) > 1 and (two or (more and "TARGET_GRAD" in constants))
    limit = dict(maxnreg=128 if more and many else 64) if size == 32 and (many or tight) else {}
    return dict(num_warps=warps(num_warps, constants, size), enable_fp_fusion=False, **limit)


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
            *tensors, **scalars, **constants, **compile_options(num_warps, constants, WARP)
        )
    else:
        stream = active.get_current_stream(active.get_current_device())
        compiled.run(
            *(*grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None,
            *tensors, *numbers,
        )  # fmt: skip
    if (tape := getattr(_thread, "tape", None)) is not None:
        tape.add(compiled, grid, tensors, numbers)
