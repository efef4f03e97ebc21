"""Comparing runs: two small work directories whose numbers are computed by hand."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flm_jax.cli import runs as programs
from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import TextFolder
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.growth import Growth
from flm_jax.recipe import Recipe, Stage
from flm_jax.records import as_dict
from flm_jax.run_comparison import compare_runs, page, read_run_curves, write_page
from flm_jax.run_comparison.curves import Point, flops_to, loss_at

ROOT = Path(__file__).resolve().parent.parent
# 400 weights in products with weights and 64 FLOPs of attention per token: (2 * 400 + 64) * 3 = 2,592 to train.
SMALL = ModelConfig(embed=8, layers=1, heads=1, head_dim=4, mlp=6, vocab=16)
# 2,432 weights and 256 FLOPs: 15,360.
LARGE = ModelConfig(embed=16, layers=2, heads=2, head_dim=4, mlp=12, vocab=16)
# 8 tokens per step.
DATA = DataConfig(TextFolder("texts"), Bytes(), context=4)


def write_run(folder, stages, heldout, seed=0, digest="a"):
    """A work directory with held-out losses (stage, step, loss), a second apart; a pause of 99 s follows the first."""
    folder.mkdir()
    recipe = Recipe(stages=stages, data=DATA, seed=seed)
    (folder / "recipe.json").write_text(json.dumps(as_dict(recipe)))
    data = {"read": "store", "context": 4, "seed": 0, "digest": digest, "vocabulary": "v"}
    (folder / "data.json").write_text(json.dumps(data))
    start = {"kind": "start", "stage": stages[0].name, "stage_step": 0, "devices": 4, "device": "TPU v9"}
    lines = [start | {"time": 50.0}]
    for number, (stage, step, loss) in enumerate(heldout):
        about = {"stage": stage, "stage_step": step, "time": 51.0 + number + (100 if number else 0)}
        lines.append({"kind": "heldout", **about, "loss": loss, "bits_per_byte": loss / 2})
        lines.append({"kind": "train", **about, "loss": loss + 1})
        lines += [start | {"stage_step": step, "time": 151.0}] if number == 0 else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two runs: a large model from its start, and one that is grown to it."""
    base = tmp_path_factory.mktemp("runs")
    large = Stage("large", LARGE, 20, 2)
    write_run(
        base / "scratch", (large,), [("large", 0, 3.0), ("large", 5, 2.2), ("large", 10, 1.8), ("large", 20, 1.4)]
    )
    grown = (Stage("small", SMALL, 10, 2), Stage("large", LARGE, 5, 2, growth=Growth("zero")))
    losses = [("small", 0, 3.0), ("small", 5, 2.5), ("small", 10, 2.0), ("large", 0, 2.0), ("large", 5, 1.5)]
    write_run(base / "grown", grown, losses)
    return base


def test_flops_and_tokens_add_up_over_stages_each_at_its_own_cost(work):
    run = read_run_curves(work / "grown")
    assert [stage.cost.flops_per_token for stage in run.stages] == [2592, 15_360]
    assert [point.flops for point in run.heldout] == [0, 103_680, 207_360, 207_360, 821_760]
    assert [point.tokens for point in run.heldout] == [0, 40, 80, 80, 120]
    assert [point.step for point in run.heldout] == [0, 5, 10, 10, 15]
    assert [point.loss for point in run.train] == [4.0, 3.5, 3.0, 3.0, 2.5]
    ((stage, point),) = run.growths()
    assert (stage.name, stage.grown, point.step) == ("large", "zero", 10)
    assert (run.device, run.notes, run.planned) == ("4 x TPU v9", (), 15)


def test_wall_clock_leaves_out_the_pause_between_two_starts(work):
    assert [point.seconds for point in read_run_curves(work / "grown").heldout] == [1, 2, 3, 4, 5]


def test_loss_at_equal_flops_is_interpolated_and_only_where_all_were_measured(work):
    found = compare_runs([str(work / "scratch"), str(work / "grown")])
    # Parts of 821,760 before scratch's first measurement at 614,400 have no loss: one is left. 207,360 of 614,400 FLOPs
    # after that one, scratch has lost 0.3375 of 0.4.
    ((flops, losses),) = found.at_equal_flops
    assert flops == 821_760 and losses == pytest.approx((2.065, 1.5))
    assert not found.notes


