"""Every derivative after the first, on both paths, against torch's own formula in float64."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fusedloss

from .losses import DEVICE, Operators, assert_all_close, doubles, each_case, each_loss, inputs, pull, wanted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:reduction:UserWarning")


def directional(call, tensors, keywords, reduction, order):
    """The derivatives of the given order along fixed directions, in all wanted tensors and the upstream one."""
    loss = call(*tensors, **keywords, reduction=reduction)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=DEVICE).reshape(loss.shape).to(loss.dtype)
    upstream.requires_grad_()
    leaves = [*wanted(tensors), upstream]
    derivatives = torch.autograd.grad(loss, leaves[:-1], upstream, create_graph=True)
    for n in range(1, order):
        along = sum((d * torch.linspace(-1 + n / 9, 1, d.numel(), device=DEVICE).reshape(d.shape).to(d)).sum()
                    for d in derivatives)  # fmt: skip
        derivatives = torch.autograd.grad(along, leaves, create_graph=True, materialize_grads=True)
    return derivatives


@each_case
@pytest.mark.parametrize("which", ["first", "last"])
def test_second_order(path, case, which):
    reduction = case.reductions[0 if which == "first" else -1]
    tensors, keywords = inputs(case)
    ours = directional(case.ours, tensors, keywords, reduction, 2)
    exact = directional(case.torch_equivalent, *doubles(tensors, keywords), reduction, 2)
    assert_all_close(ours, exact, rtol=1e-4, atol=1e-5)


@each_loss
def test_third_order(path, case):
    if case.loss == "nll_loss":
        pytest.skip("linear: there is no third derivative")
    tensors, keywords = inputs(case, (2, 4))
    ours = directional(case.ours, tensors, keywords, "sum", 3)
    exact = directional(case.torch_equivalent, *doubles(tensors, keywords), "sum", 3)
    assert any(d.abs().max() > 1e-3 for d in exact)
    assert_all_close(ours, exact, rtol=1e-3, atol=1e-4)


@each_loss
def test_second_order_is_the_slope_of_the_kernels_gradient(kernels, case):
    """A central difference of what the kernels return, with no formula of torch's in it."""
    tensors, keywords = inputs(case, (2, 5))
    if case.loss in ("binary_cross_entropy", "entropy"):  # away from the poles at 0 and 1
        tensors = (tensors[0].detach().clamp(0.2, 0.8).requires_grad_(), *tensors[1:])
    _, (first, *_) = pull(case, tensors, keywords, "sum", create_graph=True)
    direction = torch.linspace(-1, 1, first.numel(), device=DEVICE).reshape(first.shape)
    (second,) = torch.autograd.grad((first * direction).sum(), tensors[0], materialize_grads=True)
    h = 1e-3
    ends = []
    for sign in (-1, 1):
        moved = (tensors[0].detach() + sign * h * direction).requires_grad_()
        ends.append(pull(case, (moved, *tensors[1:]), keywords, "sum")[1][0])
    slope = (ends[1] - ends[0]) / (2 * h)
    torch.testing.assert_close(second, slope, rtol=2e-2, atol=2e-3)


@each_case
def test_first_order_stays_with_the_kernels(kernels, case):
    tensors, keywords = inputs(case)
    with Operators() as plain:
        loss, gradients = pull(case, tensors, keywords, "sum")
    with Operators() as graph:
        same_loss, same = pull(case, tensors, keywords, "sum", create_graph=True)
    assert len(plain.ours) == 2
    assert graph.ours == plain.ours
    assert torch.equal(loss, same_loss)
    for a, b in zip(gradients, same, strict=True):
        assert torch.equal(a, b)
        assert b.requires_grad or case.loss == "kl_div"


@each_loss
@pytest.mark.parametrize("index", [0, 1])
def test_second_order_in_one_argument(path, case, index):
    if case.differentiable <= index:
        pytest.skip("torch does not differentiate this argument")
    tensors, keywords = inputs(case)
    tensors = [t.detach().requires_grad_(i == index) if t.is_floating_point() else t for i, t in enumerate(tensors)]
    ours = directional(case.ours, tensors, keywords, "sum", 2)
    exact = directional(case.torch_equivalent, *doubles(tensors, keywords), "sum", 2)
    assert_all_close(ours, exact, rtol=1e-4, atol=1e-5)


