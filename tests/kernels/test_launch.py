"""What a launch compiles, and how often; what a tape plays.

Nothing is compiled for the first: a launch's specialisation tells what its code depends on."""

import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

from fusedloss import compiled, testing

triton = pytest.importorskip("triton")
from fusedloss.kernels.launch import specialisation  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:reduction:UserWarning")

# row lengths of one class each, aligned or not
CLASSES = ((2, 10, 12), (49, 100, 300, 896), (897, 1001, 4096, 8192), (8193, 10000, 12296))
BETWEEN = (13, 24, 25, 48)  # of the first or the second, by the kernel
LONGER = (20001, 131080)  # of the last class
# where a row is read twice, by its bytes: 4 an element, or 6 of two logits and a gradient
TWICE = ((1000, 1001, 4096), (4097, 8192, 10240), (10241, 12296, *LONGER))
TWICE_KL = ((1000, 1001, 2730), (2731, 4096, 6826), (6827, 8192, *LONGER))
# of an operand that is broadcast over rows: rows shorter than a run, of whole runs, and not
BROADCAST_CLASSES = ((2, 3, 7), (8, 16, 24, 1000, 4096, 12296), (10, 17, 1001, 8193, 20001))
OPTIONS = {  # of which a new value compiles nothing
    "cross_entropy/index": [dict(ignore_index=3)],
    "cross_entropy/label_smoothing": [dict(label_smoothing=0.3)],
    "cross_entropy/z_loss": [dict(z_loss=0.5), dict(z_loss=1)],
    "cross_entropy/softcap": [dict(softcap=30.0), dict(softcap=30)],
    "kl_div_with_logits/temperature": [dict(temperature=1.5), dict(temperature=2)],
    "binary_cross_entropy_with_logits/label_smoothing": [dict(label_smoothing=0.3)],
}


def specialisations(case, shape, options):
    (tensors, keywords) = case.make_inputs(shape, torch.bfloat16, "cpu")
    inputs = tensors, {**keywords, **options}
    found = defaultdict(set)
    for launch in compiled.launches(
        lambda: testing.forward_backward(case, inputs, reduction=case.reductions[-1])
    ):
        found[launch.kernel.__name__].add(specialisation(launch))
    return found


@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_new_sizes_compile_nothing_new_within_a_class(case):
    """At most four kernels of each name, chosen by the row length; batch sizes and options choose none."""
    every = defaultdict(set)
    apart = *CLASSES[:-1], CLASSES[-1] + LONGER
    if case.name.endswith("/grad_in_forward"):
        apart = *CLASSES[:2], *(TWICE_KL if case.name.startswith("kl_div") else TWICE)
    for lengths in BROADCAST_CLASSES if case.name.endswith("/pos_weight") else apart:
        here = defaultdict(set)
        for cols in lengths:
            for rows in (2, 3, 40):
                for options in ({}, *OPTIONS.get(case.name, ())):
                    for name, keys in specialisations(case, (rows, cols), options).items():
                        here[name] |= keys
        assert {name: len(keys) for name, keys in here.items() if len(keys) > 1} == {}
        for name, keys in here.items():
            every[name] |= keys
    for cols in BETWEEN:
        for name, keys in specialisations(case, (3, cols), {}).items():
            every[name] |= keys
    assert {name: len(keys) for name, keys in every.items() if len(keys) > 4} == {}


@pytest.mark.parametrize("cols", [129, 200, 257, 300, 513, 700, 800])
def test_middling_rows_are_not_padded_far(cols):
    """A masked block costs all of it, whatever the row fills."""
    cases = [c for c in testing.CASES if c.name.startswith(("cross_entropy/", "kl_div_with_logits/", "entropy_with"))]
    for case in cases:
        inputs = case.make_inputs((3, cols), torch.bfloat16, "cpu")
        for launch in compiled.launches(lambda case=case, inputs=inputs: testing.forward_backward(case, inputs)):
            if "UP" in launch.constants:
                part = launch.constants["UP"] * launch.constants["T"] * launch.constants["V"]
                assert -(-cols // part) * part < 1.5 * cols, (case.name, launch.kernel.__name__)


@pytest.mark.parametrize("cols", [19, 300])
@pytest.mark.parametrize("inner", [7, 25, 49, 100, 196, 257, 1024, 100_000])
def test_positions_are_not_padded_far(cols, inner):
    """A tile of positions, whose classes lie apart, costs all its lanes too."""
    cases = [c for c in testing.CASES if c.name.startswith("cross_entropy/")]
    seen = set()
    for case in cases:
        inputs = case.make_inputs((1, cols, inner), torch.bfloat16, "cpu")
        for launch in compiled.launches(lambda case=case, inputs=inputs: testing.forward_backward(case, inputs)):
            if "ROWS" in launch.constants:
                tile = launch.constants["ROWS"]
                seen.add(tile)
                assert launch.grid[0] * tile < 1.34 * 32 * -(-inner // 32), (case.name, tile)
    assert seen


@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_arguments_stand_in_the_kernels_order(case):
    """From the second launch on nobody looks at their names."""
    inputs = case.make_inputs((3, 40), torch.bfloat16, "cpu")
    for launch in compiled.launches(lambda: testing.forward_backward(case, inputs, reduction=case.reductions[-1])):
        given = [*launch.scalars, *launch.constants]
        assert launch.kernel.arg_names[len(launch.tensors) :] == given, launch.kernel.__name__


def test_a_specialisation_sees_what_code_depends_on():
    """The test above would pass if it saw nothing."""
    case = testing.case("cross_entropy/index")
    seen = [specialisations(case, (3, cols), {})["cross_entropy_forward_kernel"] for cols in (10, 300, 1000, 9000)]
    assert len(set.union(*seen)) == 4
    smooth = specialisations(case, (3, 10), dict(label_smoothing=0.1))["cross_entropy_forward_kernel"]
    assert not smooth & seen[0]


TAPES = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

seen = []
nvidia.PyKernelArg = lambda **fields: tuple(fields.items())  # of a C module that needs libcuda
class Utils:
    load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))
    get_device_properties = staticmethod(lambda _: dict(max_shared_mem=232448, max_num_regs=65536))
    unload_module = staticmethod(lambda *_: None)
    build_signature_metadata = staticmethod(tuple)
    launch = staticmethod(lambda *arguments: seen.append(arguments))
