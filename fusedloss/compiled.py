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


class Code(NamedTuple):
    """What the machine code of one kernel says. `loop` is the loop that loads most bytes, or the whole
    kernel where there is none: its instructions, special-function operations, and bytes loaded a thread."""

    name: str
    target: str
    registers: int
    spills: int
    shared: int
    num_warps: int
    instructions: int
    loop: int
    loop_special: int
    loop_load_bytes: int
    widths: dict[str, int]  # global accesses by kind and bytes: "load16": 4

    @property
    def wide(self) -> bool:
        """Whether there are 16-byte loads or stores."""
        return any(kind in self.widths for kind in ("load16", "store16"))


def launches(call: Callable[[], Any]) -> list[Any]:
    """The launches (`kernels.launch.Launch`) that `call` makes on the Triton path; none of them is run."""
    from .dispatch import use
    from .kernels.launch import recording

    with use("triton"), recording() as recorded:
        call()
    return recorded


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
    signature.update({name: "constexpr" for name in launch.constants})
    attributes = {i: [["tt.divisibility", 16]] for i in divisible}
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Any, target: str) -> Code:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    options = dict(num_warps=launch.num_warps, enable_fp_fusion=False)
    kernel = compile(source(launch), target=GPUTarget(*TARGETS[target]), options=options)
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return Code(name=kernel.metadata.name, target=target, num_warps=launch.num_warps,
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
    address: int
    opcode: str
    text: str


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
            lines.append(_Line(int(found[1], 16), found[2], found[3]))
    end = next((k for k, line in reversed(list(enumerate(lines))) if line.opcode == "EXIT"), len(lines) - 1)
    lines = lines[: end + 1]
    widths: Counter[str] = Counter()
    for line in lines:
        if (kind := _access(line.opcode)) is not None:
            widths[kind[0] + str(kind[1])] += 1
    loop = max(_loops(lines), key=_loaded, default=lines)
    loop = loop if _loaded(loop) else lines
    return dict(
        registers=registers, spills=stack + local, instructions=len(lines), loop=len(loop),
        loop_special=sum(line.opcode.startswith("MUFU") for line in loop),
        loop_load_bytes=_loaded(loop), widths=dict(widths),
    )  # fmt: skip


def _access(opcode: str) -> tuple[str, int] | None:
    kind = {"LDG": "load", "STG": "store"}.get(opcode.split(".")[0])
    if kind is None:
        return None
    width = re.search(r"\.(256|128|64|U?S?16|U?S?8)\b", opcode)
    bits = int(re.sub(r"\D", "", width[1])) if width else 32
    return kind, bits // 8


def _loaded(lines: list[_Line]) -> int:
    accesses = [_access(line.opcode) for line in lines]
    return sum(a[1] for a in accesses if a is not None and a[0] == "load" and a[1] >= 8)


def _loops(lines: list[_Line]) -> list[list[_Line]]:
    """Innermost stretches of code that a backward branch closes."""
    found = []
    for line in lines:
        if line.opcode.split(".")[0] == "BRA" and (to := re.search(r"0x([0-9a-f]+)", line.text)):
            if int(to[1], 16) < line.address:
                found.append((int(to[1], 16), line.address))
    inner = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
    return [[line for line in lines if first <= line.address <= last] for first, last in inner]


def _read_amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]
    number = lambda key: int(found[1]) if (found := re.search(rf"\.{key}:\s+(\d+)", text)) else 0
    widths: Counter[str] = Counter()
    for kind, size in re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", text):
        width = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b64": 8, "b32": 4}
        widths[kind + str(width.get(size, 2))] += 1
    body = re.findall(r"^\s+([vs]_\w+|global_\w+|buffer_\w+|ds_\w+)", text, re.MULTILINE)
    special = sum(op.startswith(("v_exp_", "v_log_", "v_rcp_", "v_sqrt_")) for op in body)
    return dict(
        registers=number("vgpr_count"), spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        instructions=len(body), loop=len(body), loop_special=special, loop_load_bytes=0, widths=dict(widths),
    )  # fmt: skip
