"""What surrounds a loss in training: autocast, overrides, checkpointing, hooks, modules, wrapper tensors."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fusedloss
from fusedloss import testing

from .losses import DEVICE, Operators, assert_all_close, doubles, each_loss, inputs, pull, wanted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:reduction:UserWarning")
INDEX = testing.case("cross_entropy/index")


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(path, case, dtype):
    """Half precision gives a float32 loss that nothing rounded; the gradient has the input's dtype."""
    if DEVICE == "cuda" and case.loss == "binary_cross_entropy":
        pytest.skip("torch refuses it under autocast on a GPU")
    tensors, keywords = inputs(case, dtype=dtype)
    with torch.autocast(DEVICE, dtype=dtype):
        loss, gradients = pull(case, tensors, keywords, "sum")
    exact_tensors, exact_keywords = doubles(tensors, keywords)
    exact, expected = pull(case, exact_tensors, exact_keywords, "sum", case.torch_equivalent)
    assert loss.dtype is torch.float32
    assert [g.dtype for g in gradients] == [dtype] * len(gradients)
    torch.testing.assert_close(loss.double(), exact, rtol=3e-6, atol=1e-6)
    half_ulp = torch.finfo(dtype).eps / 2 * 1.01
    # torch under autocast converts first, and so do we: one rounding, of the gradient
    assert_all_close(gradients, expected, rtol=half_ulp, atol=1e-6)


def test_autocast_of_a_gpu():
    """Faked: the GPU's switch is asked for the GPU's tensors, the CPU's is not."""
    pytest.importorskip("triton")
    before = torch.is_autocast_enabled("cuda")
    with fusedloss.use("triton"), FakeTensorMode():
        half = torch.empty(4, 5, device="cuda", dtype=torch.float16)
        labels = torch.empty(4, device="cuda", dtype=torch.int64)
        torch.set_autocast_enabled("cuda", True)
        try:
            with Operators() as operators:
                assert fusedloss.cross_entropy(half, labels).dtype is torch.float32
                assert fusedloss.binary_cross_entropy_with_logits(half, half).dtype is torch.float32
                assert fusedloss.kl_div(half, half).dtype is torch.float32
            assert len(operators.ours) == 3
            assert not [name for name in operators.names if "_to_copy" in name]  # no float32 copy of the logits
            with pytest.raises(RuntimeError, match="unsafe to autocast"):
                fusedloss.binary_cross_entropy(half, half)
        finally:
            torch.set_autocast_enabled("cuda", before)
        assert fusedloss.cross_entropy(half, labels).dtype is torch.float16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert fusedloss.cross_entropy(half, labels).dtype is torch.float16


