"""The documentation says what is so: its examples run, and the compatibility page is what the tests prove."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_compatibility_page_is_current():
    """tests/compatibility.py also fails where a feature names a test that does not exist."""
    command = [sys.executable, "-P", str(ROOT / "tests/compatibility.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_readme_example(example):
    exec(compile(example, "README.md", "exec"), {})


def test_readme_has_examples():
    assert EXAMPLES


def test_make_targets_that_the_documents_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in ("README.md", "CONTRIBUTING.md"):
        for command in re.findall(r"`make ([a-z -]+)", (ROOT / file).read_text()):
            assert set(command.split()) <= targets, command
