"""torch.ops.fusedloss.*: each launcher as an operator with a fake implementation.

An operator's outputs are allocated by one function, which is its fake implementation too; the launcher
fills them. Operators are registered for every device and carry no autograd: a Function stands on top.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from .layout import empty, empty_rows

NONE, MEAN, SUM, BATCHMEAN = range(4)  # torch.nn._reduction's numbers, and one more
LIBRARY = torch.library.Library("fusedloss", "DEF")
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_forwards: dict[str, tuple[str, Callable]] = {}  # an operator's schema and its allocation

# bound once: each is asked at every call
_tracing = torch.compiler.is_dynamo_compiling
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transformed, _profiled = torch._C._are_functorch_transforms_active, torch._C._autograd._profiler_enabled
_batched = torch._C._functorch.is_legacy_batchedtensor


def odd(tensor: Any) -> bool:
    """Whether this is a subclass, a batch of vmap's fallback, or a view that stands for its negative."""
    return tensor is not None and (type(tensor) not in PLAIN or _batched(tensor) or tensor.is_neg())


class Operator:
    """An operator's launcher, which is found, and Triton imported, at the first launch; what allocates its outputs; how
    many arguments are tensors: the first ones. `latest` is what it played last (launch.Tape)."""

    def __init__(self, module: str, launcher: str, allocate: Callable, schema: str) -> None:
        self.place, self.allocate = (module, launcher), allocate
        self.tensors = schema.partition(" -> ")[0].count("Tensor")
        self.perform: Any = None
        self.latest: Any = None

    def __call__(self, *arguments):
        if self.perform is None:
            self.launcher = getattr(import_module(f"fusedloss.kernels.{self.place[0]}"), self.place[1])
            self.perform = import_module("fusedloss.kernels.launch").perform
        return self.perform(self, arguments)


def unwatched(operator: Operator, name: str) -> Callable:
    """The operator as a function. Where nobody is to see it (no tracer, mode, transform or profiler; no subclass,
    batch of vmap's fallback, or view that stands for its negative), it is called as it is: torch's dispatcher costs
    as much as a launch."""
    overload = getattr(torch.ops.fusedloss, name).default

    def call(*arguments):
        if not _tracing():
            alone = not (_function_modes() or _profiled())
            if alone and operator.latest is not None:
                outputs = operator.latest.replay(arguments)
                if outputs is not None:
                    return outputs
            if alone and not (_dispatch_modes() or _transformed()) and not any(map(odd, arguments[: operator.tensors])):
                return operator(*arguments)
        return overload(*arguments)

    return call


def filled(function: Callable) -> Callable:
    """`function` as torch's dispatcher wants it: an output that nobody asked for is no None, but an empty tensor."""

    def call(*arguments):
        outputs = function(*arguments)
        if isinstance(outputs, tuple):
            return tuple(arguments[0].new_empty(0) if o is None else o for o in outputs)
        return outputs

    return call


