"""Loss as a function of FLOPs: between measured budgets of one size, and at the best size for each budget.

Savings are read from these. A ratio is given only inside the range of the data, with what of its interval lies there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import least_squares

DRAWS, REFITS = 2000, 100
LEVEL = 0.95


@dataclass(frozen=True)
class Point:
    """What a scratch run of some size and budget reached, as the mean over its seeds.

    Attributes:
      params: parameters of the model.
      tokens: of the run.
      flops: of the run.
      loss: held-out, in nats per token.
      seeds: number of runs.
    """

    params: float
    tokens: float
    flops: float
    loss: float
    seeds: int = 1


@dataclass(frozen=True)
class Ratio:
    """FLOPs of the baseline divided by those of a run, at the run's loss, with an interval of 95 %.

    Attributes:
      value: the ratio.
      low: the lower end of the interval; 0: below what the smallest run of the baseline shows.
      high: the upper end; infinite: above what the largest one shows.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.value:.2f} ({self.low:.2f} or more)" if self.low else f"{self.value:.2f} (no interval)"
        if not self.low:
            return f"{self.value:.2f} ({self.high:.2f} or less)"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def flops_at(points: Sequence[Point], loss: float) -> float | None:
    """FLOPs at which runs of one size reach a loss, interpolated; None outside the range of the data.

    Between budgets the logarithm of the FLOPs is a monotone cubic of the loss (PCHIP): a straight line between budgets
    whose FLOPs differ by 1.4 would be off by up to 2 %.
    """
    ordered = sorted(points, key=lambda point: point.flops)
    losses = np.asarray([point.loss for point in ordered])
    # A larger budget with a greater loss is noise or a bad rate; the best so far is what a user would take.
    reached = np.minimum.accumulate(losses)
    keep = np.concatenate([[True], reached[1:] < reached[:-1]])
    losses, logs = reached[keep], np.log([point.flops for point in ordered])[keep]
    if not losses[-1] <= loss <= losses[0]:
        return None
    if len(losses) < 2:
        return float(math.exp(logs[0]))
    return float(math.exp(PchipInterpolator(-losses, logs)(-loss)))


def same_size_ratio(points: Sequence[Point], loss: float, flops: float, noise: float, seeds: int = 1) -> Ratio | None:
    """The same-size ratio of a run: FLOPs of scratch runs of its size at its loss, divided by its own.

    Args:
      points: scratch runs of that size with different budgets, each decayed to its end.
      loss: that the run reached, as the mean over its seeds.
      flops: that it took.
      noise: standard deviation of the loss of one run over seeds.
      seeds: of the run.
    """
    value = flops_at(points, loss)
    if value is None:
        return None
    rng = np.random.default_rng(0)
    drawn: list[float] = []
    for _ in range(DRAWS):
        moved, reached = _moved(points, noise, rng), loss + noise * rng.standard_normal() / math.sqrt(seeds)
        drawn.append(_or_end(flops_at(moved, reached), reached < min(point.loss for point in moved)) / flops)
    return _ratio(value / flops, drawn)


@dataclass(frozen=True)
class Frontier:
    """The loss L(N, D) = E + A / N^a + B / D^b, fitted to scratch runs, and the cost of a token by size.

    Attributes:
      values: E, log A, a, log B, b.
      cost: coefficients of log(FLOPs per token) as a quadratic in log N.
      range: the least and the greatest FLOPs of the runs that it was fitted to.
      sizes: the least and the greatest number of parameters.
      residuals: by run, the measured loss minus the fitted one.
    """

    values: tuple[float, ...]
    cost: tuple[float, ...]
    range: tuple[float, float]
    sizes: tuple[float, float]
    residuals: tuple[float, ...]

    def loss(self, params: float | np.ndarray, tokens: float | np.ndarray) -> np.ndarray:
        """The fitted loss of a scratch run."""
        floor, a_log, a, b_log, b = self.values
        return np.asarray(floor + np.exp(a_log - a * np.log(params)) + np.exp(b_log - b * np.log(tokens)))

    def best(self, flops: float) -> tuple[float, float]:
        """The loss of the best size at a budget, and that size, among sizes within the range of the data."""
        sizes = np.geomspace(*self.sizes, 400)
        tokens = flops / np.exp(np.polyval(self.cost, np.log(sizes)))
        losses = self.loss(sizes, tokens)
        at = int(np.argmin(losses))
        return float(losses[at]), float(sizes[at])

    def flops_at(self, loss: float) -> float | None:
        """FLOPs at which the best size reaches a loss; None outside the range of the data."""
        low, high = (math.log(end) for end in self.range)
        if not self.best(math.exp(high))[0] <= loss <= self.best(math.exp(low))[0]:
            return None
        for _ in range(60):
            middle = (low + high) / 2
            if self.best(math.exp(middle))[0] > loss:
                low = middle
            else:
                high = middle
        return math.exp((low + high) / 2)