def transforms(f, x):
    """Name and result of every functorch transform of a function of one tensor, nested ones among them."""
    tangent = torch.linspace(-1, 1, x.numel(), device=x.device).reshape(x.shape).to(x.dtype)
    batch = torch.stack([x, x * 0.9])
    g = grad(f)
    yield "grad", g(x)
    yield "jvp", jvp(f, (x,), (tangent,))[1]
    yield "vjp", vjp(f, x)[1](torch.ones((), dtype=x.dtype, device=x.device))[0]
    yield "vmap", vmap(f)(batch)
    yield "vmap(grad)", vmap(g)(batch)
    yield "grad(grad)", grad(lambda x: (g(x) * tangent).sum())(x)
    yield "jvp(grad)", jvp(g, (x,), (tangent,))[1]
    yield "hessian", hessian(f)(x)
    yield "jacrev(jacrev)", jacrev(jacrev(f))(x)
    yield "jacfwd(jacfwd)", jacfwd(jacfwd(f))(x)
    yield "vmap(hessian)", vmap(hessian(f))(batch)


@each_loss
def test_transforms(path, case):
    tensors, keywords = inputs(case, (2, 3))
    x, *rest = (t.detach() for t in tensors)
    (exact_x, *exact_rest), exact_keywords = doubles((x, *rest), keywords)
    ours = transforms(lambda x: case.ours(x, *rest, **keywords, reduction="sum"), x)
    exact = transforms(lambda x: case.torch_equivalent(x, *exact_rest, **exact_keywords, reduction="sum"), exact_x)
    for (name, a), (_, e) in zip(ours, exact, strict=True):
        assert a.dtype is torch.float32, name
        assert_all_close([a], [e], rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@each_loss
def test_forward_mode(path, case):
    """Dual tensors without torch.func, and a graph of reverse mode under them."""
    tensors, keywords = inputs(case)
    x, *rest = (t.detach() for t in tensors)
    tangent = torch.linspace(-1, 1, x.numel(), device=DEVICE).reshape(x.shape)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        loss = case.ours(dual, *rest, **keywords, reduction="sum")
        derivative = torch.autograd.forward_ad.unpack_dual(loss).tangent
    live = x.requires_grad_()
    (gradient,) = torch.autograd.grad(case.ours(live, *rest, **keywords, reduction="sum"), live)
    torch.testing.assert_close(derivative, (gradient * tangent).sum(), rtol=1e-4, atol=1e-5)


@each_loss
def test_batched_upstream_gradients(path, case):
    """torch.autograd.grad(is_grads_batched=True), jacobian(vectorize=True): vmap over our backward."""
    tensors, keywords = inputs(case)
    reduction = "none" if "none" in case.reductions else "sum"
    loss = case.ours(*tensors, **keywords, reduction=reduction)
    upstream = torch.stack([torch.linspace(k, 1.5, loss.numel(), device=DEVICE).reshape(loss.shape) for k in (0.5, 1)])
    batched = torch.autograd.grad(loss, wanted(tensors), upstream, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(loss, wanted(tensors), u, retain_graph=True) for u in upstream]
    assert_all_close(batched, map(torch.stack, zip(*loop, strict=True)))


@each_loss
def test_functional_hessian(path, case):
    """torch.autograd.functional, which goes through double backward and not through functorch."""
    tensors, keywords = inputs(case, (2, 3))
    x, *rest = (t.detach() for t in tensors)
    (exact_x, *exact_rest), exact_keywords = doubles((x, *rest), keywords)
    call = torch.autograd.functional.hessian
    ours = call(lambda x: case.ours(x, *rest, **keywords, reduction="sum"), x)
    exact = call(lambda x: case.torch_equivalent(x, *exact_rest, **exact_keywords, reduction="sum"), exact_x)
    assert_all_close([ours], [exact], rtol=2e-4, atol=2e-5)


def test_per_sample_gradients_of_a_module(path):
    torch.manual_seed(3)
    model, loss = torch.nn.Linear(5, 4, device=DEVICE), fusedloss.CrossEntropyLoss()
    x, y = torch.randn(6, 5, device=DEVICE), torch.tensor([0, 1, 2, 3, 0, 1], device=DEVICE)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def one(parameters, x, y):
        return loss(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    together = vmap(grad(one), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(6):
        model.zero_grad()
        loss(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(together[name][i], parameter.grad, rtol=1e-4, atol=1e-6)
