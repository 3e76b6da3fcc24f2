"""The losses of the reference for large CPU tensors, loss and gradient in one walk over their pieces.

Computed in float32, summed in float64, rounded once. Takes the arguments of the Functions, which `dispatch` sends
here where `suits` says so; whatever is odd stays with the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import formulas
from .pieces import PIECE, SINGLE, constant, walk
from .reference import BATCHMEAN, HALF, MEAN, NONE

LARGE = {  # a loss, and the elements of the input below which the reference is as fast
    "BCE": 1 << 20,
    "BCEWithLogits": 1 << 15,
    "CrossEntropy": 1 << 22,
    "EntropyWithLogits": 1 << 17,
    "KLDiv": 1 << 22,
    "KLDivWithLogits": 1 << 17,
}
NEVER = 1 << 62
KEPT = 1 << 25  # bytes of a tensor whose memory malloc keeps: where torch does little else, it is as fast up to there
CLASSES = 8192  # of a row of cross entropy: as LARGE
RARE = 1e-30  # of a smaller probability digits may be lost
DTYPES = HALF | {SINGLE}
PLAIN = frozenset((Tensor, torch.nn.Parameter))
is_batched = torch._C._functorch.is_legacy_batchedtensor

Results = tuple[Tensor | None, Tensor | None]  # the loss and its gradient, as far as they are wanted


def _scalar(x: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(x, dtype=dtype, device="cpu")  # which takes what is beyond the dtype's range for infinite


def _cross_entropy(x: Tensor, others: Any, upstream: Tensor | None, want: bool, grad: bool) -> Results:
    target, weight, ignore_index, smoothing, _, _, reduction, _, dtype = others
    classes, piece = x.shape[1], max(1, PIECE // x.shape[1])
    w = None if weight is None else weight.to(SINGLE).unsqueeze(0)
    dx = torch.empty_like(x) if grad else None
    rows = torch.empty((len(x), 1), dtype=SINGLE, device="cpu")
    upstream = constant(1.0) if upstream is None else upstream.to(SINGLE).reshape(-1, 1)
    if target.is_floating_point():
        count: Any = len(x) if reduction == MEAN else 1.0
        walk(formulas.probabilities(smoothing), piece, [x, target, (upstream / count).expand_as(rows), w, rows, dx], 2)
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
        walk(formulas.labels(want, bool(smoothing), x.dtype in HALF), piece, tensors, 2)
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


def _scaled(upstream: Tensor | None, factor: float) -> Tensor:
    """As one number; an upstream of 1 is not given."""
    if upstream is None:
        return torch.full((1,), factor, dtype=SINGLE, device="cpu")
    return (upstream.to(SINGLE) * factor).reshape(1)


def _factor(x: Tensor, reduction: int) -> float:
    if reduction == MEAN:
        return 1.0 / x.numel()
    return 1.0 / x.shape[0] if reduction == BATCHMEAN else 1.0


def _elements(
    formula: Callable, spares: int, x: Tensor, target: Tensor, weights: tuple[Any, Any], reduction: int,
    dtype: torch.dtype, upstream: Tensor | None, want: bool, grad: bool,
) -> Results:  # fmt: skip
    """A loss of one value an element. Weights that rows share are repeated to the length of a piece."""
    length = PIECE
    if any(shared := [w is not None and w.shape != x.shape for w in weights]):
        classes = x.shape[-1]
        length = min(PIECE, x.numel()) // classes * classes
        weights = tuple(
            w.reshape(-1).to(SINGLE).expand(classes).repeat(length // classes) if s else w
            for w, s in zip(weights, shared, strict=True)
        )
    factor = _factor(x, reduction)
    g: Any = upstream if upstream is not None and upstream.dim() else _scaled(upstream, factor) if grad else None
    dx = torch.empty_like(x) if grad else None
    out = torch.empty_like(x, dtype=dtype) if want and reduction == NONE else None
    tensors = [x, target, *weights, g, out, dx]
    if x.numel() > length or any(shared):
        tensors = [t if t is None else t.view(-1) for t in tensors]
    total = walk(formula, length, tensors, spares)
    if want and out is None:
        out = _scalar(total * factor, dtype)
    return out, dx


def _bce_with_logits(x: Tensor, others: Any, upstream: Tensor | None, want: bool, grad: bool) -> Results:
    target, weight, pos_weight, smoothing, reduction, _, dtype = others
    formula, weights = formulas.bce_with_logits(want, smoothing), (weight, pos_weight)
    return _elements(formula, 5, x, target, weights, reduction, dtype, upstream, want, grad)


def _bce(x: Tensor, others: Any, upstream: Tensor | None, want: bool, grad: bool) -> Results:
    target, weight, reduction, dtype = others
    return _elements(formulas.bce(want), 2, x, target, (weight, None), reduction, dtype, upstream, want, grad)


def _kl_div(x: Tensor, others: Any, upstream: Tensor | None, want: bool, grad: bool) -> Results:
    target, log_target, reduction, dtype = others
    formula = formulas.kl_div(want, log_target)
    return _elements(formula, 2, x, target, (None, None), reduction, dtype, upstream, want, grad)


def _kl_div_with_logits(x: Tensor, others: Any, upstream: Tensor | None, want: bool, grad: bool) -> Results:
    target, _, temperature, reverse, reduction, _, dtype = others
    factor = _factor(x, reduction)
    dx = torch.empty_like(x) if grad else None
    classes = x.shape[-1]
    rows = [None if t is None else t.view(-1, classes) for t in (x, target, dx)]
    formula = formulas.kl_div_with_logits(want, reverse, float(temperature))
    g = _scaled(upstream, factor) if grad else None
    total = walk(formula, max(1, PIECE // classes), [*rows[:2], g, rows[2]], 3)
    return _scalar(total * factor, dtype) if want else None, dx


def _entropy_with_logits(x: Tensor, others: Any, upstream: Tensor | None, want: bool, grad: bool) -> Results:
    _, reduction, _, dtype = others
    classes = x.shape[-1]
    dx = torch.empty_like(x) if grad else None
    loss = torch.empty((x.numel() // classes, 1), dtype=SINGLE, device="cpu")
    upstream = constant(1.0) if upstream is None else upstream.to(SINGLE).reshape(-1, 1)
    g = upstream / (len(loss) if reduction == MEAN else 1)
    rows = [x.view(-1, classes), g.expand_as(loss), loss if want else None]
    piece = max(1, PIECE // classes)
    walk(formulas.entropy_with_logits, piece, [*rows, None if dx is None else dx.view(-1, classes)], 3)
    if not want:
        return None, dx
    if reduction == NONE:
        return loss.view(x.shape[:-1]).to(dtype), dx
    return (loss.sum(dtype=torch.float64) / (len(loss) if reduction == MEAN else 1)).to(dtype), dx


LOSSES = {  # name: the function, and where the reduction is among its arguments
    "BCE": (_bce, -2),
    "BCEWithLogits": (_bce_with_logits, -3),
    "CrossEntropy": (_cross_entropy, -3),
    "EntropyWithLogits": (_entropy_with_logits, -3),
    "KLDiv": (_kl_div, -2),
    "KLDivWithLogits": (_kl_div_with_logits, -3),
}


def compute(name: str, x: Tensor, others: Any, grad: bool) -> Results:
    """The loss, and its gradient under an upstream of 1 if `grad`."""
    return LOSSES[name][0](x, others, None, True, grad)


def gradient(name: str, x: Tensor, others: Any, upstream: Tensor) -> Tensor | None:
    """The gradient alone. An upstream that is one number expanded stays one number."""
    upstream = upstream.contiguous() if any(upstream.stride()) else upstream[(0,) * upstream.dim()]
    return LOSSES[name][0](x, others, upstream, False, True)[1]


def unreduced(name: str, others: Any) -> bool:
    return others[LOSSES[name][1]] == NONE


def unwatched() -> bool:
    """Whether no transform, mode or trace looks on."""
    return (
        not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def ordinary(*tensors: Tensor) -> bool:
    """Whether these are strided tensors of this process's memory and no more, and nothing looks on."""
    for t in tensors:
        if type(t) not in PLAIN or not t.is_cpu or t.layout is not torch.strided or is_batched(t):
            return False
    return unwatched()


