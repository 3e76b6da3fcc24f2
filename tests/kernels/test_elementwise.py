"""The walk over elements: operands that are broadcast, sliced or transposed against others, without copies."""

import itertools

import pytest
import torch

import fusedloss
from fusedloss import compiled

from .. import oracle

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fusedloss.kernels import elementwise  # noqa: E402
from fusedloss.kernels.elementwise import APART, FLAT, RUNS, SAME, walk  # noqa: E402
from fusedloss.kernels.launch import launch  # noqa: E402


@pytest.fixture(autouse=True)
def kernels():
    with fusedloss.use("triton"):
        yield


# rows shorter than a run, of whole runs, and not; several row ends in a tile; rows longer than a program;
# a class dimension in the middle
SHAPES = [(9, 3), (65, 16), (200, 13), (7, 1000), (2, 17003), (2, 16384), (2, 5, 24), (3, 4, 5), (2, 3, 4, 5)]
VIEWS = {
    "plain": lambda make, shape: make(shape),
    "sliced": lambda make, shape: make((*shape[:-1], shape[-1] + 5))[..., 3:-2],
    "in runs": lambda make, shape: make((*shape[:-1], shape[-1] + 8))[..., :-8],
    "every second": lambda make, shape: make((*shape[:-1], 2 * shape[-1]))[..., ::2],
    "transposed": lambda make, shape: make(shape[::-1]).permute(*reversed(range(len(shape)))),
    "one for all": lambda make, shape: make((1, *shape[1:])).expand(shape),
    "misaligned": lambda make, shape: make((make(shape).numel() + 1,))[1:].view(shape),
}
WEIGHTS = {
    "none": lambda shape: {},
    "class": lambda shape: dict(pos_weight=torch.rand(shape[1], *[1] * (len(shape) - 2)) + 0.5),
    "sample": lambda shape: dict(weight=torch.rand(shape[0], *[1] * (len(shape) - 1))),
    "last and all": lambda shape: dict(weight=torch.rand(shape[-1]), pos_weight=torch.rand(1) + 0.5),
    "positions": lambda shape: dict(weight=torch.rand(1, *shape[1:]), pos_weight=torch.rand(shape)),
}


def grid():
    """Each view of the input with each of the target, by turns with the shapes, weights, dtypes and reductions."""
    for k, (x, t) in enumerate(itertools.product(VIEWS, VIEWS)):
        for j in range(3):
            shape = SHAPES[(k + 3 * j) % len(SHAPES)]
            weights = list(WEIGHTS)[(k + j) % len(WEIGHTS)]
            way = ("none", torch.float32) if (k + j) % 2 else ("mean", torch.bfloat16)
            yield pytest.param(x, t, shape, weights, *way, id=f"{x}-{t}-{shape}-{weights}-{way[0]}")


@pytest.mark.parametrize(("x", "t", "shape", "weights", "reduction", "dtype"), list(grid()))
def test_layouts_against_each_other(x, t, shape, weights, reduction, dtype, device):
    torch.manual_seed(0)
    tensors = [VIEWS[x](torch.randn, shape).to(device, dtype), VIEWS[t](torch.rand, shape).to(device, dtype)]
    tensors = [torch.empty_strided(v.shape, v.stride(), dtype=dtype, device=device).copy_(v)
               if 0 not in v.stride() else v for v in tensors]  # fmt: skip
    keywords = {k: v.to(device, dtype) for k, v in WEIGHTS[weights](shape).items()} | dict(reduction=reduction)
    call = lambda *a, **k: fusedloss.binary_cross_entropy_with_logits(*a, **k)
    loss, upstream, gradients = oracle.value_and_gradients(call, tensors, keywords, 2)
    exact = oracle.exact(oracle.binary_cross_entropy_with_logits, tensors, keywords, 2, upstream)
    oracle.assert_close(loss, exact[0])
    for gradient, expected in zip(gradients, exact[2], strict=True):
        oracle.assert_close(gradient, expected)


@pytest.mark.parametrize("shape", [(64, 13), (4, 6, 7, 5)])
@pytest.mark.parametrize("weights", ["class", "sample", "last and all"])
def test_no_operand_is_copied(shape, weights, device):
    """One forward kernel that reads the caller's memory, and a second for the sum: no pass for weights."""
    x, t = torch.randn(shape, device=device), torch.rand(shape, device=device)
    keywords = {k: v.to(device) for k, v in WEIGHTS[weights](shape).items()}
    recorded = compiled.launches(lambda: fusedloss.binary_cross_entropy_with_logits(x, t, **keywords))
    assert len(recorded) == 2
    read = {v.untyped_storage().data_ptr() for v in recorded[0].tensors if v is not None}
    assert {v.untyped_storage().data_ptr() for v in (x, t, *keywords.values())} <= read


def test_modes():
    """What lies together is read in 16 bytes, whatever is broadcast against it; a row that is a multiple of a run
    leaves whole runs."""
    x, y = torch.zeros(4, 24), torch.zeros(4, 25)
    FLATS, WHOLE, APARTS, SAMES = FLAT.value, RUNS.value + 4, APART.value + 4, SAME.value + 4
    for tensors, wide, modes in [
        ((x, x), True, [FLATS, FLATS]),
        ((x, x[0].expand(4, 24)), True, [FLATS, WHOLE]),
        ((x, x[:, :1].expand(4, 24)), True, [FLATS, SAMES]),
        ((x, x[:1, :1].expand(4, 24)), True, [FLATS, SAME.value]),
        ((y, y[0].expand(4, 25)), True, [FLATS, APARTS]),
        ((y, y[:, :1].expand(4, 25)), True, [FLATS, APARTS]),
        ((y[:, 1:], y[:, 1:]), False, [APARTS, APARTS]),
        ((torch.zeros(4, 24, 8)[..., 0], x), True, [APART.value, FLATS]),
        ((torch.zeros(101)[1:].view(4, 25), y), True, [APART.value, FLATS]),
        ((x[:, :3], torch.zeros(4, 3)), False, [APARTS, FLATS]),  # rows shorter than a run
        ((torch.zeros(4, 27)[:, :24], x), True, [APARTS, FLATS]),  # of whole runs, off 16 bytes
    ]:
        to = walk(*tensors)
        assert (to.wide, to.modes) == (wide, modes)
    deep = walk(torch.zeros(2, 3, 8), torch.zeros(3, 1).expand(2, 3, 8))
    assert deep.sizes == (2, 3, 8) and deep.modes == [FLAT.value, SAME.value + 8]


