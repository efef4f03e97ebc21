"""Where new layers go, and which old layer each is a copy of."""

from __future__ import annotations

import numpy as np

from flm_jax.growth.axis_map import Span

PLACES = ("interleave", "top", "stack")


def place(old: int, new: int, where: str) -> Span:
    """The span of the layers axis.

    Args:
      old: layers before.
      new: layers after.
      where: interleave (copies right after their source, spread evenly over the depth), top (copies of the top
        layers, above them), stack (the whole network once more, as far as it goes: 2405.15319).

    Raises:
      ValueError: unknown place, or fewer layers than before.
    """
    if where not in PLACES:
        raise ValueError(f"Growth.depth={where!r}: new layers go to one of {', '.join(PLACES)}.")
    if new < old:
        raise ValueError(f"Axis 'layers' would shrink from {old} to {new}; growth keeps or enlarges every axis.")
    extra = new - old
    if where == "stack":
        source = np.arange(new) % old
        fresh = np.arange(new) >= old
    elif where == "top":
        # The copied run keeps its order; when it is longer than the network, it starts over.
        copied = min(extra, old)
        source = np.concatenate([np.arange(old), old - copied + np.arange(extra) % copied]) if extra else np.arange(old)
        fresh = np.arange(new) >= old
    else:
        # Layer i of the old network is followed by its share of the new ones: evenly spaced, the rest nearer the top.
        copies = (np.arange(1, old + 1) * extra) // old - (np.arange(old) * extra) // old
        source = np.repeat(np.arange(old), 1 + copies)
        fresh = np.concatenate([[False], source[1:] == source[:-1]])
    return Span("layers", old, source, fresh)
