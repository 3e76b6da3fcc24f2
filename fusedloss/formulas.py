"""What the losses of large CPU tensors compute on a piece, loss and gradient together, through given buffers.

A formula takes a piece of every tensor and its buffers, writes the gradient and the unreduced losses where they are
wanted, and returns the sum of the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .pieces import PIECE, SINGLE, constant
from .reference import NONE

NORMAL = torch.finfo(SINGLE).tiny  # logarithms of smaller numbers, and of 0, take MKL ten times as long


SHORT = PIECE // 16  # elements of which a logarithm takes no longer than a step that leads to fewer
LOG2E = math.log2(math.e)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """e^x by exp2, which takes a third of the time, and is off by x times its own rounding."""
    return torch.mul(x, constant(LOG2E), out=out).exp2_()


def log1p_sum(e: Tensor, buffer: Tensor) -> float:
    """The sum of log(1 + e), of fewer logarithms: (1 + e) (1 + f) is 1 + (e + f + e f), and nothing is rounded off."""
    n, rest = len(e), None
    while n > SHORT and n % 2 == 0:
        n //= 2
        if rest is None:
            rest = torch.addcmul(e[n:], e[n:], e[:n], out=buffer[:n]).add_(e[:n])
        else:
            low, high = rest[:n], rest[n:]
            rest = low.add_(high.addcmul_(high, low))
    return (buffer.copy_(e) if rest is None else rest).log1p_().sum().item()


def store(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """x times factor, through x where `out` is of another dtype: torch would allocate."""
    if out.dtype is SINGLE:
        torch.mul(x, factor, out=out)
    else:
        out.copy_(x.mul_(factor))


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


def bce_with_logits(want: bool, smoothing: float) -> Callable:
    """(1 - t) softplus(x) + p t softplus(-x) as x d + k log1p(e), two terms of one sign: e = exp(-|x|),
    k = 1 - t + p t, d = 1 - t where x >= 0 and -p t elsewhere. The gradient is d -+ k e / (1 + e)."""
    log2e, zero, one = constant(-LOG2E), constant(0.0), constant(1.0)

    def formula(x, t, w, p, g, out, dx, e, d, positive, a, b):
        loss = 0.0
        if smoothing:
            t = torch.mul(t, 1.0 - smoothing, out=b).add_(0.5 * smoothing)
        torch.abs(x, out=e).mul_(log2e).exp2_()
        torch.ge(x, zero, out=positive)
        if p is None:
            torch.sub(positive, t, out=d)
        else:
            k, t = torch.neg(t, out=a).add_(one), torch.mul(t, p, out=b)
            torch.lerp(torch.neg(t, out=d), k, positive, out=d)
            k, a = k.add_(t), b
        if want and w is None and p is None and out is None and x.numel() > PIECE // 2:
            loss = log1p_sum(e.view(-1), a.view(-1)) + torch.mul(x, d, out=a).sum().item()
        elif want:
            torch.log1p(e, out=a)
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


def bce(want: bool) -> Callable:
    """-(t log x + (1 - t) log(1 - x)), each logarithm not below -100; the gradient is (x - t) / (x (1 - x))."""
    one = constant(1.0)

    def formula(x, t, w, p, g, out, dx, a, b):
        loss = 0.0
        if want:
            (low, high), (first, last) = torch.aminmax(x), torch.aminmax(t)
            if not (low >= 0.0 and high <= 1.0 and first >= 0.0 and last <= 1.0):
                reference.bce(x, t, None, NONE, SINGLE)  # says no
            torch.log(x, out=a) if low >= NORMAL else torch.xlogy(one, x, out=a).clamp_min_(-100.0)
            torch.neg(x, out=b).log1p_().clamp_min_(-100.0)
            torch.lerp(b, a, t, out=a)
            loss = -_finish(a, w, None) if out is None else _finish(a.neg_(), w, out)
        if dx is not None:
            torch.sub(one, x, out=b).mul_(x).clamp_min_(1e-12)
            _scale(torch.sub(x, t, out=a).div_(b), w, g, dx)
        return loss

    return formula


def kl_div(want: bool, log_target: bool) -> Callable:
    """t log t - t x, or exp(t) (t - x); the gradient is -t, or -exp(t)."""

    def formula(x, t, w, p, g, out, dx, a, b):
        loss, probability = 0.0, t
        if log_target:
            probability = torch.exp(t, out=b)
            if want:
                loss = _finish(torch.sub(t, x, out=a).mul_(b), None, out)
        elif want and t.amin() >= 0.0:
            loss = _finish(torch.clamp_min(t, NORMAL, out=a).log_().mul_(t).addcmul_(t, x, value=-1.0), None, out)
        elif want:
            loss = _finish(torch.xlogy(t, t, out=a).addcmul_(t, x, value=-1.0), None, out)
        if dx is not None:
            store(torch.neg(probability, out=a), g, dx)
        return loss

    return formula


def entropy_with_logits(x, g, loss, dx, u, w, a):
    """log s - m with u = x - max, s = sum e^u and m = sum e^u u / s; the gradient is -e^u (u - m) / s."""
    torch.sub(x, x.amax(1, keepdim=True), out=u)
    s = exp(u, w).sum(1, keepdim=True)
    mean = torch.mul(u.clamp_min_(-1e4), w, out=a).sum(1, keepdim=True).div_(s)  # of -inf: adds 0
    if loss is not None:
        torch.sub(torch.log(s), mean, out=loss)
    if dx is not None:
        store(u.sub_(mean).mul_(w), (g / s).neg_(), dx)
    return 0.0


def labels(want: bool, smooth: bool, converted: bool) -> Callable:
    """log p of the label (or p itself, where that is enough), the sum of w log p, and total p - spread w. What was
    `converted` is the piece's own, and may be written over."""

    def formula(x, y, total, spread, w, picked, sums, dx, p, a):
        if converted and not smooth:
            p = x  # which is read once
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


