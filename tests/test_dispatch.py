"""Who computes a call, how a user asks and chooses, and what importing needs."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fusedloss
from fusedloss import dispatch

x, labels = torch.linspace(-2, 2, 20).reshape(4, 5), torch.tensor([0, 1, 2, 3])
p, w = x.softmax(-1), torch.linspace(0.5, 1.5, 5)
needs_triton = pytest.mark.skipif(not dispatch._installed, reason="Triton is not installed")


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    ).stdout.strip()  # fmt: skip


@pytest.fixture
def kernels(monkeypatch):
    """Names of the Functions that calls reach, in place of the Functions."""
    reached = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def apply(self, *args):
            reached.append((self.name, args))
            loss = torch.zeros(())
            return (loss, loss) if self.name == "CrossEntropy" else loss

    monkeypatch.setattr(dispatch, "function", Recorded)
    monkeypatch.setattr(dispatch, "_applied", {name: Recorded(name).apply for name in dispatch.FUNCTIONS})
    return reached


class TestUse:
    @needs_triton
    def test_nests_and_restores(self):
        before = fusedloss.path(x)
        forced = fusedloss.use("triton")
        with forced:
            assert fusedloss.path(x) == "triton"
            with fusedloss.use("reference"):
                assert fusedloss.path(x) == "reference"
                with forced, fusedloss.use("auto"):
                    assert fusedloss.path(x) == before
                assert fusedloss.path(x) == "reference"
            assert fusedloss.path(x) == "triton"
        assert fusedloss.path(x) == before
        with pytest.raises(KeyError), forced:
            raise KeyError
        assert fusedloss.path(x) == before

    def test_takes_effect_when_entered(self):
        before = fusedloss.path(x)
        fusedloss.use("reference" if before == "triton" else "auto")
        assert fusedloss.path(x) == before

    @pytest.mark.parametrize("name", ["cuda", "", None, "Triton"])
    def test_other_names(self, name):
        with pytest.raises(ValueError, match="'triton', 'reference' or 'auto'"):
            fusedloss.use(name)

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr(dispatch, "_installed", False)
        with pytest.raises(ImportError, match="not installed"), fusedloss.use("triton"):
            pass


@needs_triton
class TestPath:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_what_the_kernels_take(self, dtype):
        with fusedloss.use("triton"):
            assert fusedloss.path(x.to(dtype)) == "triton"
            assert fusedloss.path(torch.nn.Parameter(x.to(dtype))) == "triton"
            assert fusedloss.path(x.to(dtype).t()) == "triton"

    def test_auto_follows_the_device(self):
        with fusedloss.use("auto"), FakeTensorMode():
            assert fusedloss.path(torch.empty(3, device="cuda")) == "triton"
            on_cpu = "triton" if dispatch.INTERPRETED else "reference"
            assert fusedloss.path(torch.empty(3)) == on_cpu
            assert fusedloss.path(torch.empty(0, device="cuda")) == "reference"
            assert fusedloss.path(torch.empty(3, device="cuda", dtype=torch.float64)) == "reference"
            with fusedloss.use("reference"):
                assert fusedloss.path(torch.empty(3, device="cuda")) == "reference"

    @pytest.mark.parametrize(
        "tensor",
        [x.double(), x + 0j, labels, x > 0, x[:0], x.to("meta")],
        ids=["float64", "complex", "int64", "bool", "empty", "meta"],
    )
    def test_what_they_do_not(self, tensor):
        with fusedloss.use("triton"):
            assert fusedloss.path(tensor) == "reference"

    def test_transforms(self):
        seen = []

        def loss(x):
            seen.append(fusedloss.path(x))
            return fusedloss.cross_entropy(x, labels)

        with fusedloss.use("triton"):
            torch.func.grad(loss)(x)
            torch.func.vmap(lambda x, y: fusedloss.cross_entropy(x, y))(x, labels)
            with forward_ad.dual_level():
                loss(forward_ad.make_dual(x, torch.ones_like(x)))
            assert fusedloss.path(x) == "triton"
        assert seen == ["reference", "reference"]

    def test_wrapper_subclasses(self):
        from torch.testing._internal.two_tensor import TwoTensor

        class Plain(torch.Tensor):
            pass

        with fusedloss.use("triton"):
            assert fusedloss.path(TwoTensor(x, x)) == "reference"
            assert fusedloss.path(x.as_subclass(Plain)) == "triton"


@needs_triton
class TestRun:
    def test_arguments_are_the_references(self, kernels):
        with fusedloss.use("triton"):
            fusedloss.binary_cross_entropy_with_logits(x, p, w, pos_weight=w, label_smoothing=0.1)
            fusedloss.cross_entropy(x, labels, w, ignore_index=3, z_loss=0.1, reduction="sum")
            fusedloss.kl_div(x, p[:1], reduction="sum", dtype=torch.bfloat16)
            fusedloss.kl_div(x, p, reduction="batchmean")
            fusedloss.kl_div_with_logits(x, p, dim=-2, temperature=2.0)
            fusedloss.entropy(p)
            fusedloss.entropy_with_logits(x, reduction="mean")
            fusedloss.nll_loss(x, labels)
            fusedloss.binary_cross_entropy(p, p)
        names = [name for name, _ in kernels]
        assert names == [
            "BCEWithLogits", "CrossEntropy", "KLDiv", "KLDiv", "KLDivWithLogits", "Entropy",
            "EntropyWithLogits", "NLLLoss", "BCE",
        ]  # fmt: skip
        args = [args for _, args in kernels]
        assert args[0][2].shape == args[0][3].shape == (4, 5)
        assert args[0][4:] == (0.1, 1, 0, torch.float32)
        assert args[1][3:] == (3, 0.0, 0.1, 0.0, 2, 0, torch.float32)
        assert args[2][1].shape == (4, 5)
        assert args[2][2:] == (False, 2, torch.bfloat16)
        assert args[3][2:] == (False, 3, torch.float32)
        assert args[4][2:] == (0, 2.0, False, 3, 0, torch.float32)
        assert args[5][1:] == (1, 0, torch.float32)
        assert args[6][1:] == (1, 1, 0, torch.float32)
        assert args[7][2:] == (None, -100, 1, torch.float32)
        assert args[8][0] is p
        assert args[8][1] is not p

    @pytest.mark.parametrize(
        "call",
        [
            lambda: fusedloss.cross_entropy(x.double(), labels),
            lambda: fusedloss.cross_entropy(x, p.double()),
            lambda: fusedloss.cross_entropy(x, p, w.clone().requires_grad_()),
            lambda: fusedloss.cross_entropy(x, p, w.double()),
            lambda: fusedloss.cross_entropy(x, labels, dtype=torch.float64),
            lambda: fusedloss.binary_cross_entropy_with_logits(x, p, w.double()),
            lambda: fusedloss.binary_cross_entropy_with_logits(x, p, pos_weight=w.long() + 1),
            lambda: fusedloss.kl_div(x, p.double(), reduction="sum"),
            lambda: fusedloss.kl_div_with_logits(x, p, reduction="none"),
            lambda: fusedloss.entropy(p.double()),
            lambda: fusedloss.nll_loss(x[:0], labels[:0]),
        ],
    )
    def test_what_goes_to_the_reference(self, call, kernels):
        with fusedloss.use("triton"):
            call()
        assert not kernels

    def test_weight_that_requires_grad_under_no_grad(self, kernels):
        with fusedloss.use("triton"), torch.no_grad():
            fusedloss.cross_entropy(x, labels, w.clone().requires_grad_())
        assert kernels


class TestImport:
    def test_without_triton(self):
        code = (
            "import sys; sys.modules['triton'] = None\n"
            "import torch, fusedloss\n"
            "x = torch.randn(4, 5, requires_grad=True)\n"
            "fusedloss.cross_entropy(x, torch.tensor([0, 1, 2, 3])).backward()\n"
            "print(fusedloss.path(x), x.grad is not None)"
        )
        assert run(code, TRITON_INTERPRET="0") == "reference True"
        assert run(code, TRITON_INTERPRET="1") == "reference True"

    def test_is_light(self):
        code = (
            "import sys, time, torch; start = time.process_time(); import fusedloss\n"
            "x = torch.randn(4, 5); fusedloss.cross_entropy(x, torch.tensor([0, 1, 2, 3]))\n"
            "heavy = [m for m in ('triton', 'torch._dynamo', 'numpy.testing') if m in sys.modules]\n"
            "print(heavy, time.process_time() - start < 0.1)"
        )
        if torch.version.cuda or torch.version.hip:
            pytest.skip("Triton is loaded at import where kernels are likely to run")
        assert run(code, TRITON_INTERPRET="0") == "[] True"

    def test_names(self):
        assert all(hasattr(fusedloss, name) for name in fusedloss.__all__)
        assert fusedloss.__version__[0].isdigit()
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            fusedloss.nothing  # noqa: B018


def test_small_cpu_tensors_of_two_dtypes():
    """They are not torch's function's at once, whose result has the input's dtype."""
    x, y = torch.randn(4, 5).log_softmax(1).bfloat16(), torch.rand(4, 5)
    with fusedloss.use("reference"):
        assert fusedloss.kl_div(x, y, reduction="sum").dtype == torch.float32
        assert fusedloss.cross_entropy(x, y).dtype == torch.float32
        assert fusedloss.cross_entropy(x, y.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert fusedloss.cross_entropy(x, y.bfloat16()).dtype == torch.float32
        with pytest.raises(TypeError, match="dtype"):
            fusedloss.cross_entropy(x, y, dtype=False)
