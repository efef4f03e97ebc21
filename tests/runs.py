"""Recipes of whole runs on a corpus of eight documents, and a stop at a chosen step."""

import json
from pathlib import Path
from typing import Any

from flm_jax.data.config import DataConfig
from flm_jax.distillation import Teacher
from flm_jax.growth import Growth
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.sharding import MeshConfig
from tests.small import shape

RUN = Run(mesh=MeshConfig(fsdp=2, tensor=2), checkpoint_every=2, log_every=1, sample_tokens=8)
RAMP = 4
FAST = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
LARGE = shape(embed=32, layers=3, remat="none")


class StopAfter:
    """In place of `Interrupts`: asks for a stop after some checks of the loop."""

    def __init__(self, steps):
        self.left = steps

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def requested(self):
        self.left -= 1
        return "a test" if self.left < 0 else None


def recipe_of(data: DataConfig, *stages: Stage, **fields: Any) -> Recipe:
    """A recipe whose held-out loss is measured often, on few windows."""
    return Recipe(**{**dict(stages=stages, data=data, eval_windows=8, eval_every=4), **fields})


def three_stages(data: DataConfig) -> Recipe:
    """A small model, grown by a mask that rises over RAMP steps, then by zeros."""
    fast = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    return recipe_of(
        data,
        Stage("first", shape(), 6, 8, fast),
        Stage("second", shape(embed=32, layers=3), 8, 8, fast, Growth("mask", ramp_steps=RAMP), accumulate=2),
        Stage("third", shape(embed=40, layers=4, mlp=64), 4, 16, fast, Growth("zero")),
        eval_windows=16,
    )


def grown_once(data: DataConfig, teacher: Teacher | None = None, growth: Growth | None = None, **fields: Any) -> Recipe:
    """A model that grows after two steps; `fields` are those of its second stage, `first` those of its first."""
    first = Stage(
        **{**dict(name="first", model=shape(), steps=2, batch_size=8, optimizer=FAST), **fields.pop("first", {})}
    )
    given = dict(model=LARGE, optimizer=FAST, growth=growth or Growth("zero"), teacher=teacher)
    return recipe_of(data, first, Stage(**{**dict(name="second", steps=6, batch_size=8), **given, **fields}))


# Of the measurements of a step, what depends on the machine and its load.
OF_THE_MACHINE = ("time", "seconds/", "memory/", "tokens_per_second", "flops_per_second", "utilisation")


def measurements(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without times and memory."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(OF_THE_MACHINE)} for line in lines]
