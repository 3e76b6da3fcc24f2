"""Any shape, stride, dtype and argument: the kernels and the reference against the float64 formulas."""

import pytest
import torch

import fusedloss

from . import oracle

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

settings.register_profile(
    "here", max_examples=40, derandomize=True, deadline=None, database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    suppress_health_check=list(hypothesis.HealthCheck),
)  # fmt: skip
PROFILE = settings.get_profile("here")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# mostly small; and lengths about the sizes that tiles and blocks have
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 127, 128, 129, 255, 257]))
LONG = st.sampled_from([1000, 1023, 1024, 1025, 2049, 4095, 4097, 5000])


@pytest.fixture(params=["triton", "reference"], autouse=True)
def path(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    with fusedloss.use(request.param):
        yield request.param


@st.composite
def shapes(draw):
    """(N, C) and (N, C, d), of few programs: the interpreter takes milliseconds for each."""
    kind = draw(st.sampled_from(["short", "long", "positions"]))
    if kind == "long":
        return draw(st.integers(1, 2)), draw(LONG)
    if kind == "positions":
        return draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.one_of(st.integers(1, 9), st.just(257)))
    classes = draw(SIZES)
    return draw(SIZES if classes <= 16 else st.integers(1, 20 if classes <= 128 else 3)), classes


@st.composite
def layouts(draw, dims):
    """What `arrange` needs: an order of dimensions in memory, a step and an offset for the innermost."""
    return draw(st.permutations(range(dims))), draw(st.sampled_from([1, 1, 1, 2, 3])), draw(st.integers(0, 9))


def arrange(tensor, layout):
    """The same values with other strides and another alignment; what lies between is NaN."""
    order, step, offset = layout
    sizes = [tensor.shape[d] for d in order]
    sizes[-1] = sizes[-1] * step + offset
    room = tensor.new_full(sizes, float("nan"))
    part = room[..., offset:][..., ::step]
    back = [order.index(d) for d in range(tensor.dim())]
    return part.permute(back).copy_(tensor)


class Draw:
    """Tensors for one example, all from one seed."""

    def __init__(self, data, device):
        self.data, self.device = data, device
        self.shape = data.draw(shapes(), label="shape")
        self.dtype = data.draw(DTYPES, label="dtype")
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))

    def tensor(self, make, shape=None, dtype=None):
        shape = self.shape if shape is None else shape
        value = make(torch.randn(shape, generator=self.generator) * 3).to(dtype or self.dtype).to(self.device)
        return arrange(value, self.data.draw(layouts(len(shape)), label="layout")) if shape else value

    def labels(self):
        rows = (self.shape[0], *self.shape[2:])
        y = torch.randint(self.shape[1], rows, generator=self.generator)
        ignored = torch.rand(rows, generator=self.generator) < self.data.draw(
            st.sampled_from([0.0, 0.3]), label="ignored"
        )
        return y.masked_fill(ignored, -100).to(self.device)

    def flag(self, label):
        return self.data.draw(st.booleans(), label=label)

    def one_of(self, label, *values):
        return self.data.draw(st.sampled_from(values), label=label)


def compare(name, tensors, differentiable, factor=1.0, **keywords):
    keywords = {k: v for k, v in keywords.items() if v is not None}
    ours, exact = getattr(fusedloss, name), getattr(oracle, name)
    loss, upstream, gradients = oracle.value_and_gradients(ours, tensors, keywords, differentiable)
    expected, _, expected_gradients = oracle.exact(exact, tensors, keywords, differentiable, upstream)
    one_class = name == "cross_entropy" and tensors[0].shape[1] == 1
    absolute = 1e-6 if one_class else 0.0  # exactly 0 but for the rounding of the logits
    for actual, e in zip([loss, *gradients], [expected, *expected_gradients], strict=True):
        oracle.assert_close(actual, e, factor, absolute)


@PROFILE
@given(data=st.data())
def test_cross_entropy(data, device, path):
    d = Draw(data, device)
    dense = d.flag("probabilities")
    if path == "reference":  # torch's own functions, and torch's own half precision with them
        d.dtype = torch.float32
    x = d.tensor(lambda v: v)
    y = d.tensor(lambda v: v.softmax(1)) if dense else d.labels()
    compare(
        "cross_entropy", (x, y), 1 + dense, factor=2.0,
        weight=d.tensor(lambda v: v.abs() + 0.1, d.shape[1:2]) if d.flag("weight") else None,
        reduction=d.one_of("reduction", "none", "mean", "sum"),
        label_smoothing=d.one_of("label_smoothing", 0.0, 0.1, 1.0),
        z_loss=d.one_of("z_loss", 0.0, 0.01),
        softcap=d.one_of("softcap", None, 5.0),
    )  # fmt: skip


@PROFILE
@given(data=st.data())
def test_binary_cross_entropy_with_logits(data, device, path):
    d = Draw(data, device)
    x, y = d.tensor(lambda v: v), d.tensor(torch.sigmoid)
    broadcast = d.one_of("weight's shape", d.shape, d.shape[-1:], (1,) * len(d.shape))
    compare(
        "binary_cross_entropy_with_logits", (x, y), 2, factor=2.0,
        weight=d.tensor(torch.abs, broadcast) if d.flag("weight") else None,
        pos_weight=d.tensor(torch.abs, d.shape[-1:]) if d.flag("pos_weight") else None,
        reduction=d.one_of("reduction", "none", "mean", "sum"),
        label_smoothing=d.one_of("label_smoothing", 0.0, 0.1, 1.0),
    )  # fmt: skip


@PROFILE
@given(data=st.data())
def test_kl_div(data, device, path):
    d = Draw(data, device)
    if path == "reference":
        d.dtype = torch.float32
    log_target = d.flag("log_target")
    x = d.tensor(lambda v: v.log_softmax(1))
    t = d.tensor(lambda v: v.log_softmax(1) if log_target else v.softmax(1).clamp(min=1e-3))
    compare("kl_div", (x, t), 2, factor=2.0, log_target=log_target,
            reduction=d.one_of("reduction", "none", "mean", "sum", "batchmean"))  # fmt: skip
