"""A whole study whose losses come from a law: what was planted in the growths is found, in tables, ratios and plots."""

import dataclasses
import math
import re

import numpy as np
import pytest

from flm_jax.costs import param_count
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import TextFolder
from flm_jax.distillation import Teacher
from flm_jax.growth import Growth
from flm_jax.records import as_dict
from flm_jax.savings import run
from flm_jax.savings.catch_up import catch_ups
from flm_jax.savings.execute import How
from flm_jax.savings.page import page, write_page
from flm_jax.savings.results import Result
from flm_jax.savings.second_text import on_second_text
from flm_jax.savings.snapshots import Snapshots
from flm_jax.savings.study import STEPS, Study, best, check, missing
from flm_jax.savings.summary import spread, summarise
from flm_jax.savings.target import GrowthPlan, GrowthPoint, PlanGrid, Target, run_flops
from tests.small import shape

NOISE = 0.002
# How many times the FLOPs of a scratch run each growth is worth.
SAVED = {"when-1layer-0.5-zero": 1.0, "when-1layer-0.5-stack": 1.5, "other-twice": 0.7}


def study() -> Study:
    target = Target("planted", shape(layers=4, embed=64, mlp=172), DataConfig(context=128), 32)
    return Study(
        target,
        plans={
            "other-twice": GrowthPlan(
                {"layers": 1}, (GrowthPoint(0.3, Growth("zero"), {"layers": 2}), GrowthPoint(0.6, Growth("stack")))
            )
        },
        grids={
            "when": PlanGrid(
                {"1layer": {"layers": 1}}, [0.5], {"zero": Growth("zero"), "stack": Growth("stack")}, seeds=0
            )
        },
        optimizers={"adamw": {}, "slow": {"b2": 0.99}},
        rates=(1e-3, 2e-3, 4e-3),
        sizes={"small": {"layers": 2}, "thin": {"embed": 32, "mlp": 86}, "large": {"layers": 8}},
    )


def law(params, tokens, rate, optimizer, schedule):
    """A loss with its best rate at 8e-3, where one optimizer and one schedule are better."""
    base = 1.2 + 40 * params**-0.34 + 60 * tokens**-0.28 + 0.05 * math.log2(rate / 8e-3) ** 2
    return base + (0.02 if optimizer["b2"] == 0.99 else 0) + (0.01 if schedule == "wsd" else 0)


