"""The parts of `make bench`, in order; each is a module with TITLE, READING, `measure` and `tables`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PARTS = ("step", "start", "growth", "checkpoints", "input", "decode", "plan")
# How much is measured: "full" takes 15 minutes in all, "quick" 3; "tiny" is for the tests.
EFFORTS = ("full", "quick", "tiny")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def program(arguments: Sequence[str], **variables: str) -> str:
    """Runs Python with these arguments in a process of its own, from the checkout's root; returns what it prints.

    Raises:
      RuntimeError: it failed; the message has its last line.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise RuntimeError(f"{' '.join(arguments[:3])} ended with status {done.returncode}: {last}")
    return done.stdout
