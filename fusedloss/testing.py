"""The cases that tests, compile checks, benchmarks and the roofline report share: only shapes differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional as ours

Inputs = tuple[tuple[Tensor, ...], dict[str, Any]]


class Case(NamedTuple):
    """One way of calling one loss.

    Attributes:
        name: unique, ``loss/variant``.
        ours: the function of :mod:`fusedloss.functional`.
        make_inputs: ``(shape, dtype, device) -> (tensors, keywords)``; shape is (rows, classes) or
            (rows, classes, positions). Every float tensor is drawn in ``dtype``.
        torch_equivalent: what a torch user writes today, with the same arguments.
        naive: the textbook formula in separate operations, with the same arguments.
        reductions: those that the loss has.
        differentiable: how many of the leading tensors torch differentiates.
        forward_bytes: (logits, dense target) elements' reads in forward, as multiples of their sizes.
        backward_bytes: the same in backward, the gradient's write counted with the logits.
        row_bytes: what a row has besides: its label (int64), and the sums that forward writes and backward reads.
    """

    name: str
    ours: Callable[..., Any]
    make_inputs: Callable[[Sequence[int], torch.dtype, torch.device | str], Inputs]
    torch_equivalent: Callable[..., Any]
    naive: Callable[..., Any]
    reductions: tuple[str, ...] = ("none", "mean", "sum")
    differentiable: int = 1
    forward_bytes: tuple[int, int] = (1, 1)
    backward_bytes: tuple[int, int] = (2, 1)
    row_bytes: int = 0

    @property
    def loss(self) -> str:
        return self.name.partition("/")[0]


def _logits(shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
    return (torch.randn(*shape, device=device) * 3).to(dtype)


def _rows(shape: Sequence[int]) -> list[int]:
    return [shape[0], *shape[2:]]


def _labels(shape: Sequence[int], device: Any) -> Tensor:
    labels = torch.randint(shape[1], _rows(shape), device=device)
    if labels.numel() > 2:
        labels.view(-1)[1] = -100
    return labels


def _class_weight(shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
    return (torch.rand(shape[1], device=device) + 0.5).to(dtype)


def _index(log_probabilities: bool = False, weight: bool = False, **keywords: Any) -> Callable[..., Inputs]:
    def make(shape, dtype, device):
        x = _logits(shape, dtype, device)
        if log_probabilities:
            x = x.float().log_softmax(1).to(dtype)
        more = dict(weight=_class_weight(shape, dtype, device)) if weight else {}
        return (x, _labels(shape, device)), {**keywords, **more}

    return make


def _dense(kind: str, weight: str = "", pos_weight: bool = False, **keywords: Any) -> Callable[..., Inputs]:
    """Input and dense target: `logits` and probabilities of classes, and so on, by `kind`."""

    def make(shape, dtype, device):
        x, other = _logits(shape, dtype, device), _logits(shape, dtype, device)
        more: dict[str, Any] = {}
        if kind == "binary":
            other = torch.rand(*shape, device=device).to(dtype)
        elif kind == "probability":
            x, other = x.float().sigmoid().to(dtype), torch.rand(*shape, device=device).to(dtype)
        elif kind == "classes":
            other = other.float().softmax(1).to(dtype)
        elif kind in ("log", "both log"):
            x, other = x.float().log_softmax(1).to(dtype), other.float().log_softmax(1)
            other = (other if kind == "both log" else other.exp()).to(dtype)
        if weight == "class":
            more["weight"] = _class_weight(shape, dtype, device)
        elif weight:
            more["weight"] = torch.rand(*shape, device=device).to(dtype)
        if pos_weight:
            more["pos_weight"] = (torch.rand(*shape[1:], device=device) * 3).to(dtype)
        return (x, other), {**keywords, **more}

    return make


def _single(probabilities: bool) -> Callable[..., Inputs]:
    def make(shape, dtype, device):
        x = _logits(shape, dtype, device)
        return ((x.float().softmax(-1).to(dtype) if probabilities else x),), {}

    return make


def _reduce(loss: Tensor, reduction: str, count: Tensor | int | None = None) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (loss.numel() if count is None else count)


def _bce_smooth(x, target, label_smoothing=0.0, **keywords):
    target = target * (1 - label_smoothing) + 0.5 * label_smoothing
    return F.binary_cross_entropy_with_logits(x, target, **keywords)


def _bce_naive(x, target, weight=None, pos_weight=1.0, label_smoothing=0.0, reduction="mean"):
    p, target = torch.sigmoid(x), target * (1 - label_smoothing) + 0.5 * label_smoothing
    loss = -(pos_weight * target * torch.log(p) + (1 - target) * torch.log(1 - p))
    return _reduce(loss if weight is None else loss * weight, reduction)


def _bce_probability_naive(x, target, weight=None, reduction="mean"):
    loss = -(target * torch.log(x) + (1 - target) * torch.log(1 - x))
    return _reduce(loss if weight is None else loss * weight, reduction)


def _cross_entropy_extra(x, target, z_loss=0.0, softcap=None, reduction="mean", **keywords):
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(x, target, reduction=reduction, **keywords)
    kept = target != -100
    lse = torch.where(kept, x.logsumexp(1), 0.0)
    return loss + _reduce(z_loss * lse * lse, reduction, kept.sum()) if z_loss else loss


def _nll_naive(x, target, weight=None, ignore_index=-100, reduction="mean"):
    kept = target != ignore_index
    label = torch.where(kept, target, 0)
    w = torch.ones_like(label, dtype=x.dtype) if weight is None else weight[label]
    w = w * kept
    return _reduce(-w * x.gather(1, label.unsqueeze(1)).squeeze(1), reduction, w.sum())


def _cross_entropy_naive(x, target, weight=None, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"):
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    log_p = torch.log(torch.softmax(x, 1))
    if not target.is_floating_point() and not label_smoothing:
        loss = _nll_naive(log_p, target, weight, reduction=reduction)
    else:
        loss = F.cross_entropy(log_p, target, weight, label_smoothing=label_smoothing, reduction=reduction)
    if not z_loss:
        return loss
    kept = target != -100
    z = z_loss * torch.where(kept, torch.log(torch.exp(x).sum(1)), 0.0) ** 2
    return loss + _reduce(z, reduction, kept.sum())


def _kl_naive(x, target, log_target=False, reduction="mean"):
    loss = target.exp() * (target - x) if log_target else target * (torch.log(target) - x)
    return loss.sum() / len(x) if reduction == "batchmean" else _reduce(loss, reduction)


def _kl_logits_torch(x, target, temperature=1.0, reverse=False, reduction="batchmean"):
    p, q = (target / temperature).log_softmax(-1), (x / temperature).log_softmax(-1)
    p, q = (q, p) if reverse else (p, q)
    return F.kl_div(q, p, reduction=reduction, log_target=True) * temperature**2


def _kl_logits_naive(x, target, temperature=1.0, reverse=False, reduction="batchmean"):
    p, q = torch.softmax(target / temperature, -1), torch.softmax(x / temperature, -1)
    p, q = (q, p) if reverse else (p, q)
    return _kl_naive(torch.log(q), p, reduction=reduction) * temperature**2


def _entropy_torch(p, reduction="none"):
    return _reduce(torch.special.entr(p).sum(-1), reduction)


def _entropy_naive(p, reduction="none"):
    return _reduce(-(p * torch.log(p)).sum(-1), reduction)


def _entropy_logits_torch(x, reduction="none"):
    log_p = x.log_softmax(-1)
    return _reduce(-(log_p.exp() * log_p).sum(-1), reduction)


def _in_forward(case: Case, dense: int) -> Case:
    """The case with the gradient computed in forward, which reads the logits once; backward hands it over."""
    return case._replace(
        name=f"{case.loss}/grad_in_forward", ours=partial(case.ours, grad_in_forward=True), differentiable=1,
        forward_bytes=(2, dense), backward_bytes=(0, 0),
    )  # fmt: skip


def _cross_entropy(name: str, make: Callable[..., Inputs], saved=2, dense=False, equivalent=F.cross_entropy) -> Case:
    t = int(dense)
    return Case(
        f"cross_entropy/{name}", ours.cross_entropy, make, equivalent, _cross_entropy_naive,
        differentiable=1 + t, forward_bytes=(1, t), backward_bytes=(2, t), row_bytes=4 * saved + 8 * (1 - t),
    )  # fmt: skip


def _bce(name: str, make: Callable[..., Inputs], reads: int = 1, equivalent=_bce_smooth) -> Case:
    return Case(
        f"binary_cross_entropy_with_logits/{name}", ours.binary_cross_entropy_with_logits, make, equivalent,
        _bce_naive, differentiable=2, forward_bytes=(1, reads), backward_bytes=(2, reads),
    )  # fmt: skip


KL_REDUCTIONS = ("none", "mean", "sum", "batchmean")

_KL_LOGITS = Case(
    "kl_div_with_logits/plain", ours.kl_div_with_logits, _dense("logits"), _kl_logits_torch, _kl_logits_naive,
    KL_REDUCTIONS[1:], 2, row_bytes=20,
)  # fmt: skip

CASES: tuple[Case, ...] = (
    _cross_entropy("index", _index()),
    _cross_entropy("weight", _index(weight=True)),
    _cross_entropy("label_smoothing", _index(label_smoothing=0.1), saved=3),
    _cross_entropy("weight+label_smoothing", _index(weight=True, label_smoothing=0.1), saved=3),
    _cross_entropy("z_loss", _index(z_loss=1e-2), equivalent=_cross_entropy_extra),
    _cross_entropy("softcap", _index(softcap=5.0), equivalent=_cross_entropy_extra),
    _cross_entropy("probabilities", _dense("classes"), saved=3, dense=True),
    _cross_entropy("probabilities+weight", _dense("classes", "class", label_smoothing=0.1), saved=3, dense=True),
    Case("nll_loss/index", ours.nll_loss, _index(True), F.nll_loss, _nll_naive,
         forward_bytes=(0, 0), backward_bytes=(1, 0), row_bytes=8),
    Case("nll_loss/weight", ours.nll_loss, _index(True, weight=True), F.nll_loss, _nll_naive,
         forward_bytes=(0, 0), backward_bytes=(1, 0), row_bytes=8),
    _bce("plain", _dense("binary")),
    _bce("weight", _dense("binary", "element"), reads=2),
    _bce("pos_weight", _dense("binary", pos_weight=True)),
    _bce("label_smoothing", _dense("binary", label_smoothing=0.1)),
    Case("binary_cross_entropy/plain", ours.binary_cross_entropy, _dense("probability"),
         F.binary_cross_entropy, _bce_probability_naive, differentiable=2),
    Case("binary_cross_entropy/weight", ours.binary_cross_entropy, _dense("probability", "element"),
         F.binary_cross_entropy, _bce_probability_naive, differentiable=2,
         forward_bytes=(1, 2), backward_bytes=(2, 2)),
    Case("kl_div/probabilities", ours.kl_div, _dense("log"), F.kl_div, _kl_naive, KL_REDUCTIONS, 2,
         backward_bytes=(1, 1)),
    Case("kl_div/log_target", ours.kl_div, _dense("both log", log_target=True), F.kl_div, _kl_naive,
         KL_REDUCTIONS, 2, backward_bytes=(1, 1)),
    _KL_LOGITS,
    Case("kl_div_with_logits/temperature", ours.kl_div_with_logits, _dense("logits", temperature=2.0),
         _kl_logits_torch, _kl_logits_naive, KL_REDUCTIONS[1:], 2, row_bytes=20),
    Case("kl_div_with_logits/reverse", ours.kl_div_with_logits, _dense("logits", temperature=2.0, reverse=True),
         _kl_logits_torch, _kl_logits_naive, KL_REDUCTIONS[1:], 2, row_bytes=20),
    Case("entropy/plain", ours.entropy, _single(True), _entropy_torch, _entropy_naive, forward_bytes=(1, 0),
         backward_bytes=(2, 0)),
    Case("entropy_with_logits/plain", ours.entropy_with_logits, _single(False), _entropy_logits_torch,
         lambda x, reduction="none": _entropy_naive(torch.softmax(x, -1), reduction),
         forward_bytes=(1, 0), backward_bytes=(2, 0), row_bytes=12),
    _in_forward(_cross_entropy("index", _index()), 0),
    _in_forward(_bce("plain", _dense("binary")), 1),
    _in_forward(_KL_LOGITS, 1),
)  # fmt: skip


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def forward_backward(
    case: Case, inputs: Inputs, call: Callable[..., Any] | None = None, differentiate: int = 1, **keywords: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loss of `call` (ours, unless told otherwise), and the gradients of the leading tensors under
    an uneven upstream gradient."""
    tensors, given = inputs
    leaves = [t.detach().requires_grad_(i < differentiate) if t.is_floating_point() else t
              for i, t in enumerate(tensors)]  # fmt: skip
    loss = (call or case.ours)(*leaves, **given, **keywords)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape).to(loss.dtype)
    wanted = [t for t in leaves if t.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, wanted, upstream))
