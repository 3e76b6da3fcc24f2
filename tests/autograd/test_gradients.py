"""Which gradients exist, and what happens to a graph: torch's answers on both paths."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import fusedloss

from .losses import DEVICE, assert_all_close, doubles, each_case, each_loss, inputs, pull, wanted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:reduction:UserWarning")


def arguments(name):
    """Every float argument of torch's function by name, and the rest."""
    torch.manual_seed(4)
    x, t = torch.randn(3, 4, device=DEVICE), torch.rand(3, 4, device=DEVICE)
    w, labels = torch.rand(4, device=DEVICE) + 0.5, torch.tensor([0, 3, 1], device=DEVICE)
    return {
        "cross_entropy": (dict(input=x, weight=w), dict(target=labels)),
        "cross_entropy of probabilities": (dict(input=x, target=t, weight=w), {}),
        "nll_loss": (dict(input=x.log_softmax(1), weight=w), dict(target=labels)),
        "kl_div": (dict(input=x.log_softmax(1), target=t), {}),
        "kl_div of logarithms": (dict(input=x.log_softmax(1), target=t.log()), dict(log_target=True)),
        "binary_cross_entropy": (dict(input=t.clamp(0.1, 0.9), target=t.flip(0), weight=t + 1), {}),
        "binary_cross_entropy_with_logits": (dict(input=x, target=t, weight=t + 1, pos_weight=w), {}),
    }[name]


NAMES = (
    "cross_entropy", "cross_entropy of probabilities", "nll_loss", "kl_div", "kl_div of logarithms",
    "binary_cross_entropy", "binary_cross_entropy_with_logits",
)  # fmt: skip


def outcome(function, floats, rest, live, reduction):
    """The gradients of `live`, or the exception that says that there are none."""
    given = {k: v.detach().requires_grad_(k in live) for k, v in floats.items()}
    try:
        loss = function(**given, **rest, reduction=reduction)
        assert loss.requires_grad == bool(live)
        return torch.autograd.grad(loss.sum(), [given[k] for k in live]) if live else ()
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_exactly_where_torch_has_them(path, name, reduction):
    floats, rest = arguments(name)
    plain = name.partition(" ")[0]
    refused = 0
    for count in range(len(floats) + 1):
        for live in itertools.combinations(floats, count):
            ours = outcome(getattr(fusedloss, plain), floats, rest, live, reduction)
            theirs = outcome(getattr(F, plain), floats, rest, live, reduction)
            assert type(ours) is type(theirs), live
            if isinstance(theirs, RuntimeError):
                refused += 1
                assert str(ours) == str(theirs)
                with torch.no_grad():
                    assert isinstance(outcome_without_graph(plain, floats, rest, live), torch.Tensor)
            else:
                assert all(g is not None for g in ours)
                assert_all_close(ours, theirs)
    assert (refused > 0) == ("weight" in floats and name != "cross_entropy of probabilities")


def outcome_without_graph(name, floats, rest, live):
    return getattr(fusedloss, name)(**{k: v.detach().requires_grad_(k in live) for k, v in floats.items()}, **rest)


@each_case
def test_repeated_backward(path, case):
    """One graph, several upstream gradients; a loss that is used twice; gradients that accumulate."""
    tensors, keywords = inputs(case)
    reduction = case.reductions[0]
    loss, live = case.ours(*tensors, **keywords, reduction=reduction), wanted(tensors)
    before = [t.detach().clone() for t in tensors]
    upstreams = [torch.full_like(loss, 1.0), torch.full_like(loss, -0.25), torch.linspace(0, 2, loss.numel()).to(loss)
                 .reshape(loss.shape)]  # fmt: skip
    exact_tensors, exact_keywords = doubles(tensors, keywords)
    exact = case.torch_equivalent(*exact_tensors, **exact_keywords, reduction=reduction)
    for upstream in upstreams:
        expected = torch.autograd.grad(exact, wanted(exact_tensors), upstream.double(), retain_graph=True)
        assert_all_close(torch.autograd.grad(loss, live, upstream, retain_graph=True), expected)
    torch.autograd.backward(loss, upstreams[0], retain_graph=True)
    torch.autograd.backward(2 * loss + loss, upstreams[0])
    expected = torch.autograd.grad(exact, wanted(exact_tensors), upstreams[0].double())
    assert_all_close([t.grad for t in live], [4 * e for e in expected])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.backward(loss, upstreams[0])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@each_loss
def test_an_input_that_was_changed_is_noticed(path, case):
    """By autograd's own error; or backward does not read that input, and the gradient is the old one."""
    tensors, keywords = inputs(case)
    expected = torch.autograd.grad(case.ours(*tensors, **keywords, reduction="sum"), wanted(tensors))
    errors = []
    for i in range(len(tensors)):
        live = [t.clone() for t in tensors]
        loss = case.ours(*live, **keywords, reduction="sum")
        with torch.no_grad():
            live[i].mul_(2)
        try:
            gradients = torch.autograd.grad(loss, wanted(tensors))
        except RuntimeError as error:
            errors.append(str(error))
        else:
            assert_all_close(gradients, expected)
    assert all("modified by an inplace operation" in error for error in errors)
    if path == "triton":  # backward reads every argument; the reference's may read what it computed of them
        assert len(errors) == len(tensors)


