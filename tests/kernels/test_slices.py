"""Rows of a slice: they are read and written 16 bytes at a time, wherever it begins."""

import pytest
import torch

from fusedloss import compiled, cross_entropy, testing

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fusedloss.kernels.layout import empty_rows  # noqa: E402
from fusedloss.kernels.rowwise import schedule  # noqa: E402

from .checking import check  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:reduction:UserWarning")

COLS = 1029  # every row begins elsewhere between multiples of 16 bytes
SLICES = {  # (shape it is cut from, slice)
    "rows from the second": ((4, COLS), lambda t: t[1:]),
    "tokens but the last": ((2, 3, COLS), lambda t: t[:, :-1].transpose(1, -1)),
    "tokens but the first": ((2, 3, COLS), lambda t: t[:, 1:].transpose(1, -1)),
    "classes of more": ((3, COLS + 5), lambda t: t[:, 3:-2]),
}
NAMES = ("cross_entropy/index", "cross_entropy/label_smoothing", "cross_entropy/grad_in_forward",
         "cross_entropy/probabilities", "kl_div_with_logits/plain", "kl_div_with_logits/grad_in_forward",
         "entropy_with_logits/plain")  # fmt: skip


def sliced(like, name):
    """A slice that holds what `like`, which has its shape, holds."""
    shape, cut = SLICES[name]
    return cut(torch.full(shape, 7, dtype=like.dtype)).copy_(like)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("case", [testing.case(n) for n in NAMES], ids=lambda case: case.name)
def test_slices_keep_wide_accesses(case, name, dtype):
    shape, cut = SLICES[name]
    rows = cut(torch.empty(shape)).shape
    if len(rows) > 2 and case.loss != "cross_entropy":
        rows = rows[::2] + rows[1:2]  # their classes are the last dimension
    tensors, keywords = case.make_inputs(rows, dtype, "cpu")
    if len(rows) > 2 and case.loss != "cross_entropy":
        tensors = tuple(sliced(t.transpose(1, -1), name).transpose(1, -1) for t in tensors)
    else:
        tensors = tuple(sliced(t, name) if t.shape == tensors[0].shape else t for t in tensors)
    assert any(s % 8 for s in (tensors[0].storage_offset(), *tensors[0].stride()))
    launches = compiled.launches(lambda: testing.forward_backward(case, (tensors, keywords)))
    walked = [launch.constants["HINT"] for launch in launches if "HINT" in launch.constants]
    assert walked and set(walked) == {16 // dtype.itemsize}
    check(case, tensors, keywords, dtype)


@triton.jit
def bounds_kernel(out_ptr, x_ptr, at, n_cols, V: tl.constexpr):
    label = tl.full([], -1, tl.int32)
    plan = schedule(x_ptr + at, n_cols, label, label < 0, 1, 2, 2, 32, V, V)
    tl.store(out_ptr, plan[0])
    tl.store(out_ptr + 1, plan[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_blocks_begin_at_16_bytes_wherever_the_memory_does(dtype):
    """The interpreter would read them anywhere, where a GPU stops."""
    whole, v = torch.zeros(4000, dtype=dtype), 16 // dtype.itemsize
    for offset in range(9):
        for at in (0, 1, COLS, 2 * COLS):
            x, out = whole[offset:], torch.zeros(2, dtype=torch.int32)
            bounds_kernel[(1,)](out, x, at, COLS, v)
            first, end = out.tolist()
            assert 0 <= first < v and (x[at:].data_ptr() + first * dtype.itemsize) % 16 == 0
            assert COLS - v < end <= COLS and (end - first) % v == 0


def test_a_gradients_rows_lie_as_the_logits_do():
    for shape, cut in SLICES.values():
        x = cut(torch.empty(shape, dtype=torch.bfloat16))
        dim = x.stride().index(1)
        made = empty_rows(x, dim)
        assert made.shape == x.shape and made.stride(dim) == 1
        for d in range(x.dim()):
            last = [0] * x.dim()
            last[d] = x.size(d) - 1
            behind = [t[tuple(last)].data_ptr() % 16 for t in (x, made)]
            assert behind[0] == behind[1]
        assert made.untyped_storage().nbytes() < 2 * x.numel() + 16 * (1 + x.numel() // COLS)
        places = sum(torch.arange(n).view([-1 if k == d else 1 for k in range(x.dim())]) * s
                     for d, (n, s) in enumerate(zip(made.shape, made.stride(), strict=True)))  # fmt: skip
        assert places.unique().numel() == x.numel(), "two elements in one place"
    plain = torch.empty(4, COLS)
    assert empty_rows(plain, 1).stride() == plain.stride() and empty_rows(plain, 1).storage_offset() == 0


def test_a_compiler_expects_the_gradient_where_it_is_made():
    """The fake implementation places it as the kernels' caller does."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, dloss, saved = torch.empty(2, 5, COLS)[:, 1:].flatten(1)[:, 2:1031], torch.empty(()), torch.empty(6)
    labels = torch.zeros(2, dtype=torch.long)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (dloss, x, labels, saved)]
        operator = torch.ops.fusedloss.cross_entropy_backward
        found, _ = operator(*fakes[:3], None, fakes[3], -100, 0.0, 0.0, 0.0, 1, False)
    made = empty_rows(x, 1)
    assert (found.shape, found.stride(), found.storage_offset()) == (x.shape, made.stride(), made.storage_offset())
    assert made.storage_offset() == x.storage_offset() % 4 != 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_slice_in_a_compiled_graph(dynamic):
    def shifted(x, labels, cross_entropy):
        return cross_entropy((x * 1.5)[:, :-1].transpose(1, 2), labels)

    torch._dynamo.reset()
    graph = torch.compile(shifted, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for tokens in (4, 6):
        x, labels = torch.randn(2, tokens, COLS, requires_grad=True), torch.randint(0, COLS, (2, tokens - 1))
        loss, expected = graph(x, labels, cross_entropy), shifted(x, labels, torch.nn.functional.cross_entropy)
        torch.testing.assert_close(loss, expected)
        for one, other in zip(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x), strict=True):
            torch.testing.assert_close(one, other)
