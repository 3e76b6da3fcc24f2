"""torch's own test material, OpInfo samples and ModuleInfo inputs, on the kernels and on the reference.

The yardstick is torch in float64. Its formula of BCE with logits is the less accurate one in the tail, but
there no more than 1e-12 off for logits of the size that the samples have.
"""

import os
import random

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_utils import noncontiguous_like

import fusedloss

from .. import oracle
from .losses import DEVICE, Operators

FUNCTIONS = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "cross_entropy", "kl_div", "nll_loss")
MODULES = ("BCELoss", "BCEWithLogitsLoss", "CrossEntropyLoss", "KLDivLoss", "NLLLoss")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALL = os.environ.get("FUSEDLOSS_TEST_ALL") == "1"
SHARE = 3  # of each list, without FUSEDLOSS_TEST_ALL=1
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def share(samples):
    samples = list(samples)
    assert len(samples) > 5
    return samples if ALL else random.Random(len(samples)).sample(samples, min(SHARE, len(samples)))


def reason_for_reference(input, others):
    """Why the kernels leave a sample to the reference; None where they take it."""
    return "no elements" if input.numel() == 0 else None


def leaves(tensors, dtype=None):
    cast = lambda t: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
    return [cast(t) if torch.is_tensor(t) else t for t in tensors]


def compare(path, ours, theirs, double, tensors):
    """Value and gradients of `ours` on the tensors; half precision also with torch's own error."""
    results = []
    for call, dtype in ((ours, None), (theirs, None), (double, torch.float64)):
        live = leaves(tensors, dtype)
        with Operators() as operators:
            loss = call(*live)
            upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(3)).to(loss)
            if loss.dtype is not torch.float64:
                upstream = (upstream * 15 + 1).round() / 16  # exact in every dtype, and not 0
            needed = [t for t in live if torch.is_tensor(t) and t.requires_grad]
            upstream = results[0][2].to(loss.dtype) if results else upstream
            gradients = torch.autograd.grad(loss, needed, upstream)
        results.append((loss, gradients, upstream))
        if call is ours:
            fused = path == "triton" and reason_for_reference(live[0], live[1:]) is None
            assert len(operators.ours) == (2 if fused else 0)
    (loss, gradients, _), (torch_loss, torch_gradients, _), (exact, exact_gradients, _) = results
    assert loss.dtype is torch_loss.dtype
    assert loss.shape == torch_loss.shape
    for a, t, e in zip((loss, *gradients), (torch_loss, *torch_gradients), (exact, *exact_gradients), strict=True):
        assert a.dtype is t.dtype
        assert a.shape == t.shape
        assert torch.equal(a.isnan(), t.isnan())
        if path == "triton" or a.dtype is torch.float32:
            oracle.assert_close(a, e)
        else:
            oracle.assert_no_worse_than_torch(a, t, e)


@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples_of_functions(path, name, strided, dtype):
    torch.manual_seed(0)
    op = next(op for op in op_db if op.name == f"nn.functional.{name}")
    for sample in share(op.sample_inputs(DEVICE, dtype, requires_grad=True)):
        sample = sample.noncontiguous() if strided else sample
        names = [k for k, v in sample.kwargs.items() if torch.is_tensor(v)]
        rest = {k: v for k, v in sample.kwargs.items() if k not in names}
        tensors = [sample.input, *sample.args, *(sample.kwargs[k].detach() for k in names)]
        many = 1 + len(sample.args)

        def call(function):
            return lambda *t: function(*t[:many], **dict(zip(names, t[many:], strict=True)), **rest)  # noqa: B023

        theirs = call(getattr(F, name))
        compare(path, call(getattr(fusedloss, name)), theirs, theirs, tensors)


@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", MODULES)
def test_inputs_of_modules(path, name, strided, dtype):
    torch.manual_seed(0)
    info = next(m for m in module_db if m.name == f"nn.{name}")
    made = info.module_inputs_func(info, device=DEVICE, dtype=dtype, requires_grad=True, training=True)
    for one in share(made):
        args, kwargs = one.constructor_input.args, one.constructor_input.kwargs
        tensors = one.forward_input.args
        if strided:
            tensors = [noncontiguous_like(t) if torch.is_tensor(t) else t for t in tensors]
        wide = lambda v: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        modules = getattr(fusedloss, name)(*args, **kwargs), getattr(torch.nn, name)(*args, **kwargs)
        double = getattr(torch.nn, name)(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})
        compare(path, *modules, double, tensors)


@pytest.mark.parametrize("name", ["NLLLoss", "CrossEntropyLoss"])
def test_error_inputs_of_modules(path, name):
    """The only two that ship with error inputs."""
    info = next(m for m in module_db if m.name == f"nn.{name}")
    errors = info.module_error_inputs_func(info, device=DEVICE, dtype=torch.float32, requires_grad=False, training=True)
    for error in errors:
        given = error.module_error_input
        module = getattr(fusedloss, name)(*given.constructor_input.args, **given.constructor_input.kwargs)
        with pytest.raises(error.error_type):
            module(*given.forward_input.args, **given.forward_input.kwargs)
