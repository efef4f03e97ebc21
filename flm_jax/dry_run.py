"""What a recipe would be: every stage's parameters, FLOPs and memory, and proof that its steps lower."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from flm_jax import plan
from flm_jax.data.batches import Batch
from flm_jax.origin import begin
from flm_jax.recipe import Recipe, ResolvedStage, Run
from flm_jax.sharding import make_mesh, spec
from flm_jax.step import StageProgram


def dry_run(recipe: Recipe, run: Run) -> Iterator[str]:
    """Yields the overview, section by section; data is neither read nor prepared.

    Raises:
        ValueError: the recipe is wrong, or the mesh does not divide one of its axes.
    """
    origin, stages = begin(recipe)
    mesh = make_mesh(run.mesh)
    yield f"Mesh: {', '.join(f'{name} {size}' for name, size in mesh.shape.items())} ({mesh.devices.size} devices)"
    previous = None if origin is None else StageProgram(origin.stage, mesh, 1)
    for stage in stages:
        program = StageProgram(stage, mesh, recipe.loss_chunks)
        yield _stage(recipe, stage, program)
        yield "  lowered: " + ", ".join(_lower(recipe, stage, program, previous, mesh))
        previous = program
    total = sum(_flops(recipe, stage) for stage in stages)
    yield f"All stages: {total:.3g} FLOPs"


def _flops(recipe: Recipe, stage: ResolvedStage) -> int:
    tokens = stage.stage.steps * stage.stage.batch_size * recipe.data.context
    return tokens * plan.train_flops_per_token(stage.cfg, recipe.data.context)


def _stage(recipe: Recipe, stage: ResolvedStage, program: StageProgram) -> str:
    s, context = stage.stage, recipe.data.context
    tokens = s.steps * s.batch_size * context
    # A gradient as large as the parameters lives beside the state during a step.
    resident = jax.tree.leaves((program.abstract_state, program.abstract_state.params))
    per_device = sum(math.prod(like.sharding.shard_shape(like.shape)) * like.dtype.itemsize for like in resident)
    grows = (
        ""
        if s.growth is None
        else f"\n  grows by {s.growth.name}"
        + (f", masks ramp over {stage.ramp_steps} steps" if stage.ramp_steps else "")
    )
    return (
        f"\nStage {s.name!r}: {plan.shape_line(stage.cfg)}{grows}\n"
        f"  {s.steps} steps of {s.batch_size} x {context} tokens: {plan.count(tokens)} tokens, "
        f"{_flops(recipe, stage):.3g} FLOPs ({plan.train_flops_per_token(stage.cfg, context):.3g} a token)\n"
        f"  parameters, gradients and moments: {plan.count(per_device)}B a device; activations come on top\n"
        + "\n".join("  " + line for line in plan.param_table(stage.cfg).splitlines())
    )


def _lower(
    recipe: Recipe, stage: ResolvedStage, program: StageProgram, previous: StageProgram | None, mesh: Mesh
) -> Iterator[str]:
    """Lowers every program of a stage, and names it."""
    where = NamedSharding(mesh, spec(("batch", "time")))
    shape = (stage.stage.batch_size, recipe.data.context)
    ids, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=where) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(inputs_BT=ids, targets_BT=ids, weights_BT=weights, segments_BT=ids)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        if stage.ready:
            yield "nothing at its start, which is a checkpoint"
        elif previous is None:
            program.initialiser().lower(key)
            yield "initialisation"
        else:
            assert stage.stage.growth is not None
            program.settle(stage.stage.growth.placeholder)
            program.grower().lower(previous.abstract_state, key)
            yield "growth"
        if stage.ramp_steps:
            program.stepper(masked=True).lower(program.abstract_state, batch)
            yield "train step with masks"
        program.stepper(masked=False).lower(program.abstract_state, batch)
        yield "train step"
