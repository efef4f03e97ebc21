"""docs/faults.md names tests that exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_every_test_that_the_page_names_exists():
    page = (TESTS.parent / "docs/faults.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 40 and page.count("::") == len(named)
    for file in sorted({file for file, _ in named}):
        there = {
            node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert not {name for of, name in named if of == file} - there, file
