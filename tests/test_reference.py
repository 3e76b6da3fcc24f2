"""The reference path against float64 formulas written here, and under every transform of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacrev, jvp, vmap

import fusedloss

pytestmark = pytest.mark.filterwarnings("ignore:reduction:UserWarning")

REDUCTIONS = ("none", "mean", "sum")
INFINITY = float("inf")


@pytest.fixture(autouse=True)
def reference():
    with fusedloss.use("reference"):
        yield


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bce_oracle(x, t, p=1.0):
    """The log1p form in float64. torch's own float64 cancels for t = 0 and x below -37."""
    x, t = x.double(), t.double()
    e = torch.log1p(torch.exp(-x.abs()))
    return (1 - t) * (x.clamp(min=0) + e) + p * t * ((-x).clamp(min=0) + e)


def bce_gradient_oracle(x, t, p=1.0):
    x, t = x.double(), t.double()
    return (1 - t) / (1 + torch.exp(-x)) - p * t / (1 + torch.exp(x))


TAILS = torch.tensor(
    [0.0, 1e-9, -1e-9, 0.3, -1.0, 5.0, -20.0, 20.0, -25.0, 25.0, -40.0, 40.0, -80.0, 81.0, -300.0, 300.0, 1e4]
)


class TestBCEWithLogits:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("t", [0.0, 1.0, 0.5, 0.3, 0.999, 1e-10, -0.25, 1.5])
    @pytest.mark.parametrize("p", [None, 3.0])
    def test_tails_keep_relative_accuracy(self, dtype, t, p):
        x = TAILS.to(dtype).requires_grad_()
        target = torch.full_like(TAILS, t, dtype=dtype)
        pos_weight = None if p is None else torch.tensor(p, dtype=dtype)
        loss = fusedloss.binary_cross_entropy_with_logits(x, target, pos_weight=pos_weight, reduction="none")
        (dx,) = torch.autograd.grad(loss.sum(), x)
        expected = bce_oracle(x.detach(), target, p or 1.0)
        expected_dx = bce_gradient_oracle(x.detach(), target, p or 1.0)
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        # two terms are added, of one sign where 0 <= t <= 1
        scale = bce_oracle(x.detach(), target * 0, 1.0) * abs(1 - t) + bce_oracle(
            x.detach(), target * 0 + 1, 1.0
        ) * abs(t) * (p or 1.0)
        assert ((loss.double() - expected).abs() <= 8 * eps * scale + 4 * tiny).all()
        scale = abs(1 - t) * x.detach().double().sigmoid() + abs(t) * (p or 1.0) * (-x.detach().double()).sigmoid()
        # exp(-|x|) is exact to |x| eps; past 88 float32 has none of it
        bound = (8 + x.detach().double().abs()) * eps * scale + 4 * tiny
        assert ((dx.double() - expected_dx).abs() <= bound).all()

    def test_value_that_torch_rounds_to_zero(self):
        x = torch.tensor([-20.0, -50.0], dtype=torch.float64)
        loss = fusedloss.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
        torch.testing.assert_close(loss, torch.exp(x).log1p(), rtol=1e-15, atol=0)
        single = fusedloss.binary_cross_entropy_with_logits(x.float(), torch.zeros(2), reduction="none")
        torch.testing.assert_close(single.double(), torch.exp(x).log1p(), rtol=1e-6, atol=0)
        assert F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")[1] == 0

    @pytest.mark.parametrize("t", [0.0, 1.0, 0.3])
    def test_derivatives_at_zero(self, t):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss = fusedloss.binary_cross_entropy_with_logits(x, torch.full_like(x, t), reduction="sum")
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        (dxx,) = torch.autograd.grad(dx.sum(), x)
        torch.testing.assert_close(dx, torch.full_like(x, 0.5 - t), rtol=1e-15, atol=1e-16)
        torch.testing.assert_close(dxx, torch.full_like(x, 0.25), rtol=1e-15, atol=0)

    def test_gradient_of_target_is_minus_x(self):
        x, t = rand(50), rand(50, seed=1).sigmoid().requires_grad_()
        (dt,) = torch.autograd.grad(fusedloss.binary_cross_entropy_with_logits(x, t, reduction="sum"), t)
        torch.testing.assert_close(dt, -x, rtol=1e-13, atol=1e-15)

    def test_label_smoothing(self):
        x, t = rand(4, 5), (rand(4, 5, seed=1) > 0).double()
        smooth = t * 0.9 + 0.05
        loss = fusedloss.binary_cross_entropy_with_logits(x, t, label_smoothing=0.1, reduction="none")
        torch.testing.assert_close(loss, bce_oracle(x, smooth), rtol=1e-13, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_rounded_once(self, dtype):
        x, t = rand(400, dtype=dtype).requires_grad_(), rand(400, seed=1).sigmoid().to(dtype)
        loss = fusedloss.binary_cross_entropy_with_logits(x, t, reduction="none")
        (dx,) = torch.autograd.grad(loss.sum(), x)
        half_ulp = torch.finfo(dtype).eps / 2 * (1 + 1e-3)
        expected, expected_dx = bce_oracle(x.detach(), t), bce_gradient_oracle(x.detach(), t)
        assert loss.dtype == dx.dtype == dtype
        assert ((loss.double() - expected).abs() <= half_ulp * expected.abs() + 1e-7).all()
        assert ((dx.double() - expected_dx).abs() <= half_ulp * expected_dx.abs() + 1e-7).all()

    @pytest.mark.parametrize(
        ("input", "target"),
        [
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float64),
            (torch.float64, torch.float32),
            (torch.float16, torch.bfloat16),
        ],
    )
    def test_mixed_dtypes_give_torchs(self, input, target):
        x, t = rand(4, 5, dtype=input), rand(4, 5, seed=1).sigmoid().to(target)
        ours = fusedloss.binary_cross_entropy_with_logits(x, t)
        expected = bce_oracle(x, t).mean()
        torch.testing.assert_close(ours, expected.to(F.binary_cross_entropy_with_logits(x, t).dtype))

    @pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
    def test_weights_of_other_dtypes(self, weight_dtype):
        x, t = rand(4, 5, dtype=torch.float32), rand(4, 5, seed=1, dtype=torch.float32).sigmoid()
        w = torch.tensor([1, 2, 3, 4, 5]).to(weight_dtype)
        for kwargs in (dict(weight=w), dict(pos_weight=w), dict(weight=w[1], pos_weight=w)):
            ours = fusedloss.binary_cross_entropy_with_logits(x, t, **kwargs)
            torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(x, t, **kwargs))

    def test_complex_target_is_torchs_own(self):
        x, t = rand(4, 5, dtype=torch.float32), torch.rand(4, 5) + 0j
        torch.testing.assert_close(
            fusedloss.binary_cross_entropy_with_logits(x, t), F.binary_cross_entropy_with_logits(x, t)
        )


