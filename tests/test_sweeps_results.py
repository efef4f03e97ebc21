"""What a sweep leaves: the measure read from reports, the tables, the order, the pictures, the table while it runs."""

import csv
import io
import json

import pytest

from flm_jax.sweeps import Halving, Range, Sweep, picture, results, space, table
from flm_jax.sweeps.execute import Places
from flm_jax.sweeps.results import DONE, FAILED, RUNNING, Outcome

RATE = "OptimizerConfig.learning_rate"
LAST = {"eval_loss": 2.5, "total_tokens": 1000, "total_flops": 2e9, "params": 460_000}
REPORT = {"stages": [{"eval_loss": 9.0}, LAST], "bytes_per_token": 3.0, "evals": [{"loss": 1.0}], "sample": "text"}


def outcomes(sweep, *values, rung=0):
    """The runs of a sweep with these values; those of None failed."""
    points = space.points(sweep, space.candidates(sweep), rung)
    return [
        Outcome(p, FAILED, seconds=3.0, reason="it diverged")
        if v is None
        else Outcome(p, DONE, v, 2.0, 1000, 2e9, 460_000)
        for p, v in zip(points, values, strict=True)
    ]


def test_a_measure_is_a_path_into_the_report_and_a_wrong_one_gets_the_nearest():
    assert results.measured(REPORT, "stages.-1.eval_loss") == 2.5
    assert results.measured(REPORT, "bytes_per_token") == 3.0
    with pytest.raises(ValueError, match=r"no such number; did you mean 'stages.-1.eval_loss'\?"):
        results.measured(REPORT, "stages.-1.eval_los")
    for wrong in ("sample", "stages", "stages.7.eval_loss", "stages.x", "zzz"):
        with pytest.raises(ValueError, match="no such number"):
            results.measured(REPORT, wrong)


@pytest.mark.parametrize(
    ("text", "state"),
    [(json.dumps(REPORT), DONE), (json.dumps({"stages": []}), FAILED), ("{", FAILED), ('{"stages": 3}', FAILED)],
)
def test_a_report_that_cannot_be_read_is_a_failure_with_a_reason(tmp_path, text, state):
    (tmp_path / "report.json").write_text(text)
    point = space.points(Sweep(seeds=[1]), space.candidates(Sweep(seeds=[1])))[0]
    found = results.read_outcome(point, tmp_path, "stages.-1.eval_loss", 1.0)
    assert found.state == state
    assert (found.value == 2.5) == (state == DONE)
    assert bool(found.reason) == (state == FAILED)


def test_a_loss_that_is_no_number_is_a_failure(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({"stages": [{**LAST, "eval_loss": float("nan")}]}))
    point = space.points(Sweep(seeds=[1]), space.candidates(Sweep(seeds=[1])))[0]
    assert results.read_outcome(point, tmp_path, "stages.-1.eval_loss", 1.0).reason == "stages.-1.eval_loss is nan"


def test_candidates_are_ranked_by_their_mean_and_those_with_a_failed_seed_come_last():
    sweep = Sweep(axes={RATE: [1, 2, 3]}, seeds=[0, 1])
    rows = results.ranked(outcomes(sweep, 4.0, 2.0, 1.0, None, 2.0, 2.5), "min")
    assert [(row.point.candidate.values["learning_rate"], row.mean) for row in rows] == [(3, 2.25), (1, 3.0), (2, None)]
    assert results.best(rows).values == [2.0, 2.5]
    assert results.best(results.ranked(outcomes(sweep, *[None] * 6), "min")) is None
    assert results.best(results.ranked(outcomes(sweep, 4.0, 2.0, 1.0, None, 2.0, 2.5), "max")).mean == 3.0


def test_the_best_is_one_of_the_last_rung():
    sweep = Sweep(axes={RATE: [1, 2]}, halving=Halving([{"Stage.steps": 5}, {"Stage.steps": 50}]))
    rows = results.ranked([*outcomes(sweep, 1.0, 1.5), *outcomes(sweep, None, 1.2, rung=1)], "min")
    assert results.best(rows).point.name == "steps=50,learning_rate=2"


