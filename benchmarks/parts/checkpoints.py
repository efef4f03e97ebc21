"""Checkpoints: save and restore compared with the disk, and how much of an asynchronous save the train step notices."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks import disk
from benchmarks.parts import table
from benchmarks.parts.trainers import SIZES, batch_of, program_of
from benchmarks.turns import Quartiles, quartiles, turns
from flm_jax import costs
from flm_jax.checkpoint import Checkpoints

TITLE = "Checkpoints"
READING = (
    "The floor reads or writes and syncs one file of the same bytes on the same file system, in the same round "
    "(`benchmarks/disk.py`); what is read is dropped from the page cache before. A save also computes and a restore "
    "verifies a checksum of every leaf. What the step notices of an asynchronous save: the time that `save` blocks, "
    "and how much longer steps take until the save is on disk; the last column is both together, over the time of "
    "the save."
)
SETTINGS: dict[str, tuple[str, int]] = {"full": ("34 M", 6), "quick": ("6.9 M", 3), "tiny": ("tiny", 2)}
# Steps that are timed before each asynchronous save.
CALM = 4


def measure(effort: str) -> dict[str, Any]:
    """The figures of one size."""
    name, rounds = SETTINGS[effort]
    size = SIZES[name]
    program, batch = program_of(size), batch_of(size)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(program.mesh):
        state = program.initialiser()(jax.random.key(0))
        total = sum(x.nbytes for x in jax.tree.leaves(state))
        where = Path(folder) / "checkpoints"
        with Checkpoints(where, keep=1) as store:
            found = against_disk(store, where, state, program.abstract_state, total, rounds)
            found |= noticed(store, state, batch, program.stepper(masked=False), rounds)
    return {"size": name, "bytes": total, **found}


def against_disk(store: Checkpoints, where: Path, state: Any, abstract: Any, total: int, rounds: int) -> dict[str, Any]:
    """Save and restore in turns with the floors of writing and reading."""
    number = 0
    floors = (0.0, 0.0)

    def save() -> None:
        nonlocal number
        number += 1
        store.save(number, state, meta={})
        store.wait()

    def write_floor() -> float:
        nonlocal floors
        floors = disk.floor(where, total, total)
        return floors[1]

    def restore() -> float:
        disk.forget(where)
        since = time.perf_counter()
        jax.block_until_ready(store.restore(abstract).state)
        return time.perf_counter() - since

    calls = {"save": save, "write": write_floor, "read": lambda: floors[0], "restore": restore}
    timings = turns(calls, rounds)
    return {
        "save": timings.of("save"),
        "restore": timings.of("restore"),
        "floors": {"save": timings.of("write"), "restore": timings.of("read")},
        "ratios": {"save": timings.ratio("save", "write"), "restore": timings.ratio("restore", "read")},
        "seconds": timings.record(),
    }


def noticed(store: Checkpoints, state: Any, batch: Any, step: Any, rounds: int) -> dict[str, Any]:
    """Steps before and during an asynchronous save."""

    def steps() -> Iterator[float]:
        nonlocal state
        while True:
            since = time.perf_counter()
            state, _ = step(state, batch)
            jax.block_until_ready(state)
            yield time.perf_counter() - since

    each = steps()
    next(each)  # compiles
    found: dict[str, list[float]] = {"calm": [], "blocked": [], "during": [], "share": []}
    number = max(store.steps())
    for _ in range(rounds):
        calm = quartiles([next(each) for _ in range(CALM)]).median
        number, since = number + 1, time.perf_counter()
        store.save(number, state, meta={})
        blocked = time.perf_counter() - since
        during = []
        # The directory gets its name once everything is on disk.
        while not (store.directory / str(number)).exists():
            store.check()  # a save that failed would never get there
            during.append(next(each))
        lasted = time.perf_counter() - since
        store.wait()
        lost = blocked + sum(during) - len(during) * calm
        found["calm"].append(calm)
        found["blocked"].append(blocked)
        found["during"].append(sum(during) / len(during) / calm if during else 1.0)
        found["share"].append(lost / lasted)
    return {"asynchronous": {name: quartiles(values) for name, values in found.items()}}


def tables(found: dict[str, Any]) -> list[str]:
    """The tables in Markdown."""
    rows = [
        [
            what,
            costs.size(found["bytes"]),
            Quartiles(*found[what]).text() + " s",
            Quartiles(*found["floors"][what]).text() + " s",
            Quartiles(*found["ratios"][what]).text(),
        ]
        for what in ("save", "restore")
    ]
    late = {name: Quartiles(*values) for name, values in found["asynchronous"].items()}
    row = [
        late["calm"].text(".3f") + " s",
        late["blocked"].text(".3f") + " s",
        late["during"].text(),
        late["share"].text(".0f", 100) + " %",
    ]
    return [
        table(["", "bytes", "time", "floor", "times the floor"], rows),
        f"An asynchronous save beside the step of {found['size']}:",
        table(["step before", "`save` blocks", "steps during the save, times those before", "noticed"], [row]),
    ]