class Driver(nvidia.CudaDriver):
    def __init__(self):
        self.utils, self.launcher_cls = Utils(), nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 7
        self.get_device_capability = lambda device: (9, 0)
        self.set_current_device = lambda device: None
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self):
        return torch.device("cpu")
triton.runtime.driver.set_active(Driver())

import fusedloss
from fusedloss.kernels import launch
x, y = torch.randn(4, 8, requires_grad=True), torch.randint(8, (4,))
def plain(value):  # outputs are other tensors every time, but inputs as they are; a tape gives addresses
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, int) and value > 2**20:  # no number here is as large, and no address as small
        return "x" if value == x.data_ptr() else "y" if value == y.data_ptr() else "made"
    return tuple(map(plain, value)) if isinstance(value, (tuple, list)) else value
def call(x=x, y=y, **more):
    seen.clear()
    with fusedloss.use("triton"):
        gradient, = torch.autograd.grad(fusedloss.cross_entropy(x, y, **more), x)
    assert x.size(1) < 129 or (gradient.data_ptr() - x.data_ptr()) % 16 == 0, "16 bytes do not fit both"
    return [plain(arguments[:8] + arguments[11:]) for arguments in seen]  # hooks, and what they would be told
first = call()
assert len(first) == 3 and len(launch._tapes) == 2 and all(t.playable for t in launch._tapes.values())
assert call() == first, "a tape played something else"
assert len(launch._tapes) == 2
other = call(reduction="sum")
assert len(other) == 3 and other != first and len(launch._tapes) == 4
longer = torch.randn(4, 9, requires_grad=True)
assert call(longer) != first and len(launch._tapes) == 6
apart = torch.randn(4, 9, requires_grad=True)[:, 1:]  # off 16 bytes: another layout of the same shape
moved = call(apart)
assert len(moved) == 3 and moved != first and len(launch._tapes) == 8
plays = []
launch.Tape.play, before = (lambda self, *a: (plays.append(self), before(self, *a))[1]), launch.Tape.play
assert call() == first and len(plays) == 2
flipped = torch._neg_view(x.detach()).requires_grad_()  # x's memory, but its values are others
assert "x" not in str(call(flipped)) and "x" in str(call())
wide, off = torch.rand(4, 2000, requires_grad=True), torch.rand(8001)[1:].view(4, 2000).requires_grad_()
aligned, unaligned = call(wide, wide.detach()), call(wide, off.detach())  # off 16 bytes, in the same shape
assert aligned != unaligned
for y_now, expected in ((wide, aligned), (off, unaligned), (off, unaligned), (wide, aligned), (wide, aligned)):
    assert call(wide, y_now.detach()) == expected, "an alignment was taken for another"
for x_now in (off, wide, off, off):  # a gradient lies as its logits do, when it is made by a tape as well
    assert call(x_now) == call(wide)
twice, other = torch.rand(3, 5), torch.rand(3, 5)  # one tensor in two places leaves no tape behind for two of them
kl_div = torch.ops.fusedloss.kl_div_backward
def pointers(dloss, target):
    seen.clear()
    with fusedloss.use("triton"):
        kl_div(dloss, other, target, False, 0, True, False)
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in seen[0][-1]]
assert pointers(twice, twice).count(twice.data_ptr()) == 2
both = torch.rand(3, 5), torch.rand(3, 5)
for _ in range(3):
    found = pointers(*both)
    assert all(found.count(t.data_ptr()) == 1 for t in both) and twice.data_ptr() not in found
assert pointers(twice, twice).count(twice.data_ptr()) == 2
weighted = call(weight=torch.rand(8))
assert len(weighted) == 3 and weighted != first and call() == first and call(weight=torch.rand(8)) == weighted
with torch.autocast("cpu", torch.bfloat16):
    assert call() == first and call() == first
assert call() == first
class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    names = []
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))
with Mode() as mode:
    assert len(call()) == 3
assert {"fusedloss::cross_entropy_forward", "fusedloss::cross_entropy_backward"} <= set(mode.names)
with torch.inference_mode(), fusedloss.use("triton"):
    assert fusedloss.cross_entropy(x.detach(), y).is_inference()
    assert fusedloss.cross_entropy(x.detach(), y).is_inference()
plays.clear()
assert call() == first and len(plays) == 2
launch.guards = None  # a torch without them
launch._tapes.clear()
assert call(wide, wide.detach()) == call(wide, wide.detach()) == aligned and call() == call() == call() == first
plays.clear()
assert call() == first and len(plays) == 2
triton.knobs.runtime.launch_enter_hook = lambda *_: None  # a profiler: launches go through Triton again
assert len(call()) == 3 and len(plays) == 2
print("played")
"""


def test_a_tape_plays_what_was_launched():
    """With Triton's own launcher on a driver that notes what reaches its C function."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", TAPES], capture_output=True, text=True,
                          env=environment, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith("played\n")
