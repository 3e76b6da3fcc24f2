"""Inputs that broke fused losses elsewhere, one test each, on the kernels and (where it is theirs to answer)
on the reference; then the promises that hold for every call."""

import pytest
import torch

import fusedloss
from fusedloss import compiled, testing

from .. import oracle
from .checking import check, draw

triton = pytest.importorskip("triton")
from fusedloss.kernels.launch import launch  # noqa: E402

INFINITY = float("inf")
CASES = pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
HALF_AND_SINGLE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
KERNELS = pytest.mark.parametrize("path", ["triton"], indirect=True)  # what only they promise


@pytest.fixture(params=["triton", "reference"], autouse=True)
def path(request):
    with fusedloss.use(request.param):
        yield request.param


def normal(*shape, dtype=torch.float32, device="cpu"):
    return (3 * torch.randn(shape, device=device)).to(dtype)


def labels(rows, classes, device):
    return torch.randint(classes, (rows,), device=device)


def compare(name, tensors, differentiable=1, factor=1.0, absolute=0.0, **keywords):
    """fusedloss's `name` against the oracle's; returns the loss and the gradients. The reference is torch's own
    function in most places, and then rounds half precision as often as torch does."""
    ours, exact = getattr(fusedloss, name), getattr(oracle, name)
    coarsest = max(torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point())
    torchs = coarsest > 1e-6 and fusedloss.path(tensors[0]) == "reference"
    loss, upstream, gradients = oracle.value_and_gradients(ours, tensors, keywords, differentiable)
    expected, _, expected_gradients = oracle.exact(exact, tensors, keywords, differentiable, upstream)
    for actual, e in zip([loss, *gradients], [expected, *expected_gradients], strict=True):
        more = 2 * coarsest * (oracle.scale_of(e) + e.abs().cpu()) if torchs else 0.0
        oracle.assert_close(actual, e, factor, absolute + more)
    return loss, gradients


def gradient(loss, x):
    (dx,) = torch.autograd.grad(loss, x)
    return dx


@pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("place", [0, 299])
def test_images_of_many_classes_are_smoothed_as_torch_does(value, place, device):
    """Where one logit, not the label's, is not finite."""
    x, y = normal(1, 300, 3, device=device), torch.full((1, 3), 7, device=device)
    x[0, place, 1] = value
    loss = fusedloss.cross_entropy(x, y, label_smoothing=0.1, reduction="none")
    expected = torch.nn.functional.cross_entropy(x, y, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert loss.isfinite().tolist() == [[True, False, True]]


# (columns, how many of the first are -inf): inside a tile, and more than the first block of a long row
FIRST_TILE = pytest.mark.parametrize(("cols", "masked"), [(100, 60), (300, 260), (1000, 300), (9001, 8200)])


@FIRST_TILE
@HALF_AND_SINGLE
def test_first_tile_all_minus_infinity(cols, masked, dtype, device):
    x = normal(2, cols, dtype=dtype, device=device)
    x[:, :masked] = -INFINITY
    y = torch.tensor([masked, cols - 1], device=device)
    _, (dx,) = compare("cross_entropy", (x, y), reduction="none")
    assert not dx[:, :masked].any()


@FIRST_TILE
@pytest.mark.parametrize("name", ["entropy_with_logits", "kl_div_with_logits"])
def test_classes_at_minus_infinity_might_as_well_not_be_there(name, cols, masked, device):
    tensors = [normal(2, cols, device=device) for _ in range(1 + (name == "kl_div_with_logits"))]
    few = [t[:, masked:].contiguous() for t in tensors]
    for t in tensors:
        t[:, :masked] = -INFINITY
    call = getattr(fusedloss, name)
    loss, upstream, gradients = oracle.value_and_gradients(call, tensors, dict(reduction="sum"), 2)
    expected, _, expected_gradients = oracle.exact(
        getattr(oracle, name), few, dict(reduction="sum"), 2, upstream
    )
    oracle.assert_close(loss, expected)
    for actual, e in zip(gradients, expected_gradients, strict=True):
        assert not actual[:, :masked].any()
        oracle.assert_close(actual[:, masked:], e, factor=4.0)


@pytest.mark.parametrize("at", [0, 7, 4098], ids=str)
@HALF_AND_SINGLE
def test_one_logit_minus_infinity(at, dtype, device):
    x = normal(2, 4099, dtype=dtype, device=device)
    x[:, at] = -INFINITY
    compare("cross_entropy", (x, torch.tensor([5, 4000], device=device)), reduction="none")


def test_label_at_minus_infinity(device):
    """Its loss is infinite and its gradient finite, as in torch."""
    x = normal(3, 50, device=device)
    x[1, 4] = -INFINITY
    loss, (dx,) = compare("cross_entropy", (x, torch.tensor([0, 4, 4], device=device)), reduction="none")
    assert loss[1] == INFINITY and dx.isfinite().all()


@pytest.mark.parametrize("value", [INFINITY, float("nan")], ids=str)
@pytest.mark.parametrize("at", [0, 30, 4099], ids=str)
def test_a_row_with_infinity_or_nan_gives_nan_and_no_other(value, at, device):
    x = normal(3, 4100, device=device)
    x[1, at] = value
    x.requires_grad_()
    loss = fusedloss.cross_entropy(x, torch.tensor([1, 2, 3], device=device), reduction="none")
    dx = gradient(loss.sum(), x)
    assert loss[1].isnan() and dx[1, 2].isnan()
    assert loss[[0, 2]].isfinite().all() and dx[[0, 2]].isfinite().all()


@pytest.mark.parametrize("offset", [-1000.0, -1e4, 1e4], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "kl_div_with_logits", "entropy_with_logits"])
def test_all_logits_far_from_zero(name, offset, path, device):
    """Beyond 88 float32 has neither exp(x) nor exp(-x); the offset must cost no accuracy either."""
    if path == "triton" and device.type == "cpu" and triton.__version__.startswith("3.7."):
        pytest.skip("the interpreter of this Triton rounds a fused multiply-add twice")
    x = normal(4, 300, device=device) + offset
    other = {"cross_entropy": (labels(4, 300, device),), "kl_div_with_logits": (normal(4, 300, device=device),)}
    # torch's log_softmax, the reference, rounds x - lse to float32
    factor = 1.0 if path == "triton" else 100.0
    compare(name, (x, *other.get(name, ())), reduction="sum", factor=factor)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weight"])
