"""Every shared case on the kernels: values and gradients against float64, in every dtype, reduction, shape
and layout."""

import pytest
import torch

import fusedloss
from fusedloss import compiled, testing

from .. import oracle

pytest.importorskip("triton")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def kernels():
    with fusedloss.use("triton"):
        yield


def relayout(tensor, layout):
    """The same values (or for `expanded` the first row's) in another layout. Labels and class weights, which
    have one dimension, are laid out as they are, but for `expanded` and `strided`."""
    if tensor is None or (tensor.dim() < 2 and layout not in ("expanded", "strided")):
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype)
        wide = wide.to(tensor.device)[..., 3:-2]
        return wide.copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "strided":
        twice = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7)[..., ::2]
        return twice.copy_(tensor)
    return tensor


def draw(case, shape, dtype, device, layout="plain"):
    """Inputs in a layout: `expanded` is one target for all rows, the others are laid on every tensor."""
    tensors, keywords = case.make_inputs(shape, dtype, device)
    first, rest = tensors[0], tensors[1:]
    if layout == "misaligned":  # one element behind a multiple of 16 bytes
        move = lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].reshape(t.shape)
        return (move(first), *rest), keywords
    if layout != "expanded":
        first = relayout(first, layout)
        more = {name: relayout(value, layout) if isinstance(value, torch.Tensor) and value.dim() > 1 else value
                for name, value in keywords.items()}  # fmt: skip
        keywords = {**keywords, **more}
    return (first, *(relayout(t, layout) for t in rest)), keywords


def check(case, tensors, keywords, dtype, against_torch=True):
    call = getattr(oracle, case.loss)
    assert fusedloss.path(tensors[0]) == "triton"
    before = [t.clone() for t in tensors]
    loss, upstream, gradients = oracle.value_and_gradients(case.ours, tensors, keywords, case.differentiable)
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t, b)
    expected, _, expected_gradients = oracle.exact(
        call, tensors, keywords, case.differentiable, upstream
    )
    oracle.assert_close(loss, expected)
    for t, gradient, e in zip(tensors, gradients, expected_gradients, strict=False):
        assert gradient.dtype == t.dtype
        oracle.assert_close(gradient, e)
    if not against_torch:
        return
    theirs, _, their_gradients = oracle.value_and_gradients(
        case.torch_equivalent, tensors, keywords, case.differentiable, upstream
    )
    assert loss.dtype == theirs.dtype
    if dtype != torch.float32:
        oracle.assert_no_worse_than_torch(loss, theirs, expected)
        for ours, by_torch, e in zip(gradients, their_gradients, expected_gradients, strict=True):
            oracle.assert_no_worse_than_torch(ours, by_torch, e)


def all_cases(reductions=None):
    return [
        pytest.param(case, reduction, id=f"{case.name}-{reduction}")
        for case in testing.CASES
        for reduction in case.reductions
        if reductions is None or reduction in reductions
    ]


