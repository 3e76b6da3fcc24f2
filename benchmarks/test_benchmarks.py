"""The shared cases under pytest-benchmark, small: `pytest benchmarks`. run.py measures them in earnest.

`--benchmark-save`, `--benchmark-compare` and `--benchmark-compare-fail` follow a case from commit to commit.
"""

from pathlib import Path

import pytest
import torch

from fusedloss.testing import CASES, case, forward_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPE = (4096, 32000) if DEVICE == "cuda" else (64, 1000)
IMPLEMENTATIONS = {"fusedloss": "ours", "torch": "torch_equivalent", "naive": "naive"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning"),
    pytest.mark.benchmark(max_time=0.05, min_rounds=3, warmup=DEVICE == "cuda"),
]


@pytest.fixture
def run(monkeypatch):
    """run.py, which stands beside this file and is no package."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import run

    return run


@pytest.mark.parametrize("part", ["forward", "both"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shared", CASES, ids=lambda c: c.name)
def test_speed(benchmark, run, shared, name, part):
    torch.manual_seed(0)
    call = getattr(shared, IMPLEMENTATIONS[name])
    inputs = shared.make_inputs(SHAPE, DTYPE, DEVICE)
    timed = run.passes(call, inputs, "batchmean" if "batchmean" in shared.reductions else "mean")[part]
    if DEVICE == "cuda":
        benchmark(lambda: (timed(), torch.cuda.synchronize()))
    else:
        benchmark(timed)
    benchmark.group = f"{shared.name} {part}"
    benchmark.extra_info.update(shape=SHAPE, dtype=str(DTYPE), bytes=run.bound_bytes(shared, inputs)[part])


@pytest.mark.parametrize("slip", [lambda loss: loss * 1.01, lambda loss: loss + 0.1, lambda loss: loss.detach()])
def test_a_wrong_result_is_not_timed(run, slip):
    shared = case("cross_entropy/index")
    inputs = shared.make_inputs((16, 50), torch.float32, "cpu")
    double = (inputs[0][0].double(), inputs[0][1]), inputs[1]
    exact = forward_backward(shared, double, shared.torch_equivalent, reduction="mean")
    check = lambda call: run.verdict(shared, call, inputs, exact, 1e-4, "mean")
    assert check(shared.torch_equivalent) == ""
    wrong = check(lambda *a, **k: slip(shared.torch_equivalent(*a, **k)))
    assert wrong.startswith(("WRONG", "failed"))
