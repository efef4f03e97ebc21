"""Growth in memory, on a mesh of eight simulated devices and from disk to disk, over the floor of the same bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.parts import program, table
from benchmarks.turns import Quartiles, quartiles
from flm_jax import costs

TITLE = "Growth"
READING = (
    "The floor reads every byte of the old state and writes every byte of the new one, in the same run: in memory "
    "and on the mesh as a jitted program on the same devices (`benchmarks/mesh_growth.py`), from disk to disk by "
    "reading and writing files, before and after each growth (`benchmarks/streaming.py`). Eight simulated devices "
    "share the processors and copy what real links would carry."
)
# GB of the grown state, in memory and on disk; rounds of each, the first of those in memory is not counted.
SETTINGS: dict[str, dict[str, Any]] = {
    "full": dict(gigabytes=0.5, rounds=8, methods=("zero", "mask", "copy"), size=1.0, growths=3),
    "quick": dict(gigabytes=0.2, rounds=5, methods=("zero", "copy"), size=0.2, growths=2),
    "tiny": dict(gigabytes=0.02, rounds=2, methods=("zero",), size=0, growths=0),
}


def measure(effort: str) -> dict[str, Any]:
    """The ratio and the floor of every growth."""
    settings = SETTINGS[effort]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        methods = [f"--method={method}" for method in settings["methods"]]
        for devices, place in ((1, "in memory"), (8, "on a mesh of 8"))[: 1 if effort == "tiny" else 2]:
            options = [f"--gigabytes={settings['gigabytes']}", f"--rounds={settings['rounds']}", f"--json={file}"]
            program(["benchmarks/mesh_growth.py", f"--devices={devices}", *methods, *options])
            rows += [{"place": place, **row} for row in json.loads(file.read_text())]
        for method in settings["methods"] if settings["growths"] else ():
            again = [f"--method={method}"] * settings["growths"]
            options = [f"--size={settings['size']}", f"--dir={folder}", f"--json={file}"]
            program(["benchmarks/streaming.py", *again, *options])
            streamed = json.loads(file.read_text())
            rows.append(
                {
                    "place": "from disk to disk",
                    "method": method,
                    "bytes": (streamed[0]["read_gb"] + streamed[0]["written_gb"]) * 1e9,
                    "ratio": quartiles([row["ratio"] for row in streamed]),
                    "floor": quartiles([row["floor"] for row in streamed]),
                    "rounds": streamed,
                }
            )
    return {"rows": rows}


def tables(found: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    rows = [
        [
            row["place"],
            row["method"],
            costs.size(row["bytes"]),
            Quartiles(*row["floor"]).text() + " s",
            Quartiles(*row["ratio"]).text(),
        ]
        for row in found["rows"]
    ]
    return [table(["growth", "operator", "read and written", "floor", "growth over floor"], rows)]
