"""What the measurements of a step cost: processor time of train steps with and without them, in turns.

  python benchmarks/metrics_cost.py

Programs take steps of one model on the same batch: one that returns nothing but the loss, so that the compiler drops
every other measurement; the step as it is, also on a mixture of four sources; and, of a model that has grown, a step
that is logged, which measures the new entries too. Processor time of all threads is compared, not time on the clock, so
other programs on the machine disturb it little. Beside it stands what the compiler counts of the bytes that the program
reads and writes (of a scan over layers once).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks.turns import Timings, turns
from flm_jax.config import ModelConfig, small_1t, small_102b
from flm_jax.data.batches import Batch, RowSources
from flm_jax.growth import Growth
from flm_jax.recipe import Recipe, ResolvedStage, Stage, resolve
from flm_jax.sharding import make_mesh
from flm_jax.step import StageProgram

_ROUNDS = flags.DEFINE_integer("rounds", 21, "Rounds in which each program takes a step.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 240, "Seconds after which no further round of a shape begins.")
_JSON = flags.DEFINE_string("json", None, "Write the seconds of every round to this file.")
SOURCES = 4


def demo() -> tuple[ResolvedStage, int]:
    """The last stage of the demo, which also measures its new entries, and its context."""
    stages = (Stage("before", small_102b(), 1, 16), Stage("last", small_1t(), 90, 16, growth=Growth("zero")))
    return resolve(Recipe(stages))[1], 128


def larger() -> tuple[ResolvedStage, int]:
    """A model of 6.9 M parameters that has not grown, and its context."""
    cfg = ModelConfig(256, 6, 4, 688, 4096, base_width=256, init_std_vector=0.02, compute_dtype="float32")
    return resolve(Recipe((Stage("one", cfg, 90, 8),)))[0], 256


def batch_of(stage: ResolvedStage, context: int) -> Batch:
    """A batch of random tokens, of one corpus."""
    shape = (stage.batch_size, context + 1)
    tokens = np.random.default_rng(0).integers(0, stage.cfg.vocab, shape, dtype=np.int32)
    x, y = tokens[:, :-1], tokens[:, 1:]
    return Batch(x, y, np.ones(x.shape, np.float32), np.zeros_like(x))


def stepping(program: StageProgram, batch: Batch, measures: bool) -> tuple[Callable[[], float], float]:
    """A function that takes one step and returns its processor time in seconds, and the counted bytes of a step."""
    step = program.step_function(masked=False)

    def alone(state: Any, batch: Any) -> Any:
        state, metrics = step(state, batch)
        return state, metrics.loss

    with jax.set_mesh(program.mesh):
        state, given = program.initialiser()(jax.random.key(0)), jax.device_put(batch)
        jitted = program.stepper(masked=False) if measures else jax.jit(alone, donate_argnums=0)
        compiled = jitted.lower(state, given).compile()

    def once() -> float:
        nonlocal state
        begun = time.process_time()
        with jax.set_mesh(program.mesh):
            state, measured = compiled(state, given)
        jax.block_until_ready((state, measured))
        return time.process_time() - begun

    counted: Any = compiled.cost_analysis()
    return once, counted["bytes accessed"]


def compared(stage: ResolvedStage, context: int) -> tuple[Timings, dict[str, float]]:
    """Processor time and counted bytes of the programs of a stage."""
    program, logged = (StageProgram(stage, make_mesh(), 1, log_every=every) for every in (10**6, 1))
    batch = batch_of(stage, context)
    rows = np.arange(stage.batch_size, dtype=np.int32) % SOURCES
    mixed = batch._replace(sources=RowSources(rows, SOURCES))
    calls = {
        "loss alone": stepping(program, batch, measures=False),
        "all": stepping(program, batch, measures=True),
        "all, of a mixture": stepping(program, mixed, measures=True),
    }
    if stage.growth is not None:
        calls["all, a logged step"] = stepping(logged, batch, measures=True)
    steps, counted = {name: step for name, (step, _) in calls.items()}, {name: n for name, (_, n) in calls.items()}
    return turns(steps, _ROUNDS.value, warm_up=1, most_seconds=_SECONDS.value, rotating=True), counted


def main(argv: Sequence[str]) -> None:
    """Prints a row of a table per shape and program."""
    del argv
    found = {}
    print("| step | measures | processor seconds | over loss alone | MB, counted |\n|---|---|---|---|---|")
    for name, shape in (("the demo's last", demo), ("6.9 M, 8 x 256 tokens", larger)):
        timings, counted = compared(*shape())
        found[name] = {"seconds": timings.record(), "bytes": counted}
        for call in timings.seconds:
            seconds, ratio = timings.of(call).text(".3f"), timings.ratio(call, "loss alone").text(".4f")
            print(f"| {name} | {call} | {seconds} | {ratio} | {counted[call] / 1e6:.1f} |", flush=True)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    app.run(main)
