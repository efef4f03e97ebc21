"""Means, ratios, wins and intervals by category; the tables as text."""

import math

import numpy as np
import pytest

from flm_jax.chat.conversation import Message
from flm_jax.evaluation.compare import resampled_sums, row, tables
from flm_jax.evaluation.judges import ACCURACY, SCORES, WINS, Judgement
from flm_jax.evaluation.questions import Question
from flm_jax.evaluation.table import WIDTH, as_markdown, as_text, fitted, shown_width


def judged(measure, own, reference=None, category="c", sub="", **fields):
    question = Question("1", category, (Message("user", "?"),), subcategory=sub)
    return Judgement(question, measure, own, reference, **fields)


def test_sums_of_samples_are_those_of_the_binomial_distribution():
    """Of zeros and ones, the sum of a sample of n is binomial, whose quantiles are known."""
    n, p = 50, 0.3
    values = (np.arange(n) < p * n).astype(float)
    sums = resampled_sums(values[:, None], 0, 20_000)[:, 0]
    mass = np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
    assert np.abs(np.bincount(sums.astype(int), minlength=n + 1) / 20_000 - mass).max() < 0.01
    low, high = (np.searchsorted(np.cumsum(mass), q) for q in (0.025, 0.975))
    found = row("c", [judged(ACCURACY, v) for v in values], resamples=20_000)
    assert found.mean == pytest.approx(p) and found.interval == pytest.approx((low / n, high / n), abs=0.021)


def test_samples_are_paired_and_seeded(monkeypatch):
    values = np.random.default_rng(0).random((40, 1)) * [1, 2]
    sums = resampled_sums(values, 1, 500)
    np.testing.assert_allclose(sums[:, 1], 2 * sums[:, 0])
    np.testing.assert_array_equal(sums, resampled_sums(values, 1, 500))
    assert np.abs(sums - resampled_sums(values, 2, 500)).max() > 0
    monkeypatch.setattr("flm_jax.evaluation.compare._AT_ONCE", 100)  # in parts, of which one is shorter
    assert resampled_sums(values, 1, 501).shape == (501, 2)


def test_a_system_relative_to_another_on_the_questions_of_both():
    both = [judged(SCORES, own, other) for own, other in ((8, 8), (3, 6), (9, 7), (4, 4))]
    found = row("c", [*both, judged(SCORES, 10, None, unjudged="reference: x"), judged(SCORES, None, 9, unjudged="y")])
    assert (found.n, found.pairs, found.unjudged) == (5, 4, 2)
    assert found.mean == pytest.approx(34 / 5) and found.reference == pytest.approx(25 / 4)
    assert found.relative == pytest.approx(24 / 25)
    assert found.relative_interval[0] < 24 / 25 < found.relative_interval[1]
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)


def test_a_system_that_is_always_half_as_good_has_no_uncertainty_in_that():
    found = row("c", [judged(SCORES, x, 2 * x) for x in (1.0, 2.0, 3.0)])
    assert found.relative_interval == pytest.approx((0.5, 0.5)) and found.interval != pytest.approx((2, 2))


def test_wins_and_what_has_no_ratio():
    found = row("c", [judged(WINS, x, disagreed=x == 0.5) for x in (1, 1, 0.5, 0)] + [judged(WINS, None, unjudged="x")])
    assert (found.n, found.wins, found.ties, found.losses, found.disagreed, found.unjudged) == (4, 2, 1, 1, 1, 1)
    assert found.mean == pytest.approx(0.625) and found.relative is None
    nothing = row("c", [judged(ACCURACY, 1.0, 0.0), judged(ACCURACY, 0.0, 0.0)])
    assert nothing.relative is None and nothing.reference == 0
    rare = row("c", [judged(ACCURACY, 1.0, 0.0), judged(ACCURACY, 1.0, 1.0)])
    assert np.isfinite(rare.relative_interval).all()  # samples in which the other has nothing are left out
    none = row("c", [judged(ACCURACY, None, unjudged="x")])
    assert (none.n, none.mean, none.interval, none.unjudged) == (0, None, None, 1)


MANY = [
    judged(SCORES, 1 + i % 10, 1 + i % 9, category, sub, unjudged="x" if i % 7 == 0 else "")
    for category, sub in (("专业能力", "历史"), ("mathematics and logical reasoning, all of it", ""), ("a|b", ""))
    for i in range(120)
] + [judged(ACCURACY, float(i % 2), 1.0, "专业能力", per_byte=1.0) for i in range(3)]


def test_a_table_for_each_measure_by_category_in_their_order():
    accuracy, scores = tables(MANY, resamples=100)
    assert [r.category for r in scores.rows] == ["专业能力", "mathematics and logical reasoning, all of it", "a|b"]
    assert (accuracy.measure, accuracy.overall.n, scores.overall.n, scores.overall.per_byte) == (ACCURACY, 3, 360, None)
    assert [r.category for r in scores.parts] == ["专业能力: 历史"]
    assert scores.record()["overall"]["n"] == 360 and len(scores.record()["categories"]) == 3


def test_tables_fit_into_a_terminal_and_their_columns_stand_under_each_other():
    for table in tables(MANY, resamples=100):
        lines = as_text(table).splitlines()[1:]
        lines = [line for line in lines if "per byte" not in line]
        assert max(map(shown_width, lines)) <= WIDTH
        assert len({shown_width(line) for line in lines}) == 1
    text = as_text(tables(MANY, resamples=100)[1])
    assert "mathematics and" in text and "…" in text and text.splitlines()[-2].startswith("---")


def test_markdown_has_all_columns_and_escapes_names():
    accuracy, scores = (as_markdown(table) for table in tables(MANY, resamples=100))
    assert "by likelihood per byte" in accuracy and "100.0" in accuracy
    assert "| a\\|b | 120 |" in scores and "| 专业能力: 历史 | 120 |" in scores
    rows = [line for line in scores.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_names_are_cut_by_the_columns_that_they_take():
    assert shown_width("专业ab") == 6 and shown_width("e\u0301") == 1
    assert (
        fitted("专业能力", 8) == "专业能力" and fitted("专业能力", 7) == "专业能…" and fitted("专业能力", 6) == "专业…"
    )
