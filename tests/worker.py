"""One process of several: what tests/test_processes.py starts.

  python -m tests.worker COORDINATOR PROCESSES PROCESS PLAN

PLAN is a JSON file: `folder`, and `acts`, each a function below and its arguments, done in turn by all. Each process
writes what it found to FOLDER/NAME.PROCESS.json.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax

from flm_jax import checkpoint, distributed, stage_run
from flm_jax import train as training
from flm_jax.checkpoint import directory
from flm_jax.data.batches import StoreBatches
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import TextFolder
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.growth import Growth
from flm_jax.guards import SpikeGuard, Watchdog, lost, watching
from flm_jax.guards.watch import DATA, VOTE
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.sharding import MeshConfig, make_mesh, own_rows
from tests.small import shape

# Four processes of two devices: each two of them hold the same rows.
MESH = MeshConfig(fsdp=2, tensor=4)
RUN = Run(mesh=MESH, checkpoint_every=3, log_every=1, sample_tokens=4)
# A step whose batch holds, in the second half of its rows, targets that no text has.
POISONED, UNUSED = 17, 261


def recipe(folder: Path, cache: str = "cache", corpus: str = "corpus") -> Recipe:
    """Two stages; the second grows along several axes, its layers where they were measured to disturb least."""
    fast = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    growth = Growth("zero", depth="distance")
    return Recipe(
        stages=(
            Stage("first", shape(kv_heads=4), 4, 8, fast),
            Stage("second", shape(kv_heads=4, embed=32, layers=3), 6, 8, fast, growth, accumulate=2),
        ),
        data=DataConfig(TextFolder(str(folder / corpus)), Bytes(), context=16, cache_dir=str(folder / cache)),
        eval_windows=12,
        eval_every=4,
    )


def train(
    folder: Path,
    work: str,
    cache: str = "cache",
    corpus: str = "corpus",
    terminate: list[int] | None = None,
    fork: str | None = None,
) -> object:
    """Trains; `terminate` is [process, n]: that one sends itself SIGTERM as it places its n-th batch.

    In names '#' stands for the process. Returns the report, and how many rows were read of the batches.
    """
    honest, me, read = stage_run.put_batch, jax.process_index(), []

    def put(batch, mesh, *size):
        if size:
            read.append(len(batch.inputs_BT))
            if terminate == [me, len(read)]:
                os.kill(os.getpid(), signal.SIGTERM)
        return honest(batch, mesh, *size)

    stage_run.put_batch = put
    try:
        cache, corpus, work = (name.replace("#", str(me)) for name in (cache, corpus, work))
        whence = None if fork is None else folder / fork
        found = training.train(recipe(folder, cache, corpus), RUN, folder / work, fork=whence)
    finally:
        stage_run.put_batch = honest
    return {"report": found, "rows": own_rows(make_mesh(MESH), 8).tolist(), "read": sorted(set(read))}


def locked(folder: Path, work: str) -> object:
    """Trains where another run is at work."""
    held = contextlib.nullcontext()
    if distributed.is_primary():
        held = directory.take_lock(folder / work / "checkpoints" / "0_first")
    with held:
        return train(folder, work)


def alone(folder: Path) -> object:
    """One process fails where the others wait for it."""
    if not distributed.is_primary():
        distributed.fail_together("no more data")
    vote = distributed.Vote(make_mesh(MESH))
    return [vote(True), vote(True)]


def spiked(folder: Path, work: str) -> object:
    """Trains with a spike guard, on data of which one batch is poisoned, in the rows of process 1 alone."""
    honest = StoreBatches.next
    guard = SpikeGuard(sigmas=2.0, least=0.5, window=8, rewind_steps=3, save_every=4, skip_batches=1)

    def poisoned(self, batch_size, rows=None):
        first = self.position
        batch = honest(self, batch_size, rows)
        if first == (POISONED - 1) * batch_size and rows is not None and len(rows):
            batch.targets_BT[rows >= batch_size // 2] = UNUSED
        return batch

    StoreBatches.next = poisoned
    try:
        made = recipe(folder)
        stage = dataclasses.replace(made.stages[0], steps=24)
        made = dataclasses.replace(made, stages=(stage,), eval_every=50, spike_guard=guard)
        return training.train(made, RUN, folder / work)
    finally:
        StoreBatches.next = honest


def stalled(folder: Path) -> object:
    """Process 1 hangs before its second vote, and its watchdog ends it; process 0 waits for it, and says so."""
    vote, primary = distributed.Vote(make_mesh(MESH)), distributed.is_primary()
    vote(False)
    dog = Watchdog(at_least_seconds=0.5, first_seconds=0.5 if primary else 4.0, end=not primary)
    with watching(dog, folder) as watch:
        watch.at(VOTE if primary else DATA, 2)
        if not primary:
            time.sleep(600)
        while True:
            vote(False)


def main() -> None:
    coordinator, processes, process, plan = sys.argv[1:]
    written: set[str] = set()

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.add(arguments[0])
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            written.add(str(arguments[0]))

    sys.addaudithook(watch)
    distributed.join(coordinator, int(processes), int(process))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    checkpoint._SHOWN_WITHIN_S, distributed._FAREWELL_MS, lost._TELLING_S = 0.5, 2_000, 1.0
    given = json.loads(Path(plan).read_text())
    folder = Path(given["folder"])
    for act in given["acts"]:
        began = time.monotonic()
        try:
            found = {"result": globals()[act["do"]](folder, **act.get("with", {}))}
        except Exception as error:
            if not act.get("fails"):
                raise
            found = {"error": type(error).__name__, "text": str(error)}
        found["seconds"] = round(time.monotonic() - began, 1)
        found["written"] = sorted(path for path in written if path.startswith(str(folder)))
        (folder / f"{act['name']}.{process}.json").write_text(json.dumps(found))
        written.clear()


if __name__ == "__main__":
    main()
