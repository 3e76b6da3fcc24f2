"""Compiled, exported and traced: the fused operators are in every graph, and little else."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import fusedloss
from fusedloss import testing

from .losses import DEVICE, SHAPE, assert_all_close, each_case, each_loss, inputs, pull, wanted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:reduction:UserWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_backward():
    return compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True))


def operators(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def step(case, keywords, reduction):
    """Loss and gradients of the leading tensors, as one function that can be traced."""

    def forward_backward(*tensors):
        loss, gradients = pull(case, tensors, keywords, reduction)
        return loss, *gradients

    return forward_backward


@each_loss
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_whole_graph(path, case, backend):
    tensors, keywords = inputs(case)
    compiled = torch.compile(case.ours, fullgraph=True, backend=backend)
    reduction = case.reductions[0]
    ours = pull(case, tensors, keywords, reduction, compiled)
    expected = pull(case, tensors, keywords, reduction)
    assert_all_close([ours[0], *ours[1]], [expected[0], *expected[1]])


def compilations(case, function):
    """How many times a function was compiled after each of four sizes."""
    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for shape in [(3, 8), (5, 11), (17, 6), (4, 33)]:
        tensors, keywords = inputs(case, shape)
        ours = pull(case, tensors, keywords, "sum", compiled)
        expected = pull(case, tensors, keywords, "sum")
        assert_all_close([ours[0], *ours[1]], [expected[0], *expected[1]], rtol=1e-4)
        counts.append(counter.frame_count)
    return counts


@each_loss
def test_new_sizes_compile_nothing(path, case):
    """(A float keyword takes Dynamo two attempts at the first size.) What torch's own function does on the
    reference path is torch's: with class weights and probabilities it compiles anew for each number of classes."""
    counts = compilations(case, case.ours)
    if path == "reference" and len(set(counts)) > 1:
        assert counts[-1] - counts[0] <= (theirs := compilations(case, case.torch_equivalent))[-1] - theirs[0]
    else:
        assert len(set(counts)) == 1


def test_sizes_become_dynamic_by_themselves(path):
    """Without dynamic=True: one compilation, one more for what turned out to change, none after."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fusedloss.cross_entropy, fullgraph=True, backend=counter)
    for rows, classes in [(3, 8), (5, 11), (17, 6), (4, 33), (6, 9)]:
        x = torch.randn(rows, classes, device=DEVICE, requires_grad=True)
        compiled(x, torch.zeros(rows, dtype=torch.int64, device=DEVICE)).backward()
    assert counter.frame_count == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor(path):
    case = testing.case("cross_entropy/z_loss")
    tensors, keywords = inputs(case)
    compiled = torch.compile(lambda x, y, **k: case.ours(x * 2, y, **k) + 1, fullgraph=True)
    ours = pull(case, tensors, keywords, "mean", compiled)
    expected = pull(case, tensors, keywords, "mean", lambda x, y, **k: case.ours(x * 2, y, **k) + 1)
    assert_all_close([ours[0], *ours[1]], [expected[0], *expected[1]])


def test_training_step_of_a_module(path):
    """Dynamo over model and loss, then compiled autograd over their backward."""
    torch.manual_seed(1)
    x, y = torch.randn(6, 5, device=DEVICE), torch.randint(4, (6,), device=DEVICE)
    gradients = []
    for compile_forward, compile_backward in [(False, False), (True, False), (True, True)]:
        torch.manual_seed(2)
        model, loss = nn.Linear(5, 4, device=DEVICE), fusedloss.CrossEntropyLoss(label_smoothing=0.1)
        call = lambda x, y, model=model, loss=loss: loss(model(x), y)
        if compile_forward:
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        result = call(x, y)
        with compiled_backward() if compile_backward else nullcontext():
            result.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_all_close(gradients[1], gradients[0])
    assert_all_close(gradients[2], gradients[0])


def test_compiled_autograd_of_eager_code(path):
    for name in ("cross_entropy/index", "binary_cross_entropy_with_logits/plain", "kl_div_with_logits/plain"):
        case = testing.case(name)
        tensors, keywords = inputs(case)
        _, expected = pull(case, tensors, keywords, "sum")
        loss = case.ours(*tensors, **keywords, reduction="sum")
        with compiled_backward():
            loss.backward(torch.linspace(0.5, 1.5, 1, device=DEVICE).reshape(()))
        assert_all_close([t.grad for t in wanted(tensors)], expected)


def small(node, most):
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.numel() < most


VIEWS = ("aten.expand", "aten.view", "aten.detach", "aten.squeeze", "aten.alias", "aten.sym_size")


@each_case
def test_traced_graph_holds_the_operators_and_nothing_of_their_size(kernels, case):
    """make_fx over forward and backward: no torch operation on as many elements as the input has."""
    for reduction in case.reductions:
        tensors, keywords = inputs(case)
        keywords_of_tensors = [k for k, v in keywords.items() if torch.is_tensor(v)]

        def forward_backward(*flat):
            given = dict(zip(keywords_of_tensors, flat[len(tensors) :], strict=True))  # noqa: B023
            loss = case.ours(*flat[: len(tensors)], **(keywords | given), reduction=reduction)  # noqa: B023
            return loss, *torch.autograd.grad(loss, wanted(flat[: len(tensors)]), torch.ones_like(loss))  # noqa: B023

        flat = (*tensors, *(keywords[k] for k in keywords_of_tensors))
        elements = tensors[0].numel()
        for mode in ("real", "symbolic"):
            traced = make_fx(forward_backward, tracing_mode=mode)(*flat)
            assert sum(name.startswith("fusedloss.") for name in operators(traced.graph)) == 2
            for node in traced.graph.nodes:
                if node.op != "call_function" or str(node.target).startswith(("fusedloss.", "<built-in", *VIEWS)):
                    continue
                upstream = reduction == "none" and str(node.target) == "aten.ones_like.default"
                assert upstream or small(node, elements), node.format_node()
            assert_all_close(traced(*flat), forward_backward(*flat))


@each_case
def test_export(kernels, case):
    tensors, keywords = inputs(case)

    class Loss(nn.Module):
        def forward(self, *tensors):
            return case.ours(*tensors, **keywords, reduction="sum")

    tensors = tuple(t.detach() for t in tensors)
    sizes = None
    if not any(torch.is_tensor(v) for v in keywords.values()):  # which would be constants of the first size
        sizes = (tuple({0: torch.export.Dim("rows", min=2)} for _ in tensors),)
    exported = torch.export.export(Loss(), tensors, dynamic_shapes=sizes)
    if sizes:
        more = tuple(t.detach() for t in inputs(case, (SHAPE[0] + 4, SHAPE[1]))[0])
        assert_all_close([exported.module()(*more)], [Loss()(*more)])
    assert sum(name.startswith("fusedloss.") for name in operators(exported.graph)) == 1
    assert_all_close([exported.module()(*tensors)], [Loss()(*tensors)])


def test_symbolic_shapes_stay_symbolic(kernels):
    traced = make_fx(step(testing.case("cross_entropy/index"), {}, "sum"), tracing_mode="symbolic")(
        *inputs(testing.case("cross_entropy/index"))[0]
    )
    other = inputs(testing.case("cross_entropy/index"), (SHAPE[0] + 2, SHAPE[1] + 3))[0]
    assert_all_close(traced(*other), step(testing.case("cross_entropy/index"), {}, "sum")(*other))
