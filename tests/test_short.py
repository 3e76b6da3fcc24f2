"""Small CPU tensors: against float64, and what autograd asks of any function, which some are here."""

from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import dispatch

BCE = fusedloss.binary_cross_entropy_with_logits
KL = fusedloss.kl_div_with_logits
ENTROPY = fusedloss.entropy_with_logits


def exact_bce(x, t, reduction="mean"):
    return reduced((1 - t) * torch.nn.functional.softplus(x) + t * torch.nn.functional.softplus(-x), reduction, x)


def exact_kl(x, t, reduction, reverse, temperature, dim):
    log_q, log_p = (x / temperature).log_softmax(dim), (t / temperature).log_softmax(dim)
    if reverse:
        log_q, log_p = log_p, log_q
    return reduced(temperature**2 * log_p.exp() * (log_p - log_q), reduction, x)


def exact_entropy(x, t, reduction, dim):
    log_p = x.log_softmax(dim)
    return reduced(-(log_p.exp() * log_p).sum(dim), reduction, x)


def reduced(loss, reduction, x):
    return {
        "none": lambda: loss, "mean": loss.mean, "sum": loss.sum, "batchmean": lambda: loss.sum() / len(x),
    }[reduction]()  # fmt: skip


CASES = {  # ours of (x, t), the same in float64, keywords
    **{f"bce {reduction}": (BCE, exact_bce, dict(reduction=reduction)) for reduction in ("none", "mean", "sum")},
    **{
        f"kl {reduction}{' reverse' if reverse else ''}":
            (KL, exact_kl, dict(reduction=reduction, reverse=reverse, temperature=temperature, dim=dim))
        for reduction, temperature, dim in (("batchmean", 1.0, -1), ("mean", 2, 1), ("sum", 0.5, 0))
        for reverse in (False, True)
    },
    **{
        f"entropy {reduction}": (lambda x, t, **k: ENTROPY(x, **k), exact_entropy, dict(reduction=reduction, dim=dim))
        for reduction, dim in (("none", -1), ("mean", 1), ("sum", 0))
    },
}  # fmt: skip
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def reference():
    with fusedloss.use("reference"):
        yield


def inputs(dtype=torch.float32, shape=(4, 5, 3)):
    some = torch.Generator().manual_seed(3)
    x, t = 3 * torch.randn(shape, generator=some), torch.rand(shape, generator=some)
    return x.to(dtype).requires_grad_(), t.to(dtype)


def uneven(loss):
    return torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape).to(loss.dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case, dtype):
    ours, exact, keywords = CASES[case]
    x, t = inputs(dtype)
    loss = ours(x, t, **keywords)
    assert loss.dtype is dtype
    assert (type(loss.grad_fn).__name__ == "ShortBackward") is not case.startswith("kl")  # torch's own composition
    (dx,) = torch.autograd.grad(loss, x, uneven(loss))
    wide = x.detach().double().requires_grad_()
    wanted = exact(wide, t.double(), **keywords)
    (wanted_dx,) = torch.autograd.grad(wanted, wide, uneven(loss).double())
    assert dx.dtype is dtype
    for got, right in ((loss, wanted), (dx, wanted_dx)):
        assert (got.double() - right).abs().max() <= TOLERANCES[dtype] * right.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_higher_derivatives(case):
    x, t = inputs(torch.float64, (2, 3))
    ours, _, keywords = CASES[case]
    assert torch.autograd.gradgradcheck(lambda x: ours(x, t, **keywords), x)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_gradients_and_a_second_backward(case):
    x, t = inputs()
    ours, _, keywords = CASES[case]
    loss = ours(x, t, **keywords)
    upstream = torch.stack([uneven(loss), 2 * uneven(loss)])
    (batch,) = torch.autograd.grad(loss, x, upstream, retain_graph=True, is_grads_batched=True)
    for got, given in zip(batch, upstream, strict=True):
        (dx,) = torch.autograd.grad(loss, x, given, retain_graph=True)
        torch.testing.assert_close(got, dx)


