"""The oracle: every loss as a formula in float64, written apart from the package, and how close is close.

The functions carry the names and arguments of the public ones. They are differentiable, and their gradients
are what the tests hold the kernels to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """An element may be off by `relative` of itself and by `floor` of its tensor's scale."""

    relative: float
    floor: float


# float32: a few roundings of the arithmetic. Half precision: the same arithmetic, and one rounding of the
# result, half a unit in the last place.
TOLERANCES = {
    torch.float32: Tolerance(6e-6, 1e-6),
    torch.bfloat16: Tolerance(6e-6 + 2.0**-8, 1e-6),
    torch.float16: Tolerance(6e-6 + 2.0**-11, 1e-6),
}
# The half-precision error may be this many times torch's own, and half a unit in the last place of the
# tensor's scale more.
TORCH_MARGIN = 2.0
SMALLEST_HALF = 2.0**-24  # float16's subnormal numbers lie this far apart


def factor(case) -> float:
    """Times the tolerance: gradients of KL from logits are differences of the two sides' logits; one that was
    computed in forward is rounded twice, before and after the upstream gradient."""
    return (4.0 if case.loss == "kl_div_with_logits" else 1.0) * (2.0 if "grad_in_forward" in case.name else 1.0)


def scale_of(expected: Tensor) -> float:
    """A tensor's size: the 99th percentile of its magnitudes, so that one pole does not hide the rest."""
    finite = expected[expected.isfinite()].abs().flatten()
    if finite.numel() == 0:
        return 0.0
    return float(finite.kthvalue(max(1, round(0.99 * finite.numel()))).values)


