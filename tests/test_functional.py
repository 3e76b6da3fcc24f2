"""The public functions: torch's signatures, values, legacy arguments, autocast, overrides, sample inputs."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

import fusedloss

TORCHS = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "kl_div",
    "nll_loss",
)
OURS = ("kl_div_with_logits", "entropy", "entropy_with_logits")
pytestmark = pytest.mark.filterwarnings("ignore:reduction:UserWarning", "ignore:size_average:UserWarning")
each_of_torchs = pytest.mark.parametrize("name", TORCHS)


@pytest.fixture(autouse=True)
def reference():
    with fusedloss.use("reference"):
        yield


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(name, dtype=torch.float32):
    """(input, target) with requires_grad on the input."""
    x, other = rand(4, 5, dtype=dtype), rand(4, 5, seed=1)
    target = {
        "cross_entropy": torch.tensor([0, 4, 2, 2]),
        "nll_loss": torch.tensor([0, 4, 2, 2]),
        "kl_div": other.softmax(1).to(dtype),
    }.get(name, other.sigmoid().to(dtype))
    if name in ("nll_loss", "kl_div"):
        x = x.log_softmax(1)
    elif name in ("binary_cross_entropy", "entropy"):
        x = x.sigmoid()
    return (x.requires_grad_(),) if name.startswith("entropy") else (x.requires_grad_(), target)


@each_of_torchs
def test_signature_is_torchs(name):
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    ours = list(inspect.signature(getattr(fusedloss, name)).parameters.values())
    assert ours[: len(theirs)] == theirs
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert ours[-1].name == "dtype"


@pytest.mark.parametrize("name", [*TORCHS, *OURS])
def test_docstring_says_what_it_computes(name):
    doc = inspect.getdoc(getattr(fusedloss, name))
    for section in ("Args:", "Shape:", "Returns:", "Raises:", "::", "nats"):
        assert section in doc, section


# Numbers printed in textbook examples, in nats: distributions over five classes
NORMAL, UNIFORM, RANDOM = [0.1, 0.2, 0.4, 0.2, 0.1], [0.2] * 5, [0.4, 0.1, 0.05, 0.2, 0.25]
DISTRIBUTIONS = torch.tensor([NORMAL, UNIFORM, RANDOM], dtype=torch.float64)
ENTROPY = torch.tensor([1.4708084763221112, 1.6094379124341005, 1.415022588493559], dtype=torch.float64)
CROSS_ENTROPY = torch.tensor(  # [P, Q]
    [
        [1.4708084763221112, 1.6094379124341003, 2.21095601980663],
        [1.7480673485460896, 1.6094379124341003, 1.8420680743952367],
        [2.0253262207700673, 1.6094379124341003, 1.415022588493559],
    ],
    dtype=torch.float64,
)
KL = torch.tensor(  # KL(P || Q)
    [
        [0.0, 0.13862943611198902, 0.7401475434845188],
        [0.13862943611198905, 0.0, 0.23263016196113617],
        [0.6103036322765085, 0.19441532394054145, 0.0],
    ],
    dtype=torch.float64,
)


class TestGoldenValues:
    def test_entropy(self):
        assert_close(fusedloss.entropy(DISTRIBUTIONS), ENTROPY, rtol=1e-14, atol=0)
        assert_close(fusedloss.entropy_with_logits(DISTRIBUTIONS.log()), ENTROPY, rtol=1e-14, atol=0)
        assert_close(fusedloss.entropy(DISTRIBUTIONS, reduction="sum"), ENTROPY.sum(), rtol=1e-14, atol=0)

    @pytest.mark.parametrize("i", range(3))
    @pytest.mark.parametrize("j", range(3))
    def test_pairs_and_their_identity(self, i, j):
        p, log_q = DISTRIBUTIONS[[i]], DISTRIBUTIONS[[j]].log()
        cross_entropy = fusedloss.cross_entropy(log_q, p)
        kl = fusedloss.kl_div(log_q, p, reduction="batchmean")
        assert_close(cross_entropy, CROSS_ENTROPY[i, j], rtol=1e-14, atol=0)
        assert_close(kl, KL[i, j], rtol=1e-13, atol=1e-15)
        assert_close(fusedloss.kl_div_with_logits(log_q + 3, p.log() - 2), kl, rtol=1e-12, atol=1e-15)
        assert_close(kl + fusedloss.entropy(p, reduction="sum"), cross_entropy, rtol=1e-14, atol=0)

    def test_one_hot_target(self):
        x, y = rand(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
        one_hot = F.one_hot(y, 5).double()
        expected = fusedloss.cross_entropy(x, y)
        assert_close(fusedloss.nll_loss(x.log_softmax(1), y), expected)
        assert_close(fusedloss.kl_div(x.log_softmax(1), one_hot, reduction="batchmean"), expected)
        assert_close(fusedloss.cross_entropy(x, one_hot), expected)

    def test_bce_example(self):
        x = torch.tensor([-1.7723, -1.5965, 0.8863], requires_grad=True)
        target = torch.tensor([0.0, 1.0, 0.0])
        printed = dict(rtol=0, atol=6e-5)
        loss = fusedloss.binary_cross_entropy_with_logits
        assert_close(loss(x, target, reduction="none"), torch.tensor([0.157, 1.781, 1.2314]), **printed)
        assert_close(loss(x, target), torch.tensor(1.0565), **printed)
        (dx,) = torch.autograd.grad(loss(x, target), x)
        assert_close(dx, torch.tensor([0.0484, -0.2772, 0.236]), **printed)
        (dx,) = torch.autograd.grad(loss(x, target, reduction="sum"), x)
        assert_close(dx, torch.tensor([0.1453, -0.8315, 0.7081]), **printed)

    def test_bce_on_probabilities(self):
        p = torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=torch.float64)
        loss = fusedloss.binary_cross_entropy(p, torch.ones_like(p), reduction="none")
        expected = [2.302585092994046, 1.6094379124341003, 0.6931471805599453, 0.10536051565782628]
        assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
        assert fusedloss.binary_cross_entropy(torch.zeros(1), torch.ones(1)) == 100.0

    def test_extreme_logits(self):
        x = torch.tensor([[0.0, -5537.00322633, -7592.30679862, -1077.17353227]], dtype=torch.float64)
        losses = [fusedloss.cross_entropy(x, torch.tensor([y])) for y in range(4)]
        assert_close(torch.stack(losses), -x[0], rtol=1e-15, atol=0)


def call(function, sample):
    leaves = [t.detach().clone() for t in (sample.input, *sample.args) if torch.is_tensor(t)]
    live = [t.requires_grad_() if t.is_floating_point() else t for t in leaves]
    result = function(*live, **sample.kwargs)
    needed = [t for t in live if t.requires_grad]
    upstream = rand(*result.shape, seed=5, dtype=result.dtype)
    return result, torch.autograd.grad(result, needed, upstream)


def with_double(sample):
    cast = lambda t: t.detach().double() if torch.is_tensor(t) and t.is_floating_point() else t
    return sample.transform(cast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_of_torchs
def test_torchs_sample_inputs(name, dtype):
    """Equal to torch at torch.testing's tolerances; in bfloat16, or as close to float64 as torch is."""
    torch.manual_seed(0)
    op = next(o for o in op_db if o.name == f"nn.functional.{name}")
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        theirs, theirs_grad = call(getattr(F, name), sample)
        ours, ours_grad = call(getattr(fusedloss, name), sample)
        count += 1
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        pairs = zip((ours, *ours_grad), (theirs, *theirs_grad), strict=True)
        if dtype != torch.bfloat16:
            for a, b in pairs:
                assert_close(a, b, equal_nan=True)
            continue
        exact, exact_grad = call(getattr(F, name), with_double(sample))
        for (a, b), c in zip(pairs, (exact, *exact_grad), strict=True):
            worst = (b.detach().double() - c.detach()).abs().nan_to_num().max() if c.numel() else 0.0
            assert_close(a.double(), c, rtol=1.6e-2, atol=max(1e-5, float(worst)), equal_nan=True)
    assert count > 5


