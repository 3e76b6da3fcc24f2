"""Large CPU tensors, computed piece by piece: against float64, and what is left to the reference.

Pieces, and the size from which they are used, are made small here: some inputs end in a ragged piece, some rows
are wider than a piece.
"""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
from fusedloss import blocked, dispatch, formulas, pieces
from fusedloss.testing import _entropy_logits_torch, _kl_logits_torch

from . import oracle

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
REAL = [(m, "PIECE", m.PIECE) for m in (pieces, blocked, formulas)]
REAL += [(pieces, "APART", pieces.APART), (formulas, "SHORT", formulas.SHORT)]
SIZES = {  # pieces of 96 elements, or of whole rows
    "short": (3, 12), "one piece": (4, 20), "fits": (12, 40), "ragged": (37, 40), "wide": (5, 129),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces for small tensors, and a list that tells whether they were used."""
    used, run = [], blocked.walk
    for module, name, value in (
        (pieces, "PIECE", 96), (blocked, "PIECE", 96), (formulas, "PIECE", 96), (formulas, "SHORT", 6),
        (pieces, "APART", 1), (dispatch, "_latest", {}),
        (blocked, "LARGE", dict.fromkeys(blocked.LARGE, 1)), (blocked, "CLASSES", 2), (blocked, "KEPT", 0),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(blocked, "walk", lambda *arguments: used.append(1) or run(*arguments))
    with fusedloss.use("reference"):
        yield used


def rand(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(name, shape, dtype):
    """(ours, torch's, oracle, tensors, keywords)"""
    x, rows, classes = 3 * rand(shape, dtype), *shape
    p, labels = rand(shape, seed=1).sigmoid().to(dtype), (7 * torch.arange(rows)) % classes
    w = torch.linspace(0.5, 2.0, classes).to(dtype)
    labels[2] = -100
    hard = (p > 0.5).to(dtype)
    log_p, log_q = x.float().log_softmax(1).to(dtype), rand(shape, seed=2).log_softmax(1).to(dtype)
    probabilities = rand(shape, seed=3).softmax(1).to(dtype)
    function, tensors, keywords = {
        "bce_with_logits": ("binary_cross_entropy_with_logits", (x, p), {}),
        "bce_with_logits hard": ("binary_cross_entropy_with_logits", (x, hard), {}),
        "bce_with_logits weight": ("binary_cross_entropy_with_logits", (x, p, w), {}),
        "bce_with_logits weights": ("binary_cross_entropy_with_logits", (x, p, p + 0.5), dict(pos_weight=w)),
        "bce_with_logits smooth": (
            "binary_cross_entropy_with_logits", (x, hard), dict(label_smoothing=0.1, pos_weight=w[:1]),
        ),
        "bce": ("binary_cross_entropy", (x.sigmoid().clamp(0.01, 0.99), p), {}),
        "bce weight": ("binary_cross_entropy", (x.sigmoid().clamp(0.01, 0.99), hard, p), {}),
        "cross_entropy": ("cross_entropy", (x, labels), {}),
        "cross_entropy weight": ("cross_entropy", (x, labels, w), dict(ignore_index=7)),
        "cross_entropy smooth": ("cross_entropy", (x, labels), dict(label_smoothing=0.1)),
        "cross_entropy weight smooth": ("cross_entropy", (x, labels, w), dict(label_smoothing=0.1)),
        "cross_entropy probabilities": ("cross_entropy", (x, probabilities, w), dict(label_smoothing=0.1)),
        "kl_div": ("kl_div", (log_p, probabilities), {}),
        "kl_div log_target": ("kl_div", (log_p, log_q), dict(log_target=True)),
        "entropy_with_logits": ("entropy_with_logits", (x,), dict(reduction="mean")),
        "kl_div_with_logits": ("kl_div_with_logits", (x, 3 * rand(shape, dtype, seed=2)), {}),
        "kl_div_with_logits reverse": (
            "kl_div_with_logits", (x, 3 * rand(shape, dtype, seed=2)), dict(temperature=2.0, reverse=True),
        ),
    }[name]  # fmt: skip
    if function == "cross_entropy" and "ignore_index" in keywords:
        labels[2] = 7
    by_torch = getattr(F, function, _kl_logits_torch if function.startswith("kl") else _entropy_logits_torch)
    return getattr(fusedloss, function), by_torch, getattr(oracle, function), tensors, keywords


LOSSES = (
    "bce_with_logits", "bce_with_logits hard", "bce_with_logits weight", "bce_with_logits weights",
    "bce_with_logits smooth", "bce", "bce weight", "cross_entropy", "cross_entropy weight", "cross_entropy smooth",
    "cross_entropy weight smooth", "cross_entropy probabilities", "kl_div", "kl_div log_target",
    "kl_div_with_logits", "kl_div_with_logits reverse", "entropy_with_logits",
)  # fmt: skip
every_loss = pytest.mark.parametrize("name", LOSSES)


def leaf(tensors):
    return tensors[0].detach().clone().requires_grad_(), *tensors[1:]


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "batchmean"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(small, name, reduction, size, dtype):
    if reduction == "batchmean" and not name.startswith("kl_div"):
        reduction = "mean"
    if reduction == "none" and name.startswith("kl_div_with_logits"):
        pytest.skip("the reference computes it")
    ours, torchs, exact, tensors, keywords = make(name, SIZES[size], dtype)
    keywords = dict(keywords, reduction=reduction)
    loss, upstream, (dx,) = oracle.value_and_gradients(ours, tensors, keywords, 1)
    # a weight that the rows share is repeated to a piece's length, where it has one
    assert small or (size == "wide" and ("weight" in name or "smooth" in name))
    expected, _, (expected_dx,) = oracle.exact(exact, tensors, keywords, 1, upstream)
    assert loss.dtype == dx.dtype == dtype
    oracle.assert_close(loss, expected)
    oracle.assert_close(dx, expected_dx, factor=2.0 if dtype in HALVES else 1.0)  # an upstream rounds a second time
    if dtype in HALVES and ("label_smoothing" not in keywords or torchs is F.cross_entropy):
        by_torch, _, (dx_by_torch,) = oracle.value_and_gradients(torchs, tensors, keywords, 1, upstream)
        assert by_torch.dtype == loss.dtype
        oracle.assert_no_worse_than_torch(loss, by_torch, expected)
        oracle.assert_no_worse_than_torch(dx, dx_by_torch, expected_dx)


@every_loss
def test_no_gradient_is_the_same_loss(name):
    ours, _, exact, tensors, keywords = make(name, (37, 40), torch.float32)
    for inference in (torch.no_grad, torch.inference_mode):
        with inference():
            loss = ours(*tensors, **keywords)
        assert not loss.requires_grad
        oracle.assert_close(loss, exact(*tensors, **keywords))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_twice(name, dtype):
    """The first takes the gradient that forward computed, the second computes it again; neither harms the other."""
    ours, _, exact, tensors, keywords = make(name, (37, 40), dtype)
    x, *rest = leaf(tensors)
    loss = ours(x, *rest, **keywords)
    upstreams = [torch.tensor(u, dtype=dtype) for u in (1.0, 0.7, -2.5)]
    gradients = [torch.autograd.grad(loss, x, u, retain_graph=True)[0] for u in upstreams]
    for upstream, dx in zip(upstreams, gradients, strict=True):
        _, _, (expected,) = oracle.exact(exact, tensors, keywords, 1, upstream.double())
        oracle.assert_close(dx, expected)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward(small, name, reduction):
    if reduction == "none" and name.startswith("kl_div_with_logits"):
        pytest.skip("the reference computes it")
    ours, _, exact, tensors, keywords = make(name, (6, 40), torch.float32)
    keywords = dict(keywords, reduction=reduction)

    def orders(call, tensors):
        x, *rest = leaf(tensors)
        loss = call(x, *rest, **keywords)
        upstream = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape).to(loss.dtype).requires_grad_()
        (dx,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
        direction = torch.linspace(-1.0, 1.0, x.numel()).reshape(x.shape).to(x.dtype)
        second = torch.autograd.grad(dx, (x, upstream), direction, allow_unused=True)
        return dx.detach().double(), *(None if t is None else t.double() for t in second)

    got = orders(ours, tensors)
    assert small
    expected = orders(exact, tuple(t.double() if t.is_floating_point() else t for t in tensors))
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@every_loss
def test_arguments_are_left_alone(name):
    ours, _, _, tensors, keywords = make(name, (37, 40), torch.float32)
    x, *rest = leaf(tensors)
    before = [(t.detach().clone(), t._version) for t in (x, *rest)]
    ours(x, *rest, **keywords).backward()
    for t, (values, version) in zip((x, *rest), before, strict=True):
        assert torch.equal(t.detach(), values) and t._version == version


class TestCrossEntropy:
    def test_label_out_of_range(self):
        for label in (-1, 40):
            labels = torch.arange(37).clone()
            labels[30] = label
            with pytest.raises(IndexError):
                fusedloss.cross_entropy(rand((37, 40)), labels)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_rows_that_are_ignored(self, small, smoothing):
        x, labels = rand((37, 40)), torch.arange(37)
        labels[::2] = -100
        x[4] = float("nan")
        x[6, 3] = float("inf")
        x.requires_grad_()
        loss = fusedloss.cross_entropy(x, labels, label_smoothing=smoothing)
        loss.backward()
        assert small and loss.isfinite()
        assert not x.grad[::2].any() and x.grad[1::2].all()

    def test_no_rows(self, small):
        x, labels = rand((37, 40)).requires_grad_(), torch.full((37,), -100)
        loss = fusedloss.cross_entropy(x, labels)
        loss.backward()
        assert small and loss.isnan() and not x.grad.any()
        assert fusedloss.cross_entropy(x, labels, reduction="sum") == 0

    @pytest.mark.parametrize("grad", [False, True])
    def test_infinite_and_far_apart_logits(self, grad):
        x, labels = 200 * rand((37, 40)), torch.arange(37)
        x[0, 1:] = -float("inf")
        x[1, 2] = -float("inf")
        x[3, 3] = -float("inf")
        x += 1e4
        x.requires_grad_(grad)
        loss = fusedloss.cross_entropy(x, labels, reduction="sum")
        assert loss == float("inf")
        labels[3] = 4
        loss = fusedloss.cross_entropy(x, labels, reduction="sum")
        expected = F.cross_entropy(x.detach().double().requires_grad_(), labels, reduction="sum")
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        if grad:
            (dx,) = torch.autograd.grad(loss, x)
            assert not dx.isnan().any() and not dx[0, 1:].any()

    def test_a_row_of_nan_is_nan(self):
        x = rand((37, 40))
        x[5, 5] = float("nan")
        x.requires_grad_()
        loss = fusedloss.cross_entropy(x, torch.arange(37), reduction="none")
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert loss.isnan().nonzero().flatten().tolist() == [5]
        assert dx.isnan().any(1).nonzero().flatten().tolist() == [5]


class TestElements:
    def test_tails_keep_relative_accuracy(self):
        x = torch.linspace(-60, 60, 37 * 40).reshape(37, 40).requires_grad_()
        for t in (0.0, 1.0):
            target = torch.full_like(x, t)
            for reduction in ("none", "sum"):
                loss = fusedloss.binary_cross_entropy_with_logits(x, target, reduction=reduction)
                (dx,) = torch.autograd.grad(loss.sum(), x)
                exact = oracle.binary_cross_entropy_with_logits(x.detach(), target, reduction=reduction)
                torch.testing.assert_close(loss.detach().double(), exact, rtol=2e-5, atol=0)
                sigma = x.detach().double()
                expected = (1 - target.double()) * sigma.sigmoid() - target.double() * (-sigma).sigmoid()
                torch.testing.assert_close(dx.double(), expected, rtol=2e-5, atol=1e-40)

    @pytest.mark.parametrize("t", [0.0, 1.0, 0.3])
    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_gradient_at_zero(self, t, zero):
        x = torch.full((37, 40), zero, requires_grad=True)
        fusedloss.binary_cross_entropy_with_logits(x, torch.full((37, 40), t), reduction="sum").backward()
        torch.testing.assert_close(x.grad, torch.full((37, 40), 0.5 - t))

    def test_probabilities_of_zero_and_one(self):
        x = torch.tensor([0.0, 1.0, 1e-30, 1.0 - 2**-24]).repeat(40, 1).requires_grad_()
        t = torch.tensor([1.0, 0.0, 1.0, 1.0]).repeat(40, 1)
        loss = fusedloss.binary_cross_entropy(x, t, reduction="none")
        expected = F.binary_cross_entropy(x, t, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), x)[0] for v in (loss, expected)))

    @pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
    @pytest.mark.parametrize("at", [0, 1])
    def test_probabilities_outside_are_refused(self, value, at):
        tensors = [rand((37, 40)).sigmoid(), rand((37, 40)).sigmoid()]
        tensors[at][30, 7] = value
        with pytest.raises(RuntimeError, match="should be between 0 and 1"):
            fusedloss.binary_cross_entropy(*tensors)

    @pytest.mark.parametrize("log_target", [False, True])
    def test_kl_div_where_the_target_is_zero(self, log_target):
        x, t = rand((37, 40)).log_softmax(1), rand((37, 40), seed=1).softmax(1)
        t[3], t[4, :7] = 0.0, 0.0
        target = t.log() if log_target else t
        ours, torchs = (f.kl_div(x, target, log_target=log_target, reduction="none") for f in (fusedloss, F))
        torch.testing.assert_close(ours, torchs, equal_nan=True, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), 1e-41])
    @pytest.mark.parametrize("at", [-1.0, 0.0, 1.0])
    def test_kl_div_of_odd_targets(self, value, at):
        x, t = rand((37, 40)).log_softmax(1), rand((37, 40), seed=1).softmax(1)
        t[30, 7], x[30, 7] = value, at
        ours, torchs = (f.kl_div(x, t, reduction="none") for f in (fusedloss, F))
        torch.testing.assert_close(ours, torchs, equal_nan=True, rtol=1e-5, atol=1e-6)

    def test_mixed_dtypes(self, small):
        x, t = rand((37, 40), torch.bfloat16), rand((37, 40)).sigmoid()
        loss = fusedloss.binary_cross_entropy_with_logits(x, t)
        assert small and loss.dtype == torch.float32
        oracle.assert_close(loss, oracle.binary_cross_entropy_with_logits(x, t))

    def test_dtype_and_autocast(self, small):
        x, t = rand((37, 40), torch.bfloat16).requires_grad_(), rand((37, 40)).sigmoid().bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            losses = [fusedloss.binary_cross_entropy_with_logits(x, t)]
        losses.append(fusedloss.binary_cross_entropy_with_logits(x, t, dtype=torch.float32))
        for loss in losses:
            assert loss.dtype == torch.float32
            oracle.assert_close(loss, oracle.binary_cross_entropy_with_logits(x.detach(), t))
            assert torch.autograd.grad(loss, x)[0].dtype == torch.bfloat16
        assert len(small) == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_beyond_the_dtype_is_infinite(small, dtype):
    x = torch.full((12, 40), torch.finfo(dtype).max / 200, dtype=dtype)  # that of a piece is not
    for t, exact in ((torch.zeros_like(x), float("inf")), (torch.ones_like(x), 0.0)):
        loss = fusedloss.binary_cross_entropy_with_logits(x, t, reduction="sum")
        assert small and loss.dtype == dtype and loss.item() == exact


