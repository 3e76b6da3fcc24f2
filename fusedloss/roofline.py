"""How far each kernel is from its GPU's memory roofline, read from machine code compiled for that GPU.

Run ``python -m fusedloss.roofline --gpu h100``. Counted: registers, spills, instructions and special-function
operations, in the code that Triton's own assembler emits. Declared: bytes (beside each case, in
:mod:`fusedloss.testing`) and trip counts (:func:`trips`). Modelled: times, the largest of bytes over
bandwidth, instructions over issue rate and special-function operations over their rate, with launches
apart. No GPU is needed; where the named one is present, its measured time stands beside the model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .compiled import Code, compile_launch, launches, tiles_each
from .testing import CASES, Case, forward_backward
from .traffic import traffic

SAMPLE_ROWS = 8  # rows compiled for: the code does not depend on their number


class GPU(NamedTuple):
    """Published rates. `lanes`: instructions of one thread a clock an SM; `special`: the same for MUFU."""

    name: str
    target: str
    bandwidth: float  # bytes a second
    sms: int
    clock: float  # Hz
    lanes: int = 128
    special: int = 16
    warps: int = 64  # resident an SM, at most
    registers: int = 65536

    def resident_warps(self, code: Code) -> int:
        """Warps an SM that the registers leave room for."""
        if self.target.startswith("gfx"):
            return min(self.warps, 4 * (512 // max(code.registers, 1)))
        each = (max(code.registers, 16) * 32 + 255) // 256 * 256 * code.num_warps
        return min(self.warps, self.registers // each * code.num_warps)


GPUS = {
    "a100": GPU("A100 80GB SXM", "sm_80", 2.04e12, 108, 1.41e9),
    "h100": GPU("H100 SXM", "sm_90", 3.35e12, 132, 1.755e9),
    "b200": GPU("B200", "sm_100", 8.0e12, 148, 1.85e9),
    "rtx4090": GPU("RTX 4090", "sm_120", 1.01e12, 128, 2.52e9, warps=48),
    "mi300x": GPU("MI300X", "gfx942", 5.3e12, 304, 2.1e9, 64, 16, warps=32),
}


class Row(NamedTuple):
    """One kernel of one case: what is counted, and what follows from it."""

    case: str
    kernel: str
    registers: int
    spills: int
    warps: int
    instructions: float
    special: float
    bytes: float
    torch_bytes: float
    bytes_us: float
    modelled_us: float
    bound: str

    @property
    def distance(self) -> float:
        return self.modelled_us / self.bytes_us if self.bytes_us else 0.0


def trips(launch: Any, cols: int) -> tuple[int, tuple[int, ...]]:
    """(elements a thread, trips of each loop) of one program, or of those of a row, in the order of the code.

    A long row: whole blocks without a mask, whole parts of the label's block and of the tail where a part is
    less than a block, masked parts; a kernel that walks a row twice has these loops twice. A tile of short rows:
    masked blocks. An element-wise plane: whole tiles (UNROLL a trip, then the rest), and masked ones, which the last
    program alone has."""
    constants, threads = launch.constants, launch.num_warps * 32
    if "T" in constants and constants["ROWS"] == 1:
        part, each = constants["UP"] * constants["T"] * constants["V"], constants["U"] // constants["UP"]
        label = constants.get("PROBS") is False or launch.kernel.__name__.startswith("nll_loss")
        parts = cols // part
        blocks = max(parts // each - label, 0)
        label = label and parts > 0  # else it is in the tail
        counts = blocks, parts - blocks * each - label, label + (cols % part > 0)
        return cols // threads, counts if each > 1 else counts[::2]
    if "T" in constants:
        block = constants["U"] * constants["T"] * constants["V"]
        return constants["ROWS"] * cols // threads, (-(-cols // block),)
    if "BLOCK" not in constants:  # one element a row is gathered
        return 1, (1,)
    tiles, unroll = launch.scalars["trips"], constants.get("UNROLL", 1)
    whole = (tiles // unroll, tiles % unroll) if unroll > 1 else (tiles,)
    return tiles * constants["BLOCK"] // threads, (*whole, 0)


def executed(code: Code, launch: Any, cols: int) -> tuple[float, float]:
    """Machine instructions and special-function operations an element; of a branch within a loop, both sides count, and
    of what may be passed over outside: rows that begin and end at 16 bytes have no edges, others in one program."""
    elements, counts = trips(launch, cols)
    # in forward a very long row has several programs, whatever the number of rows
    programs = launch.grid[1] if "_forward_" in code.name and len(launch.grid) > 1 else 1
    if len(code.loops) % len(counts):  # the compiler saw that one of them never runs
        counts = tuple(c for c in counts if c) or counts
    instructions, special = float(programs * code.outside.instructions), float(programs * code.outside.special)
    if launch.constants.get("ROWS") == 1 and launch.constants["HINT"] > 1:
        without = programs if cols % launch.constants["HINT"] == 0 else programs - 1
        instructions -= without * code.passed.instructions
        special -= without * code.passed.special
    for k, loop in enumerate(code.loops):
        times = float(counts[k % len(counts)])
        once = 0  # bytes that the loop loads in a trip, where another loop tells
        if "UNROLL" in launch.constants and k == 1:
            once = code.loops[0].load_bytes // launch.constants["UNROLL"]
        elif "U" in launch.constants and len(counts) == 3 and k % 3 == 0 and k + 1 < len(code.loops):
            once = launch.constants["U"] * code.loops[k + 1].load_bytes
        if once:
            times /= max(1, loop.load_bytes // once)  # the assembler unrolled it
        instructions += loop.instructions * times
        special += loop.special * times
    return instructions / max(elements, 1), special / max(elements, 1)


def element_bytes(case: Case, inputs: Any, forward: bool, cols: int) -> float:
    """Bytes an element that cannot be avoided: reads and writes of element-sized tensors, and an element's share of
    what its row has."""
    tensors = inputs[0]
    logits, dense = case.forward_bytes if forward else case.backward_bytes
    target = tensors[1].element_size() if len(tensors) > 1 and tensors[1].is_floating_point() else 0
    size = logits * tensors[0].element_size() + dense * target
    return size + case.row_bytes / cols if size else 0


def torch_bytes(case: Case, dtype: torch.dtype, reduction: str) -> tuple[float, float]:
    """Bytes an element that eager torch's operators read and write, in forward and in backward: counted on a CPU."""
    tensors, given = case.make_inputs((16, 4096), dtype, "cpu")
    leaf = tensors[0].detach().requires_grad_()
    keywords = {**given, "reduction": reduction}
    forward = traffic(lambda: case.torch_equivalent(leaf, *tensors[1:], **keywords))
    both = traffic(lambda: forward_backward(case, (tensors, given), case.torch_equivalent, reduction=reduction))
    return forward / leaf.numel(), (both - forward) / leaf.numel()