def test_tails_keep_relative_accuracy():
    x = torch.tensor([[-40.0, -20.0, 20.0, 40.0, 0.0]] * 2, requires_grad=True)
    t = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5]] * 2)
    loss = BCE(x, t, reduction="none")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    e = torch.tensor([-40.0, -20.0]).double().exp()
    torch.testing.assert_close(dx[0, :2].double(), e / (1 + e), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(dx[0, 2:4].double(), -(e / (1 + e)).flip(0), rtol=1e-6, atol=0.0)
    assert dx[0, 4] == 0.0


@pytest.mark.parametrize("elements", [8191, 8192])
@pytest.mark.parametrize("t", [0.0, 1e-7, 0.3, 1 - 1e-7, 1.0])
def test_both_forms_of_binary_cross_entropy(elements, t):
    """Few elements, and more: each loss to its own size, in both tails."""
    x = torch.linspace(-80, 80, elements, requires_grad=True)
    t = torch.full_like(x, t)
    loss = BCE(x, t, reduction="none")
    assert type(loss.grad_fn).__name__ == "ShortBackward"
    (dx,) = torch.autograd.grad(loss, x, uneven(loss))
    wide, soft = x.detach().double(), t.double()
    tail = (-wide.abs()).exp()
    right = (1 - soft) * wide.relu() + soft * (-wide).relu() + tail.log1p()
    torch.testing.assert_close(loss.double(), right, rtol=8e-6, atol=0.0)
    right = ((1 - soft) * wide.sigmoid() - soft * (-wide).sigmoid()) * uneven(loss)
    torch.testing.assert_close(dx.double(), right, rtol=1e-6, atol=1e-7 if 0.0 < t[0] < 1.0 else 0.0)


@pytest.mark.parametrize("case", ["bce mean", "kl batchmean", "entropy mean"])
def test_others_are_left_to_autograd(case):
    """A target that requires a gradient, modes, transforms and tensors without elements."""
    (function, _, keywords), (x, t) = CASES[case], inputs()
    ours = partial(function, **keywords)
    (dx,) = torch.autograd.grad(ours(x, t), x)
    torch.testing.assert_close(torch.func.grad(lambda x: ours(x, t))(x.detach()), dx)
    assert ours(x.detach(), t).grad_fn is None
    with torch.no_grad():
        assert ours(x, t).grad_fn is None
    _, tangent = torch.func.jvp(lambda x: ours(x, t), (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, dx.sum())
    if not case.startswith("entropy"):
        loss = ours(x, t.clone().requires_grad_())
        assert type(loss.grad_fn).__name__ != "ShortBackward"
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], dx)


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["BCEWithLogits", "KLDivWithLogits"])
def test_tensors_like_the_last_are_known(name, monkeypatch):
    """Once found readable, tensors like them are; others, and those in other surroundings, are looked at again."""
    x, t = (tensor.detach().bfloat16() for tensor in inputs())
    monkeypatch.setattr(dispatch, "_latest", {})
    ask, small, looked = partial(dispatch.readable, name), dispatch._small, []
    monkeypatch.setattr(dispatch, "_small", lambda *given: looked.append(given) or small(*given))
    assert ask(x, t) and ask(x, t) and ask(x + 1, t + 1)
    assert len(looked) == 1
    assert not ask(x, t[:1]) and not ask(x, t.double()) and not ask(x.to_sparse(), t) and not ask(x, None)
    assert ask(x, t)
    for mode in (Watch(), FakeTensorMode()):
        with mode:
            assert not ask(x, t)
    with forward_ad.dual_level():
        assert not ask(forward_ad.make_dual(x, x), t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not ask(x, t)
    assert torch.func.vmap(lambda t: torch.tensor(float(ask(x, t))))(t[None]) == 0.0
    with fusedloss.use("triton"):
        assert not ask(x, t)
    with torch.inference_mode():
        before = len(looked)
        assert ask(x, t) and len(looked) == before + 1


@pytest.mark.parametrize("case", ["bce mean", "bce none", "kl batchmean", "entropy mean", "entropy none"])
def test_no_elements(case):
    ours, _, keywords = CASES[case]
    x, t = inputs(shape=(0, 3))
    loss = ours(x, t, **keywords)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx.shape == x.shape
    assert loss.isnan().all() if loss.dim() == 0 else loss.numel() == 0


@pytest.mark.parametrize("case", CASES)
def test_one_dimension(case):
    (ours, exact, keywords), (x, t) = CASES[case], inputs(shape=(7,))
    keywords = {**keywords, "dim": 0} if "dim" in keywords else keywords
    loss = ours(x, t, **keywords)
    torch.testing.assert_close(loss.double(), exact(x.double(), t.double(), **keywords), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("ours", [KL, lambda x, t: ENTROPY(x, reduction="sum")])
def test_a_class_without_probability(ours):
    x, t = inputs(shape=(2, 4))
    with torch.no_grad():
        x[:, 1], t[:, 1] = float("-inf"), float("-inf")
    loss = ours(x, t)
    loss.backward()
    kept = [0, 2, 3]
    less = x.detach()[:, kept].requires_grad_()
    ours(less, t[:, kept]).backward()
    assert type(loss.grad_fn).__name__ != "ShortBackward"
    torch.testing.assert_close(x.grad[:, kept], less.grad)
    assert (x.grad[:, 1] == 0).all()


def test_an_input_that_changes_in_between_is_noticed():
    x, t = inputs()
    loss = BCE(x, t)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