class TestMemory:
    def test_buffers_are_kept_and_used_again(self, monkeypatch):
        monkeypatch.setattr(pieces, "_kept", [])
        monkeypatch.setattr(pieces, "WORKERS", 1)
        with torch.inference_mode():  # such tensors could not be written to outside
            first = fusedloss.binary_cross_entropy_with_logits(X, P)
        (kept,) = pieces._kept
        assert torch.equal(fusedloss.binary_cross_entropy_with_logits(X, P), first)
        assert len(pieces._kept) == 1 and pieces._kept[0] is kept and not kept[0].is_inference()
        fusedloss.binary_cross_entropy_with_logits(X, P, W, pos_weight=W)
        assert len(pieces._kept) == 1

    def test_no_more_is_kept_than_two_workers_need(self, monkeypatch):
        monkeypatch.setattr(pieces, "_kept", [])
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        fusedloss.binary_cross_entropy_with_logits(X, P)
        assert len(pieces._kept) <= pieces.KEPT
        pieces._kept.clear()
        fusedloss.cross_entropy(rand((4, 8 * 96 + 1)), torch.arange(4))  # rows wider than a piece
        assert not pieces._kept

    def test_calls_at_once(self, monkeypatch):
        """Each has buffers of its own: 400 calls in four threads, every loss right."""
        monkeypatch.setattr(pieces, "WORKERS", 1)
        shifts = [float(k % 7) for k in range(400)]
        expected = [fusedloss.binary_cross_entropy_with_logits(X + s, P) for s in shifts[:7]]
        with ThreadPoolExecutor(4) as pool:
            losses = list(pool.map(lambda s: fusedloss.binary_cross_entropy_with_logits(X + s, P), shifts))
        assert all(torch.equal(loss, expected[k % 7]) for k, loss in enumerate(losses))


