"""One process of several: what tests/test_processes.py starts.

  python -m tests.worker COORDINATOR PROCESSES PROCESS PLAN

PLAN is a JSON file: `folder`, `data`, and `acts`, each a function below and its arguments, done in turn by all.
Each process writes what it found to FOLDER/NAME.PROCESS.json.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax

from flm_jax import checkpoint, hosts
from flm_jax import train as training
from flm_jax.data.corpora import TextFolder
from flm_jax.data.source import DataConfig
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.sharding import MeshConfig
from tests.small import shape


def recipe(data: DataConfig) -> Recipe:
    """Two stages; the second grows along every axis, and its masks ramp."""
    fast = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    growth = Growth("mask", ramp_steps=3, depth="distance")
    return Recipe(
        stages=(
            Stage("first", shape(kv_heads=4), 4, 8, fast),
            Stage("second", shape(kv_heads=4, embed=32, layers=3), 6, 8, fast, growth, accumulate=2),
        ),
        data=data,
        eval_windows=12,
        eval_every=2,
    )


def run(**mesh: int) -> Run:
    return Run(mesh=MeshConfig(**mesh), checkpoint_every=2, log_every=1, sample_tokens=4)


def data_config(folder: Path, cache: str = "cache", **changes) -> DataConfig:
    return DataConfig(TextFolder(str(folder / "corpus")), Bytes(), context=16, cache_dir=str(folder / cache), **changes)


def train(folder: Path, work: str, mesh: dict, terminate: list[int] | None = None, each_its_own: str = "") -> object:
    """Trains; `terminate` is [process, n]: it sends itself SIGTERM as it places its n-th batch."""
    honest, me = training.put_batch, jax.process_index()
    count = iter(range(1, 10_000))

    def put(batch, mesh, *size):
        if size and terminate is not None and terminate == [me, next(count)]:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(batch, mesh, *size)

    training.put_batch = put
    own = f".{me}" if each_its_own == "work" else ""
    data = data_config(folder, f"cache.{me}" if each_its_own == "cache" else "cache")
    try:
        return training.train(recipe(data), run(**mesh), folder / f"{work}{own}")
    finally:
        training.put_batch = honest


def locked(folder: Path, work: str, mesh: dict) -> object:
    """Trains where another run is at work."""
    held = contextlib.nullcontext()
    if hosts.first():
        held = checkpoint._take_lock(folder / work / "checkpoints" / "0_first")
    with held:
        return train(folder, work, mesh)


def main() -> None:
    coordinator, processes, process, plan = sys.argv[1:]
    hosts.join(coordinator, int(processes), int(process))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    checkpoint._SHOWN_WITHIN_S = 0.5
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
        found["seconds"] = time.monotonic() - began
        (folder / f"{act['name']}.{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
