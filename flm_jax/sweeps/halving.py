"""Which candidates of a rung go on to the next one."""

from __future__ import annotations

import math
from collections.abc import Mapping


def survivors(scores: Mapping[str, float | None], keep: float, goal: str) -> list[str]:
    """The names of the best candidates of a rung, best first.

    Args:
      scores: by name, the mean of the measure over seeds; None where a run failed, which never goes on.
      keep: the share of all candidates that goes on, rounded up.
      goal: min or max.
    """
    sign = 1 if goal == "min" else -1
    able = {name: score for name, score in scores.items() if score is not None and math.isfinite(score)}
    # Without the small number, 0.07 of 100, which is a little more than 7 in binary, would be 8.
    count = max(math.ceil(keep * len(scores) - 1e-9), 1)
    return sorted(able, key=lambda name: sign * able[name])[:count]
