"""What a call costs on the host: checks, dispatch, autograd and launches, with next to no arithmetic.

    python benchmarks/host.py

On a CPU: the reference path on 4 x 8 tensors beside torch's own functions; then the Triton path with its GPU
driver stubbed out. Kernels are compiled by Triton's CUDA pipeline for sm_90 and launched by Triton's own C
launcher, linked with a libcuda whose functions do nothing; without a C compiler, by a launcher in Python that
does nothing. On a GPU: the Triton path with the real driver, the device not waited for.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns, for Liger's kernels, where it is unset

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fusedloss

ROWS, COLS, BATCH = 4, 8, 5
warnings.filterwarnings("ignore", message="reduction: 'mean' divides")

STUB = r"""
#include <string.h>
#define OK(name) int name() { return 0; }
OK(cuInit) OK(cuCtxSetCurrent) OK(cuCtxGetLimit) OK(cuCtxSetLimit) OK(cuDriverGetVersion) OK(cuFuncSetAttribute)
OK(cuFuncSetCacheConfig) OK(cuLaunchKernelEx) OK(cuLaunchKernel) OK(cuModuleUnload) OK(cuOccupancyMaxActiveClusters)
OK(cuPointerGetAttributes) OK(cuStreamIsCapturing) OK(cuTensorMapEncodeIm2col) OK(cuTensorMapEncodeTiled)
static int context;
int cuCtxGetCurrent(void **c) { *c = &context; return 0; }
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &context; return 0; }
int cuDeviceGetAttribute(int *v, int what, int d) { *v = what == 75 ? 9 : what == 76 ? 0 : 49152; return 0; }
int cuFuncGetAttribute(int *v, int what, void *f) { *v = what == 0 ? 1024 : 0; return 0; }
int cuGetErrorString(int e, const char **s) { *s = "stub"; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = &context; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = &context; return 0; }
int cuPointerGetAttribute(void *v, int what, unsigned long long p) { memcpy(v, &p, sizeof p); return 0; }
"""


def stub_libcuda() -> None:
    """A libcuda.so.1 that every later dlopen of that name finds already loaded."""
    folder = tempfile.mkdtemp(prefix="libcuda-stub-")
    source, library = Path(folder) / "stub.c", Path(folder) / "libcuda.so.1"
    source.write_text(STUB)
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, capture_output=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = folder


class NoUtils:
    """What a driver's C helpers return, for a launcher that launches nothing."""

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return dict(max_shared_mem=232448, max_num_regs=65536, multiprocessor_count=132, warpSize=32)


def stub_driver() -> str:
    """Make Triton compile for sm_90 and launch into nothing; says how."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            try:
                stub_libcuda()
                self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
                self.how = "Triton's C launcher, linked with a libcuda that does nothing"
            except (OSError, RuntimeError, subprocess.CalledProcessError):
                self.utils, self.launcher_cls = NoUtils(), lambda source, metadata: lambda *arguments: None
                self.how = "a Python launcher that does nothing (no C compiler: Triton's own is not counted)"
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device: (9, 0)
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    return driver.how


def interleaved(
    calls: dict[str, Callable], rounds: int, settle: Callable = lambda: None
) -> dict[str, tuple[float, float]]:
    """Median and least microseconds a call, each round timing all of them: what slows one slows the others."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(4 * BATCH):
            call()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                settle()
                start = time.perf_counter()
                for _ in range(BATCH):
                    call()
                samples[name].append((time.perf_counter() - start) / BATCH * 1e6)
    finally:
        gc.enable()
    return {name: (statistics.median(s), min(s)) for name, s in samples.items()}


