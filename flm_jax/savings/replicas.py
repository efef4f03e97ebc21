"""Trains one stage of recipes that differ only in seed and learning rate as one program, in memory.

What `flm_jax.train` does with checkpoints, logs and reports is done here without them, for models that train in
minutes: the same states from the same recipe. A stage begins with a `Snapshot` of the stage before and ends with
another, so that runs which share their first stages share the work: many decays can follow one stable stage.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.data.batches import Batch, TokenBatches
from flm_jax.data.source import Data, open_data
from flm_jax.growth import Growth
from flm_jax.growth.distance import settle
from flm_jax.loss import make_heldout_loss
from flm_jax.model import Params
from flm_jax.recipe import Recipe, ResolvedStage, Run, resolve
from flm_jax.records import as_dict
from flm_jax.savings.target import stage_flops
from flm_jax.sharding import few_rows, put_batch
from flm_jax.source_checkpoint import read_source
from flm_jax.stage_run import stage_program
from flm_jax.state import TrainState
from flm_jax.step import StageProgram

# Times the loss of a uniform guess: a run with a greater loss has diverged.
MAX_LOSS = 3.0


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands at the end of a stage.

    Attributes:
      state: its train state, on the host.
      position: in the data.
      placed: the growths so far, by the index of their stage, with their layers placed.
      evals: held-out measurements so far: stage (index), step, tokens, flops (both of the whole run) and loss.
      seconds: wall-clock seconds that the stages took; replicas share them.
    """

    state: TrainState
    position: bytes
    placed: Mapping[int, Growth]
    evals: tuple[Mapping[str, Any], ...]
    seconds: float = 0.0