def test_savings_are_flops_to_the_same_loss(work):
    half, whole = compare_runs([str(work / "scratch"), str(work / "grown")]).savings
    # The lowest loss of both is 1.5: scratch reaches it at 3/4 of its last 1,228,800 FLOPs.
    assert (whole.run, whole.loss, whole.first, whole.own) == ("grown", 1.5, pytest.approx(2_150_400), 821_760)
    assert whole.ratio == pytest.approx(821_760 / 2_150_400)
    # With half of these FLOPs scratch has 1.9, and grown has it a fifth of its second stage after the growth.
    assert (half.loss, half.first, half.own) == pytest.approx((1.9, 1_075_200, 330_240))
    (other,) = [s for s in compare_runs([str(work / "grown"), str(work / "scratch")]).savings if s.loss == 1.5]
    assert other.ratio == pytest.approx(1 / whole.ratio)


def test_curves_that_do_not_overlap_give_no_saving_and_a_sentence(work, tmp_path):
    write_run(tmp_path / "bad", (Stage("large", LARGE, 5, 2),), [("large", 0, 3.0), ("large", 5, 2.9)])
    found = compare_runs([str(work / "scratch"), str(tmp_path / "bad")])
    assert not found.savings
    assert any(
        "bad: its held-out losses (2.9000 to 2.9000) and those of scratch (2.2000 to 1.4000) do not overlap" in note
        for note in found.notes
    )


def test_losses_on_other_text_are_not_compared(work, tmp_path):
    write_run(tmp_path / "other", (Stage("large", LARGE, 5, 2),), [("large", 1, 2.0), ("large", 5, 1.0)], digest="b")
    found = compare_runs([str(work / "scratch"), str(tmp_path / "other")])
    assert not found.savings and not found.at_equal_flops
    assert "other: its held-out text is not that of scratch (they differ in digest)" in found.notes[0]


def test_settings_that_differ_are_named_by_stage(work, tmp_path):
    write_run(tmp_path / "b", (Stage("large", LARGE, 30, 2, accumulate=2),), [("large", 1, 2.0)], seed=3)
    found = compare_runs([str(work / "scratch"), str(tmp_path / "b")]).differences
    assert found == {"stages.large.steps": (20, 30), "stages.large.accumulate": (1, 2), "seed": (0, 3)}
    # A stage that one run lacks is one line.
    found = compare_runs([str(work / "scratch"), str(work / "grown")]).differences
    assert found["stages.small"] == ("-", "1 layer x 8 wide, 1 head of 4, MLP 6, vocabulary 16")
    assert "stages.small.steps" not in found and found["stages.large.growth.method"] == ("-", "zero")


def test_the_growing_stage_has_no_loss_between_its_two_measurements_at_one_place():
    points = [Point("a", 0, 0, 0, flops, None, loss) for flops, loss in ((0, 9), (10, 4), (20, 3), (20, 3.5), (40, 2))]
    assert [loss_at(points, flops) for flops in (5, 10, 15, 20, 30, 40, 41)] == [None, 4, 3.5, 3.5, 2.75, 2, None]
    # The loss after the growth is no new loss: from 3 at 20 to 2 at 40.
    assert [flops_to(points, loss) for loss in (5, 4, 3.5, 2.5, 2, 1)] == [None, 10, 15, 30, 40, None]


@pytest.mark.parametrize("left", ["report", "checkpoint"])
def test_runs_without_a_log_are_read_from_what_there_is(work, tmp_path, left):
    write_run(tmp_path / "old", (Stage("large", LARGE, 5, 2),), [("large", 0, 3.0)])
    (tmp_path / "old/metrics.jsonl").unlink()
    if left == "report":
        evals = [{"stage": "large", "step": step, "loss": 2.0, "bits_per_byte": 1.0} for step in (0, 5)]
        (tmp_path / "old/report.json").write_text(json.dumps({"evals": evals}))
        run = read_run_curves(tmp_path / "old")
        assert [point.flops for point in run.heldout] == [0, 5 * 122_880]
        assert "It has no metrics.jsonl: held-out losses are those of report.json" in run.notes[0]
    else:
        with pytest.raises(ValueError, match="old has neither metrics.jsonl nor report.json, and no checkpoint"):
            read_run_curves(tmp_path / "old")
        run = read_run_curves(ROOT / "tests/golden/run")
        assert "those of checkpoint 1_second/" in run.notes[0] and len(run.heldout) == 3
    assert all(point.seconds is None for point in run.heldout)


