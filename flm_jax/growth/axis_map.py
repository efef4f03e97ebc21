"""How one axis grows: the source of each new entry, and what fresh entries hold in each role.

A `Span` gives the source index of every new entry and marks the fresh ones. An operator (see `operators`) turns a span
into an `AxisMap`, which adds the weight of taken entries and the content of fresh ones. This module knows nothing about
parameters: a parameter's signature selects the rule (`AxisMap.rules`), and `grow` applies one axis map after another.
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
    """The source of each entry of a grown axis.

    Attributes:
      axis: name of the axis.
      old: its size before growth.
      source: (new,) int, the index of the old entry that each new entry is (or would be) copied from; 0 if there are no
        old entries.
      fresh: (new,) bool, the entries that did not exist before.
      group: (new,) int, equal for entries that are copies of each other; None: `source`.
      parts: the outer and the inner span of an axis that is laid out as (outer, inner).
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

    def take(self, values: np.ndarray, dim: int = 0) -> np.ndarray:
        """The values of old entries, along one dimension, for the entries that come from them; 1 if there are none."""
        if not self.old:
            return np.ones((*values.shape[:dim], self.new, *values.shape[dim + 1 :]))
        return np.take(values, self.source, axis=dim)

    @property
    def copy_group(self) -> np.ndarray:
        """(new,) int, equal for entries that are copies of each other: `group`, or `source` where that is None."""
        return self.source if self.group is None else self.group

    @property
    def copies(self) -> np.ndarray:
        """(new,) int, the size of each entry's group of copies."""
        return np.bincount(self.copy_group)[self.copy_group]

    def shares(self, unevenness: float = 0.0) -> np.ndarray:
        """(new,) positive weights that sum to 1 over the copies of an entry.

        The weights of its copies are proportional to 1, 1 + unevenness, 1 + 2 unevenness and so on; 0 makes them equal.
        The shares of an axis in two parts are the products of the shares of its parts, so that a copied key head weighs
        as much as all the queries that read it.
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
    """Reshapes a vector so that it broadcasts along one dimension of an array with `ndim` dimensions."""
    return vector.reshape((1,) * dim + (-1,) + (1,) * (ndim - dim - 1))


def append(axis: str, old: int, new: int) -> Span:
    """The span in which new entries follow the old ones; their sources are the old entries in turn.

    Raises:
      ValueError: the axis would shrink.
    """
    if new < old:
        raise ValueError(f"Axis {axis!r} would shrink from {old} to {new}; growth keeps or enlarges every axis.")
    index = np.arange(new)
    return Span(axis, old, index % old, index >= old)


def nested(axis: str, outer: Span, inner: Span) -> Span:
    """The span of an axis laid out as (outer, inner), such as query heads as (key heads, queries per key head).

    A query head therefore stays with its key head: existing groups widen in place, and new groups belong to new key
    heads.
    """
    source = outer.source[:, None] * inner.old + inner.source[None]
    fresh = outer.fresh[:, None] | inner.fresh[None]
    return Span(axis, outer.old * inner.old, source.ravel(), fresh.ravel(), parts=(outer, inner))


def divided(span: Span, into: int) -> Span:
    """`span`, as seen from the undivided axis: each of its old entries is first repeated `into` times, in place.

    The parts of one entry serve different readers (key heads that divide their queries among themselves), so they are
    not copies of each other and need no weights.
    """
    if into == 1:
        return span
    return replace(span, old=span.old // into, source=span.source // into, group=span.source)


def resampled(span: Span) -> Span:
    """`span` with the sources of its fresh entries drawn at random (Net2Net's mapping).

    The draw depends on the sizes alone, so that every parameter uses the same sources.
    """
    if span.parts is not None:
        return nested(span.axis, *(resampled(part) for part in span.parts))
    old = span.copy_group[~span.fresh]
    chosen = np.random.default_rng(len(old) * 1_000_003 + span.new).integers(0, len(old), span.new)
    pick = np.where(span.fresh, chosen, np.cumsum(~span.fresh) - 1)
    source = span.source[np.flatnonzero(~span.fresh)[pick]]
    return replace(span, source=source, group=None if span.group is None else old[pick])


@dataclass(frozen=True, eq=False)
class Rule:
    """What a grown axis does to a parameter that has one given role on it.

    Attributes:
      fill: content of fresh entries: drawn as at initialisation, zero, a copy of their source, or the mean of the old
        entries.
      scale: weight of taken entries, W' = scale * W[source]: a number or (new,).
      dual: the effect on the gradient, g' = dual * g[source]; moments are carried over by it.
      noise: (new,) relative sizes of the activations that the copies multiply: noise that cancels over the copies is
        added. None: no noise.
      from_above: whether fresh entries are copied from the layer above, where there is one.
    """

    fill: Fill
    scale: float | np.ndarray = 1.0
    dual: float | np.ndarray = 1.0
    noise: np.ndarray | None = None
    from_above: bool = False


@dataclass(frozen=True, eq=False)
class AxisMap:
    """How one axis grows: its span, and a rule for each role.

    Attributes:
      span: the source of each entry.
      rules: by the role of a parameter on this axis.
      masked: whether the fresh entries start behind a mask.
      squares: on the residual axis, the factor by which the growth increases the stream's sum of squares; the width
        that norms divide by increases by the same factor. None: it is unknown, and a mask hides fresh entries until
        norms divide by the target's own width.
    """

    span: Span
    rules: Mapping[Role, Rule]
    masked: bool = False
    squares: float | None = None

    @property
    def active(self) -> bool:
        """Whether fresh entries contribute to the output at step 0, as unmasked copies do."""
        return not self.masked and all(rule.fill == "copy" for rule in self.rules.values())
