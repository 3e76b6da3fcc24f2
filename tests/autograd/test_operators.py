"""Each operator by torch.library.opcheck, and every case on tensors whose values no host can read."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import dispatch, testing

from .losses import DISTINCT, SHAPE, each_case, each_loss, inputs, pull
from .test_grad_in_forward import operators_arguments
from .test_inplace import IN_PLACE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:reduction:UserWarning")


class Calls(TorchDispatchMode):
    """The calls of fused operators, with arguments of their own."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("fusedloss."):
            self.calls.append((function, tuple(a.detach().clone() if torch.is_tensor(a) else a for a in args)))
        return function(*args, **(kwargs or {}))


@each_loss
def test_opcheck(kernels, case):
    """Schema, fake implementation, and AOT dispatch with dynamic shapes. (torch.library's test of autograd
    registration asks for none here: a Function stands on top.)"""
    for reduction in (case.reductions[0], case.reductions[-1]):
        tensors, keywords = inputs(case)
        with Calls() as seen:
            pull(case, tensors, keywords, reduction)
        assert len(seen.calls) == 2
        for function, args in seen.calls:
            results = function(*args)
            written = [t for t in (results if isinstance(results, tuple) else (results,)) if t.numel()]
            assert all(t.data_ptr() not in [a.data_ptr() for a in args if torch.is_tensor(a)] for t in written)
            torch.library.opcheck(function, args)


def test_every_operator_is_checked(kernels):
    """No operator of the library is left out of the test above, of test_inplace.py and test_grad_in_forward.py."""
    seen = set(operators_arguments("cpu")) | {f"{name}_" for name in IN_PLACE}
    for case in map(testing.case, DISTINCT):
        with Calls() as calls, FakeTensorMode():
            pull(case, *inputs(case, device="cpu"), "sum")
        seen |= {function.name().removeprefix("fusedloss::") for function, _ in calls.calls}
    registered = {
        name.removeprefix("fusedloss::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fusedloss::")
    }
    assert registered == seen


class Context:
    """What autograd hands to forward and backward. A build of torch without CUDA makes no graph of "cuda"."""

    def __init__(self, arguments):
        self.needs_input_grad = tuple(torch.is_tensor(a) and a.is_floating_point() for a in arguments)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass


def on_gpu(t):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")


@each_case
def test_gpu_tensors_without_values(case, monkeypatch):
    """On fake GPU tensors, where each .item() and each bool() of a tensor raises: nothing waits for the device."""
    for reduction in case.reductions:
        with FakeTensorMode(), fusedloss.use("triton"):
            tensors, keywords = inputs(case, device="cpu")
            tensors = tuple(map(on_gpu, tensors))
            keywords = {k: on_gpu(v) if torch.is_tensor(v) else v for k, v in keywords.items()}
            ran = []

            for name in dispatch.FUNCTIONS:
                function = dispatch.function(name)

                def apply(*arguments, function=function):
                    context = Context(arguments)
                    outputs = function.forward(context, *arguments)
                    loss, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
                    gradients = function.backward(context, torch.ones_like(loss), *rest)
                    ran.append((arguments, loss, gradients))  # noqa: B023
                    return outputs

                monkeypatch.setitem(dispatch._applied, name, apply)
            with torch.no_grad():
                loss = case.ours(*tensors, **keywords, reduction=reduction)
            monkeypatch.undo()
            ((arguments, _, gradients),) = ran
            assert loss.is_cuda
            assert len(gradients) == len(arguments)
            for argument, gradient in zip(arguments[: case.differentiable], gradients, strict=False):
                assert gradient.is_cuda
                assert (gradient.shape, gradient.dtype) == (argument.shape, argument.dtype)


def test_fake_tensors_do_raise_for_host_reads():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.empty(3, device="cuda").sum() > 0)


@each_loss
def test_fake_tensors_with_a_graph(kernels, case):
    """FakeTensorMode with autograd: loss and gradients in the right shapes and dtypes."""
    real = pull(case, *inputs(case), "sum")
    with FakeTensorMode():
        loss, gradients = pull(case, *inputs(case, device="cpu"), "sum")
    for fake, true in zip((loss, *gradients), (real[0], *real[1]), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (true.shape, true.dtype, true.stride())


@each_loss
def test_meta_tensors(path, case):
    tensors, keywords = inputs(case, device="meta")
    assert pull(case, tensors, keywords, "sum")[1][0].shape == SHAPE


LAUNCHES = """
import sys, threading
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import fusedloss
from fusedloss import testing
from fusedloss.kernels import launch, operators

READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
inside = []

class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.removeprefix("aten.").startswith(READS):
            raise AssertionError(f"the host reads a tensor: {name}")
        inside.append(name)
        return function(*args, **(kwargs or {}))

def guard(launcher):
    def guarded(*arguments):
        with NoHostRead():  # a mode does not see what an operator does below it; item() has its own name there
            return launcher(*arguments)
    return guarded

from importlib import import_module
for name in ("bce", "bce_with_logits", "cross_entropy", "entropy", "entropy_with_logits", "kl_div",
             "kl_div_with_logits", "nll_loss"):
    module = import_module(f"fusedloss.kernels.{name}")
    for suffix in ("forward", "backward"):
        setattr(module, f"{name}_{suffix}", guard(getattr(module, f"{name}_{suffix}")))

def run():
    for case in testing.CASES:
        for reduction in case.reductions:
            for layout in (lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t):
                tensors, keywords = case.make_inputs((40, 700), torch.bfloat16, "cpu")
                inputs = tuple(map(layout, tensors)), keywords
                with NoHostRead():
                    testing.forward_backward(case, inputs, differentiate=case.differentiable, reduction=reduction)

with fusedloss.use("triton"), launch.recording() as launches:
    try:
        with NoHostRead():
            bool(torch.ones(()) > 0)
    except AssertionError:
        pass
    else:
        raise SystemExit("a host read went unseen")
    inside.clear()
    run()
    one, seen = len(launches), len(inside)
    assert one > 4 * len(testing.CASES), one
    assert any(name.startswith("aten.") for name in inside)
    threads = [threading.Thread(target=run) for _ in range(2)]
    failures = []
    threading.excepthook = lambda args: failures.append(args.exc_value)
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures, failures
    assert len(launches) == 3 * one, (one, len(launches))
print("launches", one)
"""


def test_launches_without_a_host_read_and_from_two_threads():
    """The compiled path, its launches recorded instead of run. (The interpreter keeps its state in globals:
    it cannot run two threads.)"""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", LAUNCHES], capture_output=True, text=True, timeout=200,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("launches ")
