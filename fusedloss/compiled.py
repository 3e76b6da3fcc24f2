"""Ahead-of-time compilation: every kernel that a call launches, for any GPU, on a machine with none.

`launches` runs a call with its launches recorded instead of run; `compile_launch` compiles one of them for
a target and reads registers, spills, access widths and instruction counts from the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
}
TYPES = {
    "float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64",
    "int64": "*i64", "int32": "*i32", "uint8": "*u8",
}  # fmt: skip


class Loop(NamedTuple):
    """A loop, or the code outside of all loops: instructions, special-function operations among them, bytes that
    a thread loads in accesses of eight bytes and more, and barriers and accesses of shared memory."""

    instructions: int
    special: int
    load_bytes: int
    exchanges: int


class Code(NamedTuple):
    """What the machine code of one kernel says."""

    name: str
    target: str
    num_warps: int
    registers: int
    spills: int
    shared: int
    loops: tuple[Loop, ...]  # innermost loops, in the order of the code
    outside: Loop
    passed: Loop  # of that, what a jump behind the first loop may pass over, and no loop in it: a row's edges (NVIDIA)
    widths: dict[str, int]  # global accesses by kind and bytes: "load16": 4

    @property
    def instructions(self) -> int:
        return self.outside.instructions + sum(loop.instructions for loop in self.loops)

    @property
    def wide(self) -> bool:
        """Whether there are 16-byte loads or stores."""
        return "load16" in self.widths or "store16" in self.widths


def launches(call: Callable[[], Any]) -> list[Any]:
    """The launches (`kernels.launch.Launch`) that `call` makes on the Triton path; none of them is run."""
    from .dispatch import use
    from .kernels.launch import recording

    with use("triton"), recording() as recorded:
        call()
    return recorded


def tiles_each(launch: Any, elements: int) -> int:
    """The tiles of a program of this element-wise launch, were it over so many elements."""
    from .kernels.elementwise import trips_of

    tile = launch.constants["BLOCK"]
    return trips_of(elements // tile, tile)


def source(launch: Any) -> Any:
    """The launch's kernel, specialised as Triton specialises it."""
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    divisible: list[tuple[int]] = []
    for i, (name, tensor) in enumerate(zip(names, launch.tensors, strict=False)):
        if tensor is None:
            signature[name], constants[name] = "constexpr", None
            continue
        signature[name] = TYPES[str(tensor.dtype).removeprefix("torch.")]
        if tensor.data_ptr() % 16 == 0:
            divisible.append((i,))
    for i, (name, value) in enumerate(launch.scalars.items(), len(launch.tensors)):
        if isinstance(value, float):
            signature[name] = "fp32"
        elif name.endswith("_stride") and value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if name.endswith("_stride") and value % 16 == 0:
                divisible.append((i,))
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    attributes = {i: [["tt.divisibility", 16]] for i in divisible}
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Any, target: str) -> Code:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    from .kernels.launch import compile_options

    options = compile_options(launch.num_warps, launch.constants, TARGETS[target][2])
    kernel = compile(source(launch), target=GPUTarget(*TARGETS[target]), options=options)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return Code(name=kernel.metadata.name, target=target, num_warps=options["num_warps"],
                shared=kernel.metadata.shared, **read(kernel))  # fmt: skip


def _tool(name: str, cubin: bytes, *arguments: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class _Line(NamedTuple):
    opcode: str
    text: str
    address: int


MUFU = re.compile(r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
EXCHANGE = re.compile(r"BAR\.|LDS|STS|s_barrier|ds_")


def _read_nvidia(kernel: Any) -> dict[str, Any]:
    cubin = kernel.asm["cubin"]
    usage = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", cubin, "--dump-resource-usage")
    )
    registers, stack, local = map(int, usage.groups()) if usage else (0, 0, 0)
    lines = []
    for text in _tool("cuobjdump", cubin, "-sass").splitlines():
        found = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", text)
        if found:
            lines.append(_Line(found[2], found[3], int(found[1], 16)))
    jumps = [
        (int(to[1], 16), line.address)
        for line in lines
        if line.opcode.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", line.text))
    ]
    behind = {first for first, last in jumps if first == last}  # a jump to itself closes the code, then padding
    lines = [line for line in lines if line.opcode != "NOP" and line.address not in behind]
    return dict(registers=registers, spills=stack + local, **_counts(lines, jumps))


def _read_amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+([vs]_\w+|global_\w+|buffer_\w+|ds_\w+)(.*)", line):
            if (to := re.search(r"(\.L\w+)", found[2])) and to[1] in labels:
                jumps.append((labels[to[1]], len(lines)))  # back; ahead it jumps over any masked access
            lines.append(_Line(found[1], found[2], len(lines)))
    number = lambda key: int(value[1]) if (value := re.search(rf"\.{key}:\s+(\d+)", text)) else 0
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return dict(registers=number("vgpr_count"), spills=spills, **_counts(lines, jumps))


def _counts(lines: list[_Line], jumps: list[tuple[int, int]]) -> dict[str, Any]:
    """Loops (stretches that a backward jump closes, none within another), the rest, access widths."""
    back = {(first, last) for first, last in jumps if first < last}
    inner = sorted(a for a in back if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in back))
    bodies = [[line for line in lines if first <= line.address <= last] for first, last in inner]
    inside = {line.address for body in bodies for line in body}
    ahead = [(first, last) for last, first in jumps if inner and inner[0][0] < first < last]
    ahead = [(a, b) for a, b in ahead if not any(a < first < b for first, _ in inner)]
    rest = [line for line in lines if line.address not in inside]
    passed = [line for line in rest if any(a < line.address < b for a, b in ahead)]
    widths = Counter(kind + str(size) for line in lines for kind, size in [_access(line.opcode)] if kind)
    return dict(
        loops=tuple(_loop(body) for body in bodies),
        outside=_loop(rest), passed=_loop(passed), widths=dict(widths),
    )  # fmt: skip


def _loop(lines: list[_Line]) -> Loop:
    loads = [size for line in lines for kind, size in [_access(line.opcode)] if kind == "load" and size >= 8]
    special, exchanges = (sum(bool(kind.match(line.opcode)) for line in lines) for kind in (MUFU, EXCHANGE))
    return Loop(len(lines), special, sum(loads), exchanges)


def _access(opcode: str) -> tuple[str, int]:
    """("load" or "store", bytes) of a global access, ("", 0) of anything else."""
    if amd := re.match(r"(?:global|buffer)_(load|store)_(\w+)", opcode):
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b96": 12, "b64": 8, "b32": 4}
        return amd[1], sizes.get(amd[2], 2)
    kind = {"LDG": "load", "STG": "store"}.get(opcode.split(".")[0], "")
    width = re.search(r"\.(256|128|64|[US]?16|[US]?8)\b", opcode)
    return (kind, int(re.sub(r"\D", "", width[1])) // 8 if width else 4) if kind else ("", 0)