@pytest.mark.parametrize(
    ("name", "more"),
    [("cross_entropy", {}), ("cross_entropy", dict(label_smoothing=0.1)), ("cross_entropy", dict(z_loss=0.1)),
     ("nll_loss", {})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cols", [10, 2000])
def test_all_rows_ignored(name, more, weighted, cols, device):
    x = normal(4, cols, device=device)
    y = torch.full((4,), -100, device=device)
    if weighted:
        more = {**more, "weight": torch.rand(cols, device=device)}
    for reduction, value in (("none", 0.0), ("sum", 0.0), ("mean", float("nan"))):
        leaf = x.clone().requires_grad_()
        loss = getattr(fusedloss, name)(leaf, y, reduction=reduction, **more)
        torch.testing.assert_close(loss, torch.full_like(loss, value), equal_nan=True, rtol=0, atol=0)
        assert not gradient(loss.sum(), leaf).any()


@CASES
def test_empty_batch(case, device):
    tensors, keywords = draw(case, (0, 7), torch.float32, device)
    for reduction in case.reductions:
        loss, _, gradients = oracle.value_and_gradients(
            case.ours, tensors, {**keywords, "reduction": reduction}, case.differentiable
        )
        theirs = case.torch_equivalent(*tensors, **{**keywords, "reduction": reduction})
        torch.testing.assert_close(loss, theirs, equal_nan=True)
        assert all(g.shape == t.shape for g, t in zip(gradients, tensors, strict=False))


@pytest.mark.parametrize("bad", [-1, "V", -(2**40), 2**32 + 1], ids=str)
@pytest.mark.parametrize("cols", [7, 64, 300, 1000, 4099])
@pytest.mark.parametrize(
    ("name", "more"),
    [("cross_entropy", {}), ("cross_entropy", dict(label_smoothing=0.1, weight=True)), ("nll_loss", {}),
     ("nll_loss", dict(weight=True))],
    ids=str,
)  # fmt: skip
def test_label_out_of_range(name, more, cols, bad, path, device):
    """IndexError on the reference, as in torch; NaN for the row on the kernels, which touch nothing outside."""
    bad = cols if bad == "V" else bad
    x = normal(3, cols, device=device).requires_grad_()
    y = torch.tensor([0, bad, 1], device=device)
    more = {k: torch.rand(cols, device=device) if k == "weight" else v for k, v in more.items()}
    call = getattr(fusedloss, name)
    if path == "reference":
        if device.type == "cpu":
            with pytest.raises(IndexError):
                call(x, y, **more)
        return
    loss = call(x, y, reduction="none", **more)
    dx = gradient(loss.sum(), x)
    assert loss[1].isnan() and dx[1].isnan().all()
    good = torch.tensor([0, 2], device=device)
    alone = x.detach()[good].requires_grad_()
    expected = getattr(oracle, name)(alone, y[good], reduction="none", **more)
    oracle.assert_close(loss[good], expected)
    oracle.assert_close(dx[good], gradient(expected.sum(), alone))
    assert call(x, y, **more).isnan()


@pytest.mark.parametrize("shape", [(1, 32769), (2049, 32), (1000, 10)], ids=str)
def test_sizes_one_beyond_a_power_of_two(shape, device):
    """2^15 + 1 classes; 2^11 + 1 rows; a thousand small rows."""
    compare("cross_entropy", (normal(*shape, device=device), labels(*shape, device)))


def test_a_million_small_rows(path, device):
    if device.type == "cpu" and path == "triton":
        pytest.skip("too slow for the interpreter")
    compare("cross_entropy", (normal(10**6, 10, device=device), labels(10**6, 10, device)))


@pytest.mark.parametrize("cols", [1, 2])
@CASES
def test_one_and_two_classes(case, cols, device):
    """A softmax over one class is 1: loss and gradient are 0, but for the rounding of the logits."""
    tensors, keywords = draw(case, (5, cols), torch.float32, device)
    compare(case.loss, tensors, case.differentiable, factor=2.0, absolute=1e-6 * (cols == 1), **keywords)


@KERNELS
@pytest.mark.parametrize("margin", [20.0, 30.0, 80.0])
@pytest.mark.parametrize("cols", [2, 100, 300, 1000, 4103])
@HALF_AND_SINGLE
def test_confident_label_is_not_rounded_to_zero(cols, margin, dtype, device):
    x = torch.randn(2, cols, device=device).to(dtype)
    x[:, 1] = margin
    y = torch.ones(2, dtype=torch.int64, device=device)
    exact = x.double()
    exact[:, 1] = -INFINITY
    z = exact.logsumexp(1) - x[:, 1].double()  # the loss is log(1 + exp(z))
    x.requires_grad_()
    loss = fusedloss.cross_entropy(x, y, reduction="none")
    dx = gradient(loss.sum(), x)
    assert (loss > 0).all()
    relative = 2e-5 + oracle.TOLERANCES[dtype].relative  # exp2 of -115 in float32
    torch.testing.assert_close(loss.double(), torch.exp(z).log1p(), rtol=relative, atol=0)
    torch.testing.assert_close(dx[:, 1].double(), -z.sigmoid(), rtol=relative, atol=0)


@HALF_AND_SINGLE
def test_bce_of_a_confident_zero(dtype, device):
    """y = 0, x = -20: the loss is 2.06e-9. max(x, 0) - x y + log(1 + exp(-|x|)) gives 0."""
    x = torch.tensor([-20.0, -20.0, 20.0, -80.0, 0.0], device=device, dtype=dtype)
    y = torch.tensor([0.0, 0.25, 1.0, 0.0, 0.0], device=device, dtype=dtype)
    for reduction in ("none", "sum"):
        loss, _ = compare("binary_cross_entropy_with_logits", (x, y), 2, reduction=reduction)
        assert (loss > 0).all()
    alone = fusedloss.binary_cross_entropy_with_logits(x[:1], y[:1])
    torch.testing.assert_close(alone.item(), 2.0611536e-09, rtol=oracle.TOLERANCES[dtype].relative, atol=0)


@pytest.mark.parametrize("pos_weight", [None, 100.0])
@pytest.mark.parametrize("upstream", [1e-8, 1.0])
def test_bce_gradient_of_a_confident_mistake(upstream, pos_weight, path, device):
    """x = -86, y = 1: exp(-x) is near the largest number, and a mean's factor times its inverse below the least."""
    x = torch.tensor([-60.0, -70.0, -80.0, -86.0, -100.0, -1e4, 86.0, 1e4], device=device).repeat(2).requires_grad_()
    y = torch.tensor([1.0, 0.25], device=device).repeat_interleave(8)
    weight = None if pos_weight is None else torch.tensor(pos_weight, device=device)
    loss = fusedloss.binary_cross_entropy_with_logits(x, y, pos_weight=weight, reduction="sum")
    (found,) = torch.autograd.grad(loss, x, torch.tensor(upstream, device=device))
    p, z = pos_weight or 1.0, x.double()
    exact = upstream * ((1 - y) * z.sigmoid() - p * y * (-z).sigmoid())
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=1e-37)


@CASES
def test_second_backward_adds_the_same_gradient(case, device):
    tensors, keywords = draw(case, (4, 40), torch.float32, device)
    x = tensors[0].requires_grad_()
    loss = case.ours(x, *tensors[1:], **keywords)
    loss.sum().backward(retain_graph=True)
    once = x.grad.clone()
    loss.sum().backward()
    assert once.any() and torch.equal(x.grad, 2 * once)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@CASES
def test_arguments_are_not_overwritten(case, grad, device):
    """Data and version counters, ignored rows among them."""
    tensors, keywords = draw(case, (4, 40), torch.float32, device)
    everything = [*tensors, *(v for v in keywords.values() if isinstance(v, torch.Tensor))]
    before = [(t.clone(), t._version) for t in everything]
    with torch.set_grad_enabled(grad):
        if grad:
            oracle.value_and_gradients(case.ours, tensors, keywords, case.differentiable)
        else:
            case.ours(*tensors, **keywords)
    for t, (data, version) in zip(everything, before, strict=True):
        assert torch.equal(t, data) and t._version == version


@CASES
def test_input_that_a_sigmoid_saved(case, device):
    """sigmoid's own backward reads its output: whoever overwrites it makes that gradient wrong."""
    tensors, keywords = draw(case, (4, 40), torch.float32, device)
    w = normal(4, 40, device=device).requires_grad_()
    x = torch.sigmoid(w)
    loss = case.ours(x, *tensors[1:], **keywords)
    upstream = torch.rand_like(loss) + 0.5
    dw = gradient((loss * upstream).sum(), w)
    _, _, (dx, *_) = oracle.exact(
        getattr(oracle, case.loss), (x.detach(), *tensors[1:]), keywords, 1, upstream
    )
    exact = x.detach().double()
    oracle.assert_close(dw, dx * exact * (1 - exact), factor=4.0)


@CASES
def test_last_stride_is_not_one(case, device):
    tensors, keywords = draw(case, (3, 40), torch.float32, device, "strided")
    assert tensors[0].stride(-1) == 2
    compare(case.loss, tensors, case.differentiable, factor=2.0, **keywords)


@CASES
def test_expanded_target(case, device):
    tensors, keywords = draw(case, (5, 33), torch.float32, device, "expanded")
    if len(tensors) == 1:
        tensors = [tensors[0][:1].expand(5, 33)]
    assert tensors[-1].stride(0) == 0
    compare(case.loss, tensors, case.differentiable, factor=2.0, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bfloat16_target_that_is_a_logarithm(dtype, device):
    x = torch.log_softmax(normal(4, 40, device=device), 1).to(dtype)
    t = torch.log_softmax(normal(4, 40, device=device), 1).bfloat16()
    loss, _ = compare("kl_div", (x, t), 2, reduction="batchmean", log_target=True)
    assert loss.dtype == torch.promote_types(dtype, torch.bfloat16)


@pytest.mark.parametrize("shapes", [((4, 33), (33,)), ((4, 33), (4, 1)), ((1, 33), (4, 33))], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean"])
def test_target_broadcast_against_the_input(shapes, reduction, device):
    x = torch.log_softmax(normal(*shapes[0], device=device), -1)
    t = torch.softmax(normal(*shapes[1], device=device), -1) * 0.9
    compare("kl_div", (x, t), 2, reduction=reduction, factor=2.0)


@pytest.mark.parametrize("shape", [(33,), (4, 1), (1, 1), (4, 33)], ids=str)
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weight_broadcast_against_the_input(name, shape, reduction, device):
    x, y = normal(4, 33, device=device), torch.rand(4, 33, device=device)
    more = {name: torch.rand(shape, device=device) + 0.5, "reduction": reduction}
    compare("binary_cross_entropy_with_logits", (x, y), 2, **more)


# (how many, elements between them): strides beyond int32, and strides within whose multiples are beyond
FAR = pytest.mark.parametrize(("count", "stride"), [(2, 2**31 + 64), (4, 2**30 + 64)])


def far_apart(like, strides):
    """The values of `like` in memory that is otherwise untouched, so that it costs addresses only."""
    try:
        room = like.new_empty(sum((n - 1) * s for n, s in zip(like.shape, strides, strict=True)) + 1)
    except RuntimeError:
        pytest.skip("not enough address space")
    return room.as_strided(like.shape, strides).copy_(like)


@FAR
@CASES
@KERNELS
def test_rows_more_than_two_to_the_31_elements_apart(case, count, stride, device):
    tensors, keywords = draw(case, (count, 40), torch.bfloat16, device)
    x = far_apart(tensors[0], (stride, 1))
    check(case, (x, *tensors[1:]), keywords, torch.bfloat16)


@FAR
@CASES
@KERNELS
def test_classes_more_than_two_to_the_31_elements_apart(case, count, stride, device):
    tensors, keywords = draw(case, (1, count, 8), torch.bfloat16, device)
    x = far_apart(tensors[0], (count * stride, stride, 1))
    check(case, (x, *tensors[1:]), keywords, torch.bfloat16)


@FAR
@CASES
@KERNELS
def test_batches_more_than_two_to_the_31_elements_apart(case, count, stride, device):
    tensors, keywords = draw(case, (count, 3, 8), torch.bfloat16, device)
    x = far_apart(tensors[0], (stride, 8, 1))
    check(case, (x, *tensors[1:]), keywords, torch.bfloat16)


@KERNELS
@pytest.mark.parametrize(("name", "vectors"), [("cross_entropy/label_smoothing", 4), ("kl_div_with_logits/plain", 5),
                                               ("entropy_with_logits/plain", 3)])  # fmt: skip
def test_row_vectors_of_more_than_two_to_the_31_numbers(name, vectors, device):
    """What forward keeps of a row for backward lies a number of rows apart: two rows of what is said to be 2^30."""
    case, many = testing.case(name), 2**30
    inputs = draw(case, (2, 40), torch.float32, device)
    forward, _, backward = compiled.launches(lambda: testing.forward_backward(case, inputs, reduction="sum"))
    of_both = {id(t) for t in forward.tensors} & {id(t) for t in backward.tensors}
    (kept,) = [t for t in forward.tensors if id(t) in of_both and t is not None and t.numel() == 2 * vectors]
    near, gradients = torch.ones(vectors, 2, device=device), []  # of cross entropy the last are a mean's factors
    for rows, memory in ((2, near), (many, far_apart(near, (many, 1)))):
        for call in (forward, backward):
            tensors = [memory if t is kept else t.fill_(1.0) if t is not None and t.dim() == 0 else t
                       for t in call.tensors]  # fmt: skip
            launch(call.kernel, call.grid, *tensors, scalars={**call.scalars, "n_rows": rows},
                   constants=call.constants, num_warps=call.num_warps)  # fmt: skip
        gradients.append(next(t for t in backward.tensors if t is not None).clone())
        assert torch.equal(memory, near) and not torch.equal(near, torch.ones_like(near))
    assert gradients[0].isfinite().all() and torch.equal(*gradients)


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "cross_entropy", "kl_div"])
def test_mean_whose_sum_overflows_float16(name, path, device):
    """Three losses of 32768 make no float16 number, and their mean does."""
    x = torch.zeros(3, 5, device=device, dtype=torch.float16)
    if name == "cross_entropy":
        x[:, 1] = 2.0**15
        arguments = x, torch.zeros(3, dtype=torch.int64, device=device)
    else:
        arguments = (x + 2.0**15, x) if name != "kl_div" else (x - 2.0**15, torch.ones_like(x))
    mean, total = (getattr(fusedloss, name)(*arguments, reduction=r) for r in ("mean", "sum"))
    assert mean.dtype is torch.float16 and total == INFINITY
    if path == "triton" or name == "binary_cross_entropy_with_logits":
        assert mean == 2.0**15
    else:  # torch's own function, which may overflow on a CPU
        assert mean == getattr(torch.nn.functional, name)(*arguments, reduction="mean")


def test_gradient_accumulation_with_a_mean_over_kept_tokens(device):
    """sum(loss) / kept, over batches with different numbers of ignored tokens, is the mean over all."""
    x = normal(8, 40, device=device).requires_grad_()
    y = labels(8, 40, device)
    y[[0, 1, 2, 6]] = -100
    whole = gradient(fusedloss.cross_entropy(x, y), x)
    kept = (y != -100).sum()
    for part in (slice(0, 4), slice(4, 8)):
        (fusedloss.cross_entropy(x[part], y[part], reduction="sum") / kept).backward()
    torch.testing.assert_close(x.grad, whole, rtol=1e-6, atol=0)
    oracle.assert_close(whole, gradient(oracle.cross_entropy(x, y), x))


@pytest.mark.parametrize(
    "case", [c for c in testing.CASES if c.loss != "binary_cross_entropy"], ids=lambda c: c.name
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast(case, reduction, device):
    """The loss in float32, the gradient in the input's dtype, and no rounding between."""
    if reduction not in case.reductions:
        pytest.skip("this loss is always reduced")
    tensors, keywords = draw(case, (5, 33), torch.bfloat16, device)
    keywords["reduction"] = reduction
    with torch.autocast(device.type, torch.bfloat16):
        loss, upstream, gradients = oracle.value_and_gradients(case.ours, tensors, keywords, 1)
    expected, _, expected_gradients = oracle.exact(getattr(oracle, case.loss), tensors, keywords, 1, upstream)
    assert loss.dtype is torch.float32 and gradients[0].dtype is torch.bfloat16
    oracle.assert_close(loss, expected, factor=2.0)
    oracle.assert_close(gradients[0], expected_gradients[0], factor=max(2.0, oracle.factor(case)))


# what holds for every call of the kernels

SPLIT = 57_376  # classes of a float32 row that two programs read in forward, where the loss is reduced


@KERNELS
@CASES
def test_same_bits_on_every_run(case, device):
    tensors, keywords = draw(case, (3, 1500), torch.float32, device)
    upstream = None
    runs = []
    for _ in range(2):
        loss, upstream, gradients = oracle.value_and_gradients(
            case.ours, tensors, keywords, case.differentiable, upstream
        )
        runs.append((loss, *gradients))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "cols"),
    [(d, cols) for d in (torch.float32, torch.bfloat16) for cols in (16, 96, 512, 4104, 20_000)]
    + [(torch.float32, 1004), (torch.float32, 8204), (torch.float32, SPLIT)],
    ids=str,
)
@pytest.mark.parametrize("name", ["cross_entropy/index", "cross_entropy/probabilities+weight", "cross_entropy/z_loss",
                                  "nll_loss/weight", "entropy/plain", "entropy_with_logits/plain",
                                  "kl_div_with_logits/temperature"])  # fmt: skip