LEGACY = [(a, b) for a in (None, True, False) for b in (None, True, False) if (a, b) != (None, None)]


@each_of_torchs
@pytest.mark.parametrize(("size_average", "reduce"), LEGACY)
def test_legacy_arguments(name, size_average, reduce):
    args = arguments(name)
    kwargs = dict(size_average=size_average, reduce=reduce)
    ours, theirs = getattr(fusedloss, name)(*args, **kwargs), getattr(F, name)(*args, **kwargs)
    assert ours.shape == theirs.shape
    assert_close(ours, theirs)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        getattr(fusedloss, name)(*args, **kwargs)


def test_deprecated_reductions():
    x, y = arguments("cross_entropy")
    with pytest.warns(UserWarning, match="elementwise_mean"):
        assert_close(fusedloss.cross_entropy(x, y, reduction="elementwise_mean"), F.cross_entropy(x, y))
    log_q, p = arguments("kl_div")
    with pytest.warns(UserWarning, match="'mean' divides") as caught:
        fusedloss.kl_div(log_q, p)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize(
    ("input", "target"), [((4, 5), (1, 5)), ((1, 5), (4, 5)), ((5,), (4, 5)), ((4, 5), (5,)), ((), ())]
)
def test_kl_div_broadcasts(reduction, log_target, input, target):
    x, t = rand(*input).requires_grad_(), rand(*target, seed=1).sigmoid().requires_grad_()
    kwargs = dict(reduction=reduction, log_target=log_target)
    ours, theirs = fusedloss.kl_div(x, t, **kwargs), F.kl_div(x, t, **kwargs)
    assert_close(ours, theirs)
    upstream = rand(*ours.shape, seed=5)
    assert_close(torch.autograd.grad(ours, (x, t), upstream), torch.autograd.grad(theirs, (x, t), upstream))