def report(case: Case, gpu: GPU, rows: int, cols: int, dtype: torch.dtype, reduction: str = "mean") -> list[Row]:
    """The rows of one case: every kernel of forward and backward, reductions apart."""
    reduction = next(r for r in ("batchmean", reduction, case.reductions[0]) if r in case.reductions)
    flat = case.forward_bytes != (0, 0) and case.loss in (
        "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "entropy",
    )  # fmt: skip
    shape = (max(1, rows * cols // 65536 // 16), 65536) if flat else (SAMPLE_ROWS, cols)
    inputs = case.make_inputs(shape, dtype, "cpu")
    by_torch = torch_bytes(case, dtype, reduction)
    found = []
    for launch in launches(lambda: forward_backward(case, inputs, reduction=reduction)):
        code = compile_launch(launch, gpu.target)
        if not code.name.endswith(("_forward_kernel", "_backward_kernel")):
            continue
        forward = "forward" in code.name
        if flat:
            launch.scalars["trips"] = tiles_each(launch, rows * cols)
        instructions, special = executed(code, launch, cols)
        size = element_bytes(case, inputs, forward, cols)
        elements = rows * cols if "T" in launch.constants or flat or size else rows  # a gather reads rows
        times = {
            "bytes": elements * size / gpu.bandwidth,
            "instructions": elements * instructions / (gpu.sms * gpu.lanes * gpu.clock),
            "special functions": elements * special / (gpu.sms * gpu.special * gpu.clock),
        }
        bound = max(times, key=lambda name: times[name])
        found.append(
            Row(case.name, code.name, code.registers, code.spills, gpu.resident_warps(code), instructions,
                special, size, by_torch[not forward], times["bytes"] * 1e6, times[bound] * 1e6, bound)
        )  # fmt: skip
    return found


def show(rows: list[Row], gpu: GPU, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption="Counted in machine code, and torch's bytes in its operators' tensors; "
                  "times are modelled, not measured.")  # fmt: skip
    for name in ("case", "kernel", "registers", "spills", "warps/SM", "insns/el", "MUFU/el", "bytes/el",
                 "torch's", "bytes us", "model us", "distance", "bound by"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("case", "kernel", "bound by") else "right")
    for r in rows:
        table.add_row(
            r.case, r.kernel.removesuffix("_kernel"), str(r.registers), str(r.spills), str(r.warps),
            f"{r.instructions:.1f}", f"{r.special:.2f}", f"{r.bytes:.3g}", f"{r.torch_bytes:.0f}", f"{r.bytes_us:.0f}",
            f"{r.modelled_us:.0f}", f"{r.distance:.2f}", r.bound,
        )  # fmt: skip
    Console(width=180).print(table)


def plot(rows: list[Row], gpu: GPU, path: Path) -> None:
    """Modelled time over pure-bytes time, a bar a kernel; and a mark where torch's bytes are, times as many."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1 + 0.2 * len(rows)), layout="constrained")
    shown = [r for r in rows if r.bytes_us]
    names = [f"{r.case}  {'forward' if 'forward' in r.kernel else 'backward'}" for r in shown]
    colors = ["#2f6f8f" if r.bound == "bytes" else "#d9822b" for r in shown]
    axes.barh(names, [r.distance for r in shown], color=colors, height=0.7)
    axes.scatter([r.torch_bytes / r.bytes for r in shown], names, marker="|", s=60, color="#30638e",
                 label="bytes of eager torch's operators", zorder=3)  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    axes.legend(fontsize=8, loc="lower right")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("times the unavoidable bytes (orange: bound by something else)")
    axes.set_title(f"{gpu.name}: modelled time, and torch's bytes (no GPU was timed)", fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def measured(case: Case, rows: int, cols: int, dtype: torch.dtype) -> float:
    """Median microseconds of forward and backward on the GPU of this machine."""
    from torch.utils.benchmark import Timer

    inputs = case.make_inputs((rows, cols), dtype, "cuda")
    timer = Timer("forward_backward(case, inputs)", globals=dict(globals(), case=case, inputs=inputs))
    return 1e6 * timer.blocked_autorange(min_run_time=0.5).median


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(prog="python -m fusedloss.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=32000)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    gpu, dtype = GPUS[options.gpu], getattr(torch, options.dtype)
    rows = []
    for case in (c for c in CASES if options.cases in c.name):
        rows += report(case, gpu, options.rows, options.cols, dtype)
    show(rows, gpu, f"{gpu.name} ({gpu.target}), {options.rows} x {options.cols}, {options.dtype}")
    if torch.cuda.is_available():
        print(f"measured on {torch.cuda.get_device_name()}, forward and backward:")
        for case in (c for c in CASES if options.cases in c.name):
            print(f"  {case.name:45s} {measured(case, options.rows, options.cols, dtype):9.1f} us")
    else:
        print("No GPU was timed.")
    if options.json:
        options.json.write_text(json.dumps([r._asdict() | {"distance": r.distance} for r in rows], indent=1))
    if options.plot:
        plot(rows, gpu, options.plot)
    return rows


if __name__ == "__main__":
    main()
