"""Results by category: means, ratios to a reference system, wins, and bootstrap intervals over questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flm_jax.evaluation.judges import ACCURACY, SCORES, WINS, Judgement

MEASURES = (ACCURACY, SCORES, WINS)
OVERALL = "overall"
LEVEL = 0.95
RESAMPLES = 10_000
# Indices that are drawn at a time.
_AT_ONCE = 1 << 22
Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """The results of one category by one measure.

    Attributes:
      category: its name.
      n: questions whose answer was judged.
      mean: of their values: accuracy, score, or share of wins with ties as halves. None: n is 0.
      interval: of the mean.
      pairs: questions on which both systems were judged; for WINS, n.
      reference: mean of the reference system over the pairs.
      relative: sum over the pairs divided by that of the reference system; None: there is none, or it is 0.
      relative_interval: of that ratio.
      wins: pairs in which the system's answer is better.
      ties: pairs in which none is.
      losses: pairs in which the reference system's is.
      disagreed: ties because the judge's verdict changed with the order of the answers.
      per_byte: accuracy of choices by their likelihood per byte; None: there are no such choices.
      unjudged: questions on which a system was not judged.
    """

    category: str
    n: int
    mean: float | None
    interval: Interval | None
    pairs: int
    reference: float | None
    relative: float | None
    relative_interval: Interval | None
    wins: int
    ties: int
    losses: int
    disagreed: int
    per_byte: float | None
    unjudged: int


@dataclass(frozen=True)
class Table:
    """The results by one measure.

    Attributes:
      measure: one of MEASURES.
      rows: by category, in the order of the questions.
      overall: over all questions.
      parts: by subcategory, where questions have one.
    """

    measure: str
    rows: tuple[Row, ...]
    overall: Row
    parts: tuple[Row, ...]

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        rows = {"categories": self.rows, "subcategories": self.parts}
        lists = {name: [asdict(row) for row in found] for name, found in rows.items()}
        return {"measure": self.measure, "overall": asdict(self.overall), **lists}


def tables(judgements: Sequence[Judgement], seed: int = 0, resamples: int = RESAMPLES) -> list[Table]:
    """A table for each measure that there are judgements by.

    Args:
      judgements: of all questions.
      seed: of the bootstrap.
      resamples: how many samples of questions the bootstrap draws.
    """

    def groups(mine: Sequence[Judgement], name: Callable[[Judgement], str]) -> tuple[Row, ...]:
        names = dict.fromkeys(name(j) for j in mine)
        return tuple(row(label, [j for j in mine if name(j) == label], seed, resamples) for label in names if label)

    found = []
    for measure in MEASURES:
        mine = [j for j in judgements if j.measure == measure]
        if mine:
            rows = groups(mine, lambda j: j.question.category)
            parts = groups(
                mine, lambda j: j.question.subcategory and f"{j.question.category}: {j.question.subcategory}"
            )
            found.append(Table(measure, rows, row(OVERALL, mine, seed, resamples), parts))
    return found


def row(category: str, judgements: Sequence[Judgement], seed: int = 0, resamples: int = RESAMPLES) -> Row:
    """The results of some questions, judged by one measure."""
    own = np.array([j.own for j in judgements if j.own is not None], float)
    both = [(j.own, j.reference) for j in judgements if j.own is not None and j.reference is not None]
    pairs = np.array(both, float).reshape(-1, 2)
    compared = own - 0.5 if judgements[0].measure == WINS else pairs[:, 0] - pairs[:, 1]
    per_byte = [j.per_byte for j in judgements if j.per_byte is not None]
    interval = relative = relative_interval = None
    if len(own):
        sums_R = resampled_sums(own[:, None], seed, resamples)[:, 0]
        interval = _interval(sums_R / len(own))
    if len(pairs) and pairs[:, 1].sum() > 0:
        relative = float(pairs[:, 0].sum() / pairs[:, 1].sum())
        sums_R2 = resampled_sums(pairs, seed, resamples)
        with np.errstate(divide="ignore", invalid="ignore"):
            # A sample in which the reference system got nothing has no ratio.
            ratios_R = sums_R2[:, 0] / sums_R2[:, 1]
        relative_interval = _interval(ratios_R[np.isfinite(ratios_R)])
    return Row(
        category,
        len(own),
        float(own.mean()) if len(own) else None,
        interval,
        len(compared),
        float(pairs[:, 1].mean()) if len(pairs) else None,
        relative,
        relative_interval,
        int((compared > 0).sum()),
        int((compared == 0).sum()),
        int((compared < 0).sum()),
        sum(j.disagreed for j in judgements),
        float(np.mean(per_byte)) if per_byte else None,
        sum(bool(j.unjudged) for j in judgements),
    )


def resampled_sums(values_NK: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """The sums of columns over samples of rows, as many as there are rows and drawn with replacement.

    All columns of a sample have the same rows: a comparison of columns is paired.

    Args:
      values_NK: the values, one row per question.
      seed: equal seeds draw equal rows.
      resamples: number of samples.

    Returns:
      float64 (resamples, K).
    """
    count, rng = len(values_NK), np.random.default_rng(seed)
    found, step = [], max(1, _AT_ONCE // count)
    for start in range(0, resamples, step):
        index_RN = rng.integers(0, count, (min(step, resamples - start), count))
        found.append(values_NK[index_RN].sum(1))
    return np.concatenate(found)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