def cross_entropy_oracle(x, y, ignore_index=-100, weight=None, z_loss=0.0, softcap=None):
    """Rows in float64: (loss, z term, weight), class indices only."""
    x = x.double()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    lse = torch.log(torch.exp(x - x.amax(1, keepdim=True)).sum(1)) + x.amax(1)
    kept = (y != ignore_index).double()
    index = torch.where(y != ignore_index, y, 0)
    w = torch.ones(x.shape[1], dtype=torch.float64) if weight is None else weight.double()
    picked = x.gather(1, index.unsqueeze(1)).squeeze(1)
    return kept * w[index] * (lse - picked), kept * z_loss * lse**2, kept * w[index]


class TestCrossEntropy:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4), (2, 5, 3, 2)])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize(("z_loss", "softcap"), [(1e-2, None), (0.0, 2.0), (0.3, 1.5)])
    def test_z_loss_and_softcap(self, reduction, shape, weighted, z_loss, softcap):
        x = (3 * rand(*shape)).requires_grad_()
        y = torch.arange(x.numel() // 5).reshape(shape[0], *shape[2:]) % 5
        weight = torch.linspace(0.5, 2.0, 5, dtype=torch.float64) if weighted else None
        loss, z = fusedloss.cross_entropy(
            x, y, weight, ignore_index=2, reduction=reduction, z_loss=z_loss, softcap=softcap,
            return_z_loss=True,
        )  # fmt: skip
        rows, z_rows, w = cross_entropy_oracle(x, y, 2, weight, z_loss, softcap)
        if reduction == "sum":
            rows, z_rows = rows.sum(), z_rows.sum()
        elif reduction == "mean":
            rows, z_rows = rows.sum() / w.sum(), z_rows.sum() / (y != 2).sum()
        torch.testing.assert_close(loss, rows + z_rows, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(z, z_rows.detach(), rtol=1e-12, atol=1e-14)
        assert not z.requires_grad
        upstream = rand(*loss.shape, seed=9)
        (ours,) = torch.autograd.grad(loss, x, upstream)
        (expected,) = torch.autograd.grad(rows + z_rows, x, upstream)
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-14)
        assert not ours.movedim(1, -1)[y == 2].any()

    def test_z_loss_with_probabilities_and_one_row(self):
        x, t = rand(4, 5), rand(4, 5, seed=1).softmax(1)
        expected = F.cross_entropy(x, t) + 0.1 * (x.logsumexp(1) ** 2).mean()
        torch.testing.assert_close(fusedloss.cross_entropy(x, t, z_loss=0.1), expected)
        for y in (torch.tensor(2), torch.tensor([2])):
            loss, z = fusedloss.cross_entropy(x[0], y, z_loss=0.1, reduction="none", return_z_loss=True)
            torch.testing.assert_close(z, 0.1 * x[0].logsumexp(0) ** 2)
            torch.testing.assert_close(loss, F.cross_entropy(x[0], y, reduction="none") + z)

    def test_z_loss_of_no_rows(self):
        x, y = rand(3, 5).requires_grad_(), torch.full((3,), -100)
        loss, z = fusedloss.cross_entropy(x, y, z_loss=0.1, return_z_loss=True)
        loss.backward()
        assert loss.isnan()
        assert z.isnan()
        assert not fusedloss.cross_entropy(x, y, z_loss=0.1, reduction="sum").any()

    def test_return_z_loss_of_zero(self):
        x, y = rand(3, 5).requires_grad_(), torch.arange(3)
        loss, z = fusedloss.cross_entropy(x, y, return_z_loss=True)
        assert torch.equal(loss, F.cross_entropy(x, y))
        assert torch.equal(z, torch.zeros((), dtype=torch.float64))
        assert not z.requires_grad

    def test_half_precision_extras_are_rounded_once(self):
        x, y = rand(64, 33, dtype=torch.bfloat16), torch.arange(64) % 33
        loss = fusedloss.cross_entropy(x, y, reduction="none", z_loss=0.1, softcap=2.0)
        rows, z, _ = cross_entropy_oracle(x, y, z_loss=0.1, softcap=2.0)
        assert ((loss.double() - rows - z).abs() <= 2**-8 * 1.001 * (rows + z)).all()


class TestDivergences:
    @pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("dim", [-1, 1, 0])
    def test_kl_div_with_logits(self, reduction, reverse, dim):
        x, target = rand(4, 5, 3).requires_grad_(), rand(4, 5, 3, seed=1).requires_grad_()
        temperature = 2.5
        q, p = (x / temperature).exp(), (target / temperature).exp()
        q, p = q / q.sum(dim, keepdim=True), p / p.sum(dim, keepdim=True)
        if reverse:
            q, p = p, q
        expected = temperature**2 * p * (p.log() - q.log())
        if reduction == "batchmean":
            expected = expected.sum() / 4
        elif reduction != "none":
            expected = getattr(expected, reduction)()
        ours = fusedloss.kl_div_with_logits(
            x, target, dim=dim, temperature=temperature, reverse=reverse, reduction=reduction
        )
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
        upstream = rand(*ours.shape, seed=9)
        for a, b in zip(
            torch.autograd.grad(ours, (x, target), upstream),
            torch.autograd.grad(expected, (x, target), upstream),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_masked_classes_add_nothing(self, reverse):
        x, target = rand(4, 5), rand(4, 5, seed=1)
        masked = [torch.cat([t, torch.full((4, 2), -INFINITY)], 1).requires_grad_() for t in (x, target)]
        plain = [t.clone().requires_grad_() for t in (x, target)]
        ours = fusedloss.kl_div_with_logits(*masked, temperature=2.0, reverse=reverse)
        expected = fusedloss.kl_div_with_logits(*plain, temperature=2.0, reverse=reverse)
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
        ours.backward()
        expected.backward()
        for a, b in zip(masked, plain, strict=True):
            torch.testing.assert_close(a.grad[:, :5], b.grad, rtol=1e-13, atol=1e-15)
            assert not a.grad[:, 5:].any()

    @pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (0,)], ids=str)
    def test_mean_of_a_batch_of_none_is_nan(self, shape):
        x = torch.zeros(shape, requires_grad=True)
        loss = fusedloss.kl_div_with_logits(x, torch.zeros(shape))
        assert loss.isnan() and torch.autograd.grad(loss, x)[0].shape == shape

    def test_dim_of_another_type(self):
        x = torch.randn(4, 6)
        assert torch.equal(fusedloss.entropy_with_logits(x, dim=True), fusedloss.entropy_with_logits(x, dim=1))
        expected = fusedloss.kl_div_with_logits(x, x.flip(0), dim=1)
        torch.testing.assert_close(fusedloss.kl_div_with_logits(x, x.flip(0), dim=True), expected)

    def test_class_that_only_the_input_excludes_is_infinite(self):
        x = torch.tensor([[0.0, -INFINITY]])
        assert fusedloss.kl_div_with_logits(x, torch.zeros(1, 2)) == INFINITY
        assert torch.isfinite(fusedloss.kl_div_with_logits(x, torch.zeros(1, 2), reverse=True))

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("dim", [-1, 0])
    def test_entropies(self, reduction, dim):
        x = rand(4, 5).requires_grad_()
        p = (x.exp() / x.exp().sum(dim, keepdim=True)).detach().requires_grad_()
        expected = -(p * p.log()).sum(dim)
        expected = expected if reduction == "none" else getattr(expected, reduction)()
        from_p = fusedloss.entropy(p, dim=dim, reduction=reduction)
        from_x = fusedloss.entropy_with_logits(x, dim=dim, reduction=reduction)
        torch.testing.assert_close(from_p, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(from_x, expected, rtol=1e-13, atol=0)
        upstream = rand(*expected.shape, seed=9)
        (dp,) = torch.autograd.grad(from_p, p, upstream)
        (expected_dp,) = torch.autograd.grad(expected, p, upstream)
        torch.testing.assert_close(dp, expected_dp, rtol=1e-12, atol=1e-15)
        assert gradcheck(lambda x: fusedloss.entropy_with_logits(x, dim=dim, reduction=reduction), x)

    def test_zero_times_log_zero(self):
        p = torch.tensor([[0.0, 1.0], [0.5, 0.5]], requires_grad=True)
        loss = fusedloss.entropy(p)
        torch.testing.assert_close(loss, torch.tensor([0.0, 0.6931471805599453]))
        loss.sum().backward()
        expected = torch.special.entr(q := p.detach().requires_grad_()).sum()
        expected.backward()
        torch.testing.assert_close(p.grad, q.grad)
        x = torch.tensor([[0.0, -INFINITY], [0.0, 0.0]], requires_grad=True)
        loss = fusedloss.entropy_with_logits(x)
        torch.testing.assert_close(loss, torch.tensor([0.0, 0.6931471805599453]))
        loss.sum().backward()
        assert not x.grad.isnan().any()


X, Y = rand(3, 3), torch.tensor([0, 1, 2])
P, W = rand(3, 3, seed=1).sigmoid(), torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
PROBS = rand(3, 3, seed=2).softmax(1)
LOG_P, LOG_Q = rand(3, 3, seed=3).log_softmax(1), rand(3, 3, seed=4).log_softmax(1)
fl = fusedloss
DIFFERENTIABLE = {  # name: (function of every differentiable argument, the arguments)
    "bce_with_logits": (lambda x, t, r: fl.binary_cross_entropy_with_logits(x, t, W, reduction=r), (X, P)),
    "bce_with_logits pos_weight": (
        lambda x, t, r: fl.binary_cross_entropy_with_logits(
            x, t, pos_weight=W, reduction=r, label_smoothing=0.2
        ),
        (X, P),
    ),
    "bce": (lambda x, t, r: fl.binary_cross_entropy(x, t, W, reduction=r), (P, PROBS)),
    "cross_entropy": (lambda x, r: fl.cross_entropy(x, Y, W, label_smoothing=0.1, reduction=r), (X,)),
    "cross_entropy extras": (
        lambda x, r: fl.cross_entropy(x, Y, ignore_index=2, z_loss=0.1, softcap=2.0, reduction=r),
        (X,),
    ),
    "cross_entropy probabilities": (
        lambda x, t, w, r: fl.cross_entropy(x, t, w, z_loss=0.1, reduction=r),
        (X, PROBS, W),
    ),
    "nll_loss": (lambda x, r: fl.nll_loss(x, Y, W, reduction=r), (LOG_P,)),
    "kl_div": (lambda x, t, r: fl.kl_div(x, t, reduction=r), (LOG_P, PROBS)),
    "kl_div log_target": (lambda x, t, r: fl.kl_div(x, t, reduction=r, log_target=True), (LOG_P, LOG_Q)),
    "kl_div_with_logits": (
        lambda x, t, r: fl.kl_div_with_logits(x, t, temperature=2.0, reduction=r), (X, P),
    ),
    "kl_div_with_logits reverse": (
        lambda x, t, r: fl.kl_div_with_logits(x, t, reverse=True, reduction=r), (X, P),
    ),
    "entropy": (lambda p, r: fl.entropy(p, reduction=r), (PROBS,)),
    "entropy_with_logits": (lambda x, r: fl.entropy_with_logits(x, reduction=r), (X,)),
}  # fmt: skip
each_loss = pytest.mark.parametrize("name", DIFFERENTIABLE)


def loss_and_arguments(name, reduction):
    function, arguments = DIFFERENTIABLE[name]
    return lambda *a: function(*a, reduction), tuple(a.clone().requires_grad_() for a in arguments)


@each_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(name, reduction):
    function, arguments = loss_and_arguments(name, reduction)
    assert gradcheck(function, arguments, check_forward_ad=True)
    if reduction == "mean":
        assert gradgradcheck(function, arguments)


@each_loss
def test_functorch(name):
    function, arguments = loss_and_arguments(name, "sum")
    arguments = tuple(a.detach() for a in arguments)
    live = tuple(a.clone().requires_grad_() for a in arguments)
    every = tuple(range(len(arguments)))
    expected = torch.autograd.grad(function(*live), live)
    for a, b in zip(grad(function, every)(*arguments), expected, strict=True):
        torch.testing.assert_close(a, b)
    tangents = tuple(rand(*a.shape, seed=9) for a in arguments)
    _, tangent = jvp(function, arguments, tangents)
    torch.testing.assert_close(tangent, sum((g * t).sum() for g, t in zip(expected, tangents, strict=True)))
    torch.testing.assert_close(
        hessian(function)(*arguments), jacrev(jacrev(function))(*arguments), rtol=1e-9, atol=1e-12
    )


@each_loss
def test_vmap_is_a_loop(name):
    function, arguments = loss_and_arguments(name, "sum")
    batch = tuple(torch.stack([a.detach(), a.detach() * 0.7]) for a in arguments)
    one = grad(function)
    expected = torch.stack([one(*(a[i] for a in batch)) for i in range(2)])
    torch.testing.assert_close(vmap(one)(*batch), expected)


def test_compile_has_no_graph_break():
    torch._dynamo.reset()
    flat = [a.clone().requires_grad_() for _, arguments in DIFFERENTIABLE.values() for a in arguments]

    def every_loss(*flat):
        losses, rest = [], list(flat)
        for function, arguments in DIFFERENTIABLE.values():
            losses.append(function(*(rest.pop(0) for _ in arguments), "sum"))
        return torch.stack(losses)

    compiled = torch.compile(every_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    upstream = rand(len(DIFFERENTIABLE), seed=9)
    ours, expected = compiled(*flat), every_loss(*flat)
    torch.testing.assert_close(ours, expected)
    gradients = (torch.autograd.grad(loss, flat, upstream) for loss in (ours, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_with_dynamic_shapes_does_not_recompile():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, y, t):
        return (
            fusedloss.cross_entropy(x, y, z_loss=0.1)
            + fusedloss.binary_cross_entropy_with_logits(x, t)
            + fusedloss.kl_div_with_logits(x, t)
        )

    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    compiled_once = None
    for rows, classes in [(4, 5), (6, 9), (33, 7)]:
        x, t = rand(rows, classes).requires_grad_(), rand(rows, classes, seed=1).sigmoid()
        y = torch.arange(rows) % classes
        torch.testing.assert_close(compiled(x, y, t), step(x, y, t))
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once


def test_make_fx_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    function = lambda x, t: fusedloss.binary_cross_entropy_with_logits(x, t).sum()
    traced = make_fx(function, tracing_mode="symbolic")(X, P)
    torch.testing.assert_close(traced(X, P), function(X, P))
    with FakeTensorMode():
        loss = fusedloss.cross_entropy(torch.empty(4, 5), torch.empty(4, dtype=torch.int64))
        assert loss.shape == ()
    assert fusedloss.cross_entropy(X.to("meta"), Y.to("meta"), reduction="none").shape == (3,)
    assert fusedloss.binary_cross_entropy_with_logits(X.to("meta"), P.to("meta")).is_meta


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_without_gradients(inference):
    with inference():
        weight = W.clone().requires_grad_() if inference is torch.no_grad else W
        loss = fusedloss.binary_cross_entropy_with_logits(X, P, weight)
        torch.testing.assert_close(loss, (bce_oracle(X, P) * W).mean())
        assert not loss.requires_grad