def test_kl_div_legacy_batchmean_still_divides():
    x, t = arguments("kl_div")
    for kwargs in (dict(reduce=False), dict(size_average=False), dict(size_average=True)):
        ours = fusedloss.kl_div(x, t, reduction="batchmean", **kwargs)
        assert_close(ours, F.kl_div(x, t, reduction="batchmean", **kwargs))


@pytest.mark.parametrize("weight", [(5,), (4, 1), (4, 5), (), (1, 1)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_bce_weights_broadcast(weight, reduction):
    w = rand(*weight, seed=3).abs()
    x, t = arguments("binary_cross_entropy_with_logits")
    for kwargs in (dict(weight=w), dict(pos_weight=w), dict(weight=w, pos_weight=w)):
        ours = fusedloss.binary_cross_entropy_with_logits(x, t, reduction=reduction, **kwargs)
        assert_close(ours, F.binary_cross_entropy_with_logits(x, t, reduction=reduction, **kwargs))
    p, t = arguments("binary_cross_entropy")
    assert_close(
        fusedloss.binary_cross_entropy(p, t, w, reduction=reduction),
        F.binary_cross_entropy(p, t, w, reduction=reduction),
    )


CROSS_ENTROPY_SHAPES = {
    "one row": ((5,), ()),
    "one row, target [1]": ((5,), (1,)),
    "rows": ((4, 5), (4,)),
    "3 dimensions": ((2, 5, 3), (2, 3)),
    "4 dimensions": ((2, 5, 3, 2), (2, 3, 2)),
    "5 dimensions": ((2, 5, 3, 2, 2), (2, 3, 2, 2)),
    "empty": ((0, 5), (0,)),
}


@pytest.mark.parametrize("shape", CROSS_ENTROPY_SHAPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", ["plain", "weight", "ignore", "all ignored", "smooth", "uint8"])
def test_cross_entropy_with_indices(shape, reduction, options):
    size, target_size = CROSS_ENTROPY_SHAPES[shape]
    if options == "smooth" and shape == "one row, target [1]":
        pytest.skip("refused by torch")
    if options == "uint8" and len(size) > 2:
        pytest.skip("refused by torch")
    x = rand(*size).requires_grad_()
    y = (torch.arange(max(1, torch.Size(target_size).numel())) % 5)[: torch.Size(target_size).numel()]
    y = y.reshape(target_size)
    kwargs = dict(
        plain={},
        weight=dict(weight=torch.linspace(0.5, 2.0, 5)),
        ignore=dict(ignore_index=1, weight=torch.linspace(0.5, 2.0, 5)),
        smooth=dict(label_smoothing=0.2, ignore_index=1, weight=torch.linspace(0.5, 2.0, 5)),
        uint8={},
    ).get(options, {})
    if options == "all ignored":
        y = torch.full_like(y, -100)
    if options == "uint8":
        y = y.to(torch.uint8)
    for name in ("cross_entropy", "nll_loss"):
        if name == "nll_loss" and options == "smooth":
            continue
        ours = getattr(fusedloss, name)(x, y, reduction=reduction, **kwargs)
        theirs = getattr(F, name)(x, y, reduction=reduction, **kwargs)
        assert_close(ours, theirs, equal_nan=True)
        upstream = rand(*ours.shape, seed=5)
        if shape == "one row, target [1]":  # where torch's backward fails
            theirs = getattr(F, name)(x, y[0], reduction=reduction, **kwargs)
        (a,), (b,) = (torch.autograd.grad(loss, x, upstream) for loss in (ours, theirs))
        assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3), (0, 5)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "float64")])