def test_what_is_no_run_is_refused_in_a_sentence(work, tmp_path):
    with pytest.raises(ValueError, match="nowhere is no directory; give the work directory of a run"):
        compare_runs([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match=r"holds no recipe.json, so it is no work directory of train.py"):
        compare_runs([str(tmp_path)])
    with pytest.raises(ValueError, match="named twice; name each run once"):
        compare_runs([str(work / "grown"), str(work / "grown") + "/"])
    (tmp_path / "link").symlink_to(work / "grown")
    with pytest.raises(ValueError, match="link is named twice; name each run once"):
        compare_runs([str(work / "grown"), str(tmp_path / "link")])
    write_run(tmp_path / "new", (Stage("large", LARGE, 5, 2),), [])
    with pytest.raises(ValueError, match="new holds no losses yet"):
        compare_runs([str(tmp_path / "new")])
    write_run(tmp_path / "strange", (Stage("large", LARGE, 5, 2),), [("larger", 0, 1.0)])
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, names the stage 'larger', and the recipe has large"):
        compare_runs([str(tmp_path / "strange")])


def test_the_program_prints_and_writes_tables_a_picture_a_page_and_json(work, tmp_path, capsys):
    asked = [str(work / "scratch"), str(work / "grown")]
    programs.run_compare(asked, str(tmp_path / "out"), str(tmp_path / "found.json"))
    printed = capsys.readouterr().out
    assert "| grown | 1.5000 | 2.15e+06 | 8.22e+05 | 0.382 | 61.8% |" in printed
    assert "| 8.22e+05 | 2.0650 | 1.5000 |" in printed
    assert (
        "| grown | small -> large (zero) | 552 -> 2.768 k | 15 | 120 | 8.22e+05 | 5 s | 4 x TPU v9 | 1.5000 |"
        in printed
    )
    assert "![held-out loss](compare.png)" in (tmp_path / "out/compare.md").read_text()
    assert (tmp_path / "out/compare.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["flops_to_the_same_loss"][1]["saving"] == pytest.approx(1 - 821_760 / 2_150_400)
    assert [run["name"] for run in found["runs"]] == ["scratch", "grown"]
    assert json.loads((tmp_path / "out/compare.json").read_text()) == found


class Outline(HTMLParser):
    """What a page loads, and its scripts."""

    def __init__(self):
        super().__init__()
        self.loads, self.scripts, self._inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        self._inside = tag == "script"

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        self.scripts += [data] if self._inside else []


def test_the_page_is_one_file_with_every_loss_and_no_name_can_break_it(work, tmp_path):
    odd = read_run_curves(work / "grown", "</script><b>")
    write_page([odd], tmp_path / "page.html")
    outline = Outline()
    outline.feed((tmp_path / "page.html").read_text())
    (script,) = outline.scripts
    assert not outline.loads and "http" not in script.replace("http://www.w3.org/2000/svg", "")
    (run,) = json.loads(re.search(r"const RUNS = (.*);", script)[1])
    assert run["name"] == "</script><b>"
    assert [point["loss"] for point in run["heldout"]] == [3.0, 2.5, 2.0, 2.0, 1.5]
    assert [(growth["method"], growth["flops"]) for growth in run["growths"]] == [("zero", 207_360)]


def test_long_curves_are_averaged_within_stages():
    points = [Point("ab"[n >= 7], n, n, n, n, None, float(n)) for n in range(10)]
    thin = page.thinned(points, 4)
    assert [(point.step, point.loss) for point in thin] == [(2, 1.0), (5, 4.0), (6, 6.0), (9, 8.0)]
    assert page.thinned(points, 10) == points
    assert all(a.step < b.step for a, b in itertools.pairwise(thin))
