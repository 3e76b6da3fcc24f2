"""Every refusal, before anything is computed: torch's exception types and conditions, with the values.

Not looked at here: the values in a tensor (a label out of range), which the host would have to wait for;
devices that differ and dtypes that no kernel takes, which `dispatch` sends to the reference, where torch
refuses or accepts them by its own rules.
"""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

HALF = frozenset((torch.float16, torch.bfloat16))
SINGLE = HALF | {torch.float32}  # what autocast converts
LABELS = frozenset((torch.int64, torch.uint8))


def _list(shape: Sequence[int]) -> list[int]:
    return list(shape)


def autocast(x: Tensor) -> bool:
    """Whether the device of `x` is under autocast."""
    device = x.device.type
    return torch._C._is_autocast_available(device) and torch.is_autocast_enabled(device)


def result_dtype(asked: torch.dtype | None, natural: torch.dtype, x: Tensor) -> torch.dtype:
    """`dtype=` where given; else torch's, which is float32 for half precision under autocast."""
    if asked is not None:
        if not isinstance(asked, torch.dtype) or not asked.is_floating_point:
            raise TypeError(f"dtype must be a floating point dtype, got {asked}")
        return asked
    return torch.float32 if natural in HALF and autocast(x) else natural


def _tensors(name: str, input: Any, target: Any, weight: Any = None) -> None:
    if isinstance(input, Tensor) and isinstance(target, Tensor) and (weight is None or isinstance(weight, Tensor)):
        return
    for argument, value in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(value, Tensor) and (value is not None or argument != "weight"):
            raise TypeError(f"{name}(): argument '{argument}' must be Tensor, not {type(value).__name__}")


