"""Who computes: the Triton kernels or the reference, whole or in pieces. Decided here, once a call, nowhere else."""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import blocked, short
from .reference import BACKWARD, FLOATS, FORWARD, HALF, INPLACE, NONE

TRITON, REFERENCE, AUTO = "triton", "reference", "auto"
DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))
TARGET_DTYPES = DTYPES | {torch.int64, torch.uint8}
# tensors that are, or pretend to be, one plain tensor on the device that they name
PLAIN_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)

FUNCTIONS = {  # class: its module in fusedloss.autograd
    "BCE": "bce",
    "BCEWithLogits": "bce_with_logits",
    "Blocked": "blocked",
    "CrossEntropy": "cross_entropy",
    "Entropy": "entropy",
    "EntropyWithLogits": "entropy",
    "KLDiv": "kl_div",
    "KLDivWithLogits": "kl_div_with_logits",
    "NLLLoss": "nll_loss",
    "Short": "short",
}
BINARY = frozenset(("BCE", "BCEWithLogits"))  # their weights broadcast to the input
LABELS = frozenset(("CrossEntropy", "NLLLoss"))  # the class dimension of one row is not that of several

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_installed = find_spec("triton") is not None
_loaded: dict[str, Any] = {}
_applied: dict[str, Any] = {}
_choice = AUTO
_any_device = INTERPRETED and _installed  # kernels for tensors that are not on a GPU, too
_guards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)
_latest: dict[tuple[str, int], Any] = {}


def function(name: str) -> Any:
    """The torch.autograd.Function of that name. Its module, and so Triton, is imported at the first use."""
    if name not in _loaded:
        _loaded[name] = getattr(import_module(f"fusedloss.autograd.{FUNCTIONS[name]}"), name)
    return _loaded[name]


def applied(name: str) -> Any:
    """Its `apply` in torch's C++, where no transform is active: the checks for one cost more than a launch."""
    if name not in _applied:
        _applied[name] = super(torch.autograd.Function, function(name)).apply
    return _applied[name]


class use:
    """Choose the path of every call inside a `with` block, for the whole process.

    Args:
        path: ``"triton"`` (the kernels, on any device), ``"reference"`` (plain torch) or ``"auto"``
            (the kernels for GPU tensors, and for CPU tensors under ``TRITON_INTERPRET=1``).

    Blocks nest, and one object may be entered again. What the kernels do not compute goes to the
    reference whatever was chosen; :func:`path` tells what would happen.

    Raises:
        ValueError: for another name.
        ImportError: on entering ``use("triton")`` where Triton is not installed.

    Example::

        with fusedloss.use("reference"):
            loss = fusedloss.cross_entropy(logits, labels)
    """

    def __init__(self, path: str) -> None:
        if path not in (TRITON, REFERENCE, AUTO):
            raise ValueError(f"path must be 'triton', 'reference' or 'auto', got {path!r}")
        self.path = path
        self._before: list[str] = []

    def __enter__(self) -> "use":
        if self.path == TRITON and not _installed:
            raise ImportError("use('triton'): the package triton is not installed")
        self._before.append(_choice)
        _choose(self.path)
        return self

    def __exit__(self, *exc: object) -> None:
        _choose(self._before.pop())


def _choose(path: str) -> None:
    global _choice, _any_device
    _choice = path
    _any_device = path == TRITON or (path == AUTO and INTERPRETED and _installed)


def path(x: Tensor) -> str:
    """``"triton"`` or ``"reference"``: who computes in a call made now with ``x`` as its input.

    The reference takes whatever the kernels do not: dtypes other than float16, bfloat16 and float32,
    empty tensors, tensor subclasses that wrap others (DTensor), calls under functorch transforms or
    forward-mode differentiation, meta tensors. A call whose other arguments ask for it (a weight that
    requires a gradient, a target of an odd dtype, ``kl_div_with_logits`` unreduced) goes there too.
    """
    if (
        (x.is_cuda or _any_device)
        and _choice != REFERENCE
        and _installed
        and x.dtype in DTYPES
        and x.numel() > 0
        and not x.is_meta
        and (type(x) in PLAIN_TYPES or _plain(x))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    ):
        return TRITON
    return REFERENCE


