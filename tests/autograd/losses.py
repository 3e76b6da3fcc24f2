"""What the tests of this folder share: every case with small inputs, and a look at the operators that run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedloss import testing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (3, 8)
each_case = pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.name)
# one of each loss, and of each kind of target
DISTINCT = (
    "cross_entropy/z_loss", "cross_entropy/probabilities+weight", "nll_loss/weight",
    "binary_cross_entropy_with_logits/pos_weight", "binary_cross_entropy/weight", "kl_div/log_target",
    "kl_div_with_logits/temperature", "entropy/plain", "entropy_with_logits/plain",
)  # fmt: skip
each_loss = pytest.mark.parametrize("case", [*map(testing.case, DISTINCT)], ids=DISTINCT)


def inputs(case, shape=SHAPE, dtype=torch.float32, device=DEVICE):
    """(tensors, keywords); the tensors that torch differentiates require gradients."""
    tensors, keywords = case.make_inputs(shape, dtype, device)
    return tuple(t.detach().requires_grad_(i < case.differentiable and t.is_floating_point())
                 for i, t in enumerate(tensors)), keywords  # fmt: skip


def wanted(tensors):
    return [t for t in tensors if t.requires_grad]


def doubles(tensors, keywords):
    """The same in float64, in a graph of its own."""
    wide = lambda t: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
    return tuple(map(wide, tensors)), {k: wide(v) if torch.is_tensor(v) else v for k, v in keywords.items()}


def pull(case, tensors, keywords, reduction, function=None, **more):
    """Loss and gradients under an upstream gradient that is not constant."""
    loss = (function or case.ours)(*tensors, **keywords, reduction=reduction)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device, dtype=loss.dtype).reshape(loss.shape)
    return loss, torch.autograd.grad(loss, wanted(tensors), upstream, **more)


def assert_all_close(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), **({"rtol": 2e-5, "atol": 2e-6} | tolerance))


class Operators(TorchDispatchMode):
    """Collects what runs, in order; `ours` are the fused operators."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def ours(self):
        return [name.removeprefix("fusedloss.") for name in self.names if name.startswith("fusedloss.")]
