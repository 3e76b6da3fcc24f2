"""The modules are torch's in everything but who computes; patch_torch puts them in torch's place."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import fusedloss
from fusedloss.patch import is_patched

NAMES = ("BCELoss", "BCEWithLogitsLoss", "CrossEntropyLoss", "KLDivLoss", "NLLLoss")
FUNCTIONS = (
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "kl_div",
    "nll_loss",
)
TORCH = {name: getattr(nn, name) for name in NAMES} | {name: getattr(F, name) for name in FUNCTIONS}
W = torch.linspace(0.5, 2.0, 5)
pytestmark = pytest.mark.filterwarnings("ignore:reduction:UserWarning", "ignore:size_average:UserWarning")
each_module = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def leave_torch_alone():
    with fusedloss.use("reference"):
        yield
    fusedloss.unpatch_torch()
    assert all(getattr(F, name) is TORCH[name] for name in FUNCTIONS)
    assert all(getattr(nn, name) is TORCH[name] for name in NAMES)


def inputs(name):
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)
    if name in ("CrossEntropyLoss", "NLLLoss"):
        return (x if name == "CrossEntropyLoss" else x.log_softmax(1)), torch.tensor([0, 4, 2, 2])
    if name == "KLDivLoss":
        return x.log_softmax(1), other.softmax(1)
    return (x.sigmoid() if name == "BCELoss" else x), other.sigmoid()


def options(name):
    yield {}
    yield dict(reduction="sum")
    yield dict(size_average=False)
    if name != "KLDivLoss":
        yield dict(weight=W, reduction="none")
    if name == "BCEWithLogitsLoss":
        yield dict(pos_weight=W)
    if name == "KLDivLoss":
        yield dict(log_target=True, reduction="batchmean")
    if name in ("CrossEntropyLoss", "NLLLoss"):
        yield dict(ignore_index=2)
    if name == "CrossEntropyLoss":
        yield dict(label_smoothing=0.1)


@each_module
def test_same_as_torchs(name):
    ours_type, theirs_type = getattr(fusedloss, name), TORCH[name]
    theirs_signature = list(inspect.signature(theirs_type).parameters)
    assert list(inspect.signature(ours_type).parameters)[: len(theirs_signature)] == theirs_signature
    for kwargs in options(name):
        ours, theirs = ours_type(**kwargs), theirs_type(**kwargs)
        assert isinstance(ours, theirs_type)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
        assert_close(ours(*inputs(name)), theirs(*inputs(name)))
        assert ours.double().float()(*inputs(name)).dtype == torch.float32


@each_module
def test_it_is_ours_that_computes(name, monkeypatch):
    function = {v: k for k, v in zip(FUNCTIONS, NAMES, strict=True)}[name]
    called = []
    original = getattr(fusedloss.functional, function)
    monkeypatch.setattr(fusedloss.functional, function, lambda *a, **k: called.append(1) or original(*a, **k))
    getattr(fusedloss, name)()(*inputs(name))
    assert called


def test_our_keywords():
    x, y = inputs("CrossEntropyLoss")
    module = fusedloss.CrossEntropyLoss(z_loss=0.1, softcap=2.0, return_z_loss=True, dtype=torch.float64)
    loss, z = module(x, y)
    expected = fusedloss.cross_entropy(x, y, z_loss=0.1, softcap=2.0, return_z_loss=True, dtype=torch.float64)
    assert_close((loss, z), expected)
    x, t = inputs("BCEWithLogitsLoss")
    assert_close(
        fusedloss.BCEWithLogitsLoss(label_smoothing=0.2)(x, t),
        fusedloss.binary_cross_entropy_with_logits(x, t, label_smoothing=0.2),
    )
    for name in NAMES:
        loss = getattr(fusedloss, name)(dtype=torch.float64)(*inputs(name))
        assert loss.dtype == torch.float64


def test_kl_div_with_logits_loss():
    x, t = inputs("BCEWithLogitsLoss")
    kwargs = dict(dim=0, temperature=2.0, reverse=True, reduction="sum", dtype=torch.float64)
    module = fusedloss.KLDivWithLogitsLoss(**kwargs)
    assert_close(module(x, t), fusedloss.kl_div_with_logits(x, t, **kwargs))
    assert "temperature=2.0" in repr(module)
    assert_close(pickle.loads(pickle.dumps(module))(x, t), module(x, t))


@each_module
def test_pickle_and_deepcopy(name):
    for kwargs in options(name):
        module = getattr(fusedloss, name)(**kwargs)
        for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert type(again) is type(module)
            assert_close(again(*inputs(name)), module(*inputs(name)))


@each_module
def test_state_from_before_a_keyword_existed(name):
    module = getattr(fusedloss, name)()
    state = dict(TORCH[name]().__dict__)
    module.__dict__.clear()
    module.__dict__.update(state)
    assert_close(module(*inputs(name)), TORCH[name]()(*inputs(name)))


def test_per_sample_gradients_of_a_module():
    model, loss = nn.Linear(3, 5), fusedloss.CrossEntropyLoss()
    x, y = torch.randn(4, 3), torch.tensor([0, 4, 2, 2])
    parameters = dict(model.named_parameters())

    def one(parameters, x, y):
        return loss(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    per_sample = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(parameters, x, y)
    loss(model(x), y).backward()
    assert_close(per_sample["weight"].mean(0), model.weight.grad)


class TestPatch:
    def test_call_and_undo(self):
        fusedloss.patch_torch()
        assert is_patched()
        for name in FUNCTIONS:
            assert getattr(F, name) is getattr(fusedloss, name)
        for name in NAMES:
            assert getattr(nn, name) is getattr(fusedloss, name)
            assert getattr(nn.modules, name) is getattr(fusedloss, name)
            assert getattr(nn.modules.loss, name) is getattr(fusedloss, name)
        import torch.distributions.bernoulli as bernoulli

        assert bernoulli.binary_cross_entropy_with_logits is fusedloss.binary_cross_entropy_with_logits
        fusedloss.unpatch_torch()
        assert not is_patched()
        assert bernoulli.binary_cross_entropy_with_logits is TORCH["binary_cross_entropy_with_logits"]
        assert nn.modules.loss.BCELoss is TORCH["BCELoss"]

    def test_context_managers_nest_and_calls_repeat(self):
        with fusedloss.patch_torch():
            with fusedloss.patch_torch():
                assert is_patched()
            assert is_patched()
            fusedloss.patch_torch()
        assert not is_patched()
        fusedloss.patch_torch()
        with fusedloss.patch_torch():
            pass
        assert is_patched()
        fusedloss.unpatch_torch()
        fusedloss.unpatch_torch()
        assert not is_patched()

    def test_undone_after_an_error(self):
        with pytest.raises(KeyError), fusedloss.patch_torch():
            raise KeyError
        assert not is_patched()

    @each_module
    def test_results_without_recursion(self, name):
        before = TORCH[name]()
        expected = before(*inputs(name))
        with fusedloss.patch_torch():
            assert_close(getattr(nn, name)()(*inputs(name)), expected)
            assert_close(before(*inputs(name)), expected)
            assert inspect.signature(getattr(nn, name)).parameters.keys() > {"reduction"}

    def test_odd_calls_reach_torch(self):
        with fusedloss.patch_torch(), pytest.raises(NotImplementedError):
            F.cross_entropy(torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1]))
        weight = W.clone().requires_grad_()
        with fusedloss.patch_torch(), pytest.raises(RuntimeError, match="not differentiable"):
            F.binary_cross_entropy_with_logits(torch.ones(4, 5), torch.ones(4, 5), weight)

    @each_module
    def test_pickles_in_both_directions(self, name):
        plain = TORCH[name]()
        from_plain = pickle.dumps(plain)
        expected = plain(*inputs(name))
        with fusedloss.patch_torch():
            patched = getattr(nn, name)()
            from_patched, plain_in_patched = pickle.dumps(patched), pickle.dumps(plain)
            copied = copy.deepcopy(plain)
            assert type(copied) is TORCH[name]
            buffer = io.BytesIO()
            torch.save(nn.Sequential(plain, patched), buffer)
            for data in (from_plain, from_patched, plain_in_patched):
                assert_close(pickle.loads(data)(*inputs(name)), expected)
        assert_close(copied(*inputs(name)), expected)
        for data in (from_plain, from_patched, plain_in_patched, pickle.dumps(patched)):
            assert_close(pickle.loads(data)(*inputs(name)), expected)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert type(loaded[0]) is TORCH[name]
        assert type(loaded[1]) is getattr(fusedloss, name)
        assert pickle.dumps(plain) == from_plain

    def test_compile_of_a_patched_training_step(self):
        torch._dynamo.reset()
        with fusedloss.patch_torch():
            model, loss = nn.Linear(3, 5), nn.CrossEntropyLoss()
            x, y = torch.randn(4, 3), torch.tensor([0, 4, 2, 2])
            step = torch.compile(lambda x, y: loss(model(x), y), fullgraph=True, backend="aot_eager")
            assert_close(step(x, y), loss(model(x), y))

    def test_in_a_fresh_process(self):
        code = (
            "import fusedloss; fusedloss.patch_torch(); import torch; from torch import nn;"
            "from torch.nn.functional import cross_entropy;"
            "import torch.distributions.geometric as g;"
            "assert cross_entropy is fusedloss.cross_entropy;"
            "assert g.binary_cross_entropy_with_logits is fusedloss.binary_cross_entropy_with_logits;"
            "print(type(nn.CrossEntropyLoss()).__module__)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "fusedloss.nn"
