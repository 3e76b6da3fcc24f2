"""How far each loss and its gradient are from float64, ours beside torch's own, in the tails and at offsets.

    python benchmarks/accuracy.py                the kernels on a GPU, the reference where there is none
    python benchmarks/accuracy.py --interpret    the kernels, run by Triton's interpreter on the CPU

An error is the largest one in the tensor over the largest exact value (or the dtype's smallest normal number,
where that is larger): 1 means that nothing of the result is right, and a correctly rounded result has at most
6e-8 in float32, 4e-3 in bfloat16, 5e-4 in float16. All see the same rounded inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fusedloss
from fusedloss.testing import Case, case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, COLS = 4, 1000
OFFSETS = (0.0, 300.0, 1e4)
warnings.filterwarnings("ignore", message="reduction: 'mean' divides")
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))  # max(x, 0) + log1p(exp(-|x|))


def exact_bce_with_logits(x, t, reduction):
    return (1 - t) * softplus(x) + t * softplus(-x)


def exact_cross_entropy(x, label, reduction):
    """softplus(lse of the others - x_y): lse - x_y loses a confident label in float64 too."""
    own = torch.nn.functional.one_hot(label, x.shape[1]).bool()
    others = x.masked_fill(own, -torch.inf).logsumexp(1)
    return softplus(others - x[own])


EXACT = {"binary_cross_entropy_with_logits": exact_bce_with_logits, "cross_entropy": exact_cross_entropy}


class Row(NamedTuple):
    """One line of the table: `make` returns the tensors in float64, which are then rounded to a dtype."""

    case: str
    tail: str
    make: Callable[[], tuple[Tensor, ...]]
    keywords: dict[str, Any] = {}  # noqa: RUF012


def _normal(scale: float = 3.0) -> Tensor:
    return torch.randn(ROWS, COLS, dtype=torch.float64) * scale


def _labelled(margin: float | None, offset: float) -> Callable[[], tuple[Tensor, ...]]:
    """Logits whose label stands `margin` nats above the others' log-sum-exp."""

    def make():
        x, label = _normal(), torch.randint(COLS, (ROWS,))
        if margin is not None:
            at = label.unsqueeze(1)
            x = x.scatter(1, at, x.scatter(1, at, -torch.inf).logsumexp(1, keepdim=True) + margin)
        return x + offset, label

    return make


def _constant(x: float, t: float) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.full((257,), x, dtype=torch.float64), torch.full((257,), t, dtype=torch.float64))


def _two(gap: float | None, offset: float) -> Callable[[], tuple[Tensor, ...]]:
    """A student's and a teacher's logits, `gap` apart or independent."""

    def make():
        teacher = _normal()
        student = _normal() if gap is None else teacher + gap * _normal(1.0)
        return student + offset, teacher + offset

    return make


def _half_zero(p: Tensor) -> Tensor:
    p = p * (torch.arange(COLS) % 2)
    return p / p.sum(1, keepdim=True)


def rows() -> Iterator[Row]:
    for offset in OFFSETS:
        yield Row("cross_entropy/index", f"any label, offset {offset:g}", _labelled(None, offset))
    for margin in (5, 10, 20, 40, 80, 100):
        yield Row("cross_entropy/index", f"label {margin} nats ahead", _labelled(margin, 0.0))
    yield Row("cross_entropy/index", "label 20 nats ahead, offset 300", _labelled(20, 300.0))
    yield Row("nll_loss/index", "any label", lambda: (_normal().log_softmax(1), torch.randint(COLS, (ROWS,))))
    name = "binary_cross_entropy_with_logits/plain"
    yield Row(name, "random", lambda: (_normal(), torch.rand(ROWS, COLS, dtype=torch.float64)))
    for x, t in ((-20, 0), (-40, 0), (-20, 1), (20, 0), (20, 1), (40, 1), (0, 0), (300, 0)):
        yield Row(name, f"x = {x}, y = {t}", _constant(x, t))
    name = "binary_cross_entropy/plain"
    yield Row(name, "random", lambda: (_normal(1.0).sigmoid(), torch.rand(ROWS, COLS, dtype=torch.float64)))
    for x, t in ((1e-3, 0), (1e-3, 1), (0, 0), (1, 1)):
        yield Row(name, f"p = {x}, y = {t}", _constant(x, t))
    log_p = lambda: _normal().log_softmax(1)
    yield Row("kl_div/probabilities", "random", lambda: (log_p(), log_p().exp()))
    yield Row("kl_div/probabilities", "half the target 0", lambda: (log_p(), _half_zero(log_p().exp())))
    yield Row("kl_div/log_target", "random, log target", lambda: (log_p(), log_p()), dict(log_target=True))
    name = "kl_div_with_logits/plain"
    for offset in OFFSETS:
        yield Row(name, f"random, offset {offset:g}", _two(None, offset))
    yield Row(name, "student 0.1 from teacher", _two(0.1, 0.0))
    yield Row(name, "T = 2, reverse", _two(None, 0.0), dict(temperature=2.0, reverse=True))
    yield Row("entropy/plain", "random", lambda: (_normal(1.0).softmax(1),))
    for offset in OFFSETS:
        yield Row("entropy_with_logits/plain", f"random, offset {offset:g}", lambda o=offset: (_normal() + o,))
    yield Row("entropy_with_logits/plain", "one class 20 nats ahead", lambda: (_labelled(20, 0.0)()[0],))


