"""Points of a sweep: their bindings, names, draws and rungs, and what a sweep refuses."""

import math

import gin
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_jax.sweeps import Halving, Range, Sweep, space
from flm_jax.sweeps.halving import survivors

RATE, SEED = "OptimizerConfig.learning_rate", "Recipe.seed"


def names(sweep, rung=0):
    return [point.name for point in space.points(sweep, space.candidates(sweep), rung)]


def test_a_grid_has_every_combination_of_points_axes_and_seeds():
    sweep = Sweep(
        points={"a": {"Growth.method": "zero"}, "b": {"Growth.method": "mask", "Growth.ramp_steps": 5}},
        axes={RATE: [1e-3, 2e-3], "Stage.steps": [4, 8]},
        seeds=[0, 7],
    )
    found = space.points(sweep, space.candidates(sweep))
    assert len(found) == len({point.name for point in found}) == 16
    assert found[0].name == "a,learning_rate=0.001,steps=4,seed=0"
    assert found[-1].statements == [
        "Growth.method = 'mask'",
        "Growth.ramp_steps = 5",
        f"{RATE} = 0.002",
        "Stage.steps = 8",
        f"{SEED} = 7",
    ]
    assert {point.candidate.name for point in found if point.seed == 7} == {p.candidate.name for p in found}


def test_names_say_what_differs_and_tell_bindings_of_one_parameter_apart():
    short = space.short_names(["a/Stage.steps", "b/Stage.steps", "Stage.name", SEED, "DataConfig.seed", "vocabulary"])
    assert list(short.values()) == ["a-steps", "b-steps", "name", "Recipe.seed", "DataConfig.seed", "vocabulary"]
    assert space.short_names([RATE, SEED]) == {RATE: "learning_rate", SEED: "seed"}
    sweep = Sweep(axes={"Stage.growth": ["@zero/Growth()", None], "Growth.methods": [{"layers": "mask"}]})
    assert names(sweep) == ["growth=zero-Growth,methods=layers-mask", "growth=None,methods=layers-mask"]


def test_a_sign_stays_in_a_name_and_what_no_directory_should_have_does_not():
    assert names(Sweep(axes={"MeshConfig.data": [-1, 1]})) == ["data=-1", "data=1"]
    assert space.shown("../a b[*]\\") == "a-b"
    assert space.shown("..") == "empty"


def test_a_long_name_is_cut_and_stays_its_own():
    axes = {f"Name{i}.parameter_of_some_length": [0.125] for i in range(8)}
    many = names(Sweep(axes={**axes, "Name0.parameter_of_some_length": [0.125, 0.25]}))
    assert len(set(many)) == 2
    assert all(len(name) == space.LONGEST for name in many)
    wide = space.name_of({"path": "é" * 120})
    assert space.LONGEST - 2 < len(wide.encode()) <= space.LONGEST


def test_what_is_added_to_a_sweep_keeps_the_names_of_what_is_done():
    def made(**more):
        return set(names(Sweep(**{"axes": {RATE: [1, 2]}, "seeds": [0], **more})))

    done = made()
    assert done < made(axes={RATE: [0.5, 1, 2]}) and done < made(seeds=[0, 1])
    assert done.isdisjoint(made(seeds=[])), "docs/sweeps.md says so"
    assert done.isdisjoint(made(axes={RATE: [1, 2], "Stage.steps": [3]}))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text("a'\"\\é ,"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
        max_leaves=6,
    )
)
def test_what_is_written_is_what_gin_reads(value):
    gin.clear_config()
    gin.parse_config(f"value = {space.literal(value, 'x')}")
    assert gin.query_parameter("%value") == value
    gin.clear_config()


def test_references_stand_without_quotes_and_objects_are_refused():
    assert space.literal(["@a/Stage()", "%size", "text"], "x") == "[@a/Stage(), %size, 'text']"
    with pytest.raises(ValueError, match=r"gives Stage\.growth a Range itself; write the reference in quotes"):
        space.literal(Range(1, 2), "Stage.growth")


