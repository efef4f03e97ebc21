"""Models without layers: trained, decoded, saved, planned; grown from, in memory and streamed; and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax import costs, model
from flm_jax import train as training
from flm_jax.checkpoint import verify
from flm_jax.convert.exporting import export_model
from flm_jax.generation import decode
from flm_jax.growth import REGISTRY, Growth, axis_maps, compare, grow_optimizer, masks_at
from flm_jax.growth.distance import layer_distances
from flm_jax.growth.grow import grow_opt_state, grow_params
from flm_jax.growth.lineage import lineage_of
from flm_jax.growth.rescaling import rescaled_optimizer, rescaling
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Stage
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.signature import Kind
from flm_jax.source_checkpoint import read_source
from tests import small
from tests.growing import GROWN, grow_pair, logits, mixtures, plan_with, relative
from tests.runs import RUN, recipe_of
from tests.small import examples

pytestmark = pytest.mark.usefixtures("cheap_draws")

FROM_NOTHING = sorted(name for name, operator in REGISTRY.items() if Kind.STACK in operator.kinds and name != "stack")
NONE = GROWN[0].replace(layers=0)


@examples(6)
@given(data=st.data(), growth=mixtures(without=()))
def test_every_operator_is_exact_from_no_layers_with_any_mixture_of_methods(data, growth):
    wide = dict(compute_dtype="float64", param_dtype="float64")
    with jax.enable_x64(True):
        old, new = data.draw(small.growths(**wide))
        old, params, new, grown = grow_pair((old.replace(layers=0), new), growth)
        found = compare(old, params, new, grown, growth, small.tokens())
        assert found.max_rel_logit_diff < 1e-12
        assert len(found.layer_diffs) == new.layers and max(found.layer_diffs) < 1e-12


@pytest.mark.parametrize("method", FROM_NOTHING)
def test_new_layers_without_a_source_are_drawn(method):
    growth = Growth(methods={"layers": method}, ramp_steps=3 if method == "mask" else 0)
    old, params, new, grown = grow_pair((NONE, NONE.replace(layers=2)), growth)
    silent = method in ("zero", "identity")
    for part, name, writes in (("attention", "out", True), ("mlp", "down", True), ("mlp", "up", False)):
        assert bool(np.any(grown["blocks"][part][name])) == (not writes or not silent), name
    same = relative(logits(old, params), logits(new, grown, masks_at(old, new, growth, 0))) < 1e-5
    assert same == REGISTRY[method].preserving
    # No moment has a source either.
    state = rescaled_optimizer(OptimizerConfig(), old, model.declared(old)[1]).init(params)
    moments = grow_optimizer(state, old, new, growth)
    assert all(not np.any(x) for x in jax.tree.leaves(moments))


def test_growing_from_no_layers_by_copies_is_refused_with_what_would_be_right():
    with pytest.raises(
        ValueError, match="without layers has none that 'stack' could copy: grow .* by mask, zero, ident"
    ):
        axis_maps(NONE, GROWN[0], Growth(methods={"layers": "stack"}))
    with pytest.raises(ValueError, match="a number of copies for each of 0 layers, 2 in all"):
        axis_maps(NONE, GROWN[0], Growth(depth=(1,)))


def test_wider_without_layers_stays_exact_and_every_state_grows():
    plan = plan_with("uneven", optimizer="exact")
    old, params, new, grown = grow_pair((NONE, GROWN[1].replace(layers=0)), plan)
    found = compare(old, params, new, grown, plan, small.tokens())
    assert found.max_rel_logit_diff < 1e-5 and found.layer_diffs == ()
    # And deeper after it, in the rescaling of the first growth.
    first = lineage_of(old, new, plan)
    deeper = first.grown(new.replace(layers=2), dataclasses.replace(plan, methods={**plan.methods, "layers": "zero"}))
    tx = rescaled_optimizer(OptimizerConfig(), deeper.cfg, model.declared(deeper.cfg)[1], rescaling(deeper))
    larger = grow_params(deeper, grown, jax.random.key(0))
    state = rescaled_optimizer(OptimizerConfig(), new, model.declared(new)[1], rescaling(first)).init(grown)
    jax.eval_shape(tx.update, larger, grow_opt_state(deeper, state), larger)
    assert relative(logits(new, grown), logits(deeper.cfg, larger)) < 1e-5


def test_distances_are_measured_of_no_layer_and_new_ones_are_placed():
    growth = Growth(depth="distance")
    lineage = lineage_of(NONE, GROWN[0], growth)
    found = lineage.settled(layer_distances(NONE, small.params(NONE), small.tokens()))
    assert found.is_settled and found.maps["layers"].span.fresh.all()


def test_without_layers_there_are_embedding_norm_and_head_alone():
    cfg = small.config(layers=0)
    assert costs.param_count(cfg) == 2 * 24 * small.VOCAB + 24
    assert costs.forward_flops_per_token(cfg, 64) == 2 * 24 * small.VOCAB
    assert costs.shape_line(cfg).startswith("0 layers x 24 wide")
    params, prompt = small.params(cfg.replace(init_std_vector=1.0)), small.tokens((1, 5))
    made = decode.continued(cfg, params, jnp.asarray(prompt), 4)
    last = int(prompt[0, -1])
    for token in np.asarray(made)[0]:  # a table of next tokens
        expected = int(np.argmax(small.apply(cfg, params, np.array([[last]], np.int32))[0, 0]))
        assert (int(token), last) == (expected, last)
        last = int(token)


@pytest.mark.integration
def test_a_run_begins_without_layers_and_grows_some_which_is_saved_and_restored(data, tmp_path):
    fast, run = OptimizerConfig(learning_rate=1e-2), dataclasses.replace(RUN, mesh=MeshConfig())
    stages = (
        Stage("table", small.shape(layers=0), 2, 8, fast),
        Stage("deep", small.shape(layers=2, embed=32), 2, 8, fast, Growth("zero")),
    )
    result = training.train(recipe_of(data, *stages), run, tmp_path / "run")
    assert result["growths"][0]["max_rel_logit_diff"] < 1e-5
    assert [stage["params"] for stage in result["stages"]] == [costs.param_count(stage.model) for stage in stages]
    source = read_source(tmp_path / "run" / "checkpoints" / "0_table")
    assert verify(source.directory).ok
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        restored = source.restore(mesh)
    assert restored.params["blocks"]["mlp"]["up"].shape == (0, 24, 40)
    assert int(restored.step) == 2
    with pytest.raises(ValueError, match="holds a model without layers, and other programs expect some: grow it first"):
        export_model(source.directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