class TestEntropy:
    def test_classes_without_probability(self, small):
        x = 3 * rand((37, 40))
        x[5, 3:9], x[6, 1:] = -float("inf"), -float("inf")
        (dx,) = torch.autograd.grad(fusedloss.entropy_with_logits(x.requires_grad_()).sum(), x)
        loss = fusedloss.entropy_with_logits(x)
        exact = oracle.entropy_with_logits(x.detach().clamp_min(-1e4))
        torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-6, atol=1e-6)
        assert small and loss[6] == 0.0 and dx.isfinite().all() and not dx[5, 3:9].any() and not dx[6].any()

    def test_more_dimensions(self, small):
        x = rand((4, 9, 40), torch.bfloat16)
        loss = fusedloss.entropy_with_logits(x, dtype=torch.float32)
        assert small and loss.shape == (4, 9)
        oracle.assert_close(loss, oracle.entropy_with_logits(x))


class TestTwoSetsOfLogits:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("which", ["input", "target", "both"])
    def test_classes_without_probability(self, small, reverse, which):
        """A class of -inf in the first adds nothing, whatever the second has; in the second alone it costs inf."""
        logits = [3 * rand((37, 40)), 3 * rand((37, 40), seed=1)]
        for tensor, masked in zip(logits, (which != "target", which != "input"), strict=True):
            if masked:
                tensor[5, 3:9] = -float("inf")
        x = logits[0].requires_grad_()
        loss = fusedloss.kl_div_with_logits(x, logits[1], reverse=reverse)
        (dx,) = torch.autograd.grad(loss, x)
        with fusedloss.use("reference"):
            expected = fusedloss.kl_div_with_logits(x.double(), logits[1].double(), reverse=reverse)
        assert small
        torch.testing.assert_close(loss.double(), expected.detach())
        first, second = (logits if reverse else logits[::-1])
        assert loss.isinf() == bool((second.isinf() & ~first.isinf()).any())
        if not loss.isinf():
            (exact,) = torch.autograd.grad(expected, x)
            torch.testing.assert_close(dx.double(), exact.nan_to_num(0.0).double(), rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("which", ["input", "target", "both"])
    def test_masks_of_the_least_number(self, reverse, which):
        logits = [3 * rand((37, 40)), 3 * rand((37, 40), seed=1)]
        for tensor, masked in zip(logits, (which != "target", which != "input"), strict=True):
            if masked:
                tensor[5, 3:9] = torch.finfo(torch.float32).min
        x = logits[0].requires_grad_()
        (dx,) = torch.autograd.grad(loss := fusedloss.kl_div_with_logits(x, logits[1], reverse=reverse), x)
        exact = oracle.kl_div_with_logits(x.detach(), logits[1], reverse=reverse)
        torch.testing.assert_close(loss.detach().double(), exact, rtol=1e-5, atol=0)
        assert dx.isfinite().all()

    def test_close_logits_and_a_temperature_in_a_tensor(self, recwarn):
        x = 3 * rand((37, 40))
        y = x + 1e-5 * rand((37, 40), seed=1)
        loss = fusedloss.kl_div_with_logits(x.requires_grad_(), y, temperature=torch.tensor(2.0))
        assert 0.0 <= loss < 1e-6 and not recwarn.list

    def test_close_logits_are_not_below_zero(self):
        """Where what is left is rounding, half of the sums would be."""
        for seed in range(20):
            x = 3 * rand((2, 40), seed=seed)
            assert 0.0 <= fusedloss.kl_div_with_logits(x, x + 1e-5 * rand((2, 40), seed=99)) < 1e-6

    @pytest.mark.parametrize("reverse", [False, True])
    def test_equal_logits_and_an_offset(self, reverse):
        x = (3 * rand((37, 40))).requires_grad_()
        loss = fusedloss.kl_div_with_logits(x, x.detach().clone(), reverse=reverse)
        assert loss == 0.0 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-9
        y = 3 * rand((37, 40), seed=1)
        moved = fusedloss.kl_div_with_logits(x + 1024.0, y - 512.0, reverse=reverse)
        exact = oracle.kl_div_with_logits((x.detach() + 1024.0), y - 512.0, reverse=reverse)
        torch.testing.assert_close(moved.detach().double(), exact, rtol=1e-6, atol=0)

    def test_a_row_of_nan_is_nan(self):
        x = rand((37, 40))
        x[5, 5] = float("nan")
        loss = fusedloss.kl_div_with_logits(x.requires_grad_(), rand((37, 40), seed=1))
        assert loss.isnan() and torch.autograd.grad(loss, x)[0].isnan().any(1).nonzero().flatten().tolist() == [5]


X, P, LABELS, W = rand((37, 40)), rand((37, 40), seed=1).sigmoid(), torch.arange(37), torch.ones(40)
ODD = {
    "float64": lambda: fusedloss.binary_cross_entropy_with_logits(X.double(), P.double()),
    "dtype float64": lambda: fusedloss.cross_entropy(X, LABELS, dtype=torch.float64),
    "not contiguous": lambda: fusedloss.binary_cross_entropy_with_logits(X.t(), P.t()),
    "broadcast": lambda: fusedloss.kl_div(X, P[:1], reduction="sum"),
    "target's gradient": lambda: fusedloss.kl_div(X, P.clone().requires_grad_(), reduction="sum"),
    "weight's gradient": lambda: fusedloss.cross_entropy(X, P, W.clone().requires_grad_()),
    "z_loss": lambda: fusedloss.cross_entropy(X, LABELS, z_loss=0.1),
    "softcap": lambda: fusedloss.cross_entropy(X, LABELS, softcap=5.0),
    "three dimensions": lambda: fusedloss.cross_entropy(X[None], torch.zeros(1, 40, dtype=torch.int64)),
    "few classes": lambda: fusedloss.cross_entropy(X[:, :1].contiguous(), LABELS * 0),
    "uint8": lambda: fusedloss.cross_entropy(X, LABELS.byte()),
    "weight a row": lambda: fusedloss.binary_cross_entropy_with_logits(X, P, P[:, :1]),
    "subclass": lambda: fusedloss.binary_cross_entropy_with_logits(X.as_subclass(Other), P.as_subclass(Other)),
    "meta": lambda: fusedloss.cross_entropy(X.to("meta"), LABELS.to("meta")),
    "other loss": lambda: fusedloss.nll_loss(X, LABELS),
    "other dimension": lambda: fusedloss.kl_div_with_logits(X, P, dim=0),
    "unreduced": lambda: fusedloss.kl_div_with_logits(X, P, reduction="none"),
    "functorch": lambda: torch.func.grad(lambda x: fusedloss.cross_entropy(x, LABELS))(X),
    "vmap": lambda: torch.func.vmap(fusedloss.cross_entropy)(X[None], LABELS[None]),
    "forward AD": lambda: torch.func.jvp(lambda x: fusedloss.cross_entropy(x, LABELS), (X,), (X,)),
    "compile": lambda: torch.compile(fusedloss.cross_entropy, backend="eager", fullgraph=True)(X, LABELS),
}  # fmt: skip


class Other(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", ODD)
def test_the_odd_is_the_references(small, name):
    ODD[name]()
    assert not small


def test_fake_tensors_and_modes_are_the_references(small):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert fusedloss.cross_entropy(torch.empty(37, 40), torch.empty(37, dtype=torch.int64)).shape == ()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Watch():
        fusedloss.cross_entropy(X, LABELS)
    assert not small


def test_small_calls_do_not_enter(small, monkeypatch):
    monkeypatch.setattr(blocked, "LARGE", dict.fromkeys(blocked.LARGE, X.numel() + 1))
    monkeypatch.setattr(blocked, "suits", None)  # would raise
    fusedloss.cross_entropy(X, LABELS)
    fusedloss.binary_cross_entropy_with_logits(X, P)
    monkeypatch.undo()
    assert not small and max(blocked.LARGE.values()) * 4 <= 16 << 20


def test_memory_that_malloc_keeps(small, monkeypatch):
    """Up to there torch's kl_div with a log target, and its cross entropy, are as fast."""
    for kept, used in ((X.nbytes, False), (X.nbytes - 4, True)):
        small.clear()
        monkeypatch.setattr(blocked, "KEPT", kept)
        fusedloss.kl_div(X, X, log_target=True, reduction="sum")
        fusedloss.cross_entropy(X, LABELS)
        assert len(small) == 2 * used


def test_a_batch_of_gradients(small):
    x = X.clone().requires_grad_()
    loss = fusedloss.cross_entropy(x, LABELS)
    upstream = torch.tensor([0.5, 2.0])
    (batch,) = torch.autograd.grad(loss, x, upstream, is_grads_batched=True)
    one = F.cross_entropy(y := X.clone().requires_grad_(), LABELS)
    (expected,) = torch.autograd.grad(one, y)
    assert small
    torch.testing.assert_close(batch, upstream[:, None, None] * expected)


class TestFullSize:
    """The real sizes, on a tensor of a few pieces."""

    @pytest.fixture(autouse=True)
    def real(self, monkeypatch, small):
        for module, name, value in REAL:
            monkeypatch.setattr(module, name, value)

    @every_loss
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_temporary_memory(self, small, name, dtype, monkeypatch):
        """The most that is allocated at a time beside the gradient, from torch's own record of allocations, which sees
        one thread: all workers at once, each with what the one here adds to what it found, stay under 64 MiB."""
        workers = pieces.WORKERS
        monkeypatch.setattr(pieces, "WORKERS", 1)
        monkeypatch.setattr(pieces, "_kept", [])
        ours, _, _, tensors, keywords = make(name, (1024, 32000), dtype)
        x, *rest = leaf(tensors)
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = ours(x, *rest, **keywords)
        held = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert small and loss.requires_grad and x.nbytes <= max(held)
        peak = max(itertools.accumulate(held)) - x.nbytes
        shared = sum(held[: held.index(max(held))])
        assert shared + workers * (peak - shared) < 64 << 20

    @every_loss
    def test_workers(self, small, name, monkeypatch):
        """Several threads compute, each with its share of torch's, and twice the same bits; what the process and other
        threads of it have stays as it is."""
        ours, _, _, tensors, keywords = make(name, (256, 32000), torch.float32)
        seen, before, results = set(), torch.get_num_threads(), []
        for function in ("softmax", "log_softmax", "log", "abs", "clamp_min", "sub"):
            real = getattr(torch, function)

            def record(*arguments, real=real, **others):
                seen.add((threading.current_thread(), torch.get_num_threads()))
                return real(*arguments, **others)

            monkeypatch.setattr(torch, function, record)
        for _ in range(2):
            x, *rest = leaf(tensors)
            loss = ours(x, *rest, **keywords)
            results.append((loss, *torch.autograd.grad(loss, x)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        workers = min(before, pieces.WORKERS)
        assert small and {threads for _, threads in seen} == {before // workers}
        assert len(seen) > 2 or workers == 1  # new threads each time
        with ThreadPoolExecutor(1) as pool:
            assert torch.get_num_threads() == pool.submit(torch.get_num_threads).result() == before

    @pytest.mark.parametrize("name", ["bce_with_logits", "kl_div_with_logits", "entropy_with_logits"])
    def test_a_middle_size_starts_no_threads(self, small, name, monkeypatch):
        """Few pieces: torch divides their operations."""
        monkeypatch.setattr(pieces, "ThreadPoolExecutor", None)
        ours, _, _, tensors, keywords = make(name, (64, 5000), torch.float32)
        results = []
        for large in (blocked.LARGE, {}):  # in pieces, and not
            monkeypatch.setattr(blocked, "LARGE", large)
            x, *rest = leaf(tensors)
            loss = ours(x, *rest, **keywords)
            results.append((loss, *torch.autograd.grad(loss, x)))
            assert len(small) == 1
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)

    def test_without_openmp(self, small, monkeypatch):
        """The calling thread walks alone, and torch divides its operations."""
        monkeypatch.setattr(pieces.ctypes, "CDLL", lambda path: object())
        assert pieces._set_own_threads.__wrapped__() is None
        monkeypatch.setattr(pieces, "_set_own_threads", lambda: None)
        monkeypatch.setattr(pieces, "ThreadPoolExecutor", None)
        x = rand((256, 32000)).requires_grad_()
        loss = fusedloss.cross_entropy(x, torch.arange(256))
        expected = F.cross_entropy(y := x.detach().requires_grad_(), torch.arange(256))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, y))
        assert small

    def test_inference_mode(self, small):
        with torch.inference_mode():
            x = rand((256, 32000), torch.bfloat16)
            loss = fusedloss.cross_entropy(x, torch.arange(256))
            torch.testing.assert_close(loss, F.cross_entropy(x.float(), torch.arange(256)).bfloat16())
        assert small and loss.is_inference()

    def test_an_error_in_a_worker(self, small):
        p = rand((256, 32000)).sigmoid()
        p[200, 31999] = 1.5
        with pytest.raises(RuntimeError, match="between 0 and 1"):
            fusedloss.binary_cross_entropy(p, torch.ones_like(p))
        assert small