def test_a_row_has_the_same_bits_in_any_batch(name, dtype, cols, device):
    case = testing.case(name)
    rows = 21 if cols < 1000 else 3 if cols < SPLIT else 2
    tensors, keywords = draw(case, (rows, cols), dtype, device)
    keywords["reduction"] = case.reductions[0]
    if keywords["reduction"] == "mean" or cols == SPLIT:  # of reduced ones the rows' gradients are compared
        keywords["reduction"] = "sum"
    whole = oracle.value_and_gradients(case.ours, tensors, keywords, case.differentiable)
    unreduced = whole[0].dim() > 0
    for row in {0, rows // 2, rows - 1}:
        alone = [t[row : row + 1] for t in tensors]
        upstream = whole[1][row : row + 1] if unreduced else whole[1]
        loss, _, gradients = oracle.value_and_gradients(
            case.ours, alone, keywords, case.differentiable, upstream
        )
        if unreduced:
            assert torch.equal(loss[0], whole[0][row])
        for one, all_rows in zip(gradients, whole[2], strict=True):
            assert torch.equal(one[0], all_rows[row])


def test_an_access_out_of_bounds_is_seen(out_of_bounds):
    """The guard under every test here: a kernel that is told a size too large is caught."""
    from fusedloss.kernels.launch import launch
    from fusedloss.kernels.reduce import sum_kernel

    out, parts = torch.zeros(()), torch.zeros(8)
    run = lambda n: launch(
        sum_kernel, (1,), out, parts, scalars=dict(n=n, scale=1.0), constants=dict(BLOCK=16), num_warps=4
    )
    run(8)
    with pytest.raises(out_of_bounds, match="out of bounds"):
        run(9)


@pytest.mark.parametrize("lead", [10.0, 20.0])
def test_entropy_of_a_confident_row(lead, path, device):
    """What a rounded maximum leaves of its own power would be larger than the entropy."""
    x = normal(4, 1000, device=device)
    x[:, 3] = x.logsumexp(1) + lead
    log_p = x.double().log_softmax(1)
    exact = -(log_p.exp() * log_p).sum(1)
    found = fusedloss.entropy_with_logits(x, reduction="none")
    torch.testing.assert_close(found.double(), exact, rtol=0.1, atol=0.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_further_ahead_than_float32_can_tell(smoothing, device):
    """100 nats: the others' powers vanish, and the label's share of the gradient is what smoothing gives it."""
    x, target = torch.zeros(2, 300, device=device), torch.tensor([0, 5], device=device)
    x[torch.arange(2, device=device), target] = 100.0
    _, (gradient, *_) = compare("cross_entropy", (x, target), label_smoothing=smoothing)
    if not smoothing:
        assert gradient.abs().max() < 1e-37


def test_infinite_logits_with_pos_weight(path, device):
    """The target's gradient is -x, and times p below 0: infinite, and no inf - inf."""
    x, p = torch.tensor([INFINITY, -INFINITY], device=device), torch.tensor(2.0, device=device)
    target = torch.tensor([1.0, 0.0], device=device, requires_grad=True)
    loss = fusedloss.binary_cross_entropy_with_logits(x, target, pos_weight=p, reduction="none")
    assert gradient(loss.sum(), target).tolist() == [-INFINITY, INFINITY]


@KERNELS
@pytest.mark.parametrize(
    "name", ["cross_entropy", "binary_cross_entropy_with_logits", "binary_cross_entropy", "kl_div"]
)
def test_views_that_stand_for_their_negative(name, path, device):
    """Targets and weights whose memory holds the negative of their values, as a conjugate's imaginary part does."""
    loss, results = getattr(fusedloss, name), []
    x = torch.rand(3, 5, device=device) * 0.8 + 0.1
    t, w = torch.rand(3, 5, device=device).softmax(1), torch.rand(5, device=device)
    more = {} if name == "kl_div" else {"weight": w}
    for negative in (False, True):
        given = {k: torch._neg_view(-v) for k, v in more.items()} if negative else more
        leaf = x.clone().requires_grad_()
        value = loss(leaf, torch._neg_view(-t) if negative else t, **given, reduction="sum")
        results.append((value, gradient(value, leaf)))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


@KERNELS
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("wrong", [-0.25, 1.25])
def test_one_number_that_is_no_probability(wrong, reduction, path, device):
    """Among thousands of good ones; torch's reference refuses it, or gives the same."""
    p = torch.rand(3, 1500, device=device) * 0.9 + 0.05
    bad = p.clone()
    bad[1, 700] = wrong
    assert fusedloss.binary_cross_entropy(bad, p, reduction=reduction).isnan().sum() == 1
    if wrong < 0:
        assert fusedloss.kl_div(p.log(), bad, reduction=reduction).isnan().sum() == 1
        assert (fusedloss.entropy(bad, reduction=reduction) == -INFINITY).sum() == 1


@KERNELS
@HALF_AND_SINGLE
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_entropy_of_certain_rows_is_no_negative_zero(reduction, dtype, path, device):
    """For compiled kernels: the interpreter's sums start at 0, and so hide a -0."""
    loss = fusedloss.entropy(torch.eye(8, dtype=dtype, device=device), reduction=reduction)
    assert (loss == 0).all() and not loss.signbit().any()


@KERNELS
@pytest.mark.parametrize("n", [1, 4097, 8192, 20_001], ids=str)
def test_partial_sums_of_any_number(n, device):
    """None to a step of the walk over many, and steps with and without a rest."""
    from fusedloss.kernels.reduce import reduce_means, reduce_sum

    parts = torch.rand(2, n, device=device)
    first, second = parts.double().sum(1)
    loss, mean, scale = torch.empty((), device=device), torch.empty((), device=device), torch.empty(2, device=device)
    reduce_sum(loss, parts[0], 0.5)
    reduce_means(mean, scale, parts, True)
    torch.testing.assert_close(loss.double(), 0.5 * first, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(mean.double(), first / second, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(scale.double(), torch.stack([1 / second] * 2), rtol=1e-6, atol=0.0)
