"""The losses in plain torch: any device, any float dtype, exact in float64, differentiable to any order.

Each function takes the arguments of the Function of its name. `dtype` is the result's; where it is wider
than the input's, the inputs are converted first and nothing is rounded between. What torch computes well
is torch's own function, which then also refuses what torch refuses.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

NONE, MEAN, SUM, BATCHMEAN = range(4)  # torch.nn._reduction's numbers, and one more
BACKWARD, INPLACE, FORWARD = range(3)  # where kernels put a gradient; the reference has no choice
HALF = frozenset((torch.float16, torch.bfloat16))
_SINGLE_DOUBLE = frozenset((torch.float32, torch.float64))
FLOATS = HALF | _SINGLE_DOUBLE

# taken now, so that a later change of torch's public names does not lead back here
torch_bce: Any = torch._C._nn.binary_cross_entropy  # type: ignore[attr-defined]
_torch_bce_with_logits: Any = torch.binary_cross_entropy_with_logits
torch_cross_entropy: Any = torch._C._nn.cross_entropy_loss  # type: ignore[attr-defined]
torch_kl_div: Any = torch.kl_div
torch_nll_loss: Any = torch._C._nn.nll_loss_nd  # type: ignore[attr-defined]


def _widen(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype that holds them and `dtype`, and is at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return [tensor.to(wide) for tensor in tensors]


def cast(loss: Tensor, dtype: torch.dtype) -> Tensor:
    return loss if loss.dtype is dtype else loss.to(dtype)


def reduced(loss: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    if reduction == MEAN:
        loss = loss.mean()
    elif reduction == SUM:
        loss = loss.sum()
    return cast(loss, dtype)


def softplus_of(x: Tensor) -> Tensor:
    """log(1 + exp(x)): it is x to the last bit of float64 from 37 on, and exp(80) is finite in float32."""
    return softplus(x, 1.0, 80.0)  # written out: Dynamo would take a global float for an input


def bce_with_logits(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    reduction: int,
    place: int,
    dtype: torch.dtype,
) -> Tensor:
    """(1 - t) softplus(x) + p t softplus(-x): the two terms have one sign, so neither tail cancels."""
    if label_smoothing:
        if target.dtype in HALF:
            x, target = _widen(dtype, x, target)
        target = target * (1.0 - label_smoothing) + 0.5 * label_smoothing
    if not (x.dtype is target.dtype is dtype and dtype in _SINGLE_DOUBLE):
        if x.dtype not in FLOATS or target.dtype not in FLOATS:
            return cast(_torch_bce_with_logits(x, target, weight, pos_weight, reduction), dtype)
        x, target = _widen(dtype, x, target)
    if weight is None and pos_weight is None:
        loss = torch.lerp(softplus_of(x), softplus_of(-x), target)
    elif _weight_is_odd(weight) or _weight_is_odd(pos_weight):
        return cast(_torch_bce_with_logits(x, target, weight, pos_weight, reduction), dtype)
    else:
        positive = softplus_of(-x)
        if pos_weight is not None:
            positive = positive * pos_weight.to(x.dtype)
        loss = torch.lerp(softplus_of(x), positive, target)
        if weight is not None:
            loss = loss * weight
    return reduced(loss, reduction, dtype)


def _weight_is_odd(weight: Tensor | None) -> bool:
    """Whether torch refuses this weight of a binary cross entropy, or may."""
    return weight is not None and (
        weight.dtype is torch.bool or weight.dtype.is_complex or (weight.requires_grad and torch.is_grad_enabled())
    )


def bce(x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, dtype: torch.dtype) -> Tensor:
    """-(t log x + (1 - t) log(1 - x)), each logarithm not below -100."""
    if weight is not None:
        weight = weight.expand_as(x)
    if x.dtype is not dtype and x.is_floating_point():
        wide = torch.promote_types(x.dtype, dtype)
        x, target = x.to(wide), target.to(wide)
    return cast(torch_bce(x, target, weight, reduction), dtype)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: int,
    place: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """torch's own, of softcap tanh(x / softcap), plus z_loss lse^2; and that term apart, detached."""
    if x.dtype is not dtype and x.is_floating_point():
        x, weight = _widen_rows(x, weight, dtype)
        target = _widen_probabilities(target, x)
    if not z_loss and not softcap:
        loss = torch_cross_entropy(x, target, weight, reduction, ignore_index, label_smoothing)
        return (loss if loss.dtype is dtype else loss.to(dtype)), None
    if x.dtype in HALF:
        x, weight = _widen_rows(x, weight, torch.float32)
        target = _widen_probabilities(target, x)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    loss = torch_cross_entropy(x, target, weight, reduction, ignore_index, label_smoothing)
    if not z_loss:
        return cast(loss, dtype), None
    z = _z_loss(x, target, ignore_index, z_loss, reduction).reshape(loss.shape)
    return cast(loss + z, dtype), cast(z.detach(), dtype)


