"""Write docs/compatibility.md from docs/compatibility.toml, where each feature names the tests that prove it.

    python -P tests/compatibility.py            write the page
    python -P tests/compatibility.py --check    exit with 1 where a test does not exist or the page is old

A feature counts as held only while it names a test of each path that it depends on.
"""

import ast
import sys
from functools import cache
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "docs/compatibility.toml", ROOT / "docs/compatibility.md"
FORCED = {  # the path that the tests of a file force; the others look at both
    "kernels/": "kernels", "ptxsim": "kernels",
    "test_reference": "reference", "test_functional": "reference", "test_modules": "reference",
}  # fmt: skip
MARKS = {"Y": "yes", "P": "partly", "N": "no", "-": "·"}


@cache
def names(file: Path) -> frozenset[str]:
    """The test functions of a file, as pytest names them: `test_x`, `TestX::test_y`."""
    found = set()
    for node in ast.parse(file.read_text()).body if file.is_file() else []:
        members = [node]
        prefix = ""
        if isinstance(node, ast.ClassDef):
            members, prefix = node.body, f"{node.name}::"
        found |= {prefix + m.name for m in members if isinstance(m, ast.FunctionDef) and m.name.startswith("test_")}
    return frozenset(found)


def missing(features: list[dict]) -> list[str]:
    """What the features name and no file holds."""
    wanted = {test for feature in features for test in feature["tests"]}
    return sorted(t for t in wanted if t.partition("::")[2] not in names(ROOT / "tests" / t.partition("::")[0]))


def proof(feature: dict) -> str:
    links = []
    for test in feature["tests"]:
        file, _, name = test.partition("::")
        links.append(f"[{name.replace('::', '.')}](../tests/{file})")
    return "<br>".join(links) or "·"


def ours(feature: dict) -> str:
    """Our column: what the named tests prove."""
    path, tests = feature.get("path", "both"), feature["tests"]
    seen = {next((p for prefix, p in FORCED.items() if t.startswith(prefix)), "both") for t in tests}
    if path == "no":
        return "no"
    if not tests:
        return "unproved"
    if path == "both" and "both" not in seen and len(seen) == 1:
        return f"on the {seen.pop()}; else unproved"
    held = {"kernels": "yes, the kernels", "reference": "by the reference"}.get(path, "yes")
    return f"{held}, composed" if feature.get("composed") else held


def row(feature: dict, peers: list[str]) -> str:
    marks = feature["field"].split()
    if len(marks) != len(peers):
        raise ValueError(f"{feature['name']}: {len(marks)} marks for {len(peers)} packages")
    cells = [feature["name"], f"**{ours(feature)}**", *(MARKS[m] for m in marks), proof(feature)]
    return f"| {' | '.join(cells)} |"


def page() -> tuple[str, list[str]]:
    """The page, and the tests that it names and that do not exist."""
    data = tomllib.loads(SOURCE.read_text())
    peers = data["packages"]
    lines = ["<!-- Written by `make docs` from compatibility.toml: change that file. -->", "", data["text"].strip()]
    head = ["", "fusedloss", *peers, "proved by"]
    for group in data["group"]:
        lines += ["", f"## {group['name']}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [row(feature, peers) for feature in group["feature"]]
    features = [feature for group in data["group"] for feature in group["feature"]]
    return "\n".join([*lines, "", data["notes"].strip(), ""]), missing(features)


def main(check: bool) -> int:
    text, absent = page()
    for test in absent:
        print(f"docs/compatibility.toml names tests/{test}, which does not exist")
    if check:
        old = not PAGE.is_file() or PAGE.read_text() != text
        if old:
            print("docs/compatibility.md is old: make docs")
        return int(old or bool(absent))
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return int(bool(absent))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
