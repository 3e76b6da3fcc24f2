"""`grad_in_forward=True`: loss and gradient in one kernel, and an upstream gradient that comes later."""

import pytest
import torch

import fusedloss
from fusedloss import testing

from .losses import Operators, assert_all_close

# a tile of short rows; aligned short rows; long rows with a head, a tail and edges; rows of 512 threads
SHAPES = [(5, 10), (3, 1000), (3, 8203), (2, 16500)]


def smooth(shape, device):
    weight = (torch.rand(2 * shape[1], device=device) + 0.5)[::2]  # apart in memory
    return (labels(shape, device),), dict(weight=weight, label_smoothing=0.1, z_loss=1e-2)


def labels(shape, device):
    return torch.tensor([0, -100, shape[1] - 1, 3, shape[1] // 2], device=device)[: shape[0]]


LOSSES = {
    "cross_entropy": (fusedloss.cross_entropy, lambda s, d: ((labels(s, d),), {})),
    "cross_entropy, smooth": (fusedloss.cross_entropy, smooth),
    "cross_entropy, softcap": (fusedloss.cross_entropy, lambda s, d: ((labels(s, d),), dict(softcap=3.0))),
    "cross_entropy, probabilities": (
        fusedloss.cross_entropy, lambda s, d: ((torch.randn(*s, device=d).softmax(1),), {}),
    ),
    "bce": (
        fusedloss.binary_cross_entropy_with_logits,
        lambda s, d: ((torch.rand(*s, device=d),), dict(pos_weight=torch.rand(s[1], device=d), label_smoothing=0.1)),
    ),
    "kl": (fusedloss.kl_div_with_logits, lambda s, d: ((torch.randn(*s, device=d),), dict(temperature=2.0))),
    "kl, reverse": (fusedloss.kl_div_with_logits, lambda s, d: ((torch.randn(*s, device=d),), dict(reverse=True))),
    "entropy": (fusedloss.entropy_with_logits, lambda s, d: ((), {})),
}  # fmt: skip


@pytest.fixture(params=LOSSES)
def loss(request, kernels):
    return LOSSES[request.param]


def prepare(loss, shape, device, reduction):
    """A function of logits and keywords, logits that are no leaf, as in a model, and a function of the upstream
    gradient: value and gradient in float64 by the reference, whose formulas have tests of their own."""
    ours, draw = loss
    rest, keywords = draw(shape, device)
    logits = (torch.randn(*shape, device=device) * 3).requires_grad_() * 1.0
    wide = lambda t: t.double() if torch.is_tensor(t) and t.is_floating_point() else t

    def exact(upstream):
        x, doubles = wide(logits.detach()).requires_grad_(), {k: wide(v) for k, v in keywords.items()}
        with fusedloss.use("reference"):
            value = ours(x, *map(wide, rest), **doubles, reduction=reduction)
        return value, torch.autograd.grad(value, x, torch.full_like(value, upstream))[0]

    return lambda x, **more: ours(x, *rest, **keywords, reduction=reduction, **more), logits, exact


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradient(loss, shape, reduction, device):
    """An upstream gradient of 1, another one, and then a second backward."""
    call, logits, exact = prepare(loss, shape, device, reduction)
    before = logits.detach().clone()
    for upstreams in ((1.0,), (0.7, -1.3)):
        with Operators() as operators:
            value = call(logits, grad_in_forward=True)
            found = [torch.autograd.grad(value, logits, torch.full_like(value, u), retain_graph=True)[0]
                     for u in upstreams]  # fmt: skip
        names = [name.removesuffix(".default") for name in operators.ours]
        assert [n.rpartition("_forward")[2] for n in names[:1]] == ["_grad"]
        assert names[1] == "scale_"
        assert all(name.endswith("_backward") for name in names[2:])  # the buffer was handed over: computed again
        assert len(names) == len(upstreams) + 1
        for u, gradient in zip(upstreams, found, strict=True):
            expected, exact_gradient = exact(u)
            assert_all_close([value, gradient], [expected, exact_gradient], rtol=3e-5, atol=2e-7)
        assert len({g.data_ptr() for g in found}) == len(found)
    assert torch.equal(logits, before)
    assert logits._version == 0


def test_second_order(loss, device):
    call, logits, _ = prepare(loss, (3, 10), device, "mean")
    results = []
    for keywords in (dict(grad_in_forward=True), {}):
        (first,) = torch.autograd.grad(call(logits, **keywords) * 1.5, logits, create_graph=True)
        results += [first, *torch.autograd.grad(first.square().sum(), logits)]
    assert_all_close(results[:2], results[2:])


def test_an_upstream_of_one_costs_no_pass(kernels, device):
    """A signalling NaN becomes a quiet one in any arithmetic: its bits tell whether it was computed with."""
    bits = torch.full((3, 5), 0x7F800001, dtype=torch.int32, device=device)
    for upstream, touched in ((1.0, False), (0.5, True)):
        gradient = bits.clone().view(torch.float32)
        torch.ops.fusedloss.scale_(torch.tensor(upstream, device=device), gradient)
        assert torch.equal(gradient.view(torch.int32), bits) is not touched


REFUSED = {
    "no gradient wanted": lambda x, y, call: call(x.detach(), y),
    "no grad mode": lambda x, y, call: torch.no_grad()(call)(x, y),
    "float16": lambda x, y, call: call(x.half(), y),
    "no reduction": lambda x, y, call: call(x, y, reduction="none"),
    "a target with a gradient": lambda x, y, call: call(x, torch.rand(4, 6, device=x.device).requires_grad_()),
}


@pytest.mark.parametrize("why", REFUSED)
def test_not_where_it_would_not_do(kernels, why, device):
    x, y = torch.randn(4, 6, device=device, requires_grad=True), torch.tensor([0, 1, 2, 5], device=device)
    call = lambda x, y, **more: fusedloss.cross_entropy(x, y, grad_in_forward=True, **more)
    with Operators() as operators:
        REFUSED[why](x, y, call)
    assert operators.ours == ["cross_entropy_forward.default"]


def test_compiled_code_takes_backward(kernels, device):
    x, y = torch.randn(4, 6, device=device, requires_grad=True), torch.tensor([0, 1, 2, 5], device=device)
    call = lambda x, **more: torch.autograd.grad(fusedloss.cross_entropy(x, y, **more), x)[0]
    compiled = torch.compile(lambda x: fusedloss.cross_entropy(x, y, grad_in_forward=True), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], call(x))


def test_excludes_inplace():
    x = torch.randn(4, 6, requires_grad=True)
    for call, target in ((fusedloss.cross_entropy, torch.tensor([0, 1, 2, 5])),
                         (fusedloss.binary_cross_entropy_with_logits, torch.rand(4, 6))):  # fmt: skip
        with pytest.raises(ValueError, match="exclude each other"):
            call(x, target, inplace=True, grad_in_forward=True)


def test_modules_take_it(kernels, device):
    x, y = torch.randn(4, 6, device=device, requires_grad=True), torch.tensor([0, 1, 2, 5], device=device)
    for kind, target in ((fusedloss.CrossEntropyLoss, y), (fusedloss.BCEWithLogitsLoss, torch.rand_like(x)),
                         (fusedloss.KLDivWithLogitsLoss, torch.rand_like(x))):  # fmt: skip
        with Operators() as operators:
            kind(grad_in_forward=True)(x, target)
        assert [name.endswith("_grad.default") for name in operators.ours] == [True]


def operators_arguments(device):
    """For opcheck: each operator with a gradient, and the scale."""
    x, t = torch.randn(4, 6, device=device), torch.rand(4, 6, device=device)
    y = torch.tensor([0, 1, 2, 5], device=device)
    return {
        "cross_entropy_forward_grad": (x, y, None, -100, 0.0, 0.0, 0.0, 1, torch.float32),
        "bce_with_logits_forward_grad": (x, t, None, None, 0.0, 1, torch.float32),
        "kl_div_with_logits_forward_grad": (x, t, 1, 1.0, False, 3, torch.float32),
        "entropy_with_logits_forward_grad": (x, 1, 1, torch.float32),
        "scale_": (torch.tensor(0.5, device=device), x),
    }


@pytest.mark.parametrize("name", operators_arguments("cpu"))
def test_opcheck(kernels, name, device):
    torch.library.opcheck(getattr(torch.ops.fusedloss, name).default, operators_arguments(device)[name])


def test_launches(kernels):
    """Two launches forward, three where a mean counts labels first; one backward."""
    from fusedloss import compiled

    for name, forward in (("cross_entropy", 3), ("binary_cross_entropy_with_logits", 2), ("kl_div_with_logits", 2)):
        case = testing.case(f"{name}/grad_in_forward")
        inputs = case.make_inputs((4, 64), torch.bfloat16, "cpu")
        for reduction, extra in (("mean", 0), ("sum", -1 if name == "cross_entropy" else 0)):
            made = [launch.kernel.__name__ for launch in
                    compiled.launches(lambda: testing.forward_backward(case, inputs, reduction=reduction))]  # noqa: B023
            assert len(made) == forward + extra + 1
            assert made[-1] == "scale_kernel"


@pytest.mark.parametrize("cols", [1003, 9003, 17003])  # one warp a row, four, and sixteen
def test_rows_that_share_no_alignment_with_their_gradient(loss, cols, device):
    """Sliced logits: the gradient's rows lie elsewhere between multiples of 16 bytes."""
    call, logits, exact = prepare(loss, (2, cols), device, "sum")
    memory = torch.zeros(2, cols + 6, device=device)
    memory[:, 3:-3] = logits.detach()
    x = memory[:, 3:-3].requires_grad_()
    value = call(x, grad_in_forward=True)
    assert_all_close([value, *torch.autograd.grad(value, x)], exact(1.0))
