"""The steps of rules and scores: what is left after each, and where its lines stand."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flm_jax.data.workers import Workers
from flm_jax.progress import count_bar
from flm_jax.records import as_dict
from flm_jax.selection import choose, dedupe, domains, rules, scores
from flm_jax.selection.base import Base
from flm_jax.selection.config import Selection
from flm_jax.selection.pool import PLACE, Batch, PoolFile, Reader
from flm_jax.selection.steps import Step
from flm_jax.selection.work import judge_batch

SPOOL = "spool.jsonl"
# Conversations whose places are looked up at once; and that are scored at once, which is what a killed run repeats.
CHUNK, SHARD = 1 << 16, 1024
# What became of a conversation that the rules leave.
SCORED, CUT, UNREADABLE, LOW, HIGH = range(5)


def judge(
    base: Path, pool: Sequence[PoolFile], indexed: Step, kinds: Step, selection: Selection, workers: Workers
) -> Step:
    """The finished step of the rules.

    Columns: `broken` (uint8, per conversation that is no duplicate: 0, or 1 + the number of the rule in `facts`), and
    for those that no rule drops `numbers` (uint32, in the pool), `places` (`PLACE`; of compressed files, in the spool),
    `domains` (uint16, numbers of `facts`' domains) and `lengths` (float32).

    Args:
      base: holds the folders of steps.
      pool: the files.
      indexed: the index.
      kinds: the duplicates.
      selection: the configuration.
      workers: what to compute with.

    Raises:
      ValueError: there are too many domains, or a domain with a fraction does not exist.
    """
    limits, field = selection.rules, selection.domains.field
    depends = {"duplicates": kinds.digest, "rules": as_dict(limits), "names": list(rules.REGISTRY), "field": field}
    step = Step(base, "rules", depends)
    if not step.finished:
        step.clear()
        _judge(step, pool, dedupe.places(indexed), kinds.array("kinds"), selection, workers)
    domains.check_domains(selection.domains, step.facts()["domains"])
    return step


def _judge(
    step: Step,
    pool: Sequence[PoolFile],
    places: np.ndarray,
    kinds: np.ndarray,
    selection: Selection,
    workers: Workers,
) -> None:
    left = np.flatnonzero(kinds == dedupe.STAYS)
    names = list(rules.REGISTRY)
    codes = {"": 0, **{name: number for number, name in enumerate(names, 1)}}
    known: dict[str, int] = {}
    function = functools.partial(judge_batch, rules=selection.rules, field=selection.domains.field)
    done = 0
    columns = ("broken", "numbers", "places", "domains", "lengths")
    with (
        Reader(pool) as reader,
        step.columns(*columns) as files,
        step.path(SPOOL).open("wb") as spool,
        count_bar("rules", " conversations", len(left)) as bar,
    ):

        def lines() -> Iterator[Batch]:
            for start in range(0, len(left), CHUNK):
                yield from reader.batches(places[left[start : start + CHUNK]])

        for batch, found in workers.map(function, lines()):
            broken = np.array([codes[name] for name in found.broken], np.uint8)
            kept, own = broken == 0, batch.places.copy()
            if pool[own["file"][0]].compressed:
                for number in np.flatnonzero(kept):
                    own["offset"][number] = spool.tell()
                    spool.write(batch.lines[number])
            domain = [known.setdefault(name, len(known)) for name in found.domains]
            if len(known) > domains.MOST:
                raise ValueError(
                    f"the field {selection.domains.field!r} has over {domains.MOST} different values, such as "
                    f"{found.domains[-1]!r:.60}: it names no domain; set Domains.field to another, or to ''"
                )
            files["broken"].write(broken.tobytes())
            files["numbers"].write(left[done : done + len(own)][kept].astype(np.uint32).tobytes())
            files["places"].write(own[kept].tobytes())
            files["domains"].write(np.array(domain, np.uint16)[kept].tobytes())
            files["lengths"].write(found.lengths[kept].tobytes())
            done += len(own)
            bar.update(len(own))
    step.finish({"rules": names, "domains": list(known)})


class Left(NamedTuple):
    """The conversations that the rules leave, column by column; see `judge`."""

    numbers: np.ndarray
    places: np.ndarray
    domains: np.ndarray
    lengths: np.ndarray
    names: list[str]
    spool: Path

    def reader(self, pool: Sequence[PoolFile]) -> Reader:
        """Reads them in any order."""
        return Reader(pool, self.spool)


def left_by(judged: Step) -> Left:
    """What the rules leave."""
    kinds: dict[str, Any] = {"numbers": np.uint32, "places": PLACE, "domains": np.uint16, "lengths": np.float32}
    columns = {name: judged.column(name, kind) for name, kind in kinds.items()}
    return Left(**columns, names=judged.facts()["domains"], spool=judged.path(SPOOL))


def score(base: Path, pool: Sequence[PoolFile], judged: Step, selection: Selection, model: Base | None) -> Step:
    """The finished step with the arrays `states` (SCORED, ...) and `scores` (float32, NaN without one).

    Args:
      base: holds the folders of steps.
      pool: the files.
      judged: the rules.
      selection: the configuration.
      model: the checkpoint, if there is one.
    """
    scored = scores.lookup(selection.score.name, model is not None)
    depends = {
        "rules": judged.digest,
        "score": as_dict(selection.score),
        "precut": selection.precut,
        "fractions": dict(selection.domains.fractions),
        "fill": selection.precut is not None and selection.domains.fill,
        "base": None if model is None or not scored.base else [model.digest, as_dict(selection.base)],
    }
    step = Step(base, "scores", depends)
    if step.finished:
        return step
    step.clear()
    left = left_by(judged)
    states = np.full(len(left.numbers), SCORED, np.uint8)
    if selection.precut is not None:
        of_name, room = domains.places(selection.domains.fractions, left.names, selection.precut)
        states[~choose.precut(left.lengths, of_name[left.domains], room, selection.domains.fill)] = CUT
    found = np.full(len(states), np.nan, np.float32)
    numbers = np.flatnonzero(states == SCORED)
    if scored.name == scores.LENGTH:
        found[numbers] = left.lengths[numbers]
    else:
        with left.reader(pool) as reader, count_bar(scored.name, " conversations", len(numbers)) as bar:
            for shard, start in enumerate(range(0, len(numbers), SHARD)):
                part = numbers[start : start + SHARD]

                def compute(part: np.ndarray = part) -> np.ndarray:
                    return scored.function(reader.conversations(left.places[part]), model)

                found[part] = step.shard(f"{shard:06}", compute)
                bar.update(len(part))
    most = scored.most if selection.score.most is None else selection.score.most
    states[(states == SCORED) & np.isnan(found)] = UNREADABLE
    if most is not None:
        states[(states == SCORED) & (found > most)] = HIGH
    if selection.score.least is not None:
        states[(states == SCORED) & (found < selection.score.least)] = LOW
    step.save("states", states)
    step.save("scores", found)
    step.finish({})
    return step
