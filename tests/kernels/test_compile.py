"""Every kernel that every case launches, compiled for six GPUs on a machine that may have none: nothing is
spilled, no loop has a barrier or an access of shared memory (NVIDIA's GPUs), registers leave 32 warps an SM (sm_90,
Triton 3.9), and rows that lie together and begin at 16 bytes are read and written 16 bytes at a time.

By default each case is compiled for sm_90 in two configurations, and every third case for each of the other
targets in one, which takes three minutes of one core; FUSEDLOSS_TEST_ALL=1 takes them all, which takes 45.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusedloss import compiled, testing

pytest.importorskip("triton")
from fusedloss.kernels.numerics import APPROXIMATE

ALL = os.environ.get("FUSEDLOSS_TEST_ALL") == "1"
WIDE = "wide"

# (shape, layout): one for each class of rows, each with the dtype and reduction that it has by default
CONFIGURATIONS = [
    ((4, 20480), WIDE, "bfloat16", "mean"),  # four warps a row, or more where it is read twice; aligned
    ((4, 12288), WIDE, "float32", "none"),
    ((4, 12295), "plain", "bfloat16", "none"),  # four warps a row, unaligned from the second row on
    ((4, 4103), "sliced", "float32", "mean"),  # a warp a row; rows apart, off 16 bytes
    ((300, 10), "plain", "bfloat16", "mean"),  # 256 rows a tile, or 32
    ((40, 100), "sliced", "float32", "none"),  # 32 rows a tile, or 8
    ((40, 300), "plain", "bfloat16", "mean"),  # 32 rows a tile, or 8
    ((9, 1000), WIDE, "bfloat16", "none"),  # a warp a row, aligned
    ((9, 1000), WIDE, "float32", "mean"),
    ((2, 60, 250), "plain", "bfloat16", "mean"),  # classes lie apart
    ((2, 60, 7), "plain", "float32", "none"),  # the same, with few positions
    ((2, 300, 7), "plain", "bfloat16", "mean"),  # the same, many of them
    ((2, 300, 300), "plain", "float32", "none"),  # the same, with many positions
]
# 32 warps an SM; older compilers keep more of a polynomial's values at a time
REGISTERS = 64 if APPROXIMATE.value else 128
# what the default share would leave out, and once exchanged values in a loop, took too many registers, or spilled
ONCE_RED = {
    ("cross_entropy/label_smoothing", (2, 300, 300), "sm_90"),
    ("cross_entropy/weight+label_smoothing", (2, 300, 7), "sm_90"),
    ("cross_entropy/probabilities+weight", (2, 300, 7), "sm_90"),
    ("cross_entropy/probabilities+weight", (2, 300, 300), "sm_90"),
    ("cross_entropy/probabilities+weight", (300, 10), "sm_100"),
}
# rows don't matter to them: what lies together is read wide wherever a row begins
ELEMENTWISE = ("bce_", "kl_div_forward", "kl_div_backward", "entropy_forward", "entropy_backward", "scale_")
# read by what their size depends on, or not at all: element by element is right for them
NARROW = ("sum_kernel", "means_kernel", "factors_kernel", "_join_kernel", "nll_loss_forward_kernel")


def is_chosen(c, k, t):
    """Whether case number c is compiled in configuration k for target t by default: for sm_90 (t = 0) all
    cases, in one wide configuration and another; for each of the others every third case, in one."""
    if t == 0:
        return k == c % 2 or k == 2 + c % (len(CONFIGURATIONS) - 2)
    return (c + t) % 3 == 0 and k == (c // 3 + 5 * t) % len(CONFIGURATIONS)


def chosen():
    targets = ["sm_90", *(t for t in compiled.TARGETS if t != "sm_90")]
    for c, case in enumerate(testing.CASES):
        for k, (shape, layout, dtype, reduction) in enumerate(CONFIGURATIONS):
            reduction = case.reductions[0] if reduction == "none" else case.reductions[-1]
            for t, target in enumerate(targets):
                if ALL or is_chosen(c, k, t) or (case.name, shape, target) in ONCE_RED:
                    request = dict(case=case.name, shape=shape, layout=layout, dtype=dtype,
                                   reduction=reduction, target=target)  # fmt: skip
                    yield pytest.param(request, id="-".join(str(v) for v in request.values()))


@pytest.fixture(scope="module")
def server():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-P", str(Path(__file__).with_name("compile_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=environment) as process:  # fmt: skip
        yield process
        process.stdin.close()


@pytest.fixture
def compile(server):
    def ask(request):
        print(json.dumps(request), file=server.stdin, flush=True)
        reply = json.loads(server.stdout.readline())
        assert "error" not in reply, reply["error"]
        return reply["codes"]

    return ask


@pytest.mark.parametrize("wanted", list(chosen()))
def test_kernels(wanted, compile):
    codes = compile(wanted)
    assert any("forward" in c["name"] for c in codes)
    first_order = wanted["reduction"] != "none" and "grad_in_forward" in wanted["case"]
    assert any(c["name"] == "scale_kernel" if first_order else "backward" in c["name"] for c in codes)
    for code in codes:
        assert code["instructions"] > 10, "no machine code was read"
        assert code["spills"] == 0, f"{code['name']} spills {code['spills']} bytes"
        if wanted["target"].startswith("sm_"):  # warps of 64 threads share a run of columns among more
            assert not any(code["exchanges"]), f"{code['name']}: shared memory in loops {code['exchanges']}"
        if wanted["target"] == "sm_90":
            assert code["registers"] <= REGISTERS, f"{code['name']}: {code['registers']}"
        flat = wanted["layout"] == "plain" and code["name"].startswith(ELEMENTWISE)
        if (flat or wanted["layout"] == WIDE) and not code["name"].endswith(NARROW):
            widths = code["widths"]
            assert widths.get("load16", 0) >= code["reads"], f"{code['name']}: {widths}"
            assert widths.get("store16", 0) >= code["writes"], f"{code['name']}: {widths}"


@pytest.mark.parametrize("target", ["sm_90", "sm_120"])
@pytest.mark.parametrize(("case", "limit"), [("label_smoothing", 64), ("weight+label_smoothing", 128)])
def test_gradient_in_forward_with_all_options(case, limit, target, compile):
    """Two rows of 512 threads an SM; one, where two would spill."""
    options = dict(softcap=30.0, z_loss=0.1, grad_in_forward=True)
    codes = compile(dict(case=f"cross_entropy/{case}", shape=(4, 20480), layout=WIDE, dtype="bfloat16",
                         reduction="sum", target=target, options=options))  # fmt: skip
    forward = next(c for c in codes if "forward" in c["name"])
    assert forward["spills"] == 0
    assert forward["registers"] <= limit


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("case", "shape", "options"),
    [
        ("cross_entropy/softcap", (300, 10), {}),
        ("cross_entropy/softcap", (300, 10), dict(z_loss=0.1)),
        ("cross_entropy/softcap", (300, 10), dict(label_smoothing=0.1)),
        ("cross_entropy/softcap", (40, 100), dict(label_smoothing=0.1)),
        ("cross_entropy/softcap", (9, 1000), dict(z_loss=0.1)),
        ("binary_cross_entropy_with_logits/pos_weight", (1, 1 << 16), dict(pos_weight=[2.0])),
    ],
    ids=str,
)
def test_options_leave_32_warps(case, shape, options, dtype, compile):
    """Where they took 68 to 72 registers. Rows are joined by one program: what it leaves to others is no matter."""
    codes = compile(dict(case=case, shape=shape, layout="plain", dtype=dtype, reduction="mean", target="sm_90",
                         options=options))  # fmt: skip
    assert {c["name"]: c["registers"] for c in codes if c["registers"] > REGISTERS and "join" not in c["name"]} == {}


@pytest.mark.skipif(REGISTERS > 64, reason="the limit is Triton 3.9's")
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("case", "kernel", "options"),
    [
        ("cross_entropy/weight+label_smoothing", "cross_entropy_backward_kernel", dict(softcap=30.0)),
        ("kl_div_with_logits/plain", "kl_div_with_logits_forward_kernel", {}),
    ],
)
def test_rows_of_a_warp_are_held_to_64_registers(case, kernel, options, target, compile):
    """Where they took 69 to 72, the second on sm_100 alone; without a spill."""
    reduction = testing.case(case).reductions[-1]
    codes = compile(dict(case=case, shape=(9, 1000), layout=WIDE, dtype="bfloat16", reduction=reduction,
                         target=target, options=options))  # fmt: skip
    found = [(c["registers"], c["spills"]) for c in codes if c["name"] == kernel]
    assert found and all(registers <= 64 and spills == 0 for registers, spills in found)


def test_everything_is_chosen_somewhere():
    """The default share leaves out no target; no case and no configuration on a vendor's GPUs."""
    requests = [p.values[0] for p in chosen()]
    assert {r["target"] for r in requests} == set(compiled.TARGETS)
    for vendor in ("sm_90", "sm_", "gfx"):
        mine = [r for r in requests if r["target"].startswith(vendor)]
        assert {(r["shape"], r["layout"], r["dtype"]) for r in mine} == {c[:3] for c in CONFIGURATIONS}
        if vendor != "gfx":
            assert {r["case"] for r in mine} == {c.name for c in testing.CASES}
