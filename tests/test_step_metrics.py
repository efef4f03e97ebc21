"""Norms by part of the model: named by signatures, and together the norms of the whole."""

import jax
import numpy as np
import pytest

from flm_jax.growth import Growth
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.trained import Trained
from flm_jax.model import declared
from flm_jax.recipe import Recipe, Stage, resolve
from flm_jax.sharding import make_mesh
from flm_jax.signature import Signature
from flm_jax.step import StageProgram
from flm_jax.step.metrics import PartNorms, part_norms
from tests import small

OLD = small.config(layers=1)
LINEAGE = Lineage(OLD).grown(small.config(mlp=56, layers=2), Growth("zero"))
PARTS = ("attention", "gains", "mlp", "embedding", "head")


def measured(lineage, train, logged: bool | None = True):
    """Norms of random trees, by name; a gradient is as large as its parameter, an update twice that."""
    trained = Trained(lineage, train)
    params = small.params(lineage.cfg)
    grads = trained.only(params)
    updates = jax.tree.map(lambda x: 2 * x, grads)
    found = jax.jit(lambda on, *trees: part_norms(trained, on, *trees))(logged, grads, updates, params)
    return params, grads, found.by_name()


def norm(*arrays) -> float:
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays))


def test_the_squares_of_the_parts_are_those_of_the_whole():
    params, _, found = measured(Lineage(OLD), "all", logged=None)
    assert {name for name in found if name.startswith("grad_norm/")} == {f"grad_norm/{part}" for part in PARTS}
    for kind, factor in (("grad_norm", 1), ("update_norm", 2), ("param_norm", 1)):
        whole = norm(*(found[f"{kind}/{part}"] for part in PARTS))
        assert whole == pytest.approx(factor * norm(*jax.tree.leaves(params)), rel=1e-5)
    mlp = params["blocks"]["mlp"].values()
    assert found["update_norm/mlp"] == pytest.approx(2 * norm(*mlp), rel=1e-5)
    assert found["param_norm/embedding"] == pytest.approx(norm(params["embedding"]), rel=1e-5)


@pytest.mark.parametrize("train", ["all", "new"])
def test_new_entries_have_norms_of_their_own_beside_those_of_their_parts(train):
    params, grads, found = measured(LINEAGE, train)
    mlp = params["blocks"]["mlp"]
    fresh = [spans.span.fresh for spans in (LINEAGE.maps["layers"], LINEAGE.maps["mlp"])]
    new = [np.asarray(x)[fresh[0]] for x in jax.tree.leaves(params["blocks"])]
    old = ~fresh[0]
    new += [np.asarray(mlp[name])[old][..., fresh[1]] for name in ("gate", "up")]
    new += [np.asarray(mlp["down"])[old][:, fresh[1]]]
    assert found["param_norm/new"] == pytest.approx(norm(*new), rel=1e-5)
    assert found["grad_norm/new"] == pytest.approx(norm(*new), rel=1e-5) and "update_norm/new" not in found
    # The embedding, the head and the last norm have nothing new: without a gradient they have no norm of it.
    assert ("grad_norm/embedding" in found) == (train == "all") and "param_norm/embedding" in found
    assert found["grad_norm/mlp"] == pytest.approx(norm(*jax.tree.leaves(grads["blocks"]["mlp"])), rel=1e-5)


def test_a_norm_that_is_not_finite_is_told_as_it_is():
    norms = PartNorms(np.array([np.inf, -1.0]), np.ones(2), np.array([1.0, np.nan]), names=("mlp", "head"))
    found = norms.by_name()
    assert found["grad_norm/mlp"] == np.inf and np.isnan(found["param_norm/head"])
    assert "grad_norm/head" not in found, "nothing of that part trains"


def test_new_entries_are_measured_at_the_steps_that_are_logged():
    found = measured(LINEAGE, "all", logged=False)[2]
    assert not [name for name in found if name.endswith("/new")] and "grad_norm/mlp" in found
    stages = Stage("old", OLD, 1, 4), Stage("grown", LINEAGE.cfg, 25, 4, growth=Growth("zero"))
    old, grown = (StageProgram(stage, make_mesh(), 1, log_every=10) for stage in resolve(Recipe(stages)))
    assert old._logged(9) is None
    assert [step + 1 for step in range(25) if grown._logged(step)] == [10, 20, 25]


def test_every_parameter_of_a_relative_has_a_part_and_a_new_axis_one_of_its_own(monkeypatch):
    signatures = jax.tree.leaves(declared(small.config(qkv_bias=True, qk_norm=True))[1])
    assert {sig.part for sig in signatures} == set(PARTS)
    assert Signature.parse("-> heads head_dim").part == "attention"
    monkeypatch.setitem(__import__("flm_jax.signature").signature.KINDS, "experts", None)
    assert Signature(reads=("embed",), writes=("experts",)).part == "experts"
