"""Counts in sentences agree with their nouns, and in the package no sentence counts one thing in the plural."""

import ast
import itertools
import re
from pathlib import Path

import pytest

from flm_jax.records import counted

PACKAGE = Path(__file__).resolve().parent.parent / "flm_jax"
NOUNS = "answer|byte|call|conversation|device|document|file|leave|line|part|question|request|step|tensor|token|window"
# Lengths that a program is given or reports are larger than one; what is counted by len() may be one.
COUNTED = re.compile(rf" (\w+ )?({NOUNS})s\b")


@pytest.mark.parametrize(
    ("given", "text"),
    [((0, "line"), "0 lines"), ((1, "line"), "1 line"), ((2000, "line"), "2,000 lines")]
    + [((n, "leaf is", "leaves are"), text) for n, text in ((1, "1 leaf is"), (3, "3 leaves are"))],
)
def test_a_number_and_what_it_counts(given, text):
    assert counted(*given) == text


def test_what_len_counts_is_said_by_it():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for number, text in itertools.pairwise(parts):
                if isinstance(number, ast.FormattedValue) and isinstance(text, ast.Constant):
                    call = number.value
                    counts = isinstance(call, ast.Call) and getattr(call.func, "id", "") == "len"
                    if counts and COUNTED.match(text.value):
                        found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {text.value!r}")
    assert not found, "use flm_jax.records.counted: " + "; ".join(found)
