"""Where new layers go, and which old layer each is a copy of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flm_jax.growth.axis_map import Span

PLACES = ("interleave", "top", "middle", "stack", "distance")
METRICS = ("angular", "cosine", "relative_l2")


def place(old: int, new: int, where: str | Sequence[int]) -> Span:
    """The span of the layers axis.

    Args:
      old: layers before.
      new: layers after.
      where: interleave (copies right after their source, spread evenly over the depth), top (copies of the top
        layers, above them), middle (the same, of the middle layers), stack (the whole network once more, as far as it
        goes: 2405.15319), or one number a layer: how many copies follow it. "distance" becomes such numbers by
        `by_distance`, once distances are measured.

    Raises:
      ValueError: unknown place, distances that are not measured, copies that do not add up, or fewer layers.
    """
    if new < old:
        raise ValueError(f"Axis 'layers' would shrink from {old} to {new}; growth keeps or enlarges every axis.")
    extra = new - old
    if not isinstance(where, str):
        if len(where) != old or sum(where) != extra or min(where) < 0:
            raise ValueError(
                f"Growth.depth={tuple(where)} must give a number of copies for each of {old} layers, {extra} in all."
            )
        return _after_each(np.asarray(where, int))
    if where == "distance":
        raise ValueError("Growth.depth='distance' needs distances: measure them, and take what by_distance() returns.")
    if where == "stack":
        return _after_run(old, 0, old, extra)
    if where in ("top", "middle"):
        length = min(extra, old)
        start = old - length if where == "top" else (old - length) // 2
        return _after_run(old, start, length, extra)
    if where == "interleave":
        # Layer i of the old network is followed by its share of the new ones: evenly spaced, the rest nearer the top.
        return _after_each((np.arange(1, old + 1) * extra) // old - (np.arange(old) * extra) // old)
    raise ValueError(f"Growth.depth={where!r}: new layers go to one of {', '.join(PLACES)}, or give copies a layer.")


def by_distance(distances: Sequence[float], new: int) -> tuple[int, ...]:
    """How many copies follow each layer, when copies go where a layer changes its input least.

    Tele-FLM names "distance-based layer selection" (2407.02783) and no formula; this is ours. Every layer gets its
    whole share, and what is left over goes to the layers with the smallest distance, one each.
    """
    old = len(distances)
    share, rest = divmod(new - old, old)
    copies = np.full(old, share)
    copies[np.argsort(distances, kind="stable")[:rest]] += 1
    return tuple(int(n) for n in copies)


def _after_each(copies: np.ndarray) -> Span:
    """Copies right after their source."""
    source = np.repeat(np.arange(len(copies)), 1 + copies)
    return Span("layers", len(copies), source, np.concatenate([[False], source[1:] == source[:-1]]))


def _after_run(old: int, start: int, length: int, extra: int) -> Span:
    """A run of layers, and above it copies of the run in its order; more copies than layers start over."""
    end = start + length
    copied = start + np.arange(extra) % max(length, 1)
    source = np.concatenate([np.arange(end), copied, np.arange(end, old)])
    fresh = np.concatenate([np.zeros(end, bool), np.ones(extra, bool), np.zeros(old - end, bool)])
    return Span("layers", old, source, fresh)
