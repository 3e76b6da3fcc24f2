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
import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plot
import torch
from devices import CPU, GPU, copy_gbs
from peers import peers
from plot import OURS, PASSES
from rich.console import Console
from rich.progress import track

import fusedloss
from fusedloss.testing import CASES, Case, Inputs, forward_backward

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative: a gate, not a score
COMPILED_ON_CPU = {"cross_entropy/index", "binary_cross_entropy_with_logits/plain", "kl_div/log_target"}
warnings.filterwarnings("ignore", message="reduction: 'mean' divides")


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


def run(args: Any, host: Any, console: Console, shape: tuple[int, int], compiled: set[str]) -> bool:
    """Measure, print and write one table; whether one of our own results was wrong."""
    dtype = getattr(torch, args.dtype)
    cases = [case for case in CASES if args.cases in case.name]
    seconds = args.seconds or (host.seconds / 5 if args.quick else host.seconds)
    report: dict[str, Any] = dict(
        device=host.name, kind=host.device, dtype=args.dtype, rows=shape[0], cols=shape[1], note=host.note,
        torch=torch.__version__, triton=version("triton"), fusedloss=fusedloss.__version__,
        copy_gbs=copy_gbs(host), results=[], left_out=[],
    )  # fmt: skip
    end = time.monotonic() + seconds
    variant = lambda c: [other.loss for other in cases].index(c.loss) - cases.index(c)
    ordered = sorted(cases, key=variant, reverse=True)  # every loss first, then the variants, while time lasts
    for i, case in track([*enumerate(ordered)], f"{shape[0]} x {shape[1]} {args.dtype}", console=console):
        now = time.monotonic()
        if now > end:
            report["left_out"].append(case.name)
            continue
        share = now + (end - now) / (len(cases) - i)
        report["results"] += run_case(case, host, shape, dtype, case.name in compiled, share)
    report["results"].sort(key=lambda r: [case.name for case in cases].index(r["case"]))
    console.print(plot.table(report))
    for r in report["results"]:
        if r["verdict"]:
            console.print(f"{r['case']}, {r['name']}: {r['verdict']}", markup=False)
    noisy = sum(t[2] - t[1] > t[0] for r in report["results"] for t in r.get("ms", {}).values())
    if noisy > 0.05 * 3 * len(report["results"]):
        console.print(f"Other work disturbed {noisy} of these times: their 20-80 % range is wider than their median.")
    if report["left_out"]:
        console.print(f"Out of time (--seconds {seconds:g}), not run: {', '.join(report['left_out'])}")
    console.print(host.note, style="bold")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{plot.slug(report)}.json"
    file.write_text(json.dumps(report, indent=1))
    written = plot.draw(report, file.with_suffix(".png"))
    console.print(f"wrote {file}" + (f" and {written}" if written else "; no plot: matplotlib is not installed"))
    return any(r["verdict"] for r in report["results"] if r["name"] == OURS)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def roofline(console: Console) -> None:
    """The static report of the compiled kernels stands in for a GPU."""
    if version("triton") is None or find_spec("fusedloss.roofline") is None:
        console.print("No static roofline: it needs Triton and fusedloss.roofline.")
        return
    import_module("fusedloss.roofline").main(["--gpu", "h100"])


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
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    rows = args.rows or (128 if args.quick else host.shape[0])
    compiled = {c.name for c in CASES if args.compile == "on"
                or (args.compile == "auto" and not args.quick and (args.device == "cuda" or c.name in COMPILED_ON_CPU))}
    failed = False
    for cols in args.cols or [1000 if args.quick else host.shape[1]]:
        failed |= run(args, host, console, (rows, cols), compiled)
    if args.device == "cpu":
        roofline(console)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
