"""Each bad call raises what torch raises, on the reference path and before any kernel on the other."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import fusedloss
from fusedloss import dispatch

x, labels = torch.linspace(-2, 2, 20).reshape(4, 5), torch.tensor([0, 1, 2, 3])
p, logp, w = x.softmax(-1), x.log_softmax(-1), torch.linspace(0.5, 1.5, 5)
x3, x4, x5 = torch.randn(2, 5, 3), torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3, 2)
zeros = lambda *shape: torch.zeros(*shape, dtype=torch.int64)
grad = lambda t: t.clone().requires_grad_()

CROSS_ENTROPY = [
    ((torch.tensor(1.0), torch.tensor(0)), {}),
    ((torch.tensor(1.0), torch.tensor(0.0)), {}),
    ((x, torch.tensor(0)), {}),
    ((x[0], torch.tensor([0, 1])), {}),
    ((x[0], zeros(5)), {}),
    ((x[0], zeros(5, 2)), {}),
    ((x[0], zeros(1)), dict(label_smoothing=0.1)),
    ((x, labels[:3]), {}),
    ((x, zeros(4, 1)), {}),
    ((x, zeros(4, 5)), {}),
    ((x3, zeros(2, 4)), {}),
    ((x3, zeros(2, 3).to(torch.uint8)), {}),
    ((x4, zeros(2, 3, 3).to(torch.uint8)), {}),
    ((x3, zeros(2)), {}),
    ((x4, zeros(2, 3, 4)), {}),
    ((x4, zeros(2, 9)), {}),
    ((x5, zeros(2, 3, 3, 1)), {}),
    ((x5, zeros(2, 18)), {}),
    ((x, labels, w[:4]), {}),
    ((x, labels, w[None]), {}),
    ((x[:0], labels[:0], w[:3]), {}),
    ((x3, zeros(2, 3), w[:4]), {}),
    ((x4, zeros(2, 3, 3), w[:4]), {}),
    ((x4, zeros(2, 3, 3), w[None]), dict(label_smoothing=0.1)),
    ((x, labels, w[:4]), dict(label_smoothing=0.1)),
    ((x, p, w[:4]), {}),
    ((x, p, w[None]), {}),
    ((x, labels, w.double()), {}),
    ((x, labels, w.bfloat16()), {}),
    ((x, labels, grad(w)), {}),
    ((x, labels), dict(label_smoothing=2.0)),
    ((x, p), dict(label_smoothing=2.0)),
    ((x, labels), dict(label_smoothing="a")),
    ((x, p), dict(ignore_index=1)),
    ((x, labels), dict(ignore_index=1.5)),
    ((x, labels), dict(ignore_index="a")),
    ((x, labels), dict(reduction="foo")),
    ((x, labels), dict(reduction="batchmean")),
    ((x, labels), dict(reduction=None)),
    ((x, labels.int()), {}),
    ((x, labels.float()), {}),
    ((x, labels.bool()), {}),
    ((x.long(), labels), {}),
    ((x + 0j, labels), {}),
    (([1.0], labels), {}),
    ((x, None), {}),
    ((x, labels, [1.0]), {}),
    ((x, labels.to("meta")), {}),
    ((x, labels, w.to("meta")), {}),
]
NLL_LOSS = [
    ((logp[0, 0], labels[0]), {}),
    ((logp, labels[0]), {}),
    ((logp[0], zeros(5)), {}),
    ((logp[0], zeros(5, 2)), {}),
    ((logp, labels[:3]), {}),
    ((logp, zeros(4, 5)), {}),
    ((x3, zeros(2, 4)), {}),
    ((x3, zeros(2, 3).to(torch.uint8)), {}),
    ((x4, zeros(2, 3, 3).to(torch.uint8)), {}),
    ((x3, zeros(2)), {}),
    ((x3, zeros(2, 2, 2)), {}),
    ((x4, zeros(2, 3)), {}),
    ((x5, zeros(2, 3, 3, 1)), {}),
    ((logp, labels, w[:4]), {}),
    ((logp[0], labels[0], w[:3]), {}),
    ((logp, labels, w.double()), {}),
    ((logp, labels, grad(w)), {}),
    ((logp, labels.int()), {}),
    ((logp, labels.float()), {}),
    ((logp, labels), dict(reduction="foo")),
    ((logp, labels), dict(ignore_index=1.5)),
    (([1.0], labels), {}),
    ((logp, labels, [1.0]), {}),
]
KL_DIV = [
    ((logp, p[:3]), {}),
    ((logp, p[:, :4]), dict(reduction="batchmean")),
    ((logp.long(), p), {}),
    ((logp, p.long()), {}),
    ((logp + 0j, p), {}),
    ((logp, p), dict(reduction="foo")),
    (([1.0], p), {}),
    ((logp, [1.0]), {}),
    ((logp, p.to("meta")), {}),
]
BCE_WITH_LOGITS = [
    ((x, p[:3]), {}),
    ((x, p[:1]), {}),
    ((x, p[0]), {}),
    ((x, p, w[:4]), {}),
    ((x, p, torch.ones(2, 4, 5)), {}),
    ((x[:1], p[:1], torch.ones(4, 5)), {}),
    ((x, p), dict(pos_weight=w[:4])),
    ((x, p), dict(pos_weight=torch.ones(2, 4, 5))),
    ((x, p), dict(pos_weight=grad(w))),
    ((x, p), dict(pos_weight=w > 1)),
    ((x, p), dict(pos_weight=w + 0j)),
    ((x, p, grad(w)), {}),
    ((x, p, w + 0j), {}),
    ((x, p, [1.0]), {}),
    ((x, p), dict(pos_weight=[1.0])),
    ((x, p), dict(reduction="foo")),
    ((x, p), dict(reduction="batchmean")),
    ((x, p.long()), {}),
    ((x, p.to(torch.uint8)), {}),
    ((x, p > 0.5), {}),
    ((x.long(), p), {}),
    ((x.long(), p.long()), {}),
    ((x + 0j, p), {}),
    (([1.0], p), {}),
    ((x, [1.0]), {}),
    ((x, p.to("meta")), {}),
    ((x, p, w.to("meta")), {}),
]
BCE = [
    ((p, p[:3]), {}),
    ((p, p[:1]), {}),
    ((p, p, w[:4]), {}),
    ((p, p, torch.ones(2, 4, 5)), {}),
    ((p, p, grad(w)), {}),
    ((p, p, w + 0j), {}),
    ((p, p, [1.0]), {}),
    ((p, p), dict(reduction="foo")),
    ((p, p.bfloat16()), {}),
    ((p.half(), p), {}),
    ((p, p.long()), {}),
    ((p.long(), p.long()), {}),
    (([1.0], p), {}),
    ((p, [1.0]), {}),
    ((p, p.to("meta")), {}),
]
VALUES = [  # what only a look at the values tells: the reference path's alone
    ("cross_entropy", (x, labels + 5), {}),
    ("cross_entropy", (x[:, :0], labels), {}),
    ("nll_loss", (logp, labels - 9), {}),
    ("binary_cross_entropy", (p + 1, p), {}),
    ("binary_cross_entropy", (p, p + 1), {}),
    ("binary_cross_entropy", (p * float("nan"), p), {}),
]
TABLE = [
    (name, *call)
    for name, calls in [
        ("cross_entropy", CROSS_ENTROPY),
        ("nll_loss", NLL_LOSS),
        ("kl_div", KL_DIV),
        ("binary_cross_entropy_with_logits", BCE_WITH_LOGITS),
        ("binary_cross_entropy", BCE),
    ]
    for call in calls
]


def describe(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    return repr(value)


def case_id(case):
    name, args, kwargs = case
    options = [f"{k}={describe(v)}" for k, v in kwargs.items()]
    return f"{name}({', '.join([*map(describe, args), *options])})"


def error(function, args, kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function(*args, **kwargs)
        except Exception as e:
            return e
    return None


@pytest.fixture
def no_kernel(monkeypatch):
    class Reached(BaseException):
        pass

    def function(name):
        raise Reached(name)

    monkeypatch.setattr(dispatch, "function", function)
    monkeypatch.setattr(dispatch, "_applied", {})
    return Reached


@pytest.mark.parametrize("case", TABLE + VALUES, ids=case_id)
def test_reference_raises_as_torch(case):
    name, args, kwargs = case
    expected = error(getattr(F, name), args, kwargs)
    assert expected is not None
    with fusedloss.use("reference"):
        ours = error(getattr(fusedloss, name), args, kwargs)
    assert type(ours) is type(expected), (ours, expected)
    assert str(ours)


@pytest.mark.parametrize("case", TABLE, ids=case_id)
def test_no_kernel_is_reached(case, no_kernel):
    pytest.importorskip("triton")
    name, args, kwargs = case
    expected = error(getattr(F, name), args, kwargs)
    with fusedloss.use("triton"):
        ours = error(getattr(fusedloss, name), args, kwargs)
    assert type(ours) is type(expected), (ours, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fusedloss.cross_entropy(x, labels),
        lambda: fusedloss.nll_loss(logp, labels),
        lambda: fusedloss.kl_div(logp, p, reduction="sum"),
        lambda: fusedloss.binary_cross_entropy(p, p),
        lambda: fusedloss.binary_cross_entropy_with_logits(x, p, w),
        lambda: fusedloss.kl_div_with_logits(x, x),
        lambda: fusedloss.entropy(p),
        lambda: fusedloss.entropy_with_logits(x),
    ],
)
def test_a_good_call_reaches_the_kernel(call, no_kernel):
    """The fixture of the test above can see a kernel."""
    pytest.importorskip("triton")
    with fusedloss.use("triton"), pytest.raises(no_kernel):
        call()


@pytest.mark.parametrize(
    ("call", "exception", "value"),
    [
        (lambda: fusedloss.cross_entropy(x, labels, z_loss=-0.5), ValueError, "-0.5"),
        (lambda: fusedloss.cross_entropy(x, labels, softcap=0.0), ValueError, "0.0"),
        (lambda: fusedloss.cross_entropy(x, labels, softcap=-3.0), ValueError, "-3.0"),
        (lambda: fusedloss.cross_entropy(x, labels, dtype=torch.int64), TypeError, "torch.int64"),
        (lambda: fusedloss.cross_entropy(x, labels, dtype="float32"), TypeError, "float32"),
        (lambda: fusedloss.binary_cross_entropy_with_logits(x, p, label_smoothing=1.5), ValueError, "1.5"),
        (lambda: fusedloss.binary_cross_entropy_with_logits(x, p, label_smoothing=-1), ValueError, "-1"),
        (lambda: fusedloss.kl_div_with_logits(x, x[:2]), ValueError, "[2, 5]"),
        (lambda: fusedloss.kl_div_with_logits(x, x, temperature=0.0), ValueError, "0.0"),
        (lambda: fusedloss.kl_div_with_logits(x, x, temperature=float("nan")), ValueError, "nan"),
        (lambda: fusedloss.kl_div_with_logits(x, x, dim=2), IndexError, "2"),
        (lambda: fusedloss.kl_div_with_logits(x, x, reduction="foo"), ValueError, "foo"),
        (lambda: fusedloss.kl_div_with_logits(x, labels), TypeError, "torch.int64"),
        (lambda: fusedloss.kl_div_with_logits(x, None), TypeError, "NoneType"),
        (lambda: fusedloss.entropy(labels), TypeError, "torch.int64"),
        (lambda: fusedloss.entropy(p, dim=-3), IndexError, "-3"),
        (lambda: fusedloss.entropy(p, reduction="batchmean"), ValueError, "batchmean"),
        (lambda: fusedloss.entropy_with_logits([1.0]), TypeError, "list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["reference", "triton"])
def test_our_own_arguments(call, exception, value, path, no_kernel):
    if path == "triton":
        pytest.importorskip("triton")
    with fusedloss.use(path), pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("call", "values"),
    [
        (lambda: fusedloss.cross_entropy(x, labels[:3]), ["4", "3"]),
        (lambda: fusedloss.cross_entropy(x, labels, w[:4]), ["5", "[4]"]),
        (lambda: fusedloss.cross_entropy(x3, zeros(2, 4)), ["[2, 3]", "[2, 4]"]),
        (lambda: fusedloss.cross_entropy(x, labels.int()), ["int32"]),
        (lambda: fusedloss.cross_entropy(x, labels, w.double()), ["float64", "float32"]),
        (lambda: fusedloss.cross_entropy(x, p, ignore_index=3), ["3"]),
        (lambda: fusedloss.binary_cross_entropy_with_logits(x, p[:3]), ["[4, 5]", "[3, 5]"]),
        (lambda: fusedloss.binary_cross_entropy_with_logits(x, p, w[:4]), ["[4, 5]", "[4]", "weight"]),
        (lambda: fusedloss.binary_cross_entropy_with_logits(x, p, pos_weight=w[:4]), ["pos_weight"]),
        (lambda: fusedloss.binary_cross_entropy(p, p[:3]), ["[4, 5]", "[3, 5]"]),
        (lambda: fusedloss.binary_cross_entropy(p, p.half()), ["float16", "float32"]),
        (lambda: fusedloss.kl_div(logp, p[:3], reduction="sum"), ["[4, 5]", "[3, 5]"]),
    ],
)
def test_messages_name_the_values(call, values):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    for value in values:
        assert value in str(caught.value)


def test_gpu_autocast_refuses_probabilities():
    """As torch: seen on a FakeTensor that pretends to be on a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.autocast("cuda", dtype=torch.float16, enabled=False):
        fake = torch.empty(4, 5, device="cuda", requires_grad=True)
        torch.set_autocast_enabled("cuda", True)
        try:
            assert error(fusedloss.binary_cross_entropy, (fake, fake), {}) is not None
            with pytest.raises(RuntimeError, match="unsafe to autocast"):
                fusedloss.binary_cross_entropy(fake, fake)
        finally:
            torch.set_autocast_enabled("cuda", False)
