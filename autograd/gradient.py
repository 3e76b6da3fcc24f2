"""Higher derivatives: the first order stays with the kernels, the rest is composed from torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedloss.kernels import operators
from fusedloss.reference import INPLACE


class Gradient(torch.autograd.Function):
    """A first-order gradient as a function of (dloss, x, target), itself differentiable any number of
    times: its own backward differentiates the reference twice."""

    @staticmethod
    def forward(ctx, launch: Callable, reference: Callable, dloss: Tensor, x: Tensor, target: Tensor | None):
        ctx.save_for_backward(dloss, x, target)
        ctx.reference = reference
        return launch(dloss)

    @staticmethod
    def backward(ctx, *upstream: Tensor | None):
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            saved = ctx.saved_tensors
            loss = ctx.reference(*saved[1:])
            loss = loss[0] if isinstance(loss, tuple) else loss
            asked = [t is not None and t.requires_grad for t in saved]
            if not any(asked[1:]):
                return (None,) * 5
            inputs = [t for t, a in zip(saved[1:], asked[1:], strict=True) if a]
            firsts = torch.autograd.grad(loss, inputs, saved[0], create_graph=True)
            given = [u for u, a in zip(upstream, asked[1:], strict=False) if a]
            pairs = [(f, u) for f, u in zip(firsts, given, strict=True) if u is not None and f.requires_grad]
            if not pairs:
                return (None,) * 5
            wanted = [t for t, a in zip(saved, asked, strict=True) if a]
            seconds = iter(
                torch.autograd.grad(
                    [f for f, _ in pairs], wanted, [u for _, u in pairs],
                    create_graph=again, allow_unused=True,
                )
            )  # fmt: skip
        return (None, None, *[next(seconds) if a else None for a in asked])


def gradients(
    launch: Callable[[Tensor], tuple[Tensor | None, ...]],
    reference: Callable,
    dloss: Tensor,
    x: Tensor,
    target: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """`launch(dloss)`, the kernels' gradients of x and target, on the graph where one is being built."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return Gradient.apply(launch, reference, dloss, x, target)
    return launch(dloss)


def by_reference(reference: Callable, dloss: Tensor, x: Tensor) -> Tensor:
    """The same gradient by autograd: for an upstream that is a batch of gradients, or one that is watched."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(reference(x), x, dloss)[0]


def overwritten(x: Tensor) -> Tensor:
    """The memory of x as a gradient; its version tells those who saved x."""
    torch.autograd.graph.increment_version(x)
    return x.detach()


def writable(place: int, x: Tensor, target_grad: bool) -> bool:
    """Whether a gradient is wanted in place, and can be: first order, in eager code, x in one piece."""
    return (
        place == INPLACE
        and not (target_grad or torch.is_grad_enabled() or torch.compiler.is_compiling())
        and x.is_contiguous()
    )


def handed_over(ctx, dloss: Tensor) -> Tensor | None:
    """The gradient that forward computed, times the upstream gradient: to the first backward alone."""
    dx = ctx.__dict__.pop("dx", None)
    if dx is not None:
        operators.scale_(dloss, dx)
    return dx
