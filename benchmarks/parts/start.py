"""Start-up time: what every launcher takes to print its help, and what a dry run of a tiny recipe takes."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.parts import ROOT, program, table
from benchmarks.turns import Quartiles, turns

TITLE = "Start-up"
READING = (
    "Every row is a process from start to exit. `--help` should cost little more than Python itself; the dry run of "
    "a tiny recipe (two stages, bytes, a corpus of eight files) opens the data and lowers every stage. The ratio is "
    "to `import jax` in the same round."
)
ROUNDS = {"full": 5, "quick": 2, "tiny": 1}
PYTHON, JAX = "python, nothing imported", "python, `import jax`"


def write_texts(folder: Path) -> None:
    """Eight small text files."""
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"Text {number}: " + "the model grows and goes on training. " * 20)


def measure(effort: str) -> dict[str, Any]:
    """Seconds of every launcher in turns."""
    launchers = sorted(path.name for path in (ROOT / "experiments").glob("*.py") if path.name != "__init__.py")
    if effort == "tiny":
        launchers = launchers[:1]
    commands = {PYTHON: ["-c", "pass"], JAX: ["-c", "import jax"]}
    commands |= {f"`{name} --help`": [f"experiments/{name}", "--help"] for name in launchers}
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts"
        write_texts(texts)
        bindings = f"TextFolder.path = '{texts}'\nDataConfig.cache_dir = '{folder}/cache'"
        recipe = ["--gin_file=gin_configs/recipes/minimal.gin", f"--gin_bindings={bindings}"]
        if effort != "tiny":
            commands["`train.py --dry_run`"] = ["experiments/train.py", *recipe, "--dry_run"]
        calls = {name: functools.partial(_run, command) for name, command in commands.items()}
        timings = turns(calls, ROUNDS[effort])  # the first round prepares the store
    return {
        "rows": [
            {"command": name, "seconds": timings.of(name), "ratio": timings.ratio(name, JAX)}
            for name in timings.seconds
        ],
        "seconds": timings.record(),
    }


def _run(command: list[str]) -> None:
    # absl's --help ends with status 1 in some versions; what counts here is the time.
    program(command)


def tables(found: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    rows = [
        [row["command"], Quartiles(*row["seconds"]).text() + " s", Quartiles(*row["ratio"]).text()]
        for row in found["rows"]
    ]
    return [table(["command", "time", "times `import jax`"], rows)]
