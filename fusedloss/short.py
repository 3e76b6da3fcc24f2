"""The losses of small CPU tensors in few torch operations, some with their gradient written out.

A call on them is overhead, operation by operation, and autograd may record, and run, twice as many. Tensors are of
one dtype; computed in float32 (float64 in its own), rounded once. A loss that is not finite is the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import e, log2, nan
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus  # x itself from 20 on, to the last bit of float32

from . import reference
from .reference import BACKWARD, BATCHMEAN, HALF, MEAN, NONE, SUM, softplus_of, torch_kl_div

FEW = 4096  # elements of which a second softplus takes no longer than three operations more; twice as many where
# others come between, after which each operation takes longer


@lru_cache(256)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """As a tensor: operations read it sooner than Python's."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """By the methods that take no argument, which is quicker to parse."""
    if x.dtype is dtype:
        return x
    return x.bfloat16() if dtype is torch.bfloat16 else x.half()


def _reduced(loss: Tensor, reduction: int, dtype: torch.dtype, sign: int = 1) -> Tensor:
    """sign times the loss; a mean as torch's sum divided by a tensor, which takes half the time of torch's mean."""
    if reduction == NONE:
        return _cast(loss if sign > 0 else loss.neg(), dtype)
    count = loss.numel() if reduction == MEAN else 1
    loss = loss.sum()
    return _cast(loss.div_(_number(sign * count, loss.dtype)), dtype)


def _scaled(gradient: Tensor, dloss: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """gradient times a reduced loss's upstream gradient, or a batch of them, and factor."""
    return _cast(gradient.mul(dloss.mul(_number(factor, gradient.dtype))), dtype)


def bce_with_logits(x: Tensor, target: Tensor, reduction: int, want: bool) -> tuple[Tensor, Tensor | None]:
    """(1 - t) softplus(x) + t softplus(-x), or (1 - t) relu(x) + t relu(-x) + log1p(exp(-|x|)); the gradient
    (1 - t) sigmoid(x) - t sigmoid(-x)."""
    dtype, t = x.dtype, target
    if dtype in HALF:
        x, t = x.float(), t.float()
    minus = x.neg()
    dx = torch.sigmoid(x).lerp_(torch.sigmoid(minus).neg_(), t) if want else None
    if x.dtype is not torch.float32:
        loss = softplus_of(x).lerp_(softplus_of(minus), t)
    elif x.numel() < (2 * FEW if want else FEW):
        loss = softplus(x).lerp_(softplus(minus), t)
    else:  # exp2 of a product is off by x times its own rounding
        loss, negative = x.relu(), minus.relu_()
        tail = loss.add(negative).mul_(_number(-log2(e), torch.float32)).exp2_().log1p_()
        loss = loss.lerp_(negative, t).add_(tail)
    return _reduced(loss, reduction, dtype), dx


def bce_with_logits_gradient(dloss: Tensor, x: Tensor, dx: Tensor, reduction: int) -> Tensor:
    if reduction == NONE:
        return _cast(dx.mul(dloss), x.dtype)
    return _scaled(dx, dloss, 1.0 / x.numel() if reduction == MEAN else 1.0, x.dtype)


def kl_div_with_logits(
    x: Tensor, target: Tensor, dim: int, temperature: float, reverse: bool, reduction: int
) -> Tensor:
    """T^2 p (log p - log q): nan where a class has no probability in either, and for a batch of 0. torch's own
    functions do in one call what a gradient written out takes several for."""
    dtype = x.dtype
    wide = torch.float32 if dtype in HALF else dtype
    if temperature != 1.0:
        x, target = x.to(wide) / temperature, target.to(wide) / temperature
    log_q, log_p = torch.log_softmax(x, dim, wide), torch.log_softmax(target, dim, wide)
    if reverse:
        log_q, log_p = log_p, log_q
    loss = torch_kl_div(log_q, log_p, SUM if reduction == BATCHMEAN else reduction, log_target=True)
    factor = temperature * temperature
    if reduction == BATCHMEAN:
        factor = factor / x.shape[0] if x.shape[0] else nan
    return _cast(loss if factor == 1.0 else loss * _number(factor, wide), dtype)


def entropy_with_logits(
    x: Tensor, target: None, dim: int, reduction: int, want: bool
) -> tuple[Tensor, Tensor | None]:
    """H = -sum p log p: nan where a class has no probability; the gradient -p (log p + H), here its negative."""
    log_p = torch.log_softmax(x, dim, torch.float32 if x.dtype in HALF else x.dtype)
    p = log_p.exp()
    minus = (p * log_p).sum(dim)
    dx = log_p.sub_(minus.unsqueeze(dim)).mul_(p) if want else None
    return _reduced(minus, reduction, x.dtype, -1), dx


def entropy_with_logits_gradient(dloss: Tensor, x: Tensor, dx: Tensor, dim: int, reduction: int) -> Tensor:
    if reduction == NONE:
        return _cast(dx.mul(dloss.to(dx.dtype).neg().unsqueeze(dim)), x.dtype)
    return _scaled(dx, dloss, -x.shape[dim] / x.numel() if reduction == MEAN else -1.0, x.dtype)


def _bce_with_logits(x: Tensor, target: Tensor, reduction: int) -> Tensor:
    return reference.bce_with_logits(x, target, None, None, 0.0, reduction, BACKWARD, x.dtype)


def _entropy_with_logits(x: Tensor, target: None, dim: int, reduction: int) -> Tensor:
    return reference.entropy_with_logits(x, dim, reduction, BACKWARD, x.dtype)


# loss(x, target, *numbers, reduction, want): the loss, and where it is wanted the gradient of its sum, whose operations
# take less time here than in backward; gradient(dloss, x, that, *numbers, reduction): scaled, and rounded; and the
# reference of the loss's arguments
LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "BCEWithLogits": (bce_with_logits, bce_with_logits_gradient, _bce_with_logits),
    "EntropyWithLogits": (entropy_with_logits, entropy_with_logits_gradient, _entropy_with_logits),
}
