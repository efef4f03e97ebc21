"""Recipes that cannot be: each is refused with the stage, the field and what would be right."""

import dataclasses

import jax
import pytest

from flm_jax.growth import Growth
from flm_jax.recipe import Run, resolve
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.state import abstract_state
from flm_jax.step import StageProgram, make_grower
from tests.small import shape

pytestmark = pytest.mark.integration


def test_the_optimizer_changes_only_where_a_growth_begins_without_moments(recipe):
    first, second, third = recipe.stages
    muon = dataclasses.replace(first.optimizer, name="muon")
    changes = dataclasses.replace(second, optimizer=muon)
    goes_on = dataclasses.replace(first, name="more", optimizer=muon)
    for stages in ((first, changes), (first, goes_on), (dataclasses.replace(first, optimizer=muon), second)):
        before, after = (stage.optimizer.name for stage in stages)
        message = f"OptimizerConfig.name='{after}', but the optimizer state that it begins with is {before}'s: keep"
        with pytest.raises(ValueError, match=f"Stage '{stages[1].name}': {message}.*Growth.optimizer='fresh'"):
            resolve(dataclasses.replace(recipe, stages=stages))
    fresh = dataclasses.replace(changes, growth=dataclasses.replace(second.growth, optimizer="fresh"))
    last = dataclasses.replace(third, optimizer=muon)
    found = resolve(dataclasses.replace(recipe, stages=(first, fresh, last)))
    assert [stage.optimizer_before for stage in found] == ["adamw", "adamw", "muon"]
    lineage, mesh = found[1].lineage, make_mesh(MeshConfig(fsdp=8))
    before, after = abstract_state(lineage.before, mesh), abstract_state(lineage, mesh, optimizer="muon")
    grown = make_grower(lineage, mesh, optimizer="muon").eval_shape(before, jax.random.key(0))
    assert jax.tree.structure(grown) == jax.tree.structure(after)
    exact = dataclasses.replace(last, growth=Growth("zero", optimizer="exact"))
    with pytest.raises(ValueError, match="Stage 'third': optimizer='exact': Muon cannot go on exactly where embed"):
        resolve(dataclasses.replace(recipe, stages=(first, fresh, exact)))


def test_an_unmasked_growth_of_nothing_and_other_impossible_recipes(recipe):
    first, second, _ = recipe.stages
    grow = dataclasses.replace
    cases = [
        ((), "Recipe.stages is empty"),
        ((second,), "Stage 'second': the first stage is initialised"),
        (
            (first, grow(second, growth=None)),
            "Stage 'second': its model is not that of stage 'first': embed: 24 there, 32 here; .*give it a Growth",
        ),
        (
            (first, grow(second, growth=Growth("mask"))),
            r"ramp_steps=0 on embed: give the ramp at least one step",
        ),
        (
            (first, grow(second, growth=Growth("mask", ramp_steps=6, ramp_delay=3))),
            "its masks ramp over 9 steps, delays included, of its 8",
        ),
        (
            (first, grow(second, growth=Growth("zero", ramp_steps=3))),
            "ramp_steps=3, but growing by zero masks nothing",
        ),
        (
            (first, grow(second, model=shape(embed=22))),
            "Stage 'second': Axis 'embed' would shrink from 24 to 22",
        ),
        ((first, grow(second, name="first")), "Stage names must differ: first, first"),
        ((grow(first, accumulate=3),), "accumulate=3 must divide batch_size=8"),
    ]
    with pytest.raises(ValueError, match=r"Run.checkpoint_every = 0: use an integer, at least 1"):
        Run(checkpoint_every=0)
    with pytest.raises(ValueError, match=r"loss_chunks=3 must divide DataConfig.context=16"):
        resolve(dataclasses.replace(recipe, loss_chunks=3))
    odd = dataclasses.replace(recipe, stages=(grow(first, batch_size=12),))
    with pytest.raises(ValueError, match=r"Stage 'first': batch_size=12 must be a multiple of .* = 8"):
        StageProgram(resolve(odd)[0], make_mesh(MeshConfig(fsdp=8)), 1).check_trains(16)
    for stages, message in cases:
        with pytest.raises(ValueError, match=message):
            resolve(dataclasses.replace(recipe, stages=stages))
