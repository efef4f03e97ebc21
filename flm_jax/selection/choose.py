"""The choice: in the order of scores, what is unlike everything chosen before and whose domain has places left."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# What became of a conversation.
WAITING, CHOSEN, SIMILAR, NO_PLACE, UNREADABLE = range(5)
# Conversations whose features are computed at once, and chosen ones that they are compared with at once.
BLOCK, COMPARED = 512, 4096


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
      states: uint8 (n,), what became of each conversation; WAITING: there were enough before it.
      chosen: int64 (m,), numbers of the chosen conversations, the first chosen first.
    """

    states: np.ndarray
    chosen: np.ndarray


def ranking(scores: np.ndarray, high: bool) -> np.ndarray:
    """int64 (n,): the numbers of conversations by their scores, equal ones in the order of the pool."""
    return np.argsort(-scores if high else scores, kind="stable")


def precut(lengths: np.ndarray, groups: np.ndarray, room: np.ndarray, fill: bool = False) -> np.ndarray:
    """The conversations with the longest answers of each group, as many as it has room for: bool (n,).

    With `fill`, places that a group cannot fill go to the longest of all others, as `choose` fills them too.
    """
    kept = np.zeros(len(lengths), bool)
    for group, places in enumerate(room):
        members = np.flatnonzero(groups == group)
        kept[members[ranking(lengths[members], True)[:places]]] = True
    if fill:
        others = np.flatnonzero(~kept)
        kept[others[ranking(lengths[others], True)[: int(room.sum()) - int(kept.sum())]]] = True
    return kept


class _Chosen:
    """The unit features of what is chosen, in halves: a tenth of a percent of a cosine, for half the memory."""

    def __init__(self, most: int, width: int) -> None:
        self._features, self.count = np.empty((most, width), np.float16), 0

    def add(self, features: np.ndarray) -> None:
        self._features[self.count : self.count + len(features)] = features
        self.count += len(features)

    def nearest(self, features: np.ndarray) -> np.ndarray:
        """float32 (n,): the largest cosine of each row with any that is chosen; -1 without one."""
        found = np.full(len(features), -1, np.float32)
        for start in range(0, self.count, COMPARED):
            block = self._features[start : min(start + COMPARED, self.count)].astype(np.float32)
            np.maximum(found, (features @ block.T).max(axis=1), out=found)
        return found


def choose(
    order: np.ndarray,
    groups: np.ndarray,
    room: np.ndarray,
    features: Callable[[int, np.ndarray], np.ndarray] | None,
    threshold: float,
    fill: bool,
    told: Callable[[int], object] = lambda _: None,
) -> Choice:
    """Chooses conversations until every place is taken.

    Args:
      order: numbers of the conversations that may be chosen, the best first.
      groups: of all conversations, (n,): the group of domains that each belongs to.
      room: places of each group.
      features: from the number of a block and numbers of conversations to unit vectors, float32 (block, D), NaN where a
        conversation cannot be read; None: similarity is not looked at.
      threshold: the cosine with a chosen one from which a conversation is too similar.
      fill: whether the places that a group leaves free go to the best of the others.
      told: called with numbers of chosen conversations.
    """
    states = np.full(len(groups), WAITING, np.uint8)
    total, room = int(room.sum()), room.copy()
    chosen: list[int] = []
    stored: _Chosen | None = None
    block = 0

    def go_through(candidates: np.ndarray) -> None:
        nonlocal stored, block
        at = 0
        while at < len(candidates) and len(chosen) < total and room.any():
            numbers: list[int] = []
            while at < len(candidates) and len(numbers) < BLOCK:
                ahead = candidates[at : at + BLOCK - len(numbers)]
                at += len(ahead)
                open_ = room[groups[ahead]] > 0
                states[ahead[~open_]] = NO_PLACE
                numbers += ahead[open_].tolist()
            before = len(chosen)
            if features is None:
                _take(np.array(numbers, np.int64), None)
            elif numbers:
                found = features(block, np.array(numbers, np.int64))
                block += 1
                stored = stored or _Chosen(total, found.shape[1])
                _take(np.array(numbers, np.int64), found)
            told(len(chosen) - before)

    def _take(numbers: np.ndarray, found: np.ndarray | None) -> None:
        similar = np.zeros(len(numbers), bool)
        within = np.zeros((0, 0), np.float32)
        if found is not None and stored is not None:
            similar = stored.nearest(found) >= threshold
            within = found @ found.T
        taken: list[int] = []
        for place, number in enumerate(numbers.tolist()):
            if len(chosen) == total:
                break
            group = groups[number]
            if not room[group]:
                states[number] = NO_PLACE
            elif found is not None and np.isnan(found[place, 0]):
                states[number] = UNREADABLE
            elif similar[place] or (found is not None and taken and within[place, taken].max() >= threshold):
                states[number] = SIMILAR
            else:
                states[number] = CHOSEN
                chosen.append(number)
                taken.append(place)
                room[group] -= 1
        if found is not None and stored is not None:
            stored.add(found[taken])

    go_through(order)
    if fill and len(chosen) < total:
        room[:] = total
        go_through(order[states[order] == NO_PLACE])
    return Choice(states, np.array(chosen, np.int64))
