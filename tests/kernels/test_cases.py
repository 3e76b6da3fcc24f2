"""Every shared case on the kernels: values and gradients against float64, in every dtype, reduction, shape
and layout."""

import math

import pytest
import torch

import fusedloss
from fusedloss import compiled, testing

from .. import oracle
from .checking import DTYPES, check, draw, relayout

pytest.importorskip("triton")
from fusedloss.kernels import elementwise


@pytest.fixture(autouse=True)
def kernels():
    with fusedloss.use("triton"):
        yield


def cases():
    return [
        pytest.param(case, reduction, id=f"{case.name}-{reduction}")
        for case in testing.CASES
        for reduction in case.reductions
    ]


FROM_LOGITS = [c for c in testing.CASES if c.loss in ("cross_entropy", "kl_div_with_logits", "entropy_with_logits")
               and not c.name.endswith("/grad_in_forward")]  # fmt: skip


def shape_grid():
    """Every case in every shape, unreduced in float32 and reduced in bfloat16, and every other way once."""
    for case in testing.CASES:
        first, last = case.reductions[0], "batchmean" if "batchmean" in case.reductions else "mean"
        for shape in SHAPES:
            ways = [(first, "float32"), (last, "bfloat16")]
            if shape == LONG:
                ways += [(first, "bfloat16"), (first, "float16"), (last, "float32")]
            for reduction, dtype in ways:
                yield pytest.param(case, shape, reduction, DTYPES[dtype],
                                   id=f"{case.name}-{shape}-{reduction}-{dtype}")  # fmt: skip


def layout_grid():
    """Every case in every layout, by turns unreduced in float32 and reduced in bfloat16."""
    for c, case in enumerate(testing.CASES):
        first, last = case.reductions[0], "batchmean" if "batchmean" in case.reductions else "mean"
        for k, (shape, layout) in enumerate(LAYOUTS):
            reduction, dtype = ((first, "float32"), (last, "bfloat16"))[(c + k) % 2]
            yield pytest.param(case, shape, layout, reduction, DTYPES[dtype],
                               id=f"{case.name}-{shape}-{layout}-{reduction}-{dtype}")  # fmt: skip


LONG = (2, 4103)
SHAPES = [
    (1, 2),  # the smallest softmax
    (70, 10),  # rows of up to 28 classes: two tiles of 32 rows, and six more
    (33, 100),  # rows of up to 128, and some longer ones: a tile of 32 rows or four of 8, and one more
    (3, 300),  # in several parts
    (3, 1000),  # an aligned row a warp
    LONG,  # a row a program: whole blocks, a tail, and the second row's unaligned head
]
LAYOUTS = [
    ((3, 37, 5), "plain"),  # (N, C, d): classes lie apart, positions are next to each other
    ((2, 6, 300), "plain"),  # the same with many positions: several tiles, the last not full
    ((1, 258, 257), "plain"),  # and with so many classes that several threads share a row's: a tile of up to 256 more
    ((2, 3, 4, 5), "plain"),  # two dimensions of positions walked as one
    ((5, 258), "transposed"),  # many classes that lie apart, rows are next to each other
    ((5, 40), "sliced"),  # rows begin off a multiple of 16 bytes, and are not next to each other
    ((2, 1029), "sliced"),  # the same in long rows, whose head and tail then differ
    ((2, 1500), "misaligned"),  # the input alone begins off a multiple of 16 bytes
    ((5, 33), "expanded"),  # one target for all rows: stride 0
    ((3, 600), "strided"),  # every second element
    ((3, 4, 5), "transposed"),  # positions and rows in the order of memory that no single walk covers
]


@pytest.mark.parametrize(("case", "shape", "reduction", "dtype"), list(shape_grid()))
def test_shape(case, shape, reduction, dtype, device):
    tensors, keywords = draw(case, shape, dtype, device)
    check(case, tensors, {**keywords, "reduction": reduction}, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("case", "reduction"), cases())
def test_reduction(case, reduction, dtype, device):
    tensors, keywords = draw(case, (5, 33), dtype, device)
    check(case, tensors, {**keywords, "reduction": reduction}, dtype)


@pytest.mark.parametrize(("case", "shape", "layout", "reduction", "dtype"), list(layout_grid()))
def test_layout(case, shape, layout, reduction, dtype, device):
    tensors, keywords = draw(case, shape, dtype, device, layout)
    check(case, tensors, {**keywords, "reduction": reduction}, dtype)


@pytest.mark.parametrize(
    ("dtype", "cols"),
    [
        (torch.float32, 17_000),  # several whole blocks in a program, and in backward two programs a row
        (torch.bfloat16, 33_001),  # the same for the blocks that half precision has
    ],
    ids=str,
)
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_long_row(case, dtype, cols, device):
    tensors, keywords = draw(case, (1, cols), dtype, device)
    check(case, tensors, keywords, dtype)


