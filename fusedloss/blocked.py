"""The losses of the reference for large CPU tensors, loss and gradient in one walk over their pieces.

Computed in float32, summed in float64, rounded once. Takes the arguments of the Functions, which `dispatch` sends
here where `suits` says so; whatever is odd stays with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .pieces import PIECE, SINGLE, log1p_sum, store, walk
from .reference import BATCHMEAN, HALF, MEAN, NONE

LARGE = 1 << 22  # elements of the input: below, torch is as fast
CLASSES = 8192  # the same for the classes of a row
RARE = 1e-30  # of a smaller probability digits may be lost
DTYPES = HALF | {SINGLE}


def _finish(loss: Tensor, weight: Tensor | None, out: Tensor | None) -> float:
    if weight is not None:
        loss.mul_(weight)
    if out is None:
        return loss.sum().item()
    out.copy_(loss)
    return 0.0


def _scale(gradient: Tensor, weight: Tensor | None, upstream: Tensor, dx: Tensor) -> None:
    if weight is not None:
        gradient.mul_(weight)
    store(gradient, upstream, dx)


def _bce_with_logits(want: bool, smoothing: float) -> Callable:
    """(1 - t) softplus(x) + p t softplus(-x) as x d + k log1p(e), two terms of one sign: e = exp(-|x|),
    k = 1 - t + p t, d = 1 - t where x >= 0 and -p t elsewhere. The gradient is d -+ k e / (1 + e)."""
    log2e = torch.full((1,), -math.log2(math.e), dtype=SINGLE, device="cpu")
    one = torch.ones(1, dtype=SINGLE, device="cpu")

    def formula(x, t, w, p, g, out, dx, e, d, positive, a, b):
        loss = 0.0
        if smoothing:
            t = torch.mul(t, 1.0 - smoothing, out=b).add_(0.5 * smoothing)
        torch.abs(x, out=e).mul_(log2e).exp2_()
        torch.ge(x, 0.0, out=positive)
        if p is None:
            torch.sub(positive, t, out=d)
        else:
            k, t = torch.neg(t, out=a).add_(one), torch.mul(t, p, out=b)
            torch.lerp(torch.neg(t, out=d), k, positive, out=d)
            k, a = k.add_(t), b
        if want and w is None and p is None and out is None:
            loss = log1p_sum(e, a) + torch.mul(x, d, out=a).sum().item()
        elif want:
            a.copy_(e).log1p_()
            if p is not None:
                a.mul_(k)
            loss = _finish(a.addcmul_(x, d), w, out)
        if dx is not None:
            e.div_(torch.add(e, one, out=a))
            if p is not None:
                e.mul_(k)
            _scale(e.addcmul_(e, positive, value=-2.0).add_(d), w, g, dx)
        return loss

    return formula


def _bce(want: bool) -> Callable:
    """-(t log x + (1 - t) log(1 - x)), each logarithm not below -100; the gradient is (x - t) / (x (1 - x))."""
    one = torch.ones(1, dtype=SINGLE, device="cpu")

    def formula(x, t, w, p, g, out, dx, a, b):
        loss = 0.0
        if want:
            (low, high), (first, last) = torch.aminmax(x), torch.aminmax(t)
            if not (low >= 0.0 and high <= 1.0 and first >= 0.0 and last <= 1.0):
                reference.bce(x, t, None, NONE, SINGLE)  # says no
            torch.xlogy(one, x, out=a).clamp_min_(-100.0)
            torch.neg(x, out=b).log1p_().clamp_min_(-100.0)
            torch.lerp(b, a, t, out=a)
            loss = -_finish(a, w, None) if out is None else _finish(a.neg_(), w, out)
        if dx is not None:
            torch.sub(one, x, out=b).mul_(x).clamp_min_(1e-12)
            _scale(torch.sub(x, t, out=a).div_(b), w, g, dx)
        return loss

    return formula


def _kl_div(want: bool, log_target: bool) -> Callable:
    """t log t - t x, or exp(t) (t - x) with exp(t) = sigmoid(t) / sigmoid(-t); the gradient is -t, or -exp(t)."""

    def formula(x, t, w, p, g, out, dx, a, b):
        loss, probability = 0.0, t
        if log_target:
            probability = torch.sigmoid(t, out=b).div_(torch.neg(t, out=a).sigmoid_())
            if want:
                loss = _finish(torch.sub(t, x, out=a).mul_(b), None, out)
        elif want:
            loss = _finish(torch.xlogy(t, t, out=a).addcmul_(t, x, value=-1.0), None, out)
        if dx is not None:
            store(torch.neg(probability, out=a), g, dx)
        return loss

    return formula


def _labels(want: bool, smooth: bool) -> Callable:
    """log p of the label (or p itself, where that is enough), the sum of w log p, and total p - spread w."""

    def formula(x, y, total, spread, w, picked, sums, dx, p, a):
        if want and (smooth or dx is None):
            torch.gather(torch.log_softmax(x, 1, out=p), 1, y, out=picked)
            if smooth:
                torch.sum(p if w is None else torch.mul(p, w, out=a), 1, keepdim=True, out=sums)
        if dx is not None:
            torch.softmax(x, 1, out=p)
            if not (want and smooth):
                torch.gather(p, 1, y, out=picked)
            if not smooth:
                store(p, total, dx)
            else:
                p.mul_(total)
                dx.copy_(p.sub_(spread) if w is None else p.addcmul_(spread, w, value=-1.0))
        return 0.0

    return formula


def _probabilities(smoothing: float) -> Callable:
    """-sum(q log p), and share (p sum(q) - q): q = w ((1 - smoothing) t + smoothing / classes)."""

    def formula(x, t, share, w, loss, dx, p, q):
        torch.log_softmax(x, 1, out=p)
        torch.mul(t, 1.0 - smoothing, out=q).add_(smoothing / x.shape[1])
        if w is not None:
            q.mul_(w)
        torch.sum(p.mul_(q), 1, keepdim=True, out=loss).neg_()
        if dx is not None:
            torch.softmax(x, 1, out=p)
            store(p.mul_(q.sum(1, keepdim=True)).sub_(q), share, dx)
        return 0.0

    return formula


Results = tuple[Tensor | None, Tensor | None]  # the loss and its gradient, as far as they are wanted


def _cross_entropy_of(x: Tensor, others: Any, upstream: Tensor, want: bool, grad: bool) -> Results:
    target, weight, ignore_index, smoothing, _, _, reduction, _, dtype = others
    classes, piece = x.shape[1], max(1, PIECE // x.shape[1])
    w = None if weight is None else weight.to(SINGLE).unsqueeze(0)
    dx = torch.empty_like(x) if grad else None
    rows = torch.empty((len(x), 1), dtype=SINGLE, device="cpu")
    upstream = upstream.to(SINGLE).reshape(-1, 1)
    if target.is_floating_point():
        count: Any = len(x) if reduction == MEAN else 1.0
        walk(_probabilities(smoothing), piece, [x, target, (upstream / count).expand_as(rows), w, rows, dx], 2)
    else:
        kept = target.unsqueeze(1) != ignore_index
        y = target.unsqueeze(1).where(kept, 0)
        row_weight = (kept if w is None else w[0][y].where(kept, 0.0)).to(SINGLE)
        count = row_weight.sum() if reduction == MEAN else 1.0
        share = (upstream / count).where(kept, 0.0)
        label, spread = (1.0 - smoothing) * row_weight, smoothing / classes
        total = label + spread * (classes if w is None else w.sum())
        sums = torch.empty_like(rows) if smoothing else None
        scales = [total * share, spread * share if smoothing else None] if grad else [None, None]
        tensors = [x, y, *scales, w, rows, sums, dx]
        walk(_labels(want, bool(smoothing)), piece, tensors, 2)
        logs = want and (not grad or bool(smoothing))
        if dx is not None:
            p = rows.exp() if logs else rows
            value = total * p - label - (spread if w is None else spread * w[0][y])
            at = torch.arange(len(x), device="cpu").unsqueeze(1) * classes + y
            dx.put_(at, (value * share).to(dx.dtype))  # scatter_ would copy dx
            dx.index_fill_(0, (p.isnan() & ~kept).flatten().nonzero().flatten(), 0.0)  # infinite logits, ignored
        if want:
            if not logs:
                rare = (rows < RARE).flatten().nonzero().flatten()
                rows.log_()
                for some in rare.split(16):
                    rows[some] = x[some].to(SINGLE).log_softmax(1).gather(1, y[some])
            rows = label * rows if sums is None else label * rows + spread * sums
            rows = rows.neg_().where(kept, 0.0)
    if not want:
        return None, dx
    loss = rows.squeeze(1) if reduction == NONE else rows.sum(dtype=torch.float64) / count
    return loss.to(dtype), dx


def _elements(
    formula: Callable, spares: int, x: Tensor, target: Tensor, weights: tuple[Any, Any], reduction: int,
    dtype: torch.dtype, upstream: Tensor, want: bool, grad: bool,
) -> Results:  # fmt: skip
    """A loss of one value an element. Weights that rows share are repeated to the length of a piece."""
    classes = x.shape[-1]
    shared = [w is not None and w.shape != x.shape for w in weights]
    length = PIECE // classes * classes if any(shared) else PIECE
    lanes = [
        w.reshape(-1).to(SINGLE).expand(classes).repeat(length // classes) if s else w
        for w, s in zip(weights, shared, strict=True)
    ]
    factor = {MEAN: 1.0 / x.numel(), BATCHMEAN: 1.0 / x.shape[0]}.get(reduction, 1.0)
    upstream = upstream if upstream.dim() else (upstream.to(SINGLE) * factor).reshape(1)
    dx = torch.empty_like(x) if grad else None
    out = torch.empty_like(x, dtype=dtype) if want and reduction == NONE else None
    tensors = [x, target, *lanes, upstream, out, dx]
    total = walk(formula, length, [t if t is None else t.view(-1) for t in tensors], spares)
    if want and out is None:
        out = torch.tensor(total * factor, dtype=dtype, device="cpu")
    return out, dx


def _bce_with_logits_of(x: Tensor, others: Any, upstream: Tensor, want: bool, grad: bool) -> Results:
    target, weight, pos_weight, smoothing, reduction, _, dtype = others
    formula, weights = _bce_with_logits(want, smoothing), (weight, pos_weight)
    return _elements(formula, 5, x, target, weights, reduction, dtype, upstream, want, grad)


def _bce_of(x: Tensor, others: Any, upstream: Tensor, want: bool, grad: bool) -> Results:
    target, weight, reduction, dtype = others
    return _elements(_bce(want), 2, x, target, (weight, None), reduction, dtype, upstream, want, grad)


def _kl_div_of(x: Tensor, others: Any, upstream: Tensor, want: bool, grad: bool) -> Results:
    target, log_target, reduction, dtype = others
    return _elements(_kl_div(want, log_target), 2, x, target, (None, None), reduction, dtype, upstream, want, grad)


LOSSES = {  # name: the function, and where the reduction is among its arguments
    "BCE": (_bce_of, -2),
    "BCEWithLogits": (_bce_with_logits_of, -3),
    "CrossEntropy": (_cross_entropy_of, -3),
    "KLDiv": (_kl_div_of, -2),
}


def compute(name: str, x: Tensor, others: Any, grad: bool) -> Results:
    """The loss, and its gradient under an upstream of 1 if `grad`."""
    return LOSSES[name][0](x, others, torch.ones((), dtype=SINGLE, device="cpu"), True, grad)


def gradient(name: str, x: Tensor, others: Any, upstream: Tensor) -> Tensor | None:
    """The gradient alone. An upstream that is one number expanded stays one number."""
    upstream = upstream.contiguous() if any(upstream.stride()) else upstream[(0,) * upstream.dim()]
    return LOSSES[name][0](x, others, upstream, False, True)[1]


def unreduced(name: str, others: Any) -> bool:
    return others[LOSSES[name][1]] == NONE


def ordinary(*tensors: Tensor) -> bool:
    """Whether these are strided tensors of this process's memory and no more, and nothing looks on."""
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and t.layout is torch.strided for t in tensors)
        and not any(torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def suits(name: str, x: Tensor, others: tuple[Any, ...]) -> bool:
    """Whether these arguments are among those that are computed here; the reference takes them all."""
    if name not in LOSSES:
        return False
    target, tensors = others[0], [t for t in (x, *others) if isinstance(t, Tensor)]
    if not ordinary(*tensors) or not all(t.is_contiguous() for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors[1:]):
        return False
    if x.dtype not in DTYPES or others[-1] not in DTYPES or any(t.dtype not in DTYPES for t in tensors[2:]):
        return False
    if name == "CrossEntropy":
        z_loss, softcap = others[4:6]
        if z_loss or softcap or x.dim() != 2 or x.shape[1] < CLASSES or x.nbytes < 8 * LARGE:
            return False  # torch's is fast as long as malloc keeps its memory, up to 32 MiB
        if target.dtype is torch.int64:
            low, high = target.where(target != others[2], 0).aminmax()
            return bool(low >= 0 and high < x.shape[1])
    elif not all(t.shape == x.shape or (x.shape[-1] <= PIECE and t.numel() in (1, *t.shape[-1:])) for t in tensors[2:]):
        return False
    return target.dtype in DTYPES
