"""A model and how it came to be: records, what follows from a growth, layers placed by distance."""

import jax
import numpy as np
import optax
import pytest

from flm_jax.growth import Growth, Lineage, axis_maps, grow_optimizer, masks_at
from flm_jax.growth.grow import grow_opt_state, grow_params
from tests import small

OLD = small.config(heads=4, head_dim=4)
WIDE = OLD.replace(embed=30, heads=6, kv_heads=6, mlp=50)
COPY = Growth("copy", optimizer="exact")


def test_a_record_is_read_back():
    lineage = Lineage(OLD).grown(WIDE, COPY).grown(WIDE.replace(layers=4), Growth("mask", depth=(1, 1), ramp_steps=7))
    found = Lineage.from_record(lineage.record())
    assert found.record() == lineage.record()
    assert (found.cfg, found.growth, found.before.cfg) == (lineage.cfg, lineage.growth, lineage.before.cfg)
    assert found.ramp_steps == 7
    with pytest.raises(ValueError, match="names no model"):
        Lineage.from_record([])


def test_a_stage_that_went_on_with_a_model_is_the_same_model_in_other_numerics():
    grown = Lineage(OLD).grown(WIDE, COPY)
    later = {"model": Lineage(grown.cfg.replace(compute_dtype="bfloat16")).record()[0]["model"], "growth": None}
    found = Lineage.from_record([*grown.record(), later])
    assert found.cfg.compute_dtype == "bfloat16"
    assert found.growth == COPY and found.before.cfg == OLD


def test_a_growth_and_a_parent_come_together():
    with pytest.raises(ValueError, match="a growth and a parent, or neither"):
        Lineage(WIDE, COPY)
    with pytest.raises(ValueError, match="was initialised or imported"):
        Lineage(OLD).maps  # noqa: B018


def test_before_distances_are_measured_shapes_are_known_and_values_are_refused():
    growth = Growth("mask", depth="distance", ramp_steps=5)
    lineage = Lineage(OLD).grown(OLD.replace(layers=3, mlp=50), growth)
    assert not lineage.is_settled
    assert set(lineage.outline) == {"layers", "mlp"}
    assert lineage.ramp_steps == 5 and lineage.preserving
    for value in (lambda: lineage.maps, lambda: lineage.masks(0), lambda: grow_params(lineage, {}, None)):
        with pytest.raises(ValueError, match=r"depth='distance'|lacks|has shape"):
            value()
    settled = lineage.settled((0.3, 0.1))
    assert settled.growth.depth == (0, 1) and settled.is_settled
    assert np.flatnonzero(settled.mask_flags["layers"]).tolist() == [2]


def test_the_functions_of_configurations_are_the_properties():
    growth = Growth("mask", ramp_steps=4)
    lineage = Lineage(OLD).grown(WIDE, growth)
    assert axis_maps(OLD, WIDE, growth).keys() == lineage.maps.keys()
    for mine, theirs in zip(
        jax.tree.leaves(lineage.masks(2)), jax.tree.leaves(masks_at(OLD, WIDE, growth, 2)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_an_optimizer_whose_state_nothing_declares_is_refused_by_its_leafs_path():
    params = small.params(OLD)
    growth = Growth("copy")
    grown = Lineage(OLD).grown(WIDE, growth)
    for tx, leaf in ((optax.trace(0.9), "trace"), (optax.scale_by_amsgrad(), "mu")):
        state = optax.chain(optax.scale_by_adam(), tx).init(params)
        for refused in (
            lambda state=state: grow_optimizer(state, OLD, grown.cfg, growth),
            lambda state=state: grow_opt_state(grown, state),
        ):
            with pytest.raises(ValueError, match=rf"\[1\].*{leaf}.*flm_jax.optimizer.AVERAGES"):
                refused()


def test_an_optimizer_that_is_declared_grows_by_the_duals_of_its_power(monkeypatch):
    from flm_jax import optimizer

    monkeypatch.setitem(optimizer.AVERAGES, optax.TraceState, {"trace": 1})
    params = small.params(OLD)
    grown = Lineage(OLD).grown(WIDE, Growth("copy"))
    adam, trace = optax.scale_by_adam().init(params), optax.trace(0.9).init(params)
    mine, theirs = grow_opt_state(grown, (trace._replace(trace=params), adam._replace(mu=params)))
    for a, b in zip(jax.tree.leaves(mine.trace), jax.tree.leaves(theirs.mu), strict=True):
        np.testing.assert_array_equal(a, b)
