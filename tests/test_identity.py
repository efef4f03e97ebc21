"""What a work directory belongs to: what may change within it, and what the message says of what may not."""

import dataclasses

import pytest

from flm_jax.growth import Growth
from flm_jax.recipe import Recipe, Stage
from flm_jax.records import DATA, RECIPE, as_dict, check_identity, write_identity
from tests import small

BEGUN = Recipe(stages=(Stage("a", small.config(), 20, 4), Stage("b", small.config(mlp=60), 20, 4, growth=Growth())))


def with_stage(**changes):
    return dataclasses.replace(BEGUN, stages=(dataclasses.replace(BEGUN.stages[0], **changes), BEGUN.stages[1]))


@pytest.fixture
def workdir(tmp_path):
    write_identity(tmp_path, RECIPE, as_dict(BEGUN))
    return tmp_path


@pytest.mark.parametrize(
    "recipe",
    [
        dataclasses.replace(BEGUN, eval_every=7),
        dataclasses.replace(BEGUN, tolerance=1e-3),
        with_stage(model=small.config(remat="full", scan_unroll=2)),
    ],
)
def test_what_changes_no_number_may_change(workdir, recipe):
    check_identity(workdir, RECIPE, as_dict(recipe), "another recipe")
    assert as_dict(recipe) != as_dict(BEGUN)  # It is recorded, though.


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (with_stage(steps=30), "stages.a.steps: 20 there, 30 here"),
        (with_stage(name="c"), "stages.0.name: 'a' there, 'c' here"),
        (with_stage(model=small.config(attention="auto")), "stages.a.model.attention: 'plain' there, 'auto' here"),
        (with_stage(growth=Growth()), "stages.a.growth: None there, a Growth here"),
        (dataclasses.replace(BEGUN, eval_windows=3), "eval_windows: 256 there, 3 here"),
        (dataclasses.replace(BEGUN, stages=BEGUN.stages[:1]), "stages: 2 of them there, 1 of them here"),
    ],
)
def test_what_does_is_named_with_the_way_on(workdir, recipe, message):
    with pytest.raises(ValueError) as refused:
        check_identity(workdir, RECIPE, as_dict(recipe), "another recipe")
    assert f"was begun with another recipe: {message}. Nothing was changed." in str(refused.value)
    assert f"a new --workdir; to go on there from the newest checkpoint here, add --fork={workdir}," in str(
        refused.value
    )


def test_other_data_is_told_by_what_its_digests_are_of(workdir):
    write_identity(workdir, DATA, {"digest": "1" * 64, "context": 8, "start": None})
    with pytest.raises(ValueError) as refused:
        check_identity(workdir, DATA, {"digest": "2" * 64, "context": 16, "start": "3" * 64}, "other data")
    assert (
        "context: 8 there, 16 here; the digest of the text: 111111111111 there, 222222222222 here; "
        "the digest of the start: None there, 333333333333 here."
    ) in str(refused.value)
