"""Inputs of a case in odd layouts, and a case's values and gradients against float64."""

import torch

import fusedloss

from .. import oracle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def relayout(tensor, layout):
    """The same values (or for `expanded` the first row's) in another layout. Labels and class weights, which
    have one dimension, are laid out as they are, but for `expanded` and `strided`."""
    if tensor is None or (tensor.dim() < 2 and layout not in ("expanded", "strided")):
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"), dtype=tensor.dtype)
        wide = wide.to(tensor.device)[..., 3:-2]
        return wide.copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    if layout == "strided":
        twice = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7)[..., ::2]
        return twice.copy_(tensor)
    return tensor


def draw(case, shape, dtype, device, layout="plain"):
    """Inputs in a layout: `expanded` is one target for all rows, the others are laid on every tensor."""
    tensors, keywords = case.make_inputs(shape, dtype, device)
    first, rest = tensors[0], tensors[1:]
    if layout == "misaligned":  # one element behind a multiple of 16 bytes
        move = lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].reshape(t.shape)
        return (move(first), *rest), keywords
    if layout != "expanded":
        first = relayout(first, layout)
        more = {name: relayout(value, layout) if isinstance(value, torch.Tensor) and value.dim() > 1 else value
                for name, value in keywords.items()}  # fmt: skip
        keywords = {**keywords, **more}
    return (first, *(relayout(t, layout) for t in rest)), keywords


def check(case, tensors, keywords, dtype, against_torch=True):
    call = getattr(oracle, case.loss)
    assert fusedloss.path(tensors[0]) == "triton"
    before = [t.clone() for t in tensors]
    loss, upstream, gradients = oracle.value_and_gradients(case.ours, tensors, keywords, case.differentiable)
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t, b)
    expected, _, expected_gradients = oracle.exact(
        call, tensors, keywords, case.differentiable, upstream
    )
    factor = oracle.factor(case)
    oracle.assert_close(loss, expected, factor)
    for t, gradient, e in zip(tensors, gradients, expected_gradients, strict=False):
        assert gradient.dtype == t.dtype
        oracle.assert_close(gradient, e, factor)
    if not against_torch:
        return
    theirs, _, their_gradients = oracle.value_and_gradients(
        case.torch_equivalent, tensors, keywords, case.differentiable, upstream
    )
    assert loss.dtype == theirs.dtype
    if dtype != torch.float32:
        oracle.assert_no_worse_than_torch(loss, theirs, expected)
        for ours, by_torch, e in zip(gradients, their_gradients, expected_gradients, strict=True):
            oracle.assert_no_worse_than_torch(ours, by_torch, e)
