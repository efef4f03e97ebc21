"""How one axis grows: where its new entries come from, and what they hold in parameters that read or write it.

A span says where: the source of every new entry, and which of them are fresh. An operator (see `operators`) turns a
span into an axis map, which says what: the weight of entries that are taken, and the content of fresh ones. Nothing
here knows of parameters; a signature picks the rule (`AxisMap.rules`), and `grow` applies one map after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from flm_jax.signature import Role

Fill = Literal["draw", "zero", "copy"]


@dataclass(frozen=True, eq=False)
class Span:
    """Where the entries of a grown axis come from.

    Attributes:
      axis: its name.
      old: its size before.
      source: (new,) int, the old entry that each new one is taken (or would be copied) from.
      fresh: (new,) bool, the entries that did not exist before.
    """

    axis: str
    old: int
    source: np.ndarray
    fresh: np.ndarray

    @property
    def new(self) -> int:
        """The axis's size after growth."""
        return len(self.source)


def append(axis: str, old: int, new: int) -> Span:
    """New entries after the old ones; each stands beside an old one, in turn.

    Raises:
        ValueError: the axis would shrink.
    """
    if new < old:
        raise ValueError(f"Axis {axis!r} would shrink from {old} to {new}; growth keeps or enlarges every axis.")
    index = np.arange(new)
    return Span(axis, old, index % old, index >= old)


def nested(axis: str, outer: Span, inner: Span) -> Span:
    """The span of an axis laid out as (outer, inner): query heads, as key heads times queries a key head.

    So a query head stays with the key head that it had: groups widen in place, and new groups come with new key heads.
    """
    source = outer.source[:, None] * inner.old + inner.source[None]
    fresh = outer.fresh[:, None] | inner.fresh[None]
    return Span(axis, outer.old * inner.old, source.ravel(), fresh.ravel())


@dataclass(frozen=True, eq=False)
class Rule:
    """What a grown axis does to a parameter in one role.

    Attributes:
      fill: content of fresh entries: drawn as at initialisation, zero, or a copy of their source.
      scale: weight of what is taken, W' = scale * W[source]: a number or (new,).
      dual: what that does to its gradient, g' = dual * g[source], by which Adam's moments are carried.
    """

    fill: Fill
    scale: float | np.ndarray = 1.0
    dual: float | np.ndarray = 1.0


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis, grown: its span, and the rule of each role.

    Attributes:
      span: where entries come from.
      rules: by the role of a parameter on this axis.
      masked: whether the fresh entries start behind a mask.
      keeps_norm_width: whether norms go on dividing by the width from before (residual axis).
    """

    span: Span
    rules: Mapping[Role, Rule]
    masked: bool = False
    keeps_norm_width: bool = field(default=False)