def suits(name: str, x: Tensor, others: tuple[Any, ...]) -> bool:
    """Whether these arguments are among those that are computed here; the reference takes them all."""
    target, tensors, grad = others[0], [t for t in others if isinstance(t, Tensor)], torch.is_grad_enabled()
    if x.dtype not in DTYPES or others[-1] not in DTYPES or not ordinary(x, *tensors) or not x.is_contiguous():
        return False
    for t in tensors:
        if not t.is_contiguous() or (grad and t.requires_grad) or (t.dtype not in DTYPES and t is not target):
            return False
    if name == "CrossEntropy":
        z_loss, softcap = others[4:6]
        if z_loss or softcap or x.dim() != 2 or x.shape[1] < CLASSES or x.nbytes <= KEPT:
            return False
        if target.dtype is torch.int64:
            low, high = target.where(target != others[2], 0).aminmax()
            return bool(low >= 0 and high < x.shape[1])
    elif name == "EntropyWithLogits":
        return bool(target == x.dim() - 1)  # the dimension stands first
    elif name == "KLDivWithLogits":
        return others[1] == x.dim() - 1 and target.dtype in DTYPES
    elif name == "KLDiv" and others[1]:
        return x.nbytes > KEPT and target.dtype in DTYPES
    elif any(t.shape != x.shape and (x.shape[-1] > PIECE or t.numel() not in (1, *t.shape[-1:])) for t in tensors[1:]):
        return False
    return target.dtype in DTYPES