def operator(module: str, schema: str) -> Callable[[Callable], Callable]:
    """Register `kernels.<module>.<name>` as torch.ops.fusedloss.<name>; decorates the allocation."""
    name = schema.partition("(")[0]

    def register(allocate: Callable) -> Callable:
        implementation = Operator(module, name, allocate, schema)
        _forwards[name] = schema, allocate
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, filled(implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedloss::{name}", filled(allocate), lib=LIBRARY)
        return unwatched(implementation, name)

    return register


def with_gradient(module: str, forward: str, beside: Callable) -> Callable:
    """Register `kernels.<module>.<forward>_grad`, which takes the arguments of the operator `forward` and
    returns the gradient of x, the first of them, as well: made by beside(x, *others)."""
    schema, allocate = _forwards[forward]
    call, _, returns = schema.partition(" -> ")

    def allocate_both(*arguments):
        outputs = allocate(*arguments)
        return *(outputs if isinstance(outputs, tuple) else (outputs,)), beside(*arguments)

    call = call.replace(forward, f"{forward}_grad", 1)
    return operator(module, f"{call} -> ({returns.strip('()')}, Tensor dx)")(allocate_both)


def in_place(module: str, schema: str) -> Callable:
    """Register the launcher `<name>` as torch.ops.fusedloss.<name>_, which writes its output over its second
    argument, whose gradient or which it is."""
    name = schema.partition("(")[0]
    implementation = Operator(module, name.removesuffix("_"), lambda *arguments: (arguments[1], None), schema)

    def discarded(*arguments):
        implementation(*arguments)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, discarded, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedloss::{name}", lambda *arguments: None, lib=LIBRARY)
    return unwatched(implementation, name)


scale_ = in_place("scale", "scale_(Tensor dloss, Tensor(a!) grad) -> ()")


def _reduced(x, reduction, dtype):
    return empty(x, (), dtype) if reduction != NONE else torch.empty_like(x, dtype=dtype)


def _factors(reduction):
    """How many factors of a mean are saved; an unreduced loss writes none, and no output is left unwritten."""
    return 0 if reduction == NONE else 2


def _like(x, *_):
    return torch.empty_like(x)


def _gradients(x, target, input_grad, target_grad, beside=_like, dim=0):
    return beside(x, dim) if input_grad else None, beside(target, dim) if target_grad else None


@operator(
    "bce_with_logits",
    "bce_with_logits_forward(Tensor x, Tensor target, Tensor? weight, Tensor? pos_weight,"
    " float label_smoothing, int reduction, ScalarType dtype) -> Tensor",
)
def bce_with_logits_forward(x, target, weight, pos_weight, label_smoothing, reduction, dtype):
    return _reduced(x, reduction, dtype)


bce_with_logits_forward_grad = with_gradient("bce_with_logits", "bce_with_logits_forward", _like)


@operator(
    "bce_with_logits",
    "bce_with_logits_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor? pos_weight,"
    " float label_smoothing, int reduction, bool input_grad, bool target_grad) -> (Tensor, Tensor)",
)
def bce_with_logits_backward(
    dloss, x, target, weight, pos_weight, label_smoothing, reduction, input_grad, target_grad
):
    return _gradients(x, target, input_grad, target_grad)


bce_with_logits_backward_ = in_place(
    "bce_with_logits",
    "bce_with_logits_backward_(Tensor dloss, Tensor(a!) x, Tensor target, Tensor? weight, Tensor? pos_weight,"
    " float label_smoothing, int reduction, bool input_grad, bool target_grad) -> ()",
)


def _class_dim(x):
    return min(1, x.dim() - 1)


def _rows_shape(x, dim):
    return [n for d, n in enumerate(x.shape) if d != dim % x.dim()]


@operator(
    "cross_entropy",
    "cross_entropy_forward(Tensor x, Tensor target, Tensor? weight, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap, int reduction, ScalarType dtype)"
    " -> (Tensor loss, Tensor z, Tensor saved)",
)
def cross_entropy_forward(
    x, target, weight, ignore_index, label_smoothing, z_loss, softcap, reduction, dtype
):
    """The loss, its z term, and for backward in one float32 vector: m, s and, where targets are dense, b a
    row, and the mean's two factors."""
    rows = x.numel() // x.size(_class_dim(x))
    loss = empty(x, _rows_shape(x, _class_dim(x)) if reduction == NONE else (), dtype)
    z = torch.empty_like(loss) if z_loss != 0.0 else None
    dense = target.is_floating_point() or label_smoothing != 0.0
    return loss, z, empty(x, ((3 if dense else 2) * rows + _factors(reduction),), torch.float32)


cross_entropy_forward_grad = with_gradient(
    "cross_entropy", "cross_entropy_forward", lambda x, *_: empty_rows(x, _class_dim(x))
)


@operator(
    "cross_entropy",
    "cross_entropy_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor saved,"
    " int ignore_index, float label_smoothing, float z_loss, float softcap,"
    " int reduction, bool target_grad) -> (Tensor, Tensor)",
)
def cross_entropy_backward(
    dloss, x, target, weight, saved, ignore_index, label_smoothing, z_loss, softcap, reduction, target_grad
):
    return _gradients(x, target, True, target_grad, empty_rows, _class_dim(x))


cross_entropy_backward_ = in_place(
    "cross_entropy",
    "cross_entropy_backward_(Tensor dloss, Tensor(a!) x, Tensor target, Tensor? weight, Tensor saved,"
    " int ignore_index, float label_smoothing, float z_loss, float softcap,"
    " int reduction, bool target_grad) -> ()",
)


@operator(
    "kl_div",
    "kl_div_forward(Tensor x, Tensor target, bool log_target, int reduction, ScalarType dtype) -> Tensor",
)
def kl_div_forward(x, target, log_target, reduction, dtype):
    return _reduced(x, reduction, dtype)


@operator(
    "kl_div",
    "kl_div_backward(Tensor dloss, Tensor x, Tensor target, bool log_target, int reduction,"
    " bool input_grad, bool target_grad) -> (Tensor, Tensor)",
)
def kl_div_backward(dloss, x, target, log_target, reduction, input_grad, target_grad):
    return _gradients(x, target, input_grad, target_grad)


@operator(
    "bce",
    "bce_forward(Tensor x, Tensor target, Tensor? weight, int reduction, ScalarType dtype) -> Tensor",
)
def bce_forward(x, target, weight, reduction, dtype):
    return _reduced(x, reduction, dtype)


@operator(
    "bce",
    "bce_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, int reduction,"
    " bool input_grad, bool target_grad) -> (Tensor, Tensor)",
)
def bce_backward(dloss, x, target, weight, reduction, input_grad, target_grad):
    return _gradients(x, target, input_grad, target_grad)


@operator("entropy", "entropy_forward(Tensor p, int dim, int reduction, ScalarType dtype) -> Tensor")
def entropy_forward(p, dim, reduction, dtype):
    shape = list(p.shape)
    del shape[dim]
    return empty(p, () if reduction != NONE else shape, dtype)


@operator("entropy", "entropy_backward(Tensor dloss, Tensor p, int dim, int reduction) -> Tensor")
def entropy_backward(dloss, p, dim, reduction):
    return torch.empty_like(p)


@operator(
    "nll_loss",
    "nll_loss_forward(Tensor x, Tensor target, Tensor? weight, int ignore_index, int reduction,"
    " ScalarType dtype) -> (Tensor loss, Tensor scale)",
)
def nll_loss_forward(x, target, weight, ignore_index, reduction, dtype):
    """The loss, and for backward the mean's factor."""
    shape = _rows_shape(x, _class_dim(x)) if reduction == NONE else ()
    return empty(x, shape, dtype), empty(x, (_factors(reduction),), torch.float32)


@operator(
    "nll_loss",
    "nll_loss_backward(Tensor dloss, Tensor x, Tensor target, Tensor? weight, Tensor scale,"
    " int ignore_index, int reduction) -> Tensor",
)
def nll_loss_backward(dloss, x, target, weight, scale, ignore_index, reduction):
    return torch.empty_like(x)


@operator(
    "kl_div_with_logits",
    "kl_div_with_logits_forward(Tensor x, Tensor target, int dim, float temperature, bool reverse,"
    " int reduction, ScalarType dtype) -> (Tensor loss, Tensor stats)",
)
def kl_div_with_logits_forward(x, target, dim, temperature, reverse, reduction, dtype):
    stats = empty(x, [5, *_rows_shape(x, dim)], torch.float32)
    return empty(x, (), dtype), stats


kl_div_with_logits_forward_grad = with_gradient(
    "kl_div_with_logits", "kl_div_with_logits_forward", lambda x, target, dim, *_: empty_rows(x, dim)
)


@operator(
    "kl_div_with_logits",
    "kl_div_with_logits_backward(Tensor dloss, Tensor x, Tensor target, Tensor stats, int dim,"
    " float temperature, bool reverse, int reduction, bool input_grad, bool target_grad)"
    " -> (Tensor, Tensor)",
)
def kl_div_with_logits_backward(
    dloss, x, target, stats, dim, temperature, reverse, reduction, input_grad, target_grad
):
    return _gradients(x, target, input_grad, target_grad, empty_rows, dim)


@operator(
    "entropy_with_logits",
    "entropy_with_logits_forward(Tensor x, int dim, int reduction, ScalarType dtype)"
    " -> (Tensor loss, Tensor stats)",
)
def entropy_with_logits_forward(x, dim, reduction, dtype):
    rows = _rows_shape(x, dim)
    loss = empty(x, rows if reduction == NONE else (), dtype)
    return loss, empty(x, [3, *rows], torch.float32)


entropy_with_logits_forward_grad = with_gradient(
    "entropy_with_logits", "entropy_with_logits_forward", lambda x, dim, *_: empty_rows(x, dim)
)


@operator(
    "entropy_with_logits",
    "entropy_with_logits_backward(Tensor dloss, Tensor x, Tensor stats, int dim, int reduction) -> Tensor",
)
def entropy_with_logits_backward(dloss, x, stats, dim, reduction):
    return empty_rows(x, dim)
