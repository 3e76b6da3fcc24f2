"""The CPU path on large tensors: ours beside eager torch, and torch.compile.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --rows 1024 --busy 1 --compile

Each round times every implementation, one after another, forth and back: what slows one slows the others. A result is
compared with float64's, in ten of its rows, before anything is timed. Temporary memory is the most that torch allocated
at a time in the calling thread (which makes its workers' buffers too), less what the call returned. `--busy 1` lets
another process compute on the first core meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fusedloss
from fusedloss import pieces

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
warnings.filterwarnings("ignore", message="reduction: 'mean' divides")
SHORT, ROUNDS = 20.0, 31  # milliseconds of a short call, and how often it is timed at least
Inputs = tuple[torch.Tensor, ...]


def inputs(name: str, rows: int, cols: int, dtype: torch.dtype) -> Inputs:
    x = torch.randn(rows, cols)
    if name == "cross_entropy":
        return x.to(dtype), torch.randint(cols, (rows,))
    if name == "kl_div_with_logits":
        return x.to(dtype), torch.randn(rows, cols).to(dtype)
    if name == "kl_div":
        return x.log_softmax(1).to(dtype), torch.randn(rows, cols).softmax(1).to(dtype)
    return (x.sigmoid() if name == "binary_cross_entropy" else x).to(dtype), torch.rand(rows, cols).to(dtype)


LOSSES = (
    "cross_entropy", "binary_cross_entropy_with_logits", "binary_cross_entropy", "kl_div", "kl_div_with_logits",
)  # fmt: skip


def eager(name: str) -> Callable:
    """torch's function, or what stands for it there."""
    if name != "kl_div_with_logits":
        return getattr(F, name)
    return lambda x, target: F.kl_div(
        x.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True
    )  # fmt: skip


def passes(call: Callable, given: Inputs) -> dict[str, Callable]:
    x, *rest = given
    leaf = x.detach().requires_grad_()

    def both() -> Inputs:
        loss = call(leaf, *rest)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    return {"forward": lambda: (call(x, *rest),), "and gradient": both}


def right(call: Callable, by_torch: Callable, given: Inputs) -> bool:
    """Loss and gradient of a few rows against float64. BCE's formula in torch cancels in tails that these lack."""
    few = [t[:10].repeat(-(-(1 << 23) // t[:10].numel()), *[1] * (t.dim() - 1)) for t in given[:1]]
    few += [t[:10].repeat(len(few[0]) // len(t[:10]), *[1] * (t.dim() - 1)) for t in given[1:]]
    ours = passes(call, tuple(few))["and gradient"]()
    exact = passes(by_torch, tuple(t.double() if t.is_floating_point() else t for t in few))["and gradient"]()
    eps = 4 * torch.finfo(few[0].dtype).eps
    return all((a.double() - b).abs().max() <= 4 * eps * b.abs().max() for a, b in zip(ours, exact, strict=True))


def temporary(call: Callable[[], Inputs]) -> float:
    """MiB that a call allocates at its peak, beside what it returns, with no buffers left by an earlier one."""
    pieces._kept.clear()
    with torch.profiler.profile(profile_memory=True) as profile:
        results = call()
    held = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return (max(accumulate(held), default=0) - sum(t.nbytes for t in results)) / 2**20


def interleaved(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median milliseconds a call; one untimed round first. Short calls are timed several at a time, in more rounds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, repeats = list(calls), 1
    while len(samples[names[0]]) <= rounds:
        for name in names:
            start = time.perf_counter()
            for _ in range(repeats):
                results = calls[name]()
            samples[name].append((time.perf_counter() - start) * 1e3 / repeats)
            del results
        if len(samples[names[0]]) == 1 and (shortest := min(s[0] for s in samples.values())) < SHORT:
            repeats, rounds = max(1, round(SHORT / 5 / shortest)), max(rounds, ROUNDS)
        names.reverse()
    return {name: statistics.median(s[1:]) for name, s in samples.items()}


def number(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 10.0 else f"{ms:.3f}"


def model() -> str:
    """The processor's name, where Linux gives one."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(args: argparse.Namespace, console: Console) -> list[dict]:
    names = ["ours", "torch", *(["compile"] if args.compile else [])]
    table = Table(
        title=f"{args.rows} x {args.cols}, mean, {model()}, {torch.get_num_threads()} threads"
        + (f", {args.busy} other busy" if args.busy else "") + ": median ms (MiB temporary)",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for column in ("", "", "", *names, *(f"{n} / ours" for n in names[1:])):
        table.add_column(column, justify="right" if column else "left")
    results = []
    for name in args.loss or LOSSES:
        ours, by_torch = getattr(fusedloss, name), eager(name)
        for dtype in args.dtype or DTYPES:
            torch.manual_seed(0)
            given = inputs(name, args.rows, args.cols, DTYPES[dtype])
            implementations = {"ours": ours, "torch": by_torch}
            if args.compile:
                torch._dynamo.reset()
                implementations["compile"] = torch.compile(by_torch)
            verdict = "" if right(ours, by_torch, given) else "WRONG"
            for part in ("forward", "and gradient"):
                calls = {n: passes(f, given)[part] for n, f in implementations.items()}
                memory = {n: temporary(c) for n, c in calls.items()}
                ms = interleaved(calls, args.rounds)
                cells = [f"{number(ms[n])} ({memory[n]:.0f})" for n in names]
                ratios = [f"{ms[n] / ms['ours']:.2f}" for n in names[1:]]
                table.add_row(name.replace("binary_cross_entropy", "bce"), dtype, part, verdict or cells[0], *cells[1:],
                              *ratios)  # fmt: skip
                results.append(dict(name=name, dtype=dtype, part=part, ms=ms, temporary=memory, wrong=bool(verdict)))
    console.print(table)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loss", action="append", choices=LOSSES, help="which; again for more (default: all)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="which; again for more (default: both)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of torch's functions too")
    parser.add_argument("--busy", type=int, default=0, help="how many cores other processes take")
    parser.add_argument("--json", type=Path, help="write the medians there too")
    args = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    busy = []
    try:
        for core in (cores or range(args.busy))[: args.busy]:
            pin = f"import os; os.sched_setaffinity(0, {{{core}}})\n" if cores else ""
            busy.append(subprocess.Popen([sys.executable, "-c", f"{pin}while True: pass"]))
        results = measure(args, Console(width=None if sys.stdout.isatty() else 140))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
