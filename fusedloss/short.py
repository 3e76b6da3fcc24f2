"""The losses of small CPU tensors in few torch operations, some with their gradient written out.

A call on them is overhead, operation by operation, and autograd may record, and run, twice as many. Tensors are of
one dtype; computed in float32 (float64 in its own), rounded once. A loss that is not finite is the reference's.
"""

from __future__ import annotations

from collections.abc import Callable
from math import nan

import torch
from torch import Tensor

from .reference import BATCHMEAN, HALF, MEAN, NONE, SUM, cast, reduced, softplus_of, torch_kl_div

Kept = tuple[Tensor, ...]


def _scaled(gradient: Tensor, dloss: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """gradient, in place, times a reduced loss's upstream gradient and factor."""
    return cast(gradient.mul_(dloss.item() * factor), dtype)


def bce_with_logits(x: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Kept]:
    """(1 - t) softplus(x) + t softplus(-x)."""
    dtype = x.dtype
    if dtype in HALF:
        x, target = x.to(torch.float32), target.to(torch.float32)
    minus = -x
    return reduced(torch.lerp(softplus_of(x), softplus_of(minus), target), reduction, dtype), (x, minus, target)


def bce_with_logits_gradient(dloss: Tensor, x: Tensor, kept: Kept, reduction: int) -> Tensor:
    """(1 - t) sigmoid(x) - t sigmoid(-x)."""
    wide, minus, target = kept
    dx = torch.sigmoid(wide).lerp_(torch.sigmoid(minus).neg_(), target)
    if reduction == NONE:
        return cast(dx.mul_(dloss), x.dtype)
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
    return cast(loss if factor == 1.0 else loss * factor, dtype)


def entropy_with_logits(x: Tensor, target: None, dim: int, reduction: int) -> tuple[Tensor, Kept]:
    """-sum p log p: nan where a class has no probability."""
    log_p = torch.log_softmax(x, dim, torch.float32 if x.dtype in HALF else x.dtype)
    p = log_p.exp()
    minus = (p * log_p).sum(dim)
    return reduced(-minus, reduction, x.dtype), (log_p, p, minus)


def entropy_with_logits_gradient(dloss: Tensor, x: Tensor, kept: Kept, dim: int, reduction: int) -> Tensor:
    """-p (log p + H)."""
    log_p, p, minus = kept
    dx = torch.sub(log_p, minus.unsqueeze(dim)).mul_(p)
    if reduction == NONE:
        return cast(dx.mul_(dloss.to(p.dtype).neg().unsqueeze(dim)), x.dtype)
    return _scaled(dx, dloss, -1.0 / minus.numel() if reduction == MEAN else -1.0, x.dtype)


# loss(x, target, *numbers, reduction): the loss, and what its gradient is computed from; and
# gradient(dloss, x, that, *numbers, reduction)
LOSSES: dict[str, tuple[Callable[..., tuple[Tensor, Kept]], Callable[..., Tensor]]] = {
    "BCEWithLogits": (bce_with_logits, bce_with_logits_gradient),
    "EntropyWithLogits": (entropy_with_logits, entropy_with_logits_gradient),
}