class Tagged(torch.Tensor):
    """A subclass that notes which functions are called with it."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class Noting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@each_loss
def test_overrides(path, case):
    """Our public function is what subclasses and modes are asked about; both may go on to the kernels."""
    tensors, keywords = inputs(case)
    loss, gradients = pull(case, tensors, keywords, "sum")
    tagged = tensors[0].detach().as_subclass(Tagged).requires_grad_()
    Tagged.seen.clear()
    by_subclass = case.ours(tagged, *tensors[1:], **keywords, reduction="sum")
    assert Tagged.seen[0] is case.ours
    assert isinstance(by_subclass, Tagged)
    with Noting() as mode, Operators() as operators:
        by_mode, mode_gradients = pull(case, tensors, keywords, "sum")
    assert mode.seen[0] is case.ours
    assert len(operators.ours) == (2 if path == "triton" else 0)
    assert_all_close([by_subclass.as_subclass(torch.Tensor), by_mode, *mode_gradients], [loss, loss, *gradients])


@each_loss
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(path, case, reentrant):
    tensors, keywords = inputs(case)
    call = lambda *t, **k: checkpoint(case.ours, *t, use_reentrant=reentrant, **k)
    if reentrant:  # which takes no keywords
        call = lambda *t, **k: checkpoint(lambda *t: case.ours(*t, **k), *t, use_reentrant=True)
    loss = call(*tensors, **keywords, reduction="sum")
    loss.backward()  # the reentrant kind takes no torch.autograd.grad
    gradients = [t.grad for t in wanted(tensors)]
    exact_tensors, exact_keywords = doubles(tensors, keywords)
    exact = case.torch_equivalent(*exact_tensors, **exact_keywords, reduction="sum")
    assert_all_close([loss, *gradients], [exact, *torch.autograd.grad(exact, wanted(exact_tensors))])


@each_loss
def test_selective_checkpoint(kernels, case):
    """A policy sees the operators, and what it keeps is not computed again."""
    seen = []

    def contexts(keep):
        def policy(context, function, *args, **kwargs):
            seen.append(str(function))
            ours = keep and str(function).startswith("fusedloss.")
            return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

        return lambda: create_selective_checkpoint_contexts(policy)

    tensors, keywords = inputs(case)
    counts, results = [], []
    for keep in (False, True):
        call = lambda *t, **k: checkpoint(
            lambda *t: case.ours(*t, **k).clone(),
            *t,
            use_reentrant=False,
            context_fn=contexts(keep),  # noqa: B023
        )
        with Operators() as operators:
            loss, gradients = pull(case, tensors, keywords, "sum", call)
        counts.append(len([name for name in operators.ours if "forward" in name]))
        results.append([loss, *gradients])
    assert any(name.startswith("fusedloss.") for name in seen)
    assert counts == [2, 1]
    assert_all_close(*results)


@each_loss
def test_saved_tensors_hooks(path, case):
    tensors, keywords = inputs(case)
    expected = pull(case, tensors, keywords, "sum")
    packed = []
    pack = lambda t: (packed.append(t.shape), t.detach().clone())[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hooked = pull(case, tensors, keywords, "sum")
    with torch.autograd.graph.save_on_cpu():
        on_cpu = pull(case, tensors, keywords, "sum")
    assert packed
    for result in (hooked, on_cpu):
        assert_all_close([result[0], *result[1]], [expected[0], *expected[1]])
    if path == "triton":  # nothing of the logits' size but the arguments
        large = [shape for shape in packed if shape.numel() >= tensors[0].numel()]
        arguments = [*tensors, *(v for v in keywords.values() if torch.is_tensor(v))]
        assert len(large) <= len(arguments)


@each_loss
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(path, case, mode):
    tensors, keywords = inputs(case)
    expected = case.ours(*tensors, **keywords, reduction="sum")
    with mode(), Operators() as operators:
        loss = case.ours(*tensors, **keywords, reduction="sum")
    assert len(operators.ours) == (1 if path == "triton" else 0)
    assert not loss.requires_grad
    assert torch.equal(loss, expected.detach())


def test_copies_of_a_module(path):
    x, y = inputs(INDEX)[0]
    module = fusedloss.CrossEntropyLoss(torch.rand(x.shape[1], device=DEVICE), z_loss=0.1, dtype=torch.float32)
    expected = module(x, y)
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert torch.equal(made(x, y), expected)
    assert torch.equal(nn.parallel.replicate(module, [0], detach=True)[0](x, y) if DEVICE == "cuda" else
                       module._replicate_for_data_parallel()(x, y), expected)  # fmt: skip


DTENSOR = """
import os, socket, torch, torch.nn.functional as F, torch.distributed as dist, fusedloss
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
s = socket.socket(); s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]; s.close()
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.manual_seed(0)
x, t, y = torch.randn(4, 6), torch.rand(4, 6), torch.tensor([0, 5, 2, 3])
made = {"cross_entropy": (x, y), "nll_loss": (x.log_softmax(1), y), "kl_div": (x.log_softmax(1), t),
        "binary_cross_entropy": (x.sigmoid(), t), "binary_cross_entropy_with_logits": (x, t)}
def attempt(function, tensors, placement):
    a, b = (distribute_tensor(t, mesh, [placement]) for t in tensors)
    a = a.detach().requires_grad_()
    try:
        loss = function(a, b, reduction="sum")
        loss.backward()
        return loss.full_tensor().detach(), a.grad.full_tensor()
    except Exception as error:
        return type(error)
worked = 0
with fusedloss.use("triton"):
    for name, tensors in made.items():
        for placement in (Replicate(), Shard(0)):
            theirs = attempt(getattr(F, name), tensors, placement)
            ours = attempt(getattr(fusedloss, name), tensors, placement)
            print(name, placement, theirs if isinstance(theirs, type) else "works", flush=True)
            if isinstance(theirs, type):
                continue
            worked += 1
            assert not isinstance(ours, type), (name, placement, ours)
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a, b)
assert worked >= 5, worked
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="a build of torch without torch.distributed")
def test_dtensor():
    """One process, gloo: whatever works with torch's function works with ours, with the same values."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", DTENSOR], capture_output=True, text=True, timeout=200,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