def test_the_tables_have_every_run_and_every_failure():
    sweep = Sweep(points={"a": {}, "b": {}}, axes={RATE: [1e-3]}, seeds=[0, 1])
    found = outcomes(sweep, 2.0, 2.5, 1.0, None)
    rows = list(csv.DictReader(io.StringIO(results.csv_text(sweep, found))))
    assert [row["stages.-1.eval_loss"] for row in rows] == ["2.0", "2.5", "1.0", ""]
    assert rows[3]["point"] == "b" and rows[3]["seed"] == "1" and rows[3]["reason"] == "it diverged"
    text = results.markdown(sweep, found, ["point.png"], "the command")
    assert "Best: `a,learning_rate=0.001`, stages.-1.eval_loss 2.2500 (mean of 2 seeds)." in text
    assert "| a | 0.001 | 2.2500 | 2.0000 to 2.5000 | 2 | 460 k | 1 k | 2e+09 | 2.0 |" in text
    assert "- `b,learning_rate=0.001,seed=1`: it diverged" in text
    assert text.index("| a |") < text.index("| b |")
    assert "3 of 4 runs done, 6e+09 training FLOPs in all." in text


@pytest.mark.parametrize(
    ("sweep", "axis", "lines"),
    [
        (Sweep(axes={RATE: [1e-3, 1e-2], "Growth.method": ["zero", "mask"]}), "learning_rate", 2),
        (Sweep(axes={RATE: [1e-3, 1e-2], "Growth.method": ["zero", "mask"]}), "method", 2),
        (Sweep(points={"a": {}, "b": {}}, axes={RATE: [1, 2], "Stage.steps": [1, 2]}), "point", 1),
        (Sweep(axes={RATE: Range(1, 100), "Stage.steps": Range(1, 90)}, draws=15), "learning_rate", 1),
        (Sweep(axes={RATE: [1, 2]}, halving=Halving([{"Stage.steps": 5}, {"Stage.steps": 9}])), "learning_rate", 1),
    ],
)
def test_a_picture_per_swept_value(sweep, axis, lines):
    assert axis in picture.axes_of(sweep)
    count = len(space.points(sweep, space.candidates(sweep)))
    found = outcomes(sweep, *(None if i == 0 and count > 4 else 1.0 + i for i in range(count)))
    rows = [row for row in results.ranked(found, "min") if row.mean is not None]
    assert len(picture._groups(sweep, rows, axis)) == lines
    assert picture.draw(sweep, found, axis).startswith(b"\x89PNG")


def test_an_axis_of_one_value_has_no_picture():
    assert picture.axes_of(Sweep(axes={RATE: [1], "Stage.steps": [1, 2]}, points={"a": {}})) == ["steps"]
    assert picture._best_at([1, 2, 1], [3.0, 4.0, 2.0], "min") == [2, 1]
    assert picture._best_at([1, 2, 1], [3.0, 4.0, 2.0], "max") == [0, 1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Fake:
    def __init__(self, outcomes):
        self.outcomes = {outcome.point.name: outcome for outcome in outcomes}


def test_the_table_is_drawn_over_itself_in_a_terminal_and_is_lines_elsewhere(tmp_path):
    sweep = Sweep(axes={RATE: [1, 2, 3]})
    found = outcomes(sweep, 2.0, None, 1.0)
    running = Outcome(found[2].point, RUNNING)
    where = tmp_path / "points" / running.point.name
    where.mkdir(parents=True)
    lines = [{"kind": "train", "step": 7, "loss": 3.25}, {"kind": "save", "step": 7}]
    (where / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "tra')
    for out, times in ((Terminal(), 2), (io.StringIO(), 1)):
        shows = table.Table(Places(tmp_path), {running.point.name: 50}, out)
        shows(Fake([*found[:2], running]))
        shows(Fake(found))
        text = out.getvalue()
        assert "learning_rate=3  running   step 7 of 50, loss 3.2500" in text
        assert "learning_rate=2  failed    it diverged" in text
        assert text.count("learning_rate=1  done      2.0000  2 s") == times
        assert ("\x1b[4F" in text) == (times == 2)
        assert ("3 runs: 1 running, 1 done, 1 failed" in text) == (times == 2)
