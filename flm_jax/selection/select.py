"""Selects conversations from a pool: the steps in order, and what they leave in the output directory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flm_jax.chat.template import passed_over
from flm_jax.checkpoint.directory import locked
from flm_jax.data.workers import Workers
from flm_jax.files import draft_of, fsync, write_json
from flm_jax.progress import count_bar
from flm_jax.records import as_dict, completed, counted, differences
from flm_jax.records.foreign_json import read_json
from flm_jax.records.identity import LOCK
from flm_jax.selection import choose, dedupe, domains, judge, scores
from flm_jax.selection.base import Base
from flm_jax.selection.config import Selection
from flm_jax.selection.features import Features, kind_of
from flm_jax.selection.outcome import Outcome
from flm_jax.selection.pool import PoolFile, find_files
from flm_jax.selection.rules import check_rules
from flm_jax.selection.steps import Step

IDENTITY, SELECTED, REPORT, PAGE, PICTURE = (
    "selection.json",
    "selected.jsonl",
    "report.json",
    "report.md",
    "selection.png",
)
# The field of a chosen line that holds its scores, its domain and where it stood.
KEY = "selection"


def select(
    selection: Selection,
    inputs: Sequence[str | Path],
    output: str | Path,
    steps: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes the selection, and returns its report; a start after one that was killed goes on.

    Args:
      selection: the configuration.
      inputs: files and folders of conversations.
      output: the directory for the results.
      steps: where results of steps are kept, for several selections from one pool; None: in the output directory.
      say: called with a line of text after each step.

    Returns:
      JSON-able, as in report.json.

    Raises:
      FileNotFoundError: an input does not exist.
      LineError: too many lines are faulty.
      ValueError: the configuration does not fit together or to the pool, or the directory belongs to another selection.
      CheckpointError: another process selects into this directory, or the base's checkpoint is damaged.
    """
    output = Path(output).expanduser()
    check_rules(selection.rules)
    scores.lookup(selection.score.name, selection.base is not None)
    kind_of(selection.diversity, selection.base is not None)
    if not selection.domains.field:
        domains.check_domains(selection.domains, [])
    pool = find_files(inputs, output)
    model = None if selection.base is None else Base(selection.base)
    identity = {
        "selection": as_dict(selection),
        "pool": [file.record() for file in pool],
        "base": None if model is None else model.digest,
    }
    _check(output, identity)
    with locked(output):
        if (output / REPORT).exists():
            say(f"{output} holds this selection already.")
            return dict(read_json(output / REPORT, finite=False))
        if model is not None:
            encoder = model.encoder
            if other := passed_over(encoder.template, encoder.vocabulary, "ScoringBase.template"):
                say(other)
        write_json(output / IDENTITY, identity)
        base = Path(steps).expanduser() if steps is not None else output / "steps"
        return _select(selection, pool, model, output, base, say)


def _check(output: Path, identity: dict[str, Any]) -> None:
    """Checks that a directory is new, empty, or this selection's.

    Raises:
      ValueError: it is not.
    """
    if (output / IDENTITY).exists():
        before = completed(read_json(output / IDENTITY, finite=False))
        found = list(differences(before, json.loads(json.dumps(identity))))
        if found:
            more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
            raise ValueError(
                f"{output} holds another selection: {'; '.join(found[:3])}{more}. Nothing was changed. Give this one a "
                f"new --output; with --steps={output / 'steps'} it uses the steps that are the same."
            )
    elif output.exists() and (not output.is_dir() or any(path.name != LOCK for path in output.iterdir())):
        raise ValueError(f"{output} holds files but no {IDENTITY}: give --output a new or empty directory.")


