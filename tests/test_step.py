"""The train step: the same on one device and on eight, in parts and whole; without masks after the ramp."""

import dataclasses

import jax
import numpy as np
import pytest

from flm_jax.data.source import open_data
from flm_jax.recipe import resolve
from flm_jax.sharding import MeshConfig, make_mesh, put_batch
from flm_jax.step import StageProgram
from tests.small import shape

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, tensor=4), MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=str
)
def test_one_device_and_eight_give_the_same_loss(mesh, recipe):
    stage = dataclasses.replace(recipe.stages[0], model=shape(kv_heads=4))
    recipe = dataclasses.replace(recipe, stages=(stage,))
    losses = []
    for where in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(mesh)):
        program = StageProgram(resolve(recipe)[0], where, 1)
        batches = open_data(recipe.data).train()
        with jax.set_mesh(where):
            state, step = program.initialiser()(jax.random.key(0)), program.stepper(False)
            for _ in range(3):
                state, metrics = step(state, put_batch(batches.next(8), where))
                losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)


def test_a_batch_in_parts_gives_the_step_of_the_whole_batch(recipe):
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    batch = open_data(recipe.data).train().next(8)
    # Parts must be weighted by what counts in them, not equally.
    batch = batch._replace(weights_BT=batch.weights_BT * (np.arange(8)[:, None] % 3 > 0))
    found = []
    for parts in (1, 2, 4):
        stage = dataclasses.replace(recipe.stages[0], accumulate=parts)
        program = StageProgram(resolve(dataclasses.replace(recipe, stages=(stage,)))[0], mesh, 1)
        with jax.set_mesh(mesh):
            state = program.initialiser()(jax.random.key(0))
            state, metrics = program.stepper(False)(state, put_batch(batch, mesh))
        found.append((metrics.loss, metrics.grad_norm, state.params))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[0], other)


def lowered(program, masked, rows=8):
    batch = open_data(program.stage_data).train().next(rows)
    with jax.set_mesh(program.mesh):
        return program.stepper(masked).lower(program.abstract_state, batch).as_text()


def test_after_the_ramp_the_masks_are_gone_from_the_program(recipe, data, monkeypatch):
    # What measures the entries that a growth added stays.
    monkeypatch.setattr(StageProgram, "_logged", lambda self, step: None)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    grown = resolve(recipe)[1]
    alone = resolve(dataclasses.replace(recipe, stages=(dataclasses.replace(grown.stage, growth=None),)))[0]
    texts = []
    for stage, masked in ((grown, True), (grown, False), (alone, False)):
        program = StageProgram(stage, mesh, 1)
        program.stage_data = data
        texts.append(lowered(program, masked))
    assert texts[1] == texts[2]
    assert texts[0] != texts[1]
