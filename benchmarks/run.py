"""The shared cases against the plain formula, torch, torch.compile and other packages: checked, then timed.

    python benchmarks/run.py                      the GPU where there is one, otherwise the CPU path
    python benchmarks/run.py --cols 32000 128256 --dtype bfloat16
    python benchmarks/run.py --quick --cases kl_div

Every implementation's loss and gradient are compared with torch's own function in float64 first; one that is
wrong gets WRONG in place of a time. GB/s are the bytes that the loss has to move, over the time taken.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # read when torch is imported

import torch
from peers import peers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.benchmark import Timer

import fusedloss
from fusedloss.testing import CASES, Case, Inputs, forward_backward

OURS, PASSES = "fusedloss", ("forward", "backward", "both")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative: a gate, not a score
COMPILED_ON_CPU = {"cross_entropy/index", "binary_cross_entropy_with_logits/plain", "kl_div/log_target"}
Times = tuple[float, float, float]  # ms: median, 20 % and 80 % quantiles
warnings.filterwarnings("ignore", message="reduction: 'mean' divides")


class CPU:
    device, shape, seconds = "cpu", (1024, 8192), 150.0
    note = "No GPU was timed: these are times of the CPU path (the reference)."

    def __init__(self) -> None:
        info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        model = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), "CPU")
        self.name = f"{model}, {torch.get_num_threads()} threads"

    def memory(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30

    def times(self, calls: dict[Any, Callable], seconds: float) -> dict[Any, Times]:
        """Interleaved, so that a busy neighbour slows all of them and the ratios stay."""
        timers = {key: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
                  for key, f in calls.items()}  # fmt: skip
        number = {key: max(1, round(2e-3 / t.timeit(1).mean)) for key, t in timers.items()}
        samples: dict[Any, list[float]] = {key: [] for key in calls}
        end = time.monotonic() + seconds
        rounds = 0
        while rounds < 3 or (rounds < 50 and time.monotonic() < end):
            rounds += 1
            for key, timer in timers.items():
                samples[key].append(timer.timeit(number[key]).mean * 1e3)
        return {key: _quantiles(s) for key, s in samples.items()}

    def memory_and_launches(self, call: Callable) -> tuple[int, int | None]:
        """Peak bytes beyond the inputs, from the allocator's events; a CPU has no launches."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
            kept = call()
        events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        del kept
        return peak, None