@each_loss
def test_an_input_that_another_operation_saved_is_left_alone(path, case):
    tensors, keywords = inputs(case)
    x = tensors[0].detach().requires_grad_()
    y = x.sigmoid() if case.name.startswith(("binary_cross_entropy/", "entropy/")) else x.exp()  # both save y
    (y.square().sum() + case.ours(y, *tensors[1:], **keywords, reduction="sum")).backward()
    (exact_x, *rest), exact_keywords = doubles((x, *tensors[1:]), keywords)
    exact_y = exact_x.sigmoid() if case.name.startswith(("binary_cross_entropy/", "entropy/")) else exact_x.exp()
    exact = exact_y.square().sum() + case.torch_equivalent(exact_y, *rest, **exact_keywords, reduction="sum")
    exact.backward()
    assert_all_close([x.grad], [exact_x.grad], rtol=1e-4, atol=1e-4)


@each_loss
def test_scaled_loss(path, case):
    """What a GradScaler does: the loss times a power of two, the gradient divided by it."""
    tensors, keywords = inputs(case)
    _, gradients = pull(case, tensors, keywords, "sum")
    loss = case.ours(*tensors, **keywords, reduction="sum") * 2.0**16
    upstream = torch.linspace(0.5, 1.5, 1, device=DEVICE).reshape(())
    scaled = torch.autograd.grad(loss, wanted(tensors), upstream)
    for a, b in zip(scaled, gradients, strict=True):
        assert torch.equal(a / 2.0**16, b)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_loss_of_half_inputs_is_not_rounded(path, case, dtype):
    tensors, keywords = inputs(case, dtype=dtype)
    loss = case.ours(*tensors, **keywords, reduction="sum", dtype=torch.float32)
    exact_tensors, exact_keywords = doubles(tensors, keywords)
    exact = case.torch_equivalent(*exact_tensors, **exact_keywords, reduction="sum")
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=3e-6, atol=1e-6)
    gradients = torch.autograd.grad(loss, wanted(tensors))
    expected = torch.autograd.grad(exact, wanted(exact_tensors))
    assert [g.dtype for g in gradients] == [dtype] * len(gradients)
    half_ulp = torch.finfo(dtype).eps / 2 * 1.01
    assert_all_close(gradients, expected, rtol=half_ulp, atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_target_dtypes_and_small_shapes(path, name):
    ours, theirs = getattr(fusedloss, name), getattr(F, name)
    x = torch.randn(5, 4, device=DEVICE).log_softmax(1)
    labels = torch.tensor([0, 3, 1, 2, 2], device=DEVICE)
    torch.testing.assert_close(ours(x, labels.to(torch.uint8)), theirs(x, labels.to(torch.uint8)))
    for refused in (torch.int32, torch.int16, torch.int8, torch.bool):
        for function in (ours, theirs):
            with pytest.raises(RuntimeError):
                function(x, labels.to(refused))
    for target in (labels[1], labels[1:2], labels[1].to(torch.uint8)):
        for reduction in ("none", "mean", "sum"):
            for weight in (None, torch.rand(4, device=DEVICE)):
                a, b = (f(x[0], target, weight, reduction=reduction) for f in (ours, theirs))
                assert a.shape == b.shape
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
def test_class_weight_in_every_layout(path, name):
    ours, theirs = getattr(fusedloss, name), getattr(F, name)
    x = torch.randn(5, 4, 3, device=DEVICE).log_softmax(1).requires_grad_()
    labels = torch.randint(4, (5, 3), device=DEVICE)
    wide = torch.rand(4, 6, device=DEVICE) + 0.5
    for weight in (wide[:, 2], wide.flip(0)[:, 1], wide[:1, 0].expand(4), wide[:, :1].T.contiguous()):
        try:
            expected = theirs(x, labels, weight)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                ours(x, labels, weight)
            continue
        loss = ours(x, labels, weight)
        torch.testing.assert_close(loss, expected)
        assert_all_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


def test_a_view_that_stands_for_its_negative(kernels, device):
    """The imaginary part of a conjugate is memory of the other sign, which torch remembers in a bit."""
    x = torch.randn(3, 10, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    y = torch.tensor([1, 2, 3], device=device)
    leaf, plain = x.detach().requires_grad_(), x.clone().detach().resolve_neg().requires_grad_()
    results = [[loss := fusedloss.cross_entropy(t, y), *torch.autograd.grad(loss, t)] for t in (leaf, plain)]
    assert_all_close(*results)
