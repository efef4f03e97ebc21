"""Placement of new layers: where each one goes, and which old layer it is a copy of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flm_jax.growth.axis_map import Span
from flm_jax.records import counted

PLACES = ("interleave", "top", "middle", "stack", "distance")
METRICS = ("angular", "cosine", "relative_l2")


def place(old: int, new: int, where: str | Sequence[int]) -> Span:
    """The span of the layers axis.

    Args:
      old: layers before growth; of 0, every place is the same, and new layers have no source.
      new: layers after growth.
      where: interleave (copies directly after their source, spread evenly over the depth), top (copies of the top
        layers, above them), middle (the same with the middle layers), stack (the whole network repeated, up to the new
        depth: 2405.15319), or one number per layer: how many copies follow it. For "distance", `by_distance` turns
        measured distances into such numbers.

    Raises:
      ValueError: an unknown place, distances that are not measured yet, copies that do not add up, or fewer layers than
        before.
    """
    if new < old:
        raise ValueError(f"Axis 'layers' would shrink from {old} to {new}; growth keeps or enlarges every axis.")
    extra = new - old
    if not isinstance(where, str):
        if len(where) != old or sum(where) != extra or min(where, default=0) < 0:
            raise ValueError(
                f"Growth.depth={tuple(where)} must give a number of copies for each of "
                f"{counted(old, 'layer')}, {extra} in all."
            )
        return _after_each(np.asarray(where, int))
    if where == "distance" and old:
        raise ValueError("Growth.depth='distance' needs distances: measure them, and take what by_distance() returns.")
    if not old and where in PLACES:
        return Span("layers", 0, np.zeros(extra, int), np.ones(extra, bool))
    if where == "stack":
        return _after_run(old, 0, old, extra)
    if where in ("top", "middle"):
        length = min(extra, old)
        start = old - length if where == "top" else (old - length) // 2
        return _after_run(old, start, length, extra)
    if where == "interleave":
        # Layer i is followed by its share of the new layers: evenly spaced, with the remainder nearer the top.
        return _after_each((np.arange(1, old + 1) * extra) // old - (np.arange(old) * extra) // old)
    raise ValueError(f"Growth.depth={where!r}: new layers go to one of {', '.join(PLACES)}, or give copies per layer.")


def by_distance(distances: Sequence[float], new: int) -> tuple[int, ...]:
    """How many copies follow each layer, when copies go after the layers that change their input least.

    Tele-FLM names "distance-based layer selection" (2407.02783) but gives no formula; this rule is our own. Every layer
    gets an equal whole number of copies, and the remaining copies go to the layers with the smallest distance, one
    each.
    """
    old = len(distances)
    share, rest = divmod(new - old, old)
    copies = np.full(old, share)
    copies[np.argsort(distances, kind="stable")[:rest]] += 1
    return tuple(int(n) for n in copies)


def _after_each(copies: np.ndarray) -> Span:
    """The span in which each layer is followed directly by its copies."""
    source = np.repeat(np.arange(len(copies)), 1 + copies)
    return Span("layers", len(copies), source, np.concatenate([[False], source[1:] == source[:-1]]))


def _after_run(old: int, start: int, length: int, extra: int) -> Span:
    """The span in which a run of layers is followed by copies of its layers, in order and if need be repeatedly."""
    end = start + length
    copied = start + np.arange(extra) % max(length, 1)
    source = np.concatenate([np.arange(end), copied, np.arange(end, old)])
    fresh = np.concatenate([np.zeros(end, bool), np.ones(extra, bool), np.zeros(old - end, bool)])
    return Span("layers", old, source, fresh)