def test_cross_entropy_with_probabilities(shape, reduction, dtypes):
    input, target = (getattr(torch, name) for name in dtypes)
    dim = 0 if len(shape) == 1 else 1
    x, t = rand(*shape, dtype=input), rand(*shape, seed=1).softmax(dim).to(target)
    kwargs = dict(weight=torch.linspace(0.5, 2.0, 5).to(input), label_smoothing=0.1, reduction=reduction)
    ours, theirs = fusedloss.cross_entropy(x, t, **kwargs), F.cross_entropy(x, t, **kwargs)
    assert ours.dtype == theirs.dtype
    exact = F.cross_entropy(x.double(), t.double(), **{**kwargs, "weight": kwargs["weight"].double()})
    assert_close(ours, exact.to(ours.dtype), equal_nan=True)


@pytest.mark.parametrize("name", [*TORCHS, *OURS])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_gives_the_unrounded_loss(name, half):
    args = arguments(name, half)
    for reduction in ("none", "mean"):
        loss = getattr(fusedloss, name)(*args, reduction=reduction, dtype=torch.float32)
        single = [a.detach().float() if a.is_floating_point() else a for a in args]
        assert loss.dtype == torch.float32
        assert torch.equal(loss, getattr(fusedloss, name)(*single, reduction=reduction))
    loss.backward()
    assert args[0].grad.dtype == half
    assert getattr(fusedloss, name)(*args, dtype=torch.float64).dtype == torch.float64
    assert getattr(fusedloss, name)(*single, dtype=half).dtype == half


