"""Compiles what a case launches, for a process that interprets and so cannot: one JSON request a line on
standard input, one JSON answer a line on standard output. A specialisation is compiled once."""

from __future__ import annotations

import json
import sys

import torch

from fusedloss import compiled, testing

_codes: dict[tuple, dict] = {}


def dense(launch, elements):
    """How many tensors of the input's size the kernel reads and writes, rows' values and sums apart."""
    names = [n for n, t in zip(launch.kernel.arg_names, launch.tensors, strict=False)
             if t is not None and t.untyped_storage().nbytes() >= elements * t.element_size()]  # fmt: skip
    written = [n for n in names if (n.startswith("d") and n != "dloss_ptr") or n in ("out_ptr", "loss_ptr")]
    return len(names) - len(written), len(written)


def code(launch, target):
    source = compiled.source(launch)
    key = (launch.kernel.__name__, target, launch.num_warps, repr(source.signature), repr(source.constants),
           repr(source.attrs))  # fmt: skip
    if key not in _codes:
        made = compiled.compile_launch(launch, target)
        _codes[key] = dict(name=made.name, spills=made.spills, registers=made.registers,
                           instructions=made.instructions, widths=made.widths,
                           exchanges=[loop.exchanges for loop in made.loops])  # fmt: skip
    return _codes[key]


def answer(case, shape, dtype, reduction, layout, target, options=None):
    case, dtype = testing.case(case), getattr(torch, dtype)
    tensors, keywords = case.make_inputs(shape, dtype, "cpu")
    if layout == "sliced":
        tensors = [torch.zeros(*t.shape[:-1], t.shape[-1] + 5, dtype=t.dtype)[..., 3:-2] if t.dim() > 1 else t
                   for t in tensors]  # fmt: skip
    more = {k: torch.tensor(v, dtype=dtype) if isinstance(v, list) else v for k, v in (options or {}).items()}
    keywords = {**keywords, "reduction": reduction, **more}

    def call():
        for differentiable in sorted({1, case.differentiable}):  # of the input alone, and of the target too
            leaves = [t.requires_grad_(t.is_floating_point() and i < differentiable)
                      for i, t in enumerate(tensors)]  # fmt: skip
            loss = case.ours(*leaves, **keywords)
            torch.autograd.grad(loss, [t for t in leaves if t.requires_grad], torch.ones_like(loss))

    found = []
    for launch in compiled.launches(call):
        reads, writes = dense(launch, tensors[0].numel())
        found.append({**code(launch, target), "reads": reads, "writes": writes})
    return found


def main():
    for line in sys.stdin:
        try:
            reply = {"codes": answer(**json.loads(line))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