def assert_close(actual: Tensor, expected: Tensor, factor: float = 1.0, absolute: float | Tensor = 0.0) -> None:
    """`actual` against float64; infinities and NaN where `expected` has them, and nowhere else.

    A value beyond what the dtype holds is infinite. `factor` multiplies the tolerance, `absolute` adds to it."""
    relative, floor = TOLERANCES[actual.dtype]
    assert actual.shape == expected.shape
    actual_dtype, actual = actual.dtype, actual.detach().double().cpu()
    expected = expected.detach().double().cpu()
    allowed = factor * (relative * expected.abs() + floor * scale_of(expected) + 1e-37) + absolute
    if actual_dtype is torch.float16:
        allowed += 0.51 * SMALLEST_HALF
    limit = torch.finfo(actual_dtype).max
    reaches = expected.abs() + allowed >= limit  # may round to infinity
    expected = torch.where(reaches & actual.isinf() & (actual.sign() == expected.sign()), actual, expected)
    wrong = ~((actual - expected).abs() <= allowed)
    wrong &= ~((actual == expected) | (actual.isnan() & expected.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are off; at {at} got {actual[at].item()!r}, expected "
            f"{expected[at].item()!r}, off by {(actual - expected)[at].item():.3g}, "
            f"allowed {allowed[at].item():.3g}"
        )


def assert_no_worse_than_torch(actual: Tensor, by_torch: Tensor, expected: Tensor) -> None:
    """The largest error against float64 is at most TORCH_MARGIN times torch's, and half a unit more."""
    expected = expected.detach().double().cpu()
    ours, theirs = (t.detach().double().cpu() - expected for t in (actual, by_torch))
    finite = expected.isfinite() & ours.isfinite() & theirs.isfinite()
    if not finite.any():
        return
    ulp = torch.finfo(actual.dtype).eps * expected[finite].abs().max()
    assert ours[finite].abs().max() <= TORCH_MARGIN * theirs[finite].abs().max() + ulp / 2 + 1e-37


def reduce(loss: Tensor, reduction: str, count: Tensor | float | None = None, batch: int = 1) -> Tensor:
    if reduction == "none":
        return loss
    divisor = {"sum": 1, "batchmean": batch, "mean": loss.numel() if count is None else count}
    return loss.sum() / divisor[reduction]


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), with the right derivative at 0."""
    return torch.logaddexp(x, torch.zeros_like(x))


def binary_cross_entropy_with_logits(
    x, target, weight=None, reduction="mean", pos_weight=None, label_smoothing=0.0
):
    x, t = x.double(), target.double() * (1 - label_smoothing) + label_smoothing / 2
    p = 1.0 if pos_weight is None else pos_weight.double()
    loss = (1 - t) * softplus(x) + p * t * softplus(-x)
    return reduce(loss if weight is None else loss * weight.double(), reduction)


class _Bounded(torch.autograd.Function):
    """-(t log p + (1 - t) log(1 - p)) with both logarithms bounded at -100, and torch's derivatives: the
    bound is on (1 - p) p in the one of p, and nowhere in the one of t."""

    @staticmethod
    def forward(ctx, p, t):
        ctx.save_for_backward(p, t)
        return -(t * p.log().clamp(min=-100) + (1 - t) * torch.log1p(-p).clamp(min=-100))

    @staticmethod
    def backward(ctx, g):
        p, t = ctx.saved_tensors
        return g * (p - t) / ((1 - p) * p).clamp(min=1e-12), g * (torch.log1p(-p) - p.log())


def binary_cross_entropy(p, target, weight=None, reduction="mean"):
    loss = _Bounded.apply(p.double(), target.double())
    return reduce(loss if weight is None else loss * weight.double(), reduction)


def cross_entropy(
    x, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0,
    z_loss=0.0, softcap=None, return_z_loss=False,
):  # fmt: skip
    """logsumexp(x) sum(q) - sum(q x), q = w (the target distribution, smoothed), and z_loss logsumexp(x)^2."""
    dim = 1 if x.dim() > 1 else 0
    probabilities = target.is_floating_point()
    x = x.double().movedim(dim, -1)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    classes = x.shape[-1]
    w = torch.ones_like(x[0].flatten()[:1]).expand(classes) if weight is None else weight.double()
    lse = torch.logsumexp(x, -1)
    if probabilities:
        q = w * (target.double().movedim(dim, -1) * (1 - label_smoothing) + label_smoothing / classes)
        loss = (q * (lse.unsqueeze(-1) - x)).sum(-1)
        kept, count = torch.ones_like(lse), float(lse.numel())
    else:
        kept = (target != ignore_index).reshape(lse.shape)
        label = target.reshape(lse.shape).long().where(kept, 0)
        x_y = x.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        loss = (1 - label_smoothing) * w[label] * (lse - x_y)
        if label_smoothing:
            loss = loss + label_smoothing / classes * (w * (lse.unsqueeze(-1) - x)).sum(-1)
        loss = loss.where(kept, 0.0)
        count = w[label].where(kept, 0.0).sum()
    z = (z_loss * lse * lse).where(kept.bool(), 0.0)
    z = reduce(z, reduction, kept.sum())
    total = reduce(loss, reduction, count)
    total = total + z if z_loss else total
    return (total, z) if return_z_loss else total


def nll_loss(x, target, weight=None, ignore_index=-100, reduction="mean"):
    x = x.double().movedim(1 if x.dim() > 1 else 0, -1)
    kept = target != ignore_index
    label = target.long().where(kept, 0)
    w = 1.0 * kept if weight is None else weight.double()[label] * kept
    x_y = x.gather(-1, label.reshape(x.shape[:-1]).unsqueeze(-1)).reshape(label.shape)
    return reduce(-w.double() * x_y, reduction, w.double().sum())


def kl_div(x, target, reduction="mean", log_target=False):
    x, t = x.double(), target.double()
    loss = t.exp() * (t - x) if log_target else torch.special.xlogy(t, t) - t * x
    return reduce(loss, reduction, batch=x.shape[0])


def log_softmax(x, dim):
    return x - torch.logsumexp(x, dim, keepdim=True)


def kl_div_with_logits(x, target, dim=-1, temperature=1.0, reverse=False, reduction="batchmean"):
    """T^2 sum p (log p - log q), p = softmax(target / T), q = softmax(x / T), or the other way about."""
    log_q, log_p = log_softmax(x.double() / temperature, dim), log_softmax(target.double() / temperature, dim)
    if reverse:
        log_q, log_p = log_p, log_q
    return reduce(temperature**2 * log_p.exp() * (log_p - log_q), reduction, batch=x.shape[0])


def entropy(p, dim=-1, reduction="none"):
    return reduce(torch.special.entr(p.double()).sum(dim), reduction)  # whose derivative at 0 is inf


def entropy_with_logits(x, dim=-1, reduction="none"):
    log_p = log_softmax(x.double(), dim)
    return reduce(-(log_p.exp() * log_p).sum(dim), reduction)


def exact(call, tensors, keywords, differentiate, upstream=None):
    """value_and_gradients of one of these functions, with leaves in float64: nothing is rounded."""
    tensors = [t.double() if t.is_floating_point() else t for t in tensors]
    return value_and_gradients(call, tensors, keywords, differentiate, upstream)


def value_and_gradients(call, tensors, keywords, differentiate, upstream=None):
    """`call`'s loss, its upstream gradient and the gradients of the leading tensors. An upstream gradient that
    is not given is drawn unevenly, in the loss's dtype: ones would hide a dropped factor."""
    leaves = [t.detach().requires_grad_(i < differentiate) if t.is_floating_point() else t
              for i, t in enumerate(tensors)]  # fmt: skip
    loss = call(*leaves, **keywords)
    if upstream is None:
        upstream = torch.rand(loss.shape, device=loss.device).add(0.5).to(loss.dtype)
    wanted = [t for t in leaves if t.requires_grad]
    return loss.detach(), upstream, list(torch.autograd.grad(loss, wanted, upstream.to(loss.dtype)))