SHAPES = [
    (1, 2),  # the smallest softmax
    (130, 10),  # rows of up to 16 classes: a whole tile of 128 rows, and two more
    (17, 100),  # rows of up to 128: a tile of 16 rows, and one more
    (3, 512),  # aligned rows of up to 1024: a tile of two rows, and one more
    (2, 4103),  # a row a program: whole blocks, a tail, and the second row's unaligned head
]
LAYOUTS = [
    ((3, 37, 5), "plain"),  # (N, C, d): classes lie apart, positions are next to each other
    ((2, 6, 300), "plain"),  # the same with many positions: tiles of 256, the last not full
    ((2, 3, 4, 5), "plain"),  # two dimensions of positions walked as one
    ((5, 129), "transposed"),  # classes lie apart, rows are next to each other
    ((5, 40), "sliced"),  # rows begin off a multiple of 16 bytes, and are not next to each other
    ((2, 1029), "sliced"),  # the same in long rows, whose head and tail then differ
    ((2, 1500), "misaligned"),  # the input alone begins off a multiple of 16 bytes
    ((5, 33), "expanded"),  # one target for all rows: stride 0
    ((3, 600), "strided"),  # every second element
    ((3, 4, 5), "transposed"),  # positions and rows in the order of memory that no single walk covers
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("case", "reduction"), all_cases())
def test_shape(case, reduction, shape, dtype, device):
    tensors, keywords = draw(case, shape, dtype, device)
    check(case, tensors, {**keywords, "reduction": reduction}, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
@pytest.mark.parametrize(("case", "reduction"), all_cases(("none", "mean", "batchmean")))
def test_layout(case, reduction, shape, layout, dtype, device):
    tensors, keywords = draw(case, shape, dtype, device, layout)
    check(case, tensors, {**keywords, "reduction": reduction}, dtype)


@pytest.mark.parametrize(
    "cols",
    [
        17_000,  # several whole blocks in a program; in float32 backward has two programs a row
        33_001,  # two programs a row in bfloat16 as well
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_long_row(case, dtype, cols, device):
    tensors, keywords = draw(case, (1, cols), dtype, device)
    check(case, tensors, keywords, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["index", "weight+label_smoothing", "z_loss", "softcap"])
def test_label_in_every_part_of_a_row(name, dtype, device):
    """The label's block is done apart: it may be any block, the tail, or in the unaligned head."""
    case = testing.case(f"cross_entropy/{name}")
    labels = [0, 2, 3, 8, 2047, 2048, 4095, 4096, 4099, 4105, 8201, 8212]
    (x, _), keywords = draw(case, (len(labels), 8213), dtype, device)
    check(case, (x, torch.tensor(labels, device=device)), {**keywords, "reduction": "none"}, dtype)


@pytest.mark.parametrize("upstream", ["expanded", "transposed", "strided"])
@pytest.mark.parametrize("shape", [(6, 50), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_layout_of_the_upstream_gradient(case, shape, upstream, device):
    """A sum's gradient is expanded from one number; a view's is a view."""
    if "none" not in case.reductions:
        pytest.skip("this loss is always reduced")
    tensors, keywords = draw(case, shape, torch.float32, device)
    keywords["reduction"] = "none"
    call = getattr(oracle, case.loss)
    g = torch.rand_like(call(*tensors, **keywords), dtype=torch.float32) + 0.5
    g = relayout(g, upstream) if upstream != "expanded" else g.flatten()[0].expand_as(g)
    _, _, gradients = oracle.value_and_gradients(case.ours, tensors, keywords, case.differentiable, g)
    _, _, expected = oracle.exact(call, tensors, keywords, case.differentiable, g)
    for actual, e in zip(gradients, expected, strict=True):
        oracle.assert_close(actual, e)


@pytest.mark.parametrize("case", [c for c in testing.CASES if c.differentiable == 2], ids=lambda c: c.name)
@pytest.mark.parametrize("wanted", [0, 1], ids=["input", "target"])
def test_one_gradient_alone(case, wanted, device):
    """A gradient that nobody asked for is not computed, and leaves the other as it was."""
    tensors, keywords = draw(case, (5, 33), torch.float32, device)
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    actual, *_ = torch.autograd.grad(case.ours(*leaves, **keywords), leaves[wanted])
    expected, *_ = torch.autograd.grad(getattr(oracle, case.loss)(*leaves, **keywords), leaves[wanted])
    oracle.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("result", "dtype"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_result_dtype_that_was_asked_for(case, reduction, result, dtype, device):
    if reduction not in case.reductions:
        pytest.skip("this loss is always reduced")
    tensors, keywords = draw(case, (5, 33), dtype, device)
    keywords["reduction"] = reduction
    loss, upstream, gradients = oracle.value_and_gradients(
        lambda *t, **k: case.ours(*t, **k, dtype=result), tensors, keywords, case.differentiable
    )
    expected, _, expected_gradients = oracle.exact(
        getattr(oracle, case.loss), tensors, keywords, case.differentiable, upstream
    )
    assert loss.dtype is result
    oracle.assert_close(loss, expected)
    for actual, e in zip(gradients, expected_gradients, strict=True):
        oracle.assert_close(actual, e)


@pytest.mark.parametrize(("case", "reduction"), all_cases())
def test_launches(case, reduction, device):
    """One kernel forward and one backward, and one more where partial sums are added up."""
    tensors, keywords = draw(case, (5, 33), torch.float32, device)
    keywords["reduction"] = reduction
    with torch.no_grad():
        forward = compiled.launches(lambda: case.ours(*tensors, **keywords))
    both = compiled.launches(
        lambda: oracle.value_and_gradients(case.ours, tensors, keywords, case.differentiable)
    )
    assert len(forward) == (1 if reduction == "none" else 2)
    assert len(both) == len(forward) + 1


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_inputs_are_read_in_place(case, layout, device):
    """No launch is handed a copy of an argument: what the kernel reads is the caller's memory."""
    tensors, keywords = draw(case, (5, 33), torch.float32, device, layout)
    recorded = compiled.launches(lambda: case.ours(*tensors, **keywords))
    read = {t.untyped_storage().data_ptr() for launch in recorded for t in launch.tensors if t is not None}
    assert all(t.untyped_storage().data_ptr() in read for t in tensors)


def test_conversion_to_bfloat16_rounds_to_nearest_even(device):
    """What a kernel stores is what torch rounds to, ties and subnormal numbers among them."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x00008000, 0x00018000],
                        dtype=torch.int32, device=device)  # fmt: skip
    x = bits.view(torch.float32).repeat(3)
    log_p = torch.zeros_like(x)
    stored = fusedloss.binary_cross_entropy_with_logits(
        torch.full_like(x, -200.0), -x / 200.0, reduction="none", dtype=torch.bfloat16
    )
    exact = fusedloss.binary_cross_entropy_with_logits(
        torch.full_like(x, -200.0), -x / 200.0, reduction="none"
    )
    assert torch.equal(stored, exact.to(torch.bfloat16)) and not log_p.any()