def _plain(x: Tensor) -> bool:
    """Of a type beside the plain ones: whether it is no wrapper."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def _suits(x: Tensor, others: tuple[Any, ...]) -> bool:
    """Whether the kernels take these arguments: a target first, then weights and numbers."""
    for i, other in enumerate(others):
        if other is None:
            continue
        if not isinstance(other, Tensor):  # tensors stand first
            break
        if other.dtype not in (DTYPES if i else TARGET_DTYPES) or other.device != x.device:
            return False
        if not (type(other) in PLAIN_TYPES or _plain(other)):
            return False
        if i and other.requires_grad and torch.is_grad_enabled():
            return False
    dtype = others[-1]
    return dtype in DTYPES


def _alike(name: str, given: tuple[Tensor, ...]) -> bool:
    """Whether tensors, by type, layout, dtype and device, and torch's modes are those last found `small`, or
    `readable`: one call of the guards that Dynamo compiles its own with."""
    latest = _latest.get((name, len(given)))
    try:
        return latest is not None and latest(*given)
    except TypeError:  # something else than tensors
        return False


def _remember(name: str, given: tuple[Tensor, ...]) -> None:
    if _guards is not None:
        free: dict[str, Any] = dict(dynamic_dims_sizes=None, dynamic_dims_strides=None)
        _latest[name, len(given)] = _guards(*given, **free).check


def small(name: str, x: Tensor, other: Tensor | None = None, another: Tensor | None = None) -> bool:
    """Whether the reference, where it calls torch's own function on these, may be called at once: an input of
    several rows, or elements, in a CPU's memory, too small for pieces, and other tensors of its dtype. That function
    checks them."""
    if is_compiling() or _any_device:
        return False
    given = (x,) if other is another is None else tuple([t for t in (x, other, another) if t is not None])
    if _alike(name, given):
        return True
    found = _small(name, *given)
    if found:
        _remember(name, given)
    return found


def _small(name: str, x: Tensor, *others: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dim() > (name in LABELS)
        and 0 < x.numel() < blocked.LARGE.get(name, blocked.NEVER)
        and all(type(other) is Tensor and other.dtype is x.dtype for other in others)
        and (x.dtype not in HALF or not torch.is_autocast_enabled("cpu"))
    )


def readable(name: str, *given: Tensor) -> bool:
    """Whether these are `small`, of one shape, and what is computed from them may be looked at and written over."""
    if is_compiling() or _any_device or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return False
    if _alike(name, given):
        return True
    x, *others = given
    found = (
        _small(name, *given)
        and x.dtype in FLOATS
        and x.layout is torch.strided
        and all(other.is_same_size(x) and other.layout is torch.strided and other.is_cpu for other in others)
        and blocked.unwatched()
    )
    if found:
        _remember(name, given)
    return found


def run_short(name: str, x: Tensor, target: Tensor | None, *numbers: Any) -> Tensor:
    """A loss of `readable` tensors of one dtype."""
    loss, _, composed = short.LOSSES[name]
    if torch.is_grad_enabled():
        if target is not None and target.requires_grad:
            return composed(x, target, *numbers)
        if x.requires_grad:
            return (_applied.get("Short") or applied("Short"))(name, x, target, *numbers)
    return loss(x, target, *numbers, False)[0]


def run(name: str, reference: Any, x: Tensor, *others: Any) -> Any:
    """`name`'s kernels or `reference`, on the same arguments: x, target, weights, numbers, result dtype.

    The reference's large CPU tensors are computed piece by piece: one comparison is all that small ones pay.
    """
    if (x.is_cuda or _any_device) and path(x) == TRITON and _suits(x, others):
        if name in BINARY:
            others = (others[0], *(o.expand_as(x) if isinstance(o, Tensor) else o for o in others[1:]))
        if others[0] is x:  # Dynamo refuses one tensor as two inputs of a Function
            others = (x.view_as(x), *others[1:])
        if is_compiling():
            return function(name).apply(x, *others)
        return (_applied.get(name) or applied(name))(x, *others)
    if not is_compiling() and x.numel() >= blocked.LARGE.get(name, blocked.NEVER) and blocked.suits(name, x, others):
        if not (x.requires_grad and torch.is_grad_enabled()):
            return blocked.compute(name, x.detach(), others, False)[0]
        return (_applied.get("Blocked") or applied("Blocked"))(name, reference, x, *others)
    return reference(x, *others)


def place(x: Tensor, target: Tensor | None, reduction: int, inplace: bool, grad_in_forward: bool) -> int:
    """Where the kernels are to put the gradient of x."""
    if not grad_in_forward:
        return INPLACE if inplace else BACKWARD
    if inplace:
        raise ValueError("inplace and grad_in_forward exclude each other: backward, or forward, writes the gradient")
    wanted = (
        x.requires_grad
        and reduction != NONE
        and x.dtype is not torch.float16
        and (target is None or not target.requires_grad)
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
    return FORWARD if wanted else BACKWARD


def _load() -> None:
    """Import every Function now, where kernels are likely to run: Dynamo cannot trace an import."""
    global _installed, _any_device
    try:
        for name in FUNCTIONS:
            function(name)
    except ImportError:
        _installed = _any_device = False


if _installed and (torch.version.cuda or torch.version.hip or INTERPRETED):
    _load()
