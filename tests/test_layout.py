"""The repository's own rules: what may import what, what must not be importable, how long a file may be."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# package: those below it. Kernels see nothing of the package; Functions see kernels, the reference and its pieces.
LAYERS = {
    "kernels": {"kernels"},
    "autograd": {"autograd", "kernels", "fusedloss.reference", "fusedloss.blocked", "fusedloss.short"},
    "fusedloss.reference": set(),
    "fusedloss.short": {"fusedloss.reference"},
    "fusedloss.pieces": set(),
    "fusedloss.formulas": {"fusedloss.pieces", "fusedloss.reference"},
    "fusedloss.blocked": {"fusedloss.formulas", "fusedloss.pieces", "fusedloss.reference"},
    "fusedloss.checks": set(),
    "fusedloss.dispatch": {"autograd", "fusedloss.reference", "fusedloss.blocked", "fusedloss.short"},
    "fusedloss.divergence": {
        "fusedloss.checks", "fusedloss.reference", "fusedloss.dispatch", "fusedloss.short"
    },
    "fusedloss.functional": {
        "fusedloss.checks", "fusedloss.reference", "fusedloss.dispatch", "fusedloss.divergence"
    },
    "fusedloss.nn": {"fusedloss.functional"},
    "fusedloss.patch": {"fusedloss.functional", "fusedloss.nn"},
    "fusedloss.testing": {"fusedloss.functional"},
    "fusedloss.compiled": {"fusedloss.dispatch", "kernels"},
    "fusedloss.traffic": set(),
    "fusedloss.roofline": {"fusedloss.compiled", "fusedloss.testing", "fusedloss.traffic"},
}
LINES = 250  # of code: without docstrings, comments and blank lines


def sources():
    return sorted(p for folder in ("kernels", "autograd", "fusedloss") for p in (ROOT / folder).rglob("*.py"))


def module_of(path):
    """fusedloss.x for a file of the package, the folder's name for the two others."""
    folder = path.relative_to(ROOT).parts[0]
    return folder if folder != "fusedloss" else f"fusedloss.{path.stem}"


def imported(path):
    """The modules of ours that a file imports, in module_of's names."""
    package = "fusedloss" if path.parent.name == "fusedloss" else f"fusedloss.{path.parent.name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{a.name}" for a in node.names] if base in ("fusedloss", package) else [base]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            names = ["".join(v.value if isinstance(v, ast.Constant) else "" for v in node.args[0].values)
                     if isinstance(node.args[0], ast.JoinedStr) else node.args[0].value]  # fmt: skip
        else:
            continue
        for name in names:
            parts = name.rstrip(".").split(".")
            if parts[0] == "fusedloss" and len(parts) > 1:
                yield parts[1] if parts[1] in ("kernels", "autograd") else f"fusedloss.{parts[1]}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = module_of(path)
    if module == "fusedloss.__init__":
        return  # the top
    assert module in LAYERS, f"{module} has no layer"
    assert set(imported(path)) - {module} <= LAYERS[module]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_autograd_and_grids_stay_in_their_layers(path):
    """A kernel file knows no autograd; a Function, and what stands above it, no kernel language."""
    text = path.read_text()
    if module_of(path) == "kernels":
        assert "torch.autograd" not in text
    elif module_of(path) not in ("fusedloss.compiled", "fusedloss.roofline"):  # they compile for other machines
        tree = ast.parse(text)
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert "triton" not in names


def test_the_imports_are_seen():
    """The two tests above would pass if they saw nothing."""
    assert "kernels" in set(imported(ROOT / "autograd" / "cross_entropy.py"))
    assert "fusedloss.reference" in set(imported(ROOT / "autograd" / "cross_entropy.py"))
    assert "fusedloss.dispatch" in set(imported(ROOT / "fusedloss" / "functional.py"))
    assert "autograd" in set(imported(ROOT / "fusedloss" / "dispatch.py"))


def code_lines(path):
    text = path.read_text()
    lines = set()
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert code_lines(path) <= LINES


@pytest.mark.parametrize("folder", ["kernels", "autograd"])
def test_bare_name_is_not_importable(folder):
    """`import autograd` at the root must not silently get this folder in place of the well-known package."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert f"fusedloss.{folder}" in done.stderr and "ImportError" in done.stderr


def test_importing_loads_no_triton_without_a_gpu():
    code = "import os; os.environ.pop('TRITON_INTERPRET', None); import torch; torch.version.cuda = None; " \
           "torch.version.hip = None; import fusedloss, sys; assert 'triton' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