def test_tiles_lie_a_gap_apart_where_weights_repeat():
    """Whole rows of them, in runs: a program's tiles have the same weights. The layout decides, not the size."""
    x, weights = torch.zeros(40, 1001), torch.zeros(1001)
    assert walk(x, weights.expand(40, 1001), held=1).gap == 40 * 1001
    assert walk(x, weights.expand(40, 1001)).gap == walk(x, torch.zeros(40, 1001), held=1).gap == 0
    assert walk(x, torch.zeros(40, 1).expand(40, 1001), held=1).gap == 0
    assert walk(torch.zeros(40, 1002)[:, 1:], weights.expand(40, 1001), held=1).gap == 0
    askew = torch.zeros(40 * 1001 + 1)[1:].view(40, 1001)  # neither flat nor repeated
    assert walk(x, askew, weights.expand(40, 1001), held=2).gap == 0
    assert walk(torch.zeros(7, 3, 5, 5), torch.zeros(3, 1, 1).expand(7, 3, 5, 5), held=1).gap == 75 * 8
    for rows in (1, 3, 4096, 100_000):
        to = walk(torch.empty(rows, 1001), weights.expand(rows, 1001), held=1)
        assert (to.gap > 0) == (rows > 1) and to.gap % (4 * 1001) == 0
        assert (to.trips - 1) * to.gap < rows * 1001 and to.programs * to.block >= min(to.gap or 1001, rows * 1001)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("shape", "dtype"), [
    ((300, 77), torch.bfloat16), ((40, 1000), torch.float32),
    ((9, 5, 20, 24), torch.bfloat16), ((4000, 3), torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("weights", [["pos_weight"], ["weight", "pos_weight"], ["weight"]], ids="+".join)
def test_weights_that_a_program_reads_once(weights, shape, dtype, reduction, monkeypatch, device):
    """Several tiles a program, the last program's in part, and the last of each."""
    monkeypatch.setattr(elementwise, "FILL", 1)
    torch.manual_seed(0)
    loss = "binary_cross_entropy_with_logits" if "pos_weight" in weights else "binary_cross_entropy"
    make = torch.rand if loss == "binary_cross_entropy" else torch.randn
    tensors = [make(shape, device=device).to(dtype), torch.rand(shape, device=device).to(dtype)]
    per_class = (shape[1], *[1] * (len(shape) - 2))
    keywords = {k: (torch.rand(per_class, device=device) + 0.5).to(dtype) for k in weights} | dict(reduction=reduction)
    call = getattr(fusedloss, loss)
    recorded = compiled.launches(lambda: oracle.value_and_gradients(call, tensors, keywords, 1))
    held = [v for v in recorded if v.constants.get("HELD")]
    assert len(held) == 2 and min(v.scalars["trips"] for v in held) > 4
    loss_, upstream, gradients = oracle.value_and_gradients(call, tensors, keywords, 1)
    exact = oracle.exact(getattr(oracle, loss), tensors, keywords, 1, upstream)
    oracle.assert_close(loss_, exact[0])
    oracle.assert_close(gradients[0], exact[2][0])


@triton.jit
def ends_kernel(out_ptr, n, rows, cols, per_row, per_col, trips, BLOCK: tl.constexpr):
    period = (rows, cols, per_row, per_col)
    plan = elementwise.tiles_of(n, trips, period, BLOCK, 2)
    for i in range(trips):
        at = elementwise.tile_at(i, plan, period, BLOCK)
        place = at[1] + tl.arange(0, BLOCK)
        row_end = elementwise.row_ends(place, at, 8)
        outer_end = elementwise.ends(row_end, plan[7], rows, per_row)
        to = out_ptr + at[0] + tl.arange(0, BLOCK)
        tl.store(to, plan[4] + row_end)
        tl.store(to + n, plan[5] + outer_end)


@pytest.mark.parametrize("cols", [2, 3, 7, 13, 127, 1000, 9973, 16383, 16384, 16385, 50257, 2**31 + 1])
@pytest.mark.parametrize("rows", [2, 3, 1000, 40000])
def test_ends_of_rows(rows, cols, device):
    """Multiplying by a reciprocal is exact as far as a program goes; longer rows end once at most."""
    block, trips, programs = 1024, elementwise.MAX_SHARE // 1024, 4
    n = block * trips * programs
    out = torch.zeros(2 * n, dtype=torch.int64, device=device)
    per_row, per_col = (2**31 // size + 1 for size in (rows, cols))
    launch(ends_kernel, (programs,), out, num_warps=4, constants=dict(BLOCK=block),
           scalars=dict(n=n, rows=rows, cols=cols, per_row=per_row, per_col=per_col, trips=trips))  # fmt: skip
    i = torch.arange(n, device=device)
    assert torch.equal(out[:n], i // cols)
    assert torch.equal(out[n:], i // cols // rows)