def _widen_rows(x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(x.dtype, dtype)
    if weight is not None and weight.dtype in HALF:
        weight = weight.to(wide)
    return x.to(wide), weight


def _widen_probabilities(target: Tensor, x: Tensor) -> Tensor:
    """Class probabilities in the dtype of logits that were widened: torch smooths and weighs them in their own."""
    return target.to(x.dtype) if target.dtype in HALF else target


def _z_loss(x: Tensor, target: Tensor, ignore_index: int, z_loss: float, reduction: int) -> Tensor:
    lse = x.logsumexp(0 if x.dim() == 1 else 1)
    if target.shape == x.shape:
        return reduced(z_loss * lse * lse, reduction, lse.dtype)
    kept = target.reshape(lse.shape) != ignore_index
    lse = lse.masked_fill(~kept, 0.0)
    z = z_loss * lse * lse
    return z.sum() / kept.sum() if reduction == MEAN else reduced(z, reduction, z.dtype)


def nll_loss(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, dtype: torch.dtype
) -> Tensor:
    """-w_y x_y, the input being log-probabilities."""
    if x.dtype is not dtype and x.is_floating_point():
        x, weight = _widen_rows(x, weight, dtype)
    return cast(torch_nll_loss(x, target, weight, reduction, ignore_index), dtype)


def kl_div(x: Tensor, target: Tensor, log_target: bool, reduction: int, dtype: torch.dtype) -> Tensor:
    """t (log t - x), or exp(t) (t - x) with `log_target`."""
    if x.dtype is not dtype and x.is_floating_point() and target.is_floating_point():
        wide = torch.promote_types(x.dtype, dtype)
        x, target = x.to(wide), target.to(torch.promote_types(target.dtype, wide))
    if reduction == BATCHMEAN:
        loss = torch_kl_div(x, target, SUM, log_target=log_target) / x.shape[0]
    else:
        loss = torch_kl_div(x, target, reduction, log_target=log_target)
    return cast(loss, dtype)


def kl_div_with_logits(
    x: Tensor,
    target: Tensor,
    dim: int,
    temperature: float,
    reverse: bool,
    reduction: int,
    place: int,
    dtype: torch.dtype,
) -> Tensor:
    """T^2 p (log p - log q), p = softmax(target / T) and q = softmax(x / T); `reverse` swaps p and q."""
    batch = x.shape[0] if x.dim() else 1
    x, target = _widen(dtype, x, target)
    if temperature != 1.0:
        x, target = x / temperature, target / temperature
    log_q, log_p = torch.log_softmax(x, dim), torch.log_softmax(target, dim)
    if reverse:
        log_q, log_p = log_p, log_q
    p = log_p.exp()
    # a class that p gives no probability adds nothing, even where log q is -inf as well
    loss = p * (log_p - log_q).masked_fill(p == 0.0, 0.0)
    if temperature != 1.0:
        loss = temperature * temperature * loss
    if reduction == BATCHMEAN:
        return cast(loss.sum() / batch, dtype)
    return reduced(loss, reduction, dtype)


def entropy(p: Tensor, dim: int, reduction: int, dtype: torch.dtype) -> Tensor:
    """-sum p log p over `dim`."""
    (p,) = _widen(dtype, p)
    return reduced(torch.special.entr(p).sum(dim), reduction, dtype)


def entropy_with_logits(x: Tensor, dim: int, reduction: int, place: int, dtype: torch.dtype) -> Tensor:
    """The entropy of softmax(x) over `dim`."""
    (x,) = _widen(dtype, x)
    log_p = torch.log_softmax(x, dim)
    # what is clamped has p = 0 in every dtype, and adds 0
    return reduced(-(log_p.exp() * log_p.clamp_min(-1e4)).sum(dim), reduction, dtype)
