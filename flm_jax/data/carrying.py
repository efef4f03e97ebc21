"""Where a run reads on that continues another one with other data, weights or sources: in windows, source by source.

The n-th window of a source is the n-th that a run on this source alone would read. A source that both runs have is
therefore read on after the last window that the run before has read of it, whatever stands beside it now.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flm_jax.data.batches import TokenBatches
from flm_jax.data.mixing import Order
from flm_jax.records import counted
from flm_jax.records.foreign_json import check, field, parse_json

WHERE = "the saved data position"


class Carried(NamedTuple):
    """Where the data is read on.

    Attributes:
      state: for `TokenBatches.restore`; None: the data begins at its start.
      note: a sentence about it.
    """

    state: bytes | None
    note: str


class _Source(NamedTuple):
    name: str  # '' for a single corpus
    store: str  # the digest
    read: int  # windows


def carried(state: bytes, batches: TokenBatches) -> Carried:
    """Where new batches go on from the position of others.

    Args:
      state: the position of the others, from their `state`.
      batches: the new ones, at their start.

    Raises:
      ValueError: `state` is no position.
    """
    record, here = parse_json(state, WHERE), parse_json(batches.state(), "a data position")
    theirs, ours = (dict(field(one, "identity", dict, WHERE)) for one in (record, here))
    windows = field(record, "position", int, WHERE)
    if json.dumps(theirs) == json.dumps(ours):  # in the same order: that of sources decides which count is whose
        return Carried(
            state,
            f"The data goes on after the {counted(windows, 'window')} that were read: none is left out or comes twice.",
        )
    kinds = {one.get("kind") for one in (theirs, ours)}
    differ = [name for name in ("context", "seed") if theirs.get(name) != ours.get(name)]
    if differ or not kinds <= {"store", "mixture"}:
        what = " and ".join(f"{name} {theirs.get(name)} -> {ours.get(name)}" for name in differ) or "how it is read"
        return Carried(None, f"The data starts from its beginning, as its order is another one ({what}).")
    before, names = _sources(record, theirs), _sources(here, ours)
    read = _matched(before, names)
    gone = [source.name or "the corpus" for source in before if source.store not in {one.store for one in names}]
    if not any(number is not None for number in read):
        return Carried(None, "The data is other data, and starts from its beginning.")
    said = [
        f"{one.name or 'the corpus'} goes on after {counted(number, 'window')}"
        if number is not None
        else f"{one.name or 'the corpus'} starts from its beginning"
        for one, number in zip(names, read, strict=True)
    ]
    said += [f"{name} is no longer read" for name in gone]
    drawn = [number or 0 for number in read]
    if ours["kind"] == "store":
        found: dict[str, Any] = {"identity": ours, "position": drawn[0]}
    else:
        order = {"weights": field(here, "order", dict, WHERE)["weights"], "start": sum(drawn), "drawn": drawn}
        found = {"identity": ours, "position": sum(drawn), "order": order}
    return Carried(json.dumps(found).encode(), f"Of the data, {', '.join(said)}.")


def small_position(state: bytes | None) -> dict[str, Any] | None:
    """A position as JSON-able data, if it is one of token stores; None for those of seqio, of up to a few MB."""
    if state is None:
        return None
    record: dict[str, Any] = parse_json(state, WHERE)
    return record if field(record, "identity", dict, WHERE).get("kind") in ("store", "mixture") else None


def _sources(record: Mapping[str, Any], identity: Mapping[str, Any]) -> list[_Source]:
    """The sources of a position, with how many windows were read of each before it."""
    position = field(record, "position", int, WHERE)
    if identity.get("kind") == "store":
        return [_Source("", field(identity, "store", str, WHERE), position)]
    stores, limits = field(identity, "stores", dict, WHERE), field(identity, "limits", list, WHERE)
    since = field(record, "order", dict, WHERE)
    weights, drawn = (field(since, name, list, WHERE) for name in ("weights", "drawn"))
    start = field(since, "start", int, WHERE)
    if not len(stores) == len(limits) == len(weights) == len(drawn) or not 0 <= start <= position:
        raise ValueError(f"{WHERE} is damaged: {len(stores)} sources, and {since}")
    order = Order(
        tuple(float(check(weight, float, WHERE)) for weight in weights),
        tuple(check(limit, (int, type(None)), WHERE) for limit in limits),
        start,
        tuple(check(number, int, WHERE) for number in drawn),
    )
    return [_Source(*one) for one in zip(stores, map(str, stores.values()), order.counts(position), strict=True)]


def _matched(before: list[_Source], now: list[_Source]) -> list[int | None]:
    """How many windows of each present source were read; None: it was not there.

    A source is known by its store. Where several have the same one, also by its name.
    """
    left = list(before)
    found: dict[int, int] = {}
    for same_name in (True, False):
        for place, source in enumerate(now):
            match = next(
                (one for one in left if one.store == source.store and (not same_name or one.name == source.name)), None
            )
            if place not in found and match is not None:
                found[place] = match.read
                left.remove(match)
    return [found.get(place) for place in range(len(now))]