def result(arm, rng) -> Result:
    """What the law gives for an arm, with a measurement at each border of its stages."""
    recipe, context = arm.recipe, arm.recipe.data.context
    first, last = recipe.stages[0].optimizer, recipe.stages[-1].optimizer
    tokens = sum(stage.steps * stage.batch_size for stage in recipe.stages) * context
    params, flops = param_count(recipe.stages[-1].model), run_flops(recipe)
    schedule = "wsd" if last.schedule == "linear" and not last.decay_span else "linear"
    if arm.name in SAVED:
        # The loss of a scratch run of the target that had so many times the FLOPs of this one.
        alone = dataclasses.replace(recipe.stages[-1], growth=None)
        per_token = run_flops(dataclasses.replace(recipe, stages=(alone,)))
        per_token /= recipe.stages[-1].steps * recipe.stages[-1].batch_size * context
        loss = law(params, flops * SAVED[arm.name] / per_token, first.learning_rate, {"b2": first.b2}, "linear")
    else:
        loss = law(params, tokens, first.learning_rate, {"b2": first.b2}, schedule)
    runs = []
    for seed in arm.seeds:
        end = loss + NOISE * rng.standard_normal()
        evals = [{"stage": 0, "step": 9, "tokens": tokens // 2, "flops": flops // 2, "loss": loss + 0.3}]
        if recipe.stages[1:] and recipe.stages[1].growth is not None:
            evals.append({"stage": 1, "step": 0, "tokens": tokens // 2, "flops": flops // 2, "loss": loss + 0.5})
        evals.append({"stage": len(recipe.stages) - 1, "step": 9, "tokens": tokens, "flops": flops, "loss": end})
        runs.append({"seed": seed, "evals": evals, "seconds": 1.0})
    return Result(arm.name, arm.step, as_dict(recipe), tuple(runs), params, tokens, flops)


@pytest.fixture(scope="module")
def found():
    """All results of the study."""
    results, rng = {}, np.random.default_rng(0)
    for step in STEPS.values():
        while arms := missing(list(step(study(), results)), results):
            results |= {arm.name: result(arm, rng) for arm in arms}
    return results


def test_rates_are_searched_until_the_best_is_inside(found):
    rates = sorted(r.rate for name, r in found.items() if name.startswith("scratch-target-adamw-wsd") and "-20" in name)
    assert rates[-1] == pytest.approx(1.6e-2)  # one beyond the best
    assert best(study(), found).optimizer == "adamw"
    assert found["when-1layer-0.5-zero"].rate == pytest.approx(8e-3)


@pytest.fixture(scope="module")
def summary(found):
    """Computed once: each frontier ratio fits the frontier a hundred times."""
    return summarise(study(), found)


def test_planted_savings_are_found(found, summary):
    assert summary.noise == pytest.approx(NOISE, rel=0.5)
    rows = {row.name: row for row in summary.rows}
    assert rows.keys() == SAVED.keys()
    for name, saving in SAVED.items():
        ratio = rows[name].same_size
        assert ratio is not None
        assert ratio.value == pytest.approx(saving, rel=0.03)
        assert 0.99 * ratio.low <= saving <= 1.01 * ratio.high
        assert saving == 1 or not ratio.low <= 1 <= ratio.high
        assert (rows[name].gain > 0.01) == (saving > 1)
    scratch = next(r for name, r in found.items() if name.startswith("scratch-target-adamw-wsd-0.008-20"))
    for row in rows.values():
        assert row.equal_tokens == pytest.approx(scratch.flops / row.result.flops)
        assert 1.2 < row.equal_tokens < 2
    best = rows["when-1layer-0.5-stack"]
    assert best.frontier is not None
    assert best.frontier.value < best.same_size.value  # another size than the target is better for these FLOPs
    assert [rows[name].preserving for name in SAVED] == [True, False, False]
    assert len(found["when-1layer-0.5-stack"].runs) == 3


def test_a_second_text_chooses_nothing(found, tmp_path):
    """There another rate and another optimizer would be the best, and what growths save is less."""
    second = dataclasses.replace(study(), sizes={}, second_text=TextFolder(str(tmp_path)))
    (tmp_path / "a.txt").write_text("one")
    digest, rate = second.second_text.digest(), best(study(), found).rate(found)

    def on(result):
        flat = 3.0 + 0.1 * result.loss + (10 if result.rate == rate else 0)
        runs = ({**run, "second": {"text": digest, "loss": flat}} for run in result.runs)
        return dataclasses.replace(result, runs=tuple(runs))

    marked = {name: on(result) for name, result in found.items() if name != "other-twice"}
    seen = summarise(second, marked, on_second_text(second, marked))
    assert best(second, marked).optimizer == "adamw"
    assert [row.name for row in seen.rows] == ["when-1layer-0.5-zero", "when-1layer-0.5-stack"]
    assert all(row.result.loss > 13 for row in seen.rows)
    assert seen.rows[1].same_size.value == pytest.approx(SAVED["when-1layer-0.5-stack"], rel=0.03)
    text = "\n".join(page(summarise(second, marked), "the command", {}, seen))
    assert "## On a second text" in text
    assert "held-out documents of TextFolder" in text
    assert re.search(r"\| when-1layer-0.5-stack \| 13\.\d+ ± 0\.0000 \|", text)


def test_gaps_to_the_scratch_run_are_of_the_same_tokens_and_seed(found, summary):
    gaps = {one.name: one for one in catch_ups(summary)}
    assert gaps.keys() == SAVED.keys()
    one, grown = gaps["when-1layer-0.5-stack"], found["when-1layer-0.5-stack"]
    scratch = found[next(name for name in found if name.startswith("scratch-target-adamw-linear-0.008-20"))]
    assert one.start == param_count(shape(layers=1, embed=64, mlp=172))
    assert one.tokens[0] == 0
    ends = [run["evals"][-1]["loss"] for run in (*grown.runs, *scratch.runs)]
    assert len(ends) == 6
    assert one.gaps[-1] == pytest.approx((sum(ends[:3]) - sum(ends[3:])) / 3)
    first = [run["evals"][1]["loss"] for run in grown.runs]
    base = [run["evals"][0]["loss"] for run in scratch.runs]  # half of its tokens, where the growth is
    assert one.gaps[0] == pytest.approx((sum(first) - sum(base)) / 3)
    assert one.at(one.tokens[-1] / 2) == pytest.approx((one.gaps[0] + one.gaps[-1]) / 2)
    assert one.at(2 * one.tokens[-1]) is None
    plans = {"other-twice": dataclasses.replace(study().plans["other-twice"], rate=0.5)}
    other = dataclasses.replace(study(), plans=plans)
    assert [one.name for one in catch_ups(dataclasses.replace(summary, study=other))] == list(SAVED)[:2]


def test_a_plan_that_has_changed_is_run_again(found):
    changed = study()
    plans = {"other-twice": dataclasses.replace(changed.plans["other-twice"], rate=0.5)}
    changed = dataclasses.replace(changed, plans=plans)
    assert [arm.name for arm in missing(list(STEPS["plans"](changed, found)), found)] == ["other-twice"]
    # A teacher for more steps than its stage has is refused before anything is trained.
    taught = dataclasses.replace(changed.plans["other-twice"], teacher=Teacher(steps=10**6))
    with pytest.raises(ValueError, match=r"Study.plans\['other-twice'\]: .*Teacher.steps=1000000 is more than its"):
        list(STEPS["plans"](dataclasses.replace(changed, plans={"other-twice": taught}), found))
    # Rates of another target are not taken for this one's.
    other = dataclasses.replace(changed, target=dataclasses.replace(changed.target, batch_size=64))
    with pytest.raises(ValueError, match="is not known yet: run the step 'tune' first"):
        list(STEPS["plans"](other, found))
    # So is every growth, if the best rate is another one.
    moved = {name: r for name, r in found.items() if "-adamw-" not in name or "wsd" not in name}
    lower = {**moved, **{n: r for n, r in found.items() if n.startswith("scratch-target-adamw-wsd") and r.rate < 5e-3}}
    assert missing(list(STEPS["tune"](study(), lower)), lower)
    with pytest.raises(ValueError, match="The rate of adamw with wsd is not known yet: run the step 'tune' first"):
        list(STEPS["plans"](study(), lower))


def test_the_page_shows_every_arm_and_the_plots_are_drawn(summary, tmp_path):
    write_page(summary, tmp_path / "page.md", "the command")
    text = (tmp_path / "page.md").read_text()
    assert "| when-1layer-0.5-zero | yes |" in text
    assert "| other-twice | no |" in text
    assert text.count("0.008 (best)") == 4
    assert "### other" in text
    for name in ("rates", "scratch", "savings", "curves", "catch_up"):
        assert f"page_{name}.png" in text
        assert (tmp_path / f"page_{name}.png").stat().st_size > 10_000
    alone = "\n".join(page(dataclasses.replace(summary, noise=0.0), "the command", {}))
    growths = [one[one.index("## Growths") :] for one in (text, alone)]
    assert [re.search(r"\| \d\.\d\d \(\d", one) is None for one in growths] == [False, True]
    assert "No arm ran with several seeds" in alone
    assert "| frontier |" in text and "Frontier: FLOPs" in text
    bare = "\n".join(page(dataclasses.replace(summary, frontier=None), "the command", {"scratch": "scratch.png"}))
    assert "rontier" not in bare
    for one in (text, alone, bare):
        tables = re.findall(r"(?:^\|.*\n?)+", one, re.MULTILINE)
        assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in tables)
    empty = "\n".join(page(summarise(study(), {}), "the command", {}))
    assert "# Does growing pay: planted" in empty
    assert "## Growths" not in empty
    assert "The best rate is not known yet for adamw with wsd, adamw" in empty
    assert (
        "**The study has not come to its end.** Not measured yet, or with fewer seeds than it asks for: 12 arms"
        in empty
    )
    assert "has not come to its end" not in text
    some = {name: result for name, result in summary.results.items() if name != "other-twice"}
    assert "for: 1 arm of the step 'plans'." in "\n".join(page(summarise(study(), some), "the command", {}))


def test_a_study_that_cannot_be_is_refused():
    given = study()
    cases = [
        (dict(rates=(1e-3,)), "Study.rates must be two or more"),
        (dict(budgets=(5.0, 10.0)), r"Study.budgets must hold the target's own, tokens_per_param=20"),
        (
            dict(
                schedules=("linear",),
                plans={"x": dataclasses.replace(given.plans["other-twice"], schedule="wsd")},
            ),
            r"has the schedule 'wsd', for which no rate is tuned",
        ),
        (
            dict(plans={"x": dataclasses.replace(given.plans["other-twice"], optimizer="lion")}),
            r"Study.plans\['x'\] names the optimizer 'lion'; Study.optimizers has adamw, slow",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(given, **changes)


def test_a_run_that_cannot_be_is_named_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train_all", lambda *given: pytest.fail("it trains"))
    given = study()
    check(given)
    ramp = GrowthPlan({"layers": 1}, (GrowthPoint(0.7, Growth("mask", ramp_steps=10**4)),))
    cases = [
        (dict(plans={"late": ramp}), r"Study.plans\['late'\]: Stage 'stage1': its masks ramp over 10,000 steps"),
        (dict(sizes={"odd": {"kv_heads": 3}}), "A scratch run of 'odd' with 5 tokens per parameter: .*kv_heads=3"),
        (dict(budgets=(0.01, 20.0)), "A scratch run of 'target' with .* tokens per parameter: .*Warm-up"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            run.run_steps(dataclasses.replace(given, **changes), ["tune"], tmp_path, How(Snapshots(tmp_path)))
    assert not any(tmp_path.iterdir())


def test_losses_are_shown_with_their_spread():
    assert spread([2.0]) == "2.0000"
    assert spread([2.0, 2.2]) == "2.1000 ± 0.1414"
    assert spread([math.inf]) == "diverged"
