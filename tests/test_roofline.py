"""The static roofline: what it counts is what the kernels were built for, and what it draws is there."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fusedloss import testing
from fusedloss.traffic import traffic

pytest.importorskip("triton")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report as a user asks for it, in a process that compiles (this one may interpret)."""
    folder = tmp_path_factory.mktemp("roofline")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def ask(cases, cols, gpu="h100"):
        json_file, plot = folder / f"{cols}.json", folder / f"{cols}.png"
        command = [sys.executable, "-P", "-m", "fusedloss.roofline", "--cases", cases, "--cols", str(cols),
                   "--gpu", gpu, "--json", str(json_file), "--plot", str(plot)]  # fmt: skip
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert "modelled, not measured" in printed and plot.stat().st_size > 10_000
        return {r["kernel"]: r for r in json.loads(json_file.read_text())}

    return ask


@pytest.mark.parametrize(
    ("cols", "forward", "backward"),
    [(32000, 8.3, 7.8), (50257, 8.3, 7.8), (4096, 9.5, 9.5), (1000, 18.0, 18.0)],
)
def test_cross_entropy_is_bound_by_bytes(report, cols, forward, backward):
    """On an H100, in bfloat16: instructions an element, of long rows of any alignment, and of short ones (with code
    that these do not run: rows in two dimensions)."""
    rows = report("cross_entropy/index", cols)
    first, second = rows["cross_entropy_forward_kernel"], rows["cross_entropy_backward_kernel"]
    assert 6.0 < first["instructions"] < forward and 6.0 < second["instructions"] < backward
    assert first["distance"] < 1.06 and second["distance"] < 1.06
    for row in (first, second):
        assert row["spills"] == 0 and row["warps"] >= 32
    labels_and_sums = 16 / cols
    assert (first["bytes"], second["bytes"]) == pytest.approx((2 + labels_and_sums, 4 + labels_and_sums))


def test_edges_count_where_there_are_any(report):
    """Rows of 1000 classes begin and end at 16 bytes; those of 1001 do not."""
    even, odd = (report("cross_entropy/index", n)["cross_entropy_forward_kernel"]["instructions"] for n in (1000, 1001))
    assert 40 < (odd - even) * 1000 / 32 < 80


@pytest.mark.parametrize("case", ["entropy_with_logits/plain", "binary_cross_entropy_with_logits/pos_weight"])
def test_pairs_are_added_at_once(report, case):
    """On a B200, which has half the instructions for each byte: by those for two numbers within 12 % of their time."""
    rows = [row for row in report(case, 32000, "b200").values() if row["case"] == case]
    assert len(rows) == 2
    assert all(row["distance"] < 1.12 and row["spills"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "least"), [("cross_entropy/index", 6), ("kl_div/log_target", 13), ("kl_div_with_logits/plain", 26)]
)
def test_torch_moves_more_bytes(name, least):
    """Forward and backward of eager torch, in passes over the logits."""
    case = testing.case(name)
    inputs = case.make_inputs((64, 4096), torch.float32, "cpu")
    moved = traffic(lambda: testing.forward_backward(case, inputs, case.torch_equivalent, reduction="sum"))
    assert least <= moved / inputs[0][0].nbytes < least + 4


def test_traffic_counts_memory_once():
    """Views are free, and a dimension of stride 0 is one element."""
    x = torch.zeros(8, 16)
    assert traffic(lambda: x.t().reshape(8, 16)[:4]) == 2 * x.nbytes  # the copy that reshape makes
    assert traffic(lambda: torch.zeros(1).expand(1000) + x[0, :1]) == 4 + (4 + 4 + 4000)