class GPU:
    device, shape, seconds = "cuda", (4096, 32000), 600.0
    note = ""

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()

    def memory(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def times(self, calls: dict[Any, Callable], seconds: float) -> dict[Any, Times]:
        """do_bench empties the L2 cache before each call; the host's part overlaps."""
        from triton.testing import do_bench

        rep = min(200.0, max(20.0, seconds * 1e3 / len(calls)))
        return {key: tuple(do_bench(f, warmup=rep / 4, rep=rep, quantiles=(0.5, 0.2, 0.8)))
                for key, f in calls.items()}  # fmt: skip

    def memory_and_launches(self, call: Callable) -> tuple[int, int | None]:
        """Peak bytes beyond the inputs, and kernels, copies and fills on the device."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        cuda = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, cuda]) as p:
            call()
            torch.cuda.synchronize()
        on_device = [e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return peak, sum(not getattr(e, "is_user_annotation", False) for e in on_device)


def _quantiles(samples: list[float]) -> Times:
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), low, high


def _map(inputs: Inputs, f: Callable) -> Inputs:
    tensors, keywords = inputs
    one = lambda t: f(t) if isinstance(t, torch.Tensor) else t
    return tuple(map(one, tensors)), {name: one(value) for name, value in keywords.items()}


def implementations(case: Case, keywords: dict[str, Any], device: str, compiled: bool) -> dict[str, Callable]:
    calls = {"naive": case.naive, "torch": case.torch_equivalent}
    if compiled:
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # backward is timed apart, on one graph
        calls["torch.compile"] = torch.compile(lambda *a, **k: case.torch_equivalent(*a, **k), dynamic=False)
    return {**calls, OURS: case.ours, **peers(case, keywords, device)}


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the whole tensor: a quarter of the largest error, or the root of the squares' sum."""
    gap = (got.double() - exact).abs()
    return max((gap.max() / exact.abs().max() / 4).item(), (gap.norm() / exact.norm()).item())


def verdict(case: Case, call: Callable, inputs: Inputs, exact: Any, tolerance: float, reduction: str) -> str:
    """"" where loss and gradient are right. A copy goes in: some packages write into the logits."""
    try:
        loss, (dx,) = forward_backward(case, _map(inputs, torch.clone), call, reduction=reduction)
        errors = error(loss, exact[0]), error(dx, exact[1][0])
    except Exception as e:
        return f"failed: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"[:160]
    return "" if all(e <= tolerance for e in errors) else f"WRONG: error {max(errors):.2g}"


def bound_bytes(case: Case, inputs: Inputs) -> dict[str, int]:
    """The bytes that each pass has to move, from the case's own declaration."""
    x, target = inputs[0][0], inputs[0][-1]
    sizes = x.element_size(), target.element_size() if target.shape == x.shape else 0
    count = lambda factors: x.numel() * sum(f * s for f, s in zip(factors, sizes, strict=True))
    forward, backward = count(case.forward_bytes), count(case.backward_bytes)
    return dict(forward=forward, backward=backward, both=forward + backward)


def passes(call: Callable, inputs: Inputs, reduction: str) -> dict[str, Callable]:
    (x, *rest), keywords = _map(inputs, torch.clone)
    x.requires_grad_()
    forward = lambda: call(x, *rest, **keywords, reduction=reduction)
    loss = forward()
    one = torch.ones_like(loss)
    return dict(
        forward=forward,
        backward=lambda: torch.autograd.grad(loss, x, one, retain_graph=True),
        both=lambda: torch.autograd.grad(forward(), x),
    )


def run_case(case: Case, host: Any, shape: tuple[int, int], dtype: torch.dtype, compiled: bool, end: float):
    """One result for each implementation; `end` is when this case should be done."""
    reduction = "batchmean" if "batchmean" in case.reductions else "mean"
    torch.manual_seed(0)
    # an eager formula in float64 holds about 16 tensors, gradients counted
    rows = max(1, min(shape[0], int(host.memory() * 0.7) // (16 * 8 * shape[1])))
    inputs = case.make_inputs((rows, shape[1]), dtype, host.device)
    double = _map(inputs, lambda t: t.double() if t.is_floating_point() else t)
    exact = forward_backward(case, double, case.torch_equivalent, reduction=reduction)
    del double
    calls = implementations(case, inputs[1], host.device, compiled)
    verdicts = {
        name: verdict(case, call, inputs, exact, TOLERANCE[dtype], reduction) for name, call in calls.items()
    }
    del exact
    if rows < shape[0]:
        inputs = case.make_inputs(shape, dtype, host.device)
    bound, good = bound_bytes(case, inputs), [name for name in calls if not verdicts[name]]
    timed = {name: passes(calls[name], inputs, reduction) for name in good}
    times = host.times({(n, p): f for n in good for p, f in timed[n].items()}, end - time.monotonic())
    for name in calls:
        result: dict[str, Any] = dict(case=case.name, name=name, verdict=verdicts[name], checked_rows=rows)
        if name in good:
            result["ms"] = {p: times[name, p] for p in PASSES}
            result["gbs"] = {p: bound[p] / times[name, p][0] / 1e6 if bound[p] else None for p in PASSES}
            result["peak_bytes"], result["launches"] = host.memory_and_launches(timed[name]["both"])
        yield result


def copy_gbs(host: Any) -> float:
    source = torch.ones((1 << 30 if host.device == "cuda" else 1 << 28) // 4, device=host.device)
    to = torch.empty_like(source)
    return 2 * source.nbytes / host.times({"": lambda: to.copy_(source)}, 1.0)[""][0] / 1e6


def table(report: dict[str, Any]) -> Table:
    of = {(r["case"], r["name"]): r for r in report["results"]}
    out = Table(title=f"{report['device']}: {report['rows']} x {report['cols']}, {report['dtype']}",
                caption=f"ms: median, ± half the 20-80 % range. GB/s and % of a copy's {report['copy_gbs']:.1f} GB/s "
                "count the bytes that forward and backward must move.\nMiB: peak beyond the inputs, forward and "
                "backward. x torch: both, torch's time over this one's.")  # fmt: skip
    for name in ("case", "", *PASSES, "GB/s", "% copy", "x torch", "MiB", "launches"):
        out.add_column(name, justify="left" if name in ("case", "") else "right", no_wrap=True)
    shown = None
    for (case, name), r in of.items():
        if shown not in (None, case):
            out.add_section()
        first, shown, style = case if case != shown else "", case, "bold" if name == OURS else None
        if "ms" not in r:
            out.add_row(first, name, f"[red]{r['verdict'].split(':')[0]}", style=style)
            continue
        cells = ["{:.3g} ±{:.0f}%".format(t[0], (t[2] - t[1]) / 2 / t[0] * 100) for t in r["ms"].values()]
        rate, torch_ms = r["gbs"]["both"], of[case, "torch"].get("ms")
        cells += ["-", "-"] if rate is None else [f"{rate:.1f}", f"{rate / report['copy_gbs']:.0%}"]
        cells += [f"{torch_ms['both'][0] / r['ms']['both'][0]:.2f}" if torch_ms else "-"]
        cells += [f"{r['peak_bytes'] / 2**20:.1f}", "-" if r["launches"] is None else str(r["launches"])]
        out.add_row(first, name, *cells, style=style)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--cols", type=int, nargs="+", help="one table for each")
    parser.add_argument("--cases", default="", help="only the cases whose name contains this")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="time torch.compile too")
    parser.add_argument("--quick", action="store_true", help="small, in about half a minute on a CPU")
    parser.add_argument("--seconds", type=float, help="about how long to measure for each table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args(argv)
    host, console = (GPU() if args.device == "cuda" else CPU()), Console(width=None if sys.stdout.isatty() else 150)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    rows = args.rows or (128 if args.quick else host.shape[0])
    compiled = {c.name for c in CASES if args.compile == "on"
                or (args.compile == "auto" and not args.quick and (args.device == "cuda" or c.name in COMPILED_ON_CPU))}
    failed = False
    for cols in args.cols or [1000 if args.quick else host.shape[1]]:
        failed |= run(args, host, console, dtype, (rows, cols), compiled)
    if args.device == "cpu":
        roofline(console)
    return int(failed)
