"""How one axis grows: where its new entries come from, and what they hold in parameters that read or write it.

A span says where: the source of every new entry, and which of them are fresh. An operator (see `operators`) turns a
span into an axis map, which says what: the weight of entries that are taken, and the content of fresh ones. Nothing
here knows of parameters; a signature picks the rule (`AxisMap.rules`), and `grow` applies one map after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from flm_jax.signature import Role

Fill = Literal["draw", "zero", "copy", "mean"]


@dataclass(frozen=True, eq=False)
class Span:
    """Where the entries of a grown axis come from.

    Attributes:
      axis: its name.
      old: its size before.
      source: (new,) int, the old entry that each new one is taken (or would be copied) from.
      fresh: (new,) bool, the entries that did not exist before.
      group: (new,) int, equal for entries that are copies of each other; None: `source`.
      parts: the outer and the inner span of an axis laid out as (outer, inner).
    """

    axis: str
    old: int
    source: np.ndarray
    fresh: np.ndarray
    group: np.ndarray | None = None
    parts: tuple[Span, Span] | None = None

    @property
    def new(self) -> int:
        """The axis's size after growth."""
        return len(self.source)

    @property
    def copy_group(self) -> np.ndarray:
        """(new,) int, equal for entries that are copies of each other: `group`, resolved."""
        return self.source if self.group is None else self.group

    @property
    def copies(self) -> np.ndarray:
        """(new,) int, how many copies of each other an entry and its like are."""
        return np.bincount(self.copy_group)[self.copy_group]

    def shares(self, unevenness: float = 0.0) -> np.ndarray:
        """(new,) positive weights that sum to 1 over the copies of an entry.

        Copies count for 1, 1 + unevenness, 1 + 2 unevenness and so on: 0 is even. The shares of an axis in two parts
        are the products of theirs, so that a copied key head weighs as much as all the queries that read it.
        """
        if self.parts is not None:
            outer, inner = self.parts
            return np.outer(outer.shares(unevenness), inner.shares(unevenness)).ravel()
        group = self.copy_group
        order = np.argsort(group, kind="stable")
        first = np.searchsorted(group[order], group[order])
        weight = np.empty(self.new)
        weight[order] = 1.0 + unevenness * (np.arange(self.new) - first)
        return weight / np.bincount(group, weights=weight)[group]


def along(vector: np.ndarray, dim: int, ndim: int) -> np.ndarray:
    """A vector, shaped to broadcast along one dimension of an array with `ndim` of them."""
    return vector.reshape((1,) * dim + (-1,) + (1,) * (ndim - dim - 1))


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
    return Span(axis, outer.old * inner.old, source.ravel(), fresh.ravel(), parts=(outer, inner))


def divided(span: Span, into: int) -> Span:
    """`span`, of an axis whose entries were first divided: each old entry becomes `into` entries like it, in place.

    Parts of one entry serve different readers (key heads that share out their queries), so they are no copies of each
    other and need no weights.
    """
    if into == 1:
        return span
    return replace(span, old=span.old // into, source=span.source // into, group=span.source)


def resampled(span: Span) -> Span:
    """`span` with the sources of its fresh entries drawn at random, the same for everyone (Net2Net's mapping)."""
    if span.parts is not None:
        return nested(span.axis, *(resampled(part) for part in span.parts))
    old = span.copy_group[~span.fresh]
    chosen = np.random.default_rng(len(old) * 1_000_003 + span.new).integers(0, len(old), span.new)
    pick = np.where(span.fresh, chosen, np.cumsum(~span.fresh) - 1)
    source = span.source[np.flatnonzero(~span.fresh)[pick]]
    return replace(span, source=source, group=None if span.group is None else old[pick])


@dataclass(frozen=True, eq=False)
class Rule:
    """What a grown axis does to a parameter in one role.

    Attributes:
      fill: content of fresh entries: drawn as at initialisation, zero, a copy of their source, or the old ones' mean.
      scale: weight of what is taken, W' = scale * W[source]: a number or (new,).
      dual: what that does to its gradient, g' = dual * g[source], by which Adam's moments are carried.
      noise: (new,) sizes, relative to each other, of the activations that copies meet: noise is added that they
        cancel. None: no noise.
      from_above: fresh entries are copied from the layer above, where there is one.
    """

    fill: Fill
    scale: float | np.ndarray = 1.0
    dual: float | np.ndarray = 1.0
    noise: np.ndarray | None = None
    from_above: bool = False


@dataclass(frozen=True, eq=False)
class AxisMap:
    """One axis, grown: its span, and the rule of each role.

    Attributes:
      span: where entries come from.
      rules: by the role of a parameter on this axis.
      masked: whether the fresh entries start behind a mask.
      squares: on the residual axis, the factor by which the stream's sum of squares grows at the growth, and with it
        the width that norms divide by; None: it is not known, and a mask hides what is new until that width is the
        target's own.
    """

    span: Span
    rules: Mapping[Role, Rule]
    masked: bool = False
    squares: float | None = None

    @property
    def active(self) -> bool:
        """Whether fresh entries take part from the first step, as copies of old ones do."""
        return not self.masked and all(rule.fill == "copy" for rule in self.rules.values())