def alike(recipe: Recipe, index: int) -> dict[str, Any]:
    """A record that is equal for recipes whose stages up to `index` can be trained as replicas of each other."""
    record = stages_record(recipe, index)
    record["seed"] = record["data"]["seed"] = None
    for stage in record["stages"]:
        stage["optimizer"]["learning_rate"] = None
    return record


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON-able data, with the digests of the checkpoints that its stages have as teachers.

    Records leave out paths. That the data is the same is checked apart, when a study begins.

    Raises:
      CheckpointError: a checkpoint cannot be read.
    """
    named = {n: s.teacher.checkpoint for n, s in enumerate(recipe.stages) if s.teacher and s.teacher.checkpoint}
    digests = {str(number): _digest(path) for number, path in named.items()}
    return {**as_dict(recipe), **({"teachers": digests} if digests else {})}


@functools.cache
def _digest(checkpoint: str) -> str:
    return read_source(checkpoint).digest


def stages_record(recipe: Recipe, index: int) -> dict[str, Any]:
    """A record of everything that determines a run up to the end of stage `index`; names of stages are left out."""
    whole = recipe_record(dataclasses.replace(recipe, stages=recipe.stages[: index + 1]))
    stages = [{key: value for key, value in stage.items() if key != "name"} for stage in whole["stages"]]
    return {**whole, "stages": stages}


def train_stage(
    recipes: Sequence[Recipe], index: int, before: Sequence[Snapshot | None], run: Run | None = None
) -> list[Snapshot]:
    """The snapshots at the end of stage `index` of each recipe, from those at the end of the stage before.

    Args:
      recipes: equal but for `Recipe.seed`, `DataConfig.seed` and learning rates.
      index: of the stage.
      before: a snapshot per recipe; None for the first stage.
      run: how devices are laid out, and the compiler's options; None: as `Run` has them.

    Raises:
      ValueError: the recipes differ in something else.
    """
    begun = time.monotonic()
    if any(alike(recipe, index) != alike(recipes[0], index) for recipe in recipes):
        raise ValueError("Replicas must be equal but for their seeds and learning rates.")
    data = [open_data(recipe.data) for recipe in recipes]
    replicas = [
        _Replica(recipe, index, snapshot, about, run or Run())
        for recipe, snapshot, about in zip(recipes, before, data, strict=True)
    ]
    lead = replicas[0]
    with jax.set_mesh(lead.program.mesh):
        state = _stacked([replica.start() for replica in replicas])
        if any(replica.placed != lead.placed for replica in replicas):
            raise ValueError("Replicas whose layers were placed by measured distances cannot share a program.")
        program, stage = lead.program, lead.program.stage  # a growth has placed its layers by now
        measure = _Measure(recipes[0], program, data[0])
        rates = [replica.recipe.stages[index].optimizer.learning_rate for replica in replicas]
        paces = jnp.asarray(rates) / stage.optimizer.learning_rate if len(rates) > 1 else None
        for replica, own in zip(replicas, _each(state, len(replicas)), strict=True):
            if index == 0 or stage.grows:
                replica.measured(0, measure(own, 0))
        teachers = [replica.teacher() for replica in replicas] if stage.teacher_steps else []
        kind, stepper, teacher = None, None, None
        for step in range(stage.steps):
            if kind != (step < stage.ramp_steps, step < stage.teacher_steps):
                kind = step < stage.ramp_steps, step < stage.teacher_steps
                stepper = _stepper(program, kind[0], len(replicas))
                teacher = _stacked(teachers) if kind[1] else None
            batch = _stacked([put_batch(r.batches.next(stage.batch_size), program.mesh) for r in replicas])
            assert stepper is not None
            state = stepper(state, batch, paces, teacher)
            done = step + 1
            if done % recipes[0].eval_every == 0 or done == stage.steps:
                for replica, own in zip(replicas, _each(state, len(replicas)), strict=True):
                    replica.measured(done, measure(own, done))
                if all(replica.diverged for replica in replicas):
                    break
        seconds = time.monotonic() - begun
        hosts = jax.device_get(_each(state, len(replicas)))
        return [replica.end(own, seconds) for replica, own in zip(replicas, hosts, strict=True)]


class _Replica:
    """One recipe during a stage: its data, its first state, and what is measured of it."""

    def __init__(self, recipe: Recipe, index: int, before: Snapshot | None, data: Data, run: Run) -> None:
        self.recipe, self.index, self.before, self.data, self.run = recipe, index, before, data, run
        self.placed = dict(before.placed) if before else {}
        self.evals: list[Mapping[str, Any]] = list(before.evals) if before else []
        self.program = stage_program(recipe, run, self._resolved()[index])
        self.batches: TokenBatches = data.train(recipe.stages[index].source_weights)
        if before is not None:
            self.batches.restore(before.position)
        earlier, context = self._resolved()[:index], recipe.data.context
        self.tokens = sum(stage.steps * stage.batch_size * context for stage in earlier)
        self.flops = sum(stage_flops(stage, stage.steps, context) for stage in earlier)

    def _resolved(self) -> tuple[ResolvedStage, ...]:
        """The stages up to this one, with new layers placed as far as that is known."""
        stages = [
            dataclasses.replace(stage, growth=self.placed.get(number, stage.growth))
            for number, stage in enumerate(self.recipe.stages[: self.index + 1])
        ]
        return resolve(dataclasses.replace(self.recipe, stages=tuple(stages)))

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.evals[-1]["loss"])

    def start(self) -> TrainState:
        """The state at step 0 of the stage; the keys are those of `flm_jax.train`."""
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), self.index)
        if self.before is None:
            first: TrainState = self.program.initialiser()(key)
            return first
        if not self.program.stage.grows:
            return self.program.continued(self.before.state)
        lineage, mesh = self.program.stage.lineage, self.program.mesh
        few = put_batch(next(iter(self.data.heldout(few_rows(mesh), few_rows(mesh)))), mesh)
        lineage, _ = settle(lineage, self.before.state.params, few.inputs_BT, few.segments_BT)
        self.placed[self.index] = lineage.last_growth
        self.program = stage_program(self.recipe, self.run, self._resolved()[self.index])
        grown: TrainState = self.program.grower()(self.before.state, key)
        return grown

    def teacher(self) -> Params | None:
        """The weights of the stage's teacher, if it has one: those before the growth, or those of a checkpoint."""
        resolved, mesh = self.program.stage.teacher, self.program.mesh
        if resolved is None or self.before is None:
            return None
        if resolved.source is not None:
            return resolved.restore(mesh, resolved.source.digest, resolved.source.directory)

        def held(x: Any, to: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(x.astype(to.dtype), to.sharding)

        return jax.tree.map(held, self.before.state.params, resolved.abstract(mesh))

    def measured(self, step: int, loss: float) -> None:
        """Adds a held-out measurement; from a loss far above that of a guess on, the run counts as diverged."""
        stage, context = self.program.stage, self.recipe.data.context
        if (self.evals and self.diverged) or not loss < MAX_LOSS * math.log(stage.cfg.vocab):
            loss = math.inf
        tokens = self.tokens + step * stage.batch_size * context
        flops = self.flops + stage_flops(stage, step, context)
        self.evals.append({"stage": self.index, "step": step, "tokens": tokens, "flops": flops, "loss": loss})

    def end(self, state: TrainState, seconds: float) -> Snapshot:
        spent = seconds + (self.before.seconds if self.before else 0.0)
        return Snapshot(state, self.batches.state(), self.placed, tuple(self.evals), spent)


class _Measure:
    """The held-out loss of a state: (state, step) -> nats per token."""

    def __init__(self, recipe: Recipe, program: StageProgram, data: Data) -> None:
        self.program = program
        self.loss = make_heldout_loss(program.stage.cfg, program.mesh, recipe.loss_chunks)
        self.batches: list[Batch] = list(data.heldout(program.stage.batch_size, recipe.eval_windows))

    def __call__(self, state: TrainState, step: int) -> float:
        return self.loss(state.params, self.batches, self.program.masks(step))


def _stepper(program: StageProgram, masked: bool, replicas: int) -> Any:
    """The jitted train step (state, batch, pace, teacher) -> state; for several runs all of these are stacked."""
    step = program.step_function(masked)

    def one(state: TrainState, batch: Any, pace: Any, teacher: Params | None) -> TrainState:
        after: TrainState = step(state, batch, 1.0 if pace is None else pace, teacher)[0]
        return after

    several = jax.vmap(one) if replicas > 1 else one
    return jax.jit(several, donate_argnums=0, compiler_options=program.options)


def _stacked(trees: Sequence[Any]) -> Any:
    """Trees of equal shapes as one tree with a leading axis; a single tree as it is."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _each(tree: Any, replicas: int) -> list[Any]:
    """The trees that `_stacked` made one of."""
    return [tree] if replicas == 1 else [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(replicas)]