@pytest.mark.parametrize("name", [*TORCHS, *OURS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_autocast(name, dtype):
    args = arguments(name, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = getattr(fusedloss, name)(*args, reduction="sum")
        if name in TORCHS:
            assert_close(loss, getattr(F, name)(*args, reduction="sum"))
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert args[0].grad.dtype == dtype
    meta = [a.detach().to("meta") for a in args]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert getattr(fusedloss, name)(*meta, reduction="sum").dtype == dtype


def test_autocast_accepts_what_it_converts():
    x, y, w = rand(4, 5, dtype=torch.bfloat16), torch.tensor([0, 4, 2, 2]), torch.linspace(0.5, 2, 5)
    p = rand(4, 5).sigmoid()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for weight in (w, w.bfloat16(), w.half()):
            assert_close(fusedloss.cross_entropy(x, y, weight), F.cross_entropy(x, y, weight))
            assert_close(fusedloss.nll_loss(x, y, weight), F.nll_loss(x, y, weight))
        with pytest.raises(RuntimeError):
            fusedloss.cross_entropy(x, y, w.double())
        assert_close(fusedloss.binary_cross_entropy(p, p.bfloat16()), F.binary_cross_entropy(p, p.bfloat16()))
        with pytest.raises(RuntimeError):
            fusedloss.binary_cross_entropy(p, p.double())


@pytest.mark.parametrize("name", [*TORCHS, *OURS])
def test_torch_function_mode_sees_our_function(name):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    args = arguments(name)
    with Mode():
        loss = getattr(fusedloss, name)(*args, reduction="sum")
    func, seen_args, kwargs = seen[0]
    assert func is getattr(fusedloss, name)
    assert len(seen_args) == len(args)
    assert all(a is b for a, b in zip(seen_args, args, strict=True))
    assert kwargs["reduction"] == "sum"
    assert not {"dtype", "z_loss", "softcap", "return_z_loss"} & kwargs.keys()
    assert_close(loss, getattr(fusedloss, name)(*args, reduction="sum"))
    with Mode():
        getattr(fusedloss, name)(*args, dtype=torch.float64)
    assert seen[-1][0] is not None
    assert any(k.get("dtype") == torch.float64 for f, _, k in seen if f is getattr(fusedloss, name))


class Overriding(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "").startswith("fusedloss."):
            return func.__name__
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", [*TORCHS, *OURS])
def test_subclass_overrides_our_function(name):
    args = [a.detach() for a in arguments(name)]
    for i in range(len(args)):
        mixed = [a.as_subclass(Overriding) if i == j else a for j, a in enumerate(args)]
        assert getattr(fusedloss, name)(*mixed) == name
    if name in ("cross_entropy", "nll_loss", "binary_cross_entropy"):
        weight = torch.ones(5).as_subclass(Overriding)
        assert getattr(fusedloss, name)(*args, weight) == name
    if name == "binary_cross_entropy_with_logits":
        weight = torch.ones(5).as_subclass(Overriding)
        assert getattr(fusedloss, name)(*args, pos_weight=weight) == name


class Plain(torch.Tensor):
    pass


def test_subclass_without_an_override():
    x, y = arguments("cross_entropy")
    loss = fusedloss.cross_entropy(x.detach().as_subclass(Plain), y)
    assert type(loss) is Plain
    assert_close(loss.as_subclass(torch.Tensor), F.cross_entropy(x, y).detach())


@pytest.mark.parametrize("name", [*TORCHS, *OURS])
def test_arguments_are_left_alone_and_backward_repeats(name):
    args = arguments(name)
    before = [a.detach().clone() for a in args]
    loss = getattr(fusedloss, name)(*args, reduction="mean")
    (first,) = torch.autograd.grad(loss, args[0], retain_graph=True)
    (second,) = torch.autograd.grad(loss, args[0], torch.tensor(3.0))
    assert_close(second, 3 * first)
    assert first.any()
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b)
        assert a._version == 0


def test_default_device_context():
    x, y = arguments("cross_entropy")
    with torch.device("cpu"):
        assert_close(fusedloss.cross_entropy(x, y), F.cross_entropy(x, y))


def test_two_threads():
    from concurrent.futures import ThreadPoolExecutor

    x, y = arguments("cross_entropy")
    expected = F.cross_entropy(x, y)
    with ThreadPoolExecutor(2) as pool, warnings.catch_warnings():
        for loss in pool.map(lambda _: fusedloss.cross_entropy(x, y), range(20)):
            assert torch.equal(loss, expected)
