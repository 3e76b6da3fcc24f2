"""`inplace=True`: the gradient in the input's memory, and a version counter that says so."""

import pytest
import torch
import torch.nn.functional as F

import fusedloss

LOSSES = {
    "cross_entropy": (fusedloss.cross_entropy, F.cross_entropy, lambda n, c: torch.randint(c, (n,))),
    "bce_with_logits": (
        fusedloss.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, torch.rand,
    ),
}  # fmt: skip
IN_PLACE = ("bce_with_logits_backward", "cross_entropy_backward")  # operators with a variant in place
# a tile of short rows; an aligned short row; long rows with a head, a tail and edges, labels in each
SHAPES = [(5, 10), (3, 1000), (6, 8203)]


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradient_in_the_inputs_memory(loss, shape, reduction, device):
    ours, theirs, draw = loss
    x, target = torch.randn(*shape, device=device) * 3, draw(*shape).to(device)
    if target.dtype == torch.int64:
        target[:3] = torch.tensor([0, shape[1] - 1, shape[1] // 2])
    exact = x.double().requires_grad_()
    expected = theirs(exact, target if target.dtype == torch.int64 else target.double(), reduction=reduction)
    upstream = torch.linspace(0.5, 1.5, expected.numel(), device=device).reshape(expected.shape)
    (gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    leaf = x.clone().requires_grad_()
    logits = leaf * 1.0  # not a leaf, as in a model
    memory, version = logits.data_ptr(), logits._version
    with fusedloss.use("triton"):
        value = ours(logits, target, reduction=reduction, inplace=True)
        assert torch.equal(logits, x)  # forward writes nothing
        (found,) = torch.autograd.grad(value, logits, upstream, retain_graph=True)
    assert found.data_ptr() == memory
    assert logits._version > version
    torch.testing.assert_close(found.double(), gradient, atol=1e-7, rtol=1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, logits, upstream)


def test_whoever_needs_the_old_values_is_told(loss, device):
    ours, _, draw = loss
    leaf = torch.randn(4, 10, device=device, requires_grad=True)
    logits = leaf * 1.0
    probabilities = logits.square()  # saves logits
    with fusedloss.use("triton"):
        ours(logits, draw(4, 10).to(device), inplace=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        probabilities.sum().backward()


def test_not_where_it_cannot_be(loss, device):
    """A second order, a strided input and the reference keep the input."""
    ours, theirs, draw = loss
    x, target = torch.randn(10, 4, device=device).t(), draw(4, 10).to(device)
    for path, create_graph, input in (
        ("triton", True, x.contiguous()), ("triton", False, x), ("reference", False, x.contiguous()),
    ):  # fmt: skip
        leaf, before = input.detach().clone(memory_format=torch.preserve_format).requires_grad_(), input.clone()
        with fusedloss.use(path):
            (found,) = torch.autograd.grad(ours(leaf, target, inplace=True), leaf, create_graph=create_graph)
        (expected,) = torch.autograd.grad(theirs(leaf, target), leaf)
        torch.testing.assert_close(found, expected)
        assert torch.equal(leaf, before)


@pytest.mark.parametrize("name", IN_PLACE)
def test_opcheck(name, device):
    """The schema says that x is written to, and the fake implementation agrees."""
    x, dloss = torch.randn(4, 10, device=device), torch.ones((), device=device)
    if name.startswith("bce"):
        arguments = (dloss, x, torch.rand(4, 10, device=device), None, None, 0.0, 1, True, False)
    else:
        labels = torch.randint(10, (4,), device=device)
        options = (-100, 0.0, 0.0, 0.0, 1)
        _, _, saved = torch.ops.fusedloss.cross_entropy_forward(x, labels, None, *options, torch.float32)
        arguments = (dloss, x, labels, None, saved, *options, False)
    before = x.clone()
    torch.library.opcheck(getattr(torch.ops.fusedloss, f"{name}_").default, arguments)
    getattr(torch.ops.fusedloss, f"{name}_")(*arguments)
    assert not torch.equal(x, before)


def test_modules_take_it(device):
    x, target = torch.randn(4, 10, device=device, requires_grad=True), torch.randint(10, (4,), device=device)
    logits = x * 1.0
    with fusedloss.use("triton"):
        fusedloss.CrossEntropyLoss(inplace=True)(logits, target).backward()
    assert logits._version == 1
    logits = x * 1.0
    with fusedloss.use("triton"):
        fusedloss.BCEWithLogitsLoss(inplace=True)(logits, torch.rand(4, 10, device=device)).backward()
    assert logits._version == 1