def fit_frontier(points: Sequence[Point]) -> Frontier:
    """Fits a frontier to scratch runs of at least three sizes and three budgets.

    Raises:
      ValueError: there are fewer.
    """
    sizes = sorted({point.params for point in points})
    if len(sizes) < 3 or min(sum(p.params == n for p in points) for n in sizes) < 3:
        raise ValueError(
            f"A frontier needs three sizes with three budgets each; there are {len(sizes)} sizes with "
            f"{', '.join(str(sum(p.params == n for p in points)) for n in sizes)} budgets."
        )
    params = np.asarray([point.params for point in points])
    tokens = np.asarray([point.tokens for point in points])
    losses = np.asarray([point.loss for point in points])
    weights = np.sqrt([point.seeds for point in points])
    # Sizes and budgets are measured from their middle, so that the coefficients are about 1 and independent.
    n_mid, d_mid = np.exp(np.mean(np.log(params))), np.exp(np.mean(np.log(tokens)))

    def residuals(x: np.ndarray) -> np.ndarray:
        fitted = x[0] + np.exp(x[1]) * (n_mid / params) ** x[2] + np.exp(x[3]) * (d_mid / tokens) ** x[4]
        return np.asarray((losses - fitted) * weights)

    starts = [(0.6 * losses.min(), math.log(0.3), 0.3, math.log(0.3), b) for b in (0.2, 0.4, 0.8)]
    bounds = ([0.0, -10.0, 0.02, -10.0, 0.02], [losses.min(), 3.0, 2.0, 3.0, 2.0])
    found = min((least_squares(residuals, start, bounds=bounds) for start in starts), key=lambda fit: fit.cost)
    floor, a_log, a, b_log, b = found.x
    values = (floor, a_log + a * math.log(n_mid), a, b_log + b * math.log(d_mid), b)
    per_token = {point.params: point.flops / point.tokens for point in points}
    cost = np.polyfit(np.log(list(per_token)), np.log(list(per_token.values())), min(2, len(sizes) - 1))
    flops = [point.flops for point in points]
    frontier = Frontier(
        tuple(map(float, values)),
        tuple(map(float, cost)),
        (min(flops), max(flops)),
        (sizes[0], sizes[-1]),
        (),
    )
    left = tuple(float(p.loss - frontier.loss(p.params, p.tokens)) for p in points)
    return Frontier(frontier.values, frontier.cost, frontier.range, frontier.sizes, left)


def frontier_ratio(points: Sequence[Point], loss: float, flops: float, noise: float, seeds: int = 1) -> Ratio | None:
    """The frontier ratio of a run: FLOPs of the best scratch run of any size at its loss, divided by its own.

    The interval is that of refits to losses moved by the noise, or by the residuals where those are larger.

    Args:
      points: scratch runs.
      loss: that the run reached.
      flops: that it took.
      noise: standard deviation of the loss of one run over seeds.
      seeds: of the run.
    """
    frontier = fit_frontier(points)
    value = frontier.flops_at(loss)
    if value is None:
        return None
    drawn: list[float] = []
    for refit, error in _refits(tuple(points), max(noise, float(np.std(frontier.residuals)))):
        reached = loss + noise * error / math.sqrt(seeds)
        drawn.append(_or_end(refit.flops_at(reached), reached < refit.best(refit.range[1])[0]) / flops)
    return _ratio(value / flops, drawn)


@functools.lru_cache(maxsize=8)
def _refits(points: tuple[Point, ...], spread: float) -> list[tuple[Frontier, float]]:
    """Frontiers fitted to the points as other seeds might have given them, each with a standard normal number.

    All growths of a study are compared with the same ones.
    """
    rng = np.random.default_rng(0)
    return [(fit_frontier(_moved(points, spread, rng)), float(rng.standard_normal())) for _ in range(REFITS)]


def _moved(points: Sequence[Point], spread: float, rng: np.random.Generator) -> list[Point]:
    """The points, with losses as other seeds might have given them."""
    errors = [spread * rng.standard_normal() / math.sqrt(point.seeds) for point in points]
    return [dataclasses.replace(p, loss=p.loss + error) for p, error in zip(points, errors, strict=True)]


def _or_end(flops: float | None, is_low: bool) -> float:
    """FLOPs; outside the range of the data, infinite for a loss below it and 0 for one above."""
    return (math.inf if is_low else 0.0) if flops is None else flops


def _ratio(value: float, drawn: Sequence[float]) -> Ratio:
    """A ratio with its interval; an end outside the range of the data is 0 or infinite."""
    ordered, tail = np.sort(drawn), (1 - LEVEL) / 2
    low, high = ordered[math.floor(tail * (len(drawn) - 1))], ordered[math.ceil((1 - tail) * (len(drawn) - 1))]
    return Ratio(value, float(low), float(high))


def pooled_noise(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation of a run's loss over seeds, from groups of runs that differ in nothing else."""
    squares = sum(float(np.var(group, ddof=1)) * (len(group) - 1) for group in groups if len(group) > 1)
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    return math.sqrt(squares / freedom) if freedom else None
