"""Run the compiled kernels of every case in a simulator, and compare with the oracle.

Not collected by pytest: it needs the package `ptxsim`, which executes Triton's PTX on CPU tensors, with its
checks for accesses out of bounds and reads of memory that nothing wrote. Run it as a program.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from pathlib import Path

import ptxsim
import torch

from fusedloss import use
from fusedloss.testing import CASES, Case, forward_backward

# short rows in a tile; a warp a row; four warps a row, with a head, a tail and edges; positions apart; short
# rows in several parts; rows from logits that several programs read in forward; and a slice off 16 bytes
SHAPES = {
    "tile": (5, 10), "aligned": (3, 1000), "long": (3, 8203), "positions": (2, 37, 5), "tiles": (5, 300),
    "split": (3, 114_689), "slice": (3, 1005),
}  # fmt: skip
SPLIT = ("cross_entropy", "kl_div_with_logits", "entropy_with_logits")


def load_oracle():
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["oracle"] = module
    spec.loader.exec_module(module)
    return module


def run(case: Case, kind: str, dtype: torch.dtype, reduction: str, oracle) -> int:
    """Launches made; raises where a value or a gradient is off."""
    tensors, keywords = case.make_inputs(SHAPES[kind], dtype, "cpu")
    if kind == "slice":
        tensors = tuple(torch.cat([t[:1], t])[1:] if t.is_floating_point() else t for t in tensors)
    keywords = {**keywords, "reduction": reduction}
    checks = dict(check_uninit=True, check_races=True)
    with ptxsim.simulate(arch=90, sectors=False, **checks) as simulation, use("triton"):
        found = oracle.value_and_gradients(case.ours, tensors, keywords, case.differentiable)
        launched = len(simulation.launches)
    loss, upstream, gradients = found
    expected, _, exact = oracle.exact(
        getattr(oracle, case.loss), tensors, keywords, case.differentiable, upstream
    )
    oracle.assert_close(loss, expected, oracle.factor(case))
    for gradient, e in zip(gradients, exact, strict=True):
        oracle.assert_close(gradient, e, oracle.factor(case))
    return launched


def count(case: Case, shape: tuple[int, ...]) -> None:
    """Print what each kernel executes an element: PTX instructions of a thread, those on the special-function
    unit, the ratio of machine code to PTX, registers, and bytes of distinct memory sectors."""
    tensors, keywords = case.make_inputs(shape, torch.bfloat16, "cpu")
    elements = tensors[0].numel()
    with ptxsim.simulate(arch=90, l2=False, banks=False) as simulation, use("triton"):
        forward_backward(case, (tensors, keywords), reduction="mean")
    totals = [0.0, 0.0]
    for r in simulation.launches:
        executed, special = r.total_thread_insns / elements, r.thread_insns.get("mufu", 0) / elements
        totals = [totals[0] + executed, totals[1] + special]
        print(f"{case.name:40s} {r.name:36s} {executed:6.2f} instructions {special:5.2f} MUFU, machine code x "
              f"{r.sass_ratio:.2f}, {r.regs} registers, {r.cold_read / elements:.2f} bytes read, "
              f"{r.cold_written / elements:.2f} written")  # fmt: skip
    print(f"{case.name:40s} {'all':36s} {totals[0]:6.2f} instructions {totals[1]:5.2f} MUFU", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="every dtype, shape and reduction")
    parser.add_argument("--count", metavar="ROWSxCOLS", help="count instructions an element instead, in bfloat16")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="reduction: 'mean' divides")
    if options.count:
        shape = tuple(int(n) for n in options.count.split("x"))
        for case in (c for c in CASES if options.cases in c.name):
            count(case, shape)
        return 0
    oracle = load_oracle()
    passed, failed, launches = 0, 0, 0
    losses: set[str] = set()
    for number, case in enumerate(CASES):
        if options.cases not in case.name:
            continue
        torch.manual_seed(3)
        print(case.name, flush=True)
        for k, (kind, shape) in enumerate(SHAPES.items()):
            first = kind in ("long", "split", "slice") and case.loss not in losses
            if kind == "split" and (case.loss not in SPLIT or case.name.endswith("/grad_in_forward")):
                continue
            if kind == "slice" and case.loss not in SPLIT:
                continue
            if not (first or options.all or options.cases or k == number % 5):
                continue  # each new kernel costs seconds of C compiler
            if len(shape) > 2 and case.loss in ("kl_div_with_logits", "entropy", "entropy_with_logits"):
                continue  # their dimension is the last: no class dimension in the middle
            dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float16)
            reductions = case.reductions if options.all else (case.reductions[k % len(case.reductions)],)
            if kind == "split":
                dtypes, reductions = dtypes[:1], case.reductions[-1:]
            for dtype in dtypes if options.all else (dtypes[(number + k) % 2 % len(dtypes)],):
                for reduction in reductions:
                    name = f"{case.name} {kind} {dtype} {reduction}"
                    try:
                        made = run(case, kind, dtype, reduction, oracle)
                        if not made:
                            raise AssertionError("nothing was launched")
                        launches, passed = launches + made, passed + 1
                    except Exception as error:
                        failed += 1
                        print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}")
        losses.add(case.loss)
    print(f"{launches} launches simulated")
    print(f"simulator: {passed} passed, {failed} failed")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    raise SystemExit(main())
