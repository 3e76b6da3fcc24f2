"""Other packages' fused losses behind the arguments of a shared case, where they are installed.

An adapter takes a case's keywords and returns a callable ``(x, target, reduction=..., **keywords)``, or None
where the package has no such loss. A package that is not installed, or does not import here, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fusedloss.testing import Case

Adapter = Callable[[Case, dict[str, Any]], Callable[..., Any] | None]


def _attribute(module: str, name: str) -> Any:
    """None where the package is absent, or needs a GPU to be imported."""
    try:
        return getattr(import_module(module), name)
    except Exception:
        return None


def _reduced(loss: Any, target: Any, reduction: str) -> Any:
    """Row losses to what torch returns for `reduction`; an ignored row's loss is 0."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != -100).sum()


def _index_only(case: Case) -> bool:
    return case.loss == "cross_entropy" and "probabilities" not in case.name


def liger(case: Case, keywords: dict[str, Any]) -> Callable[..., Any] | None:
    """Liger overwrites the logits with the gradient, in forward."""
    module = "liger_kernel.transformers.functional"
    if case.loss == "kl_div":
        return _attribute(module, "liger_kl_div")
    function = _attribute(module, "liger_cross_entropy") if _index_only(case) else None
    if function is None:
        return None

    def call(x, target, z_loss=0.0, **more):
        return function(x, target, lse_square_scale=z_loss, **more)

    return call


def flash_attn(case: Case, keywords: dict[str, Any]) -> Callable[..., Any] | None:
    if not _index_only(case) or keywords.keys() - {"label_smoothing", "z_loss"}:
        return None
    function = _attribute("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    if function is None:
        return None

    def call(x, target, z_loss=0.0, label_smoothing=0.0, reduction="mean"):
        loss, _ = function(x, target, label_smoothing=label_smoothing, lse_square_scale=z_loss)
        return _reduced(loss, target, reduction)

    return call


def fla(case: Case, keywords: dict[str, Any]) -> Callable[..., Any] | None:
    if not _index_only(case) or "weight" in keywords:
        return None
    function = _attribute("fla.modules.fused_cross_entropy", "cross_entropy_loss")
    if function is None:
        return None

    def call(x, target, z_loss=0.0, label_smoothing=0.0, softcap=None, reduction="mean"):
        more = {} if softcap is None else dict(logit_softcapping=softcap)  # from 0.6 on
        loss, _ = function(x, target, label_smoothing=label_smoothing, lse_square_scale=z_loss, **more)
        return _reduced(loss, target, reduction)

    return call


def quack(case: Case, keywords: dict[str, Any]) -> Callable[..., Any] | None:
    if not _index_only(case) or keywords.keys() - {"weight"}:
        return None
    function = _attribute("quack.cross_entropy", "cross_entropy")
    if function is None:
        return None

    def call(x, target, weight=None, reduction="mean"):  # its kernel wants float32 weights
        return function(x, target, weight=None if weight is None else weight.float(), reduction=reduction)

    return call


ADAPTERS: dict[str, Adapter] = {"Liger": liger, "flash-attn": flash_attn, "FLA": fla, "quack": quack}


def peers(case: Case, keywords: dict[str, Any], device: str) -> dict[str, Callable[..., Any]]:
    """The packages that compute this case on this device: none of them runs on a CPU."""
    if device == "cpu":
        return {}
    found = {name: adapter(case, keywords) for name, adapter in ADAPTERS.items()}
    return {name: call for name, call in found.items() if call is not None}