def _select(
    selection: Selection, pool: list[PoolFile], model: Base | None, output: Path, base: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    since = time.monotonic()

    def done(what: str) -> None:
        nonlocal since
        now = time.monotonic()
        say(f"{what} ({now - since:.1f} s)")
        since = now

    with Workers(selection.processes, setting="Selection.processes") as workers:
        indexed = dedupe.index(base, pool, selection.duplicates.near, selection.most_faulty, workers)
        faulty = sum(fault["count"] for fault in indexed.facts()["faults"].values())
        read = counted(indexed.facts()["conversations"], "conversation")
        done(f"read {read}, {counted(faulty, 'faulty line')}")
        kinds = dedupe.duplicates(base, indexed, selection.duplicates)
        exact, near = kinds.facts()["exact"], kinds.facts()["near"]
        done(f"{counted(exact, 'exact duplicate')} and {counted(near, 'near duplicate')}")
        judged = judge.judge(base, pool, indexed, kinds, selection, workers)
    left = judge.left_by(judged)
    done(counted(len(left.numbers), "conversation keeps the rules", "conversations keep the rules"))
    scored = judge.score(base, pool, judged, selection, model)
    done(counted(int((scored.array("states") == judge.SCORED).sum()), "has a score", "have a score"))
    step = Step(base, "choice", {"scores": scored.digest, **_depends(selection, model)})
    with left.reader(pool) as reader:
        found = None
        if kind_of(selection.diversity, model is not None) != "none" and len(left.numbers):
            found = Features(selection.diversity, step, reader, left, model)
        outcome = Outcome(
            selection, pool, indexed, kinds, judged, left, scored, _chosen(selection, step, scored, left, found)
        )
        done(counted(len(outcome.choice.chosen), "is chosen", "are chosen"))
        _write_lines(output / SELECTED, outcome, reader)
        report = outcome.report(found)
        if found is not None and len(outcome.choice.chosen):
            content = outcome.picture(found)
            draft = draft_of(output / PICTURE)
            draft.write_bytes(content)
            draft.replace(output / PICTURE)
    outcome.write_page(output / PAGE, report)
    write_json(output / REPORT, report)  # last: it says that everything is there
    done(f"written to {output}")
    return report


def _depends(selection: Selection, model: Base | None) -> dict[str, Any]:
    return {
        "count": selection.count,
        "domains": as_dict(selection.domains),
        "diversity": as_dict(selection.diversity),
        "base": None if model is None else [model.digest, as_dict(selection.base)],
    }


def _chosen(
    selection: Selection, step: Step, scored: Step, left: judge.Left, features: Features | None
) -> choose.Choice:
    """The choice, from its step if that is finished."""
    if not step.finished:
        step.clear()
        values = scored.array("scores")
        numbers = np.flatnonzero(scored.array("states") == judge.SCORED)
        high = (selection.score.order or scores.REGISTRY[selection.score.name].order) == "high"
        of_name, room = domains.places(selection.domains.fractions, left.names, selection.count)
        with count_bar("choosing", " conversations", selection.count) as bar:
            found = choose.choose(
                numbers[choose.ranking(values[numbers], high)],
                of_name[left.domains],
                room,
                None if features is None else features.block,
                selection.diversity.threshold,
                selection.domains.fill,
                bar.update,
            )
        step.save("states", found.states)
        step.save("chosen", found.chosen)
        step.finish({})
    return choose.Choice(step.array("states"), step.array("chosen"))


def _write_lines(path: Path, outcome: Outcome, reader: Any) -> None:
    """Writes the chosen conversations, the first chosen first."""
    draft, name = draft_of(path), outcome.selection.score.name
    values = outcome.scored.array("scores")
    try:
        with draft.open("w", encoding="utf-8") as file:
            for number in outcome.choice.chosen.tolist():
                (conversation,) = reader.conversations(outcome.left.places[number : number + 1])
                about = {
                    name: float(values[number]),
                    "domain": outcome.left.names[outcome.left.domains[number]],
                    "source": outcome.where(outcome.left.places[number]),
                }
                record = {**conversation.record(), KEY: about}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        fsync(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