def probabilities(smoothing: float) -> Callable:
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


def kl_div_with_logits(want: bool, reverse: bool, temperature: float) -> Callable:
    """T^2 KL(first || second) by u = (y - max) / T, w = e^u and s = sum w of either's logits y: with the mean
    a = sum w1 (u1 - u2) / s1 it is a + log(s2 / s1). Its gradient is T w1 / s1 (u1 - u2 - a) in the first,
    T (w2 / s2 - w1 / s1) in the second."""

    def shifted(y, out):
        torch.sub(y, y.amax(1, keepdim=True), out=out)
        return out if temperature == 1.0 else out.mul_(1.0 / temperature)

    def formula(x, t, g, dx, u1, u2, w1):
        first, second = (x, t) if reverse else (t, x)
        loss = 0.0
        mean: Any = None
        s1 = exp(shifted(first, u1), w1).sum(1, keepdim=True)
        shifted(second, u2)
        gap = u1.sub_(u2) if want or reverse else u1
        s2 = (w2 := exp(u2, u2)).sum(1, keepdim=True)
        if want or reverse:
            product = torch.mul(gap, w1, out=w2 if reverse else gap)
            mean = product.sum(1, keepdim=True).div_(s1)
            if mean.isnan().any():  # a class without probability adds nothing, whatever the second's logit is
                none = w1 == 0.0
                gap.masked_fill_(none, 0.0)
                mean = product.masked_fill_(none, 0.0).sum(1, keepdim=True).div_(s1)
        if want:
            divergence = s2.div(s1).log_().add_(mean).clamp_min_(0.0)
            loss = temperature * temperature * divergence.sum(dtype=torch.float64).item()
        if dx is not None:
            k1, k2 = temperature * g / s1, temperature * g / s2
            if reverse:
                store(gap.sub_(mean).mul_(w1), k1, dx)
            elif dx.dtype is SINGLE:
                torch.addcmul(w2.mul_(k2), w1, k1, value=-1.0, out=dx)
            else:
                dx.copy_(w2.mul_(k2).addcmul_(w1, k1, value=-1.0))
        return loss

    return formula