def losses(device: str) -> dict[str, tuple[Callable, Callable, tuple[torch.Tensor, ...]]]:
    """Ours, torch's, and arguments; the default reduction, mean."""
    x = torch.randn(ROWS, COLS, device=device)
    labels, p = torch.randint(COLS, (ROWS,), device=device), torch.rand(ROWS, COLS, device=device)
    log_p = x.log_softmax(1)
    inputs = dict(cross_entropy=(x, labels), nll_loss=(log_p, labels), binary_cross_entropy_with_logits=(x, p),
                  binary_cross_entropy=(x.sigmoid(), p), kl_div=(log_p, x.softmax(1)))  # fmt: skip
    return {name: (getattr(fusedloss, name), getattr(F, name), given) for name, given in inputs.items()}


def show(us: tuple[float, float]) -> str:
    return f"{us[0]:.1f} ({us[1]:.1f})"


def with_gradient(call: Callable, x: torch.Tensor, *rest: torch.Tensor) -> Callable:
    return lambda: torch.autograd.grad(call(x, *rest), x)


def reference_path(rounds: int, console: Console) -> list[dict[str, Any]]:
    title = f"Host microseconds a call, {ROWS} x {COLS} float32 on the CPU: median (least)"
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in ("", "forward: ours", "torch", "ratio", "and backward: ours", "torch", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    results = []
    for name, (ours, by_torch, (x, *rest)) in losses("cpu").items():
        leaf = x.detach().requires_grad_()
        calls = {
            "forward ours": lambda f=ours, x=x, r=rest: f(x, *r),
            "forward torch": lambda f=by_torch, x=x, r=rest: f(x, *r),
            "both ours": with_gradient(ours, leaf, *rest),
            "both torch": with_gradient(by_torch, leaf, *rest),
        }
        us = interleaved(calls, rounds)
        cells = []
        for part in ("forward", "both"):
            a, b = us[f"{part} ours"], us[f"{part} torch"]
            cells += [show(a), show(b), f"{a[0] / b[0]:.2f}"]
        table.add_row(name.replace("binary_cross_entropy", "bce"), *cells)
        results.append(dict(path="reference", name=name, us=us))
    console.print(table)
    return results


def triton_path(rounds: int, console: Console) -> list[dict[str, Any]]:
    gpu = torch.cuda.is_available()
    how = f"the driver of {torch.cuda.get_device_name()}, not waited for" if gpu else stub_driver()
    settle = torch.cuda.synchronize if gpu else lambda: None
    every = losses("cuda" if gpu else "cpu")
    chosen = ("cross_entropy", "binary_cross_entropy_with_logits", "kl_div")
    calls = {}
    for name in chosen:
        ours, _, (x, *rest) = every[name]
        calls[f"{name}, fusedloss"] = with_gradient(ours, x.detach().requires_grad_(), *rest)
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        x, labels = every["cross_entropy"][2]  # Liger writes into its input: a copy, and no leaf
        calls["cross_entropy, Liger"] = with_gradient(liger_cross_entropy, x.detach().clone().requires_grad_(), labels)
    except ImportError:
        console.print("Liger is not installed: not compared.")
    first = {}
    with fusedloss.use("triton"):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            first[name] = time.perf_counter() - start
        us = interleaved(calls, rounds, settle)
    table = Table(title=f"Host microseconds of forward + backward (mean, all checks) on the Triton path\n{how}",
                  box=SIMPLE_HEAD)  # fmt: skip
    for name in ("", "median (least)", "first call, s"):
        table.add_column(name, justify="right" if name else "left")
    for name, value in us.items():
        table.add_row(name, show(value), f"{first[name]:.1f}")
    console.print(table)
    if not gpu:
        console.print("No kernel ran: results of these calls are uninitialised memory.")
    return [dict(path="triton", how=how, name=name, us=value, first_s=first[name]) for name, value in us.items()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=400, help=f"of {BATCH} calls each")
    parser.add_argument("--json", type=Path, help="write the medians there too")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = reference_path(args.rounds, console)
    try:
        import triton  # noqa: F401
    except ImportError:
        console.print("Triton is not installed: the Triton path was not measured.")
    else:
        results += triton_path(args.rounds, console)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