def expands(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of `shape` can be expanded to the shape `to`."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _weight(name: str, weight: Tensor | None, input: Tensor) -> None:
    if weight is not None and not expands(weight.size(), input.size()):
        raise RuntimeError(
            f"{name} of shape {_list(weight.shape)} does not broadcast to {_list(input.shape)}, the input's"
        )


def bce_with_logits(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, label_smoothing: float
) -> None:
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    if not target.is_floating_point() and input.is_floating_point() and not target.is_complex():
        raise RuntimeError(f"expected a target of a floating point dtype, got {target.dtype}")
    if weight is not None or pos_weight is not None:
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(
                    f"binary_cross_entropy_with_logits(): argument '{name}' must be Tensor, not {type(value).__name__}"
                )
        _weight("weight", weight, input)
        _weight("pos_weight", pos_weight, input)
    if label_smoothing and not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")


def bce(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if target.size() != input.size():
        raise ValueError(
            f"Using a target size ({target.size()}) that is different to the input size "
            f"({input.size()}) is deprecated. Please ensure they have the same size."
        )
    if weight is not None:
        weight.size()  # an AttributeError for what is no tensor, as in torch
        _weight("weight", weight, input)
    if target.dtype is not input.dtype or input.is_cuda:
        under_autocast = autocast(input)
        if under_autocast and input.is_cuda:
            raise RuntimeError(
                "binary_cross_entropy and BCELoss are unsafe to autocast: many models use a sigmoid layer "
                "right before the binary cross entropy layer. In this case, combine the two layers using "
                "binary_cross_entropy_with_logits or BCEWithLogitsLoss, which are safe to autocast."
            )
        if target.dtype is not input.dtype and not (
            under_autocast and input.dtype in SINGLE and target.dtype in SINGLE
        ):
            raise RuntimeError(f"Found dtype {target.dtype} but expected {input.dtype}, the input's")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    _tensors("cross_entropy", input, target, weight)
    if type(ignore_index) is not int:
        index(ignore_index)
    if label_smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if z_loss and not z_loss > 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if target.dim() == input.dim() and target.size() == input.size():
        _probabilities(input, target, weight, ignore_index)
        return
    if label_smoothing > 0.0:
        if weight is not None and weight.dim() != 1:
            raise _class_weight_error(weight, input)
        _labels(input, target, weight)
        if input.dim() == 1 and target.dim() == 1:
            raise RuntimeError("label_smoothing and an input of shape [C] need a target of shape [], got [1]")
    else:
        _labels(input, target, weight)


def _probabilities(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    if not target.dtype.is_floating_point:
        raise RuntimeError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    if ignore_index >= 0:
        raise RuntimeError(f"ignore_index is not supported for floating point target, got ignore_index={ignore_index}")
    if input.dim() == 0:
        raise IndexError("Dimension specified as 1 but tensor has no dimensions")
    if weight is not None and (weight.dim() != 1 or weight.shape[0] != _classes(input)):
        raise _class_weight_error(weight, input)


def _classes(input: Tensor) -> int:
    return input.shape[1 if input.dim() > 1 else 0]


def _class_weight_error(weight: Tensor, input: Tensor) -> RuntimeError:
    return RuntimeError(
        f"weight tensor should be defined either for all {_classes(input)} classes "
        f"or no classes but got weight tensor of shape: {_list(weight.shape)}"
    )


def nll_loss(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    _tensors("nll_loss", input, target, weight)
    if type(ignore_index) is not int:
        index(ignore_index)
    _labels(input, target, weight)


def _labels(input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Class indices and class weights against the input, whose class dimension is 0 or 1."""
    dims, labels = input.dim(), target.dim()
    if dims != 2 or labels != 1:
        _odd_shapes(input, target, dims, labels)
    elif input.shape[0] != target.shape[0]:
        raise _batch_error(input, target)
    if target.dtype not in LABELS or (dims > 2 and target.dtype is torch.uint8):
        accepted = "int64 or uint8" if dims <= 2 else f"int64 for an input of {dims} dimensions"
        raise RuntimeError(f"expected target dtype to be {accepted}, but got {target.dtype}")
    if weight is not None:
        if weight.numel() != _classes(input) or (dims <= 2 and weight.dim() != 1):
            raise _class_weight_error(weight, input)
        if weight.dtype is not input.dtype and not (
            weight.dtype in SINGLE and input.dtype in SINGLE and autocast(input)
        ):
            raise RuntimeError(f"expected a weight of dtype {input.dtype}, the input's, but found {weight.dtype}")


def _batch_error(input: Tensor, target: Tensor) -> ValueError:
    batch = target.shape[0] if target.dim() else 0
    return ValueError(f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({batch}).")


def _odd_shapes(input: Tensor, target: Tensor, dims: int, labels: int) -> None:
    if dims == 0:
        raise ValueError("Expected 1 or more dimensions (got 0)")
    if dims == 1:
        if labels > 1:
            raise RuntimeError(f"0D or 1D target tensor expected, but got shape {_list(target.shape)}")
        if labels == 1 and target.shape[0] != 1:
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target.shape[0]}")
        return
    if labels == 0 or input.shape[0] != target.shape[0]:
        raise _batch_error(input, target)
    if dims == 2:
        raise RuntimeError(f"0D or 1D target tensor expected, but got shape {_list(target.shape)}")
    expected = [input.shape[0], *input.shape[2:]]
    if _list(target.shape) != expected:
        raise RuntimeError(f"Expected target size {expected}, got {_list(target.shape)}")


def kl_div(input: Tensor, target: Tensor) -> None:
    _tensors("kl_div", input, target)
    if target.size() != input.size():
        torch.broadcast_shapes(input.size(), target.size())  # a RuntimeError that names both
    if not (input.is_floating_point() and target.is_floating_point()):
        raise RuntimeError(f"kl_div takes floating point tensors, got {input.dtype} and {target.dtype}")


def class_dim(name: str, input: Tensor, dim: int) -> int:
    """`dim` counted from the front."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(input).__name__}")
    if not input.dtype.is_floating_point:
        raise TypeError(f"{name}() takes floating point tensors, got {input.dtype}")
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-dims}, {dims - 1}], but got {dim})")
    return dim % dims


def kl_div_with_logits(input: Tensor, target: Tensor, dim: int, temperature: float) -> int:
    """The class dimension, counted from the front."""
    _tensors("kl_div_with_logits", input, target)
    dim = class_dim("kl_div_with_logits", input, dim)
    class_dim("kl_div_with_logits", target, dim)
    if target.size() != input.size():
        raise ValueError(f"Target size ({target.size()}) must be the same as input size ({input.size()})")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return dim


def given(**extras: Any) -> dict[str, Any]:
    """The keywords that torch's function has not, where the caller used them: an override knows torch's."""
    return {name: value for name, value in extras.items() if value not in (None, False, 0.0)}