def _gradient(call: Callable, tensors: tuple[Tensor, ...], **keywords: Any) -> tuple[Tensor, Tensor]:
    x = tensors[0].detach().requires_grad_()
    loss = call(x, *tensors[1:], **keywords)
    return loss.detach(), torch.autograd.grad(loss, x, torch.ones_like(loss))[0]


def error(got: Tensor, exact: Tensor) -> float:
    scale = max(exact.abs().max().item(), torch.finfo(got.dtype).tiny)
    return ((got.double() - exact).abs().max() / scale).item()


def measure(row: Row, shared: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Errors by ``loss ours``, ``loss torch``, ``gradient ours``, ``gradient torch``. None where an offset
    rounds all the logits to one number, and there is nothing to measure."""
    torch.manual_seed(1)
    tensors = tuple(t.to(device, dtype if t.is_floating_point() else t.dtype) for t in row.make())
    if tensors[0].dim() == 2 and tensors[0].max() == tensors[0].min():
        return {}
    reduction = "none" if "none" in shared.reductions else "sum"
    wide = tuple(t.double() if t.is_floating_point() else t for t in tensors)
    oracle = EXACT.get(shared.loss, shared.torch_equivalent)
    exact = _gradient(oracle, wide, reduction=reduction, **row.keywords)
    errors = {}
    for who, call in (("ours", shared.ours), ("torch", shared.torch_equivalent)):
        got = _gradient(call, tensors, reduction=reduction, **row.keywords)
        errors |= {f"{what} {who}": error(g, e) for what, g, e in zip(("loss", "gradient"), got, exact, strict=True)}
    return errors


def round_stores_to_nearest() -> None:
    """The interpreter truncates float32 to bfloat16, a GPU rounds to the nearest even."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    truncate = interpreter._convert_float

    def convert(value, source, to, mode):
        if source != tl.float32 or to != tl.bfloat16:
            return truncate(value, source, to, mode)
        rounded = torch.from_numpy(np.array(value, dtype=np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert


def cell(ours: float, by_torch: float) -> str:
    show = lambda e: "0" if e < 1e-9 else f"{e:.0e}".replace("e-0", "e-").replace("e+00", "")
    worse = ours > 2 * by_torch and ours > 1e-6
    better = by_torch > 2 * ours and by_torch > 1e-6
    return f"{'[red]' if worse else '[green]' if better else ''}{show(ours)} | {show(by_torch)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--interpret", action="store_true", help="the kernels through Triton's interpreter")
    parser.add_argument("--cases", default="", help="only the losses whose name contains this")
    parser.add_argument("--json", type=Path, help="write the errors there too")
    args = parser.parse_args(argv)
    if args.interpret:
        args.device = "cpu"
        round_stores_to_nearest()
    path = fusedloss.path(torch.ones(1, device=args.device))
    what = "the reference (plain torch)" if path == "reference" else "the Triton kernels"
    what += " through Triton's interpreter" if args.interpret else f" on {args.device}"
    table = Table(title=f"Error against float64, ours | torch's: {what}", box=SIMPLE_HEAD)
    for name in ("loss", "tail", *(f"{str(d)[6:]}\n{part}" for d in DTYPES for part in ("loss", "gradient"))):
        table.add_column(name, no_wrap=True, justify="left" if name in ("loss", "tail") else "right")
    results, before = [], ""
    for row in rows():
        shared = case(row.case)
        if args.cases not in row.case:
            continue
        cells = []
        for dtype in DTYPES:
            errors = measure(row, shared, dtype, args.device)
            results.append(dict(case=row.case, tail=row.tail, dtype=str(dtype)[6:], path=what, errors=errors))
            for part in ("loss", "gradient"):
                cells.append(cell(errors[f"{part} ours"], errors[f"{part} torch"]) if errors else "-")
        if before not in ("", shared.loss):
            table.add_row()
        table.add_row(shared.loss.replace("binary_cross_entropy", "bce") if shared.loss != before else "",
                      row.tail, *cells)  # fmt: skip
        before = shared.loss
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    print("The largest error over the largest exact value; 1: nothing is right. A correctly rounded result has at most")
    print("6e-8 (float32), 4e-3 (bfloat16), 5e-4 (float16). torch's loss where torch has no function is the usual")
    print(f"composition of its functions. Ours was computed by {what}.")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