SPLIT = [(c, torch.float32, 57_353) for c in FROM_LOGITS if c.loss != "entropy_with_logits"] + [
    (c, torch.bfloat16, 114_688) for c in FROM_LOGITS if c.name.endswith(("/index", "/plain", "+label_smoothing"))
]


@pytest.mark.parametrize(("case", "dtype", "cols"), SPLIT, ids=lambda v: getattr(v, "name", None))
def test_rows_that_several_programs_read_in_forward(case, dtype, cols, device):
    """Where the loss is reduced: its second launch joins what they found, of ignored rows too."""
    tensors, keywords = draw(case, (2, cols), dtype, device)
    keywords["reduction"] = case.reductions[-1]
    if len(tensors) > 1 and not tensors[1].is_floating_point():
        tensors[1][:] = torch.tensor([7, cols - 2])
        keywords["ignore_index"] = 7
    launches = compiled.launches(lambda: case.ours(*tensors, **keywords))
    assert len(launches) == 2 and launches[0].grid[:2] == (2, launches[1].scalars["splits"])
    assert launches[1].scalars["splits"] > 1
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
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_layout_of_the_upstream_gradient(case, upstream, device):
    """A sum's gradient is expanded from one number; a view's is a view."""
    if "none" not in case.reductions:
        pytest.skip("this loss is always reduced")
    tensors, keywords = draw(case, (3, 5, 7), torch.float32, device)
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
    ("result", "dtype", "way"),
    [(torch.float32, torch.bfloat16, 0), (torch.float32, torch.float16, 1), (torch.bfloat16, torch.float32, 1)],
    ids=str,
)
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_result_dtype_that_was_asked_for(case, result, dtype, way, device):
    tensors, keywords = draw(case, (5, 33), dtype, device)
    keywords["reduction"] = case.reductions[way]
    loss, upstream, gradients = oracle.value_and_gradients(
        lambda *t, **k: case.ours(*t, **k, dtype=result), tensors, keywords, case.differentiable
    )
    expected, _, expected_gradients = oracle.exact(
        getattr(oracle, case.loss), tensors, keywords, case.differentiable, upstream
    )
    assert loss.dtype is result
    oracle.assert_close(loss, expected, oracle.factor(case))
    for actual, e in zip(gradients, expected_gradients, strict=True):
        oracle.assert_close(actual, e, oracle.factor(case))


@pytest.mark.parametrize(("case", "reduction"), cases())
def test_launches(case, reduction, device):
    """One kernel forward and one backward, and one more where partial sums are added up; another where a mean's
    gradient is computed in forward, and labels have to be counted first."""
    tensors, keywords = draw(case, (5, 33), torch.float32, device)
    keywords["reduction"] = reduction
    with torch.no_grad():
        forward = compiled.launches(lambda: case.ours(*tensors, **keywords))
    both = compiled.launches(
        lambda: oracle.value_and_gradients(case.ours, tensors, keywords, case.differentiable)
    )
    assert len(forward) == (1 if reduction == "none" else 2)
    counted = case.name == "cross_entropy/grad_in_forward" and reduction == "mean"
    assert len(both) == len(forward) + 1 + counted


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "strided"])
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
def test_inputs_are_read_in_place(case, layout, device):
    """No launch is handed a copy of an argument: what the kernel reads is the caller's memory."""
    tensors, keywords = draw(case, (5, 33), torch.float32, device, layout)
    recorded = compiled.launches(lambda: case.ours(*tensors, **keywords))
    read = {t.untyped_storage().data_ptr() for launch in recorded for t in launch.tensors if t is not None}
    assert all(t.untyped_storage().data_ptr() in read for t in tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_rounds_to_nearest_even(dtype, device):
    """What a kernel stores is what torch rounds to, in ties as well: -log p of p = exp(-x) is x, bit by bit."""
    step = torch.finfo(dtype).eps / 4
    x = -(1 + step * torch.arange(64, device=device))
    zero = torch.zeros(64, dtype=torch.int64, device=device)
    stored = fusedloss.nll_loss(x.unsqueeze(1), zero, reduction="none", dtype=dtype)
    assert torch.equal(stored, (-x).to(dtype))


@pytest.mark.parametrize("grad_in_forward", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
def test_many_tiles_of_zeros(sliced, grad_in_forward, monkeypatch, device):
    """BCE multiplies 1 + exp(-|x|) along a lane: of zero logits, as zero-initialised heads give them, 2 an element.
    With one program for all, as for tensors of some million elements, the products are at their longest."""
    monkeypatch.setattr(elementwise, "FILL", 1)
    x = torch.zeros(2, 20010, dtype=torch.bfloat16, device=device)
    x = (x[:, 3:-7] if sliced else x).requires_grad_(grad_in_forward)
    with fusedloss.use("triton"):
        loss = fusedloss.binary_cross_entropy_with_logits(
            x, torch.zeros_like(x), grad_in_forward=grad_in_forward, dtype=torch.float32
        )
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
