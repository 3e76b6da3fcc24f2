"""How a call is timed, and its memory and launches counted, on a CPU and on a GPU."""

from __future__ import annotations

import os
import statistics
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported

import torch

Times = tuple[float, float, float]  # ms: median, 20 % and 80 % quantiles


class CPU:
    device, shape, seconds = "cpu", (512, 10000), 180.0
    note = "No GPU was timed: these are times of the CPU path (the reference)."

    def __init__(self) -> None:
        info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
        model = next((line.split(": ")[1] for line in info.splitlines() if line.startswith("model name")), "CPU")
        self.name = f"{model}, {torch.get_num_threads()} threads"

    def memory(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30

    def times(self, calls: dict[Any, Callable], seconds: float) -> dict[Any, Times]:
        """Interleaved, so that a busy neighbour slows all of them and the ratios stay."""
        number = {key: _repeats(min(timeit.repeat(f, number=1, repeat=2))) for key, f in calls.items()}
        samples: dict[Any, list[float]] = {key: [] for key in calls}
        end = time.monotonic() + seconds
        rounds = 0
        while rounds < 3 or (rounds < 50 and time.monotonic() < end):
            rounds += 1
            for key, call in calls.items():
                mean = timeit.timeit(call, number=number[key]) / number[key]
                samples[key].append(mean * 1e3)
                number[key] = _repeats(mean)
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


def _repeats(seconds: float) -> int:
    """How many calls take two milliseconds: a busy machine changes that by a factor of a hundred."""
    return max(1, min(1000, round(2e-3 / seconds)))


def _quantiles(samples: list[float]) -> Times:
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), low, high


def copy_gbs(host: Any) -> float:
    source = torch.ones((1 << 30 if host.device == "cuda" else 1 << 28) // 4, device=host.device)
    to = torch.empty_like(source)
    return 2 * source.nbytes / host.times({"": lambda: to.copy_(source)}, 1.0)[""][0] / 1e6