def test_draws_lie_in_their_range_and_more_of_them_keep_the_earlier_ones():
    axes = {
        RATE: Range(1e-4, 1e-2),
        "Stage.steps": Range(3, 9, "linear", whole=True),
        "Growth.method": ["zero", "mask"],
    }
    few, many = ([c.bindings for c in space.candidates(Sweep(axes=axes, draws=n))] for n in (5, 200))
    assert many[:5] == few
    assert few != [c.bindings for c in space.candidates(Sweep(axes=axes, draws=5, draw_seed=1))]
    rates = [bindings[RATE] for bindings in many]
    assert 1e-4 <= min(rates) < max(rates) <= 1e-2
    # On a logarithmic scale half of them are below the geometric mean.
    assert 70 < sum(rate < 1e-3 for rate in rates) < 130
    assert {bindings["Stage.steps"] for bindings in many} == set(range(3, 10))
    assert {bindings["Growth.method"] for bindings in many} == {"zero", "mask"}


def test_rungs_have_their_bindings_and_their_names():
    sweep = Sweep(axes={RATE: [1e-3, 2e-3]}, halving=Halving([{"Stage.steps": 5}, {"Stage.steps": 50}]))
    assert space.rungs(sweep) == 2
    assert names(sweep, 0) == ["steps=5,learning_rate=0.001", "steps=5,learning_rate=0.002"]
    assert space.points(sweep, space.candidates(sweep)[1:], 1)[0].bindings == {RATE: 2e-3, "Stage.steps": 50}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sweep(), "varies nothing"),
        (lambda: Sweep(axes={RATE: []}), r"axes\['OptimizerConfig.learning_rate'\] has no values"),
        (lambda: Sweep(axes={RATE: Range(1e-4, 1e-2)}), "is a Range, which has no end of values: set Sweep.draws"),
        (lambda: Sweep(points={"a": {}}, draws=3), "no axes to draw from"),
        (lambda: Sweep(axes={SEED: [1]}, seeds=[2]), "Recipe.seed is set by Sweep.axes and by Sweep.seeds"),
        (lambda: Sweep(points={"a": {RATE: 1.0}}, axes={RATE: [1.0]}), r"set by Sweep.points\['a'\] and by Sweep.axes"),
        (lambda: Range(2, 1), "must be less than"),
        (lambda: Range(0, 1), "has no logarithm"),
        (lambda: Range(0.2, 0.8, "linear", whole=True), "no integer lies between Range.low=0.2 and Range.high=0.8"),
        (lambda: Halving([{"Stage.steps": 5}]), "two rungs or more"),
        (lambda: Halving([{"Stage.steps": 5}, {"Stage.stops": 5}]), "the same names in every rung"),
        (lambda: Sweep(axes={RATE: 3}), "use a Range or a list"),
        (lambda: space.candidates(Sweep(axes={RATE: [1, 2]}, draws=3)), "no more than about 2 combinations"),
        (lambda: space.candidates(Sweep(axes={RATE: [1, 2]}, draws=10**9)), "no more than about 2 combinations"),
        (
            lambda: space.candidates(Sweep(axes={RATE: [1e-3, 0.001]})),
            "one work directory, points/learning_rate=0.001: OptimizerConfig.learning_rate = 0.001, twice",
        ),
        (
            lambda: space.candidates(Sweep(points={"a b": {RATE: 1}, "a-b": {RATE: 2}})),
            "points/a-b: OptimizerConfig.learning_rate = 1; and OptimizerConfig.learning_rate = 2",
        ),
        (lambda: names(Sweep(axes={RATE: [1]}, seeds=[3, 3])), "one work directory, points/learning_rate=1,seed=3"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_best_share_of_a_rung_goes_on_and_what_failed_never_does():
    scores = {"a": 3.0, "b": 1.0, "c": None, "d": 2.0, "e": math.nan}
    assert survivors(scores, 0.5, "min") == ["b", "d", "a"]
    assert survivors(scores, 0.2, "max") == ["a"]
    assert survivors(scores, 0.01, "min") == ["b"]
    assert survivors({"a": None}, 0.5, "min") == []
    assert 0.07 * 100 > 7  # in binary
    assert len(survivors({str(n): float(n) for n in range(100)}, 0.07, "min")) == 7
