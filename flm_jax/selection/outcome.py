"""The outcome of a selection: what every step left of the pool, as a report and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flm_jax.files import atomic_write
from flm_jax.records import as_dict
from flm_jax.selection import choose, dedupe, domains, judge, picture, report, rules, scores
from flm_jax.selection.config import Selection
from flm_jax.selection.features import Features
from flm_jax.selection.pool import PoolFile, Reader
from flm_jax.selection.report import Fallen
from flm_jax.selection.steps import Step

# Chosen conversations in the picture: more would hide each other.
SHOWN = 4000
# What the states of a scored and of a chosen conversation mean.
_SCORES = {
    judge.CUT: ("cut before scoring", "answers shorter than those of Selection.precut others of the domain"),
    judge.UNREADABLE: ("no score", "the template refuses it, or its prompt is longer than what the model reads"),
    judge.LOW: ("score too low", "below SampleScore.least"),
    judge.HIGH: ("score too high", "above SampleScore.most; for ifd: the prompt does not help"),
}
_CHOICES = {
    choose.UNREADABLE: ("unreadable", "the template refuses it"),
    choose.SIMILAR: ("too similar", "a chosen one with a better score is like it"),
    choose.NO_PLACE: ("domain full", "the places of its domain are taken"),
    choose.WAITING: ("not needed", "enough were chosen before its turn"),
}


class Outcome(NamedTuple):
    """The results of all steps."""

    selection: Selection
    pool: Sequence[PoolFile]
    indexed: Step
    kinds: Step
    judged: Step
    left: judge.Left
    scored: Step
    choice: choose.Choice

    def where(self, place: np.void) -> str:
        """The file's name within the pool, and the line."""
        return f"{self.pool[place['file']].name}:{place['line']}"

    def fallen(self) -> list[tuple[str, str, str, np.ndarray]]:
        """Step, reason, meaning and numbers in the pool of all that fell out, in the order of the steps."""
        kinds = self.kinds.array("kinds")
        found = [
            ("duplicates", name, meaning, np.flatnonzero(kinds == kind))
            for kind, name, meaning in (
                (dedupe.EXACT, "exact duplicate", "equal up to case, spaces and system turns"),
                (dedupe.NEAR, "near duplicate", "most shingles in common, by the estimate of MinHash"),
            )
        ]
        stay = np.flatnonzero(kinds == dedupe.STAYS)
        broken = self.judged.column("broken", np.uint8)
        for number, name in enumerate(self.judged.facts()["rules"], 1):
            found.append(("rules", name, rules.REGISTRY[name].meaning, stay[broken == number]))
        states = self.scored.array("states")
        for state, (name, meaning) in _SCORES.items():
            found.append(("scores", name, meaning, self.left.numbers[states == state]))
        for state, (name, meaning) in _CHOICES.items():
            own = (states == judge.SCORED) & (self.choice.states == state)
            found.append(("choice", name, meaning, self.left.numbers[own]))
        return found

    def samples(self, wanted: np.ndarray) -> dict[int, dict[str, str]]:
        """Where conversations of the pool stand and how they read, by number."""
        places = dedupe.places(self.indexed)
        found = {}
        with Reader(self.pool) as reader:
            for number in np.unique(wanted).tolist():
                place = places[number : number + 1]
                (conversation,) = reader.conversations(place)
                found[number] = {"where": self.where(place[0]), "text": report.shown(conversation)}
        return found

    def report(self, features: Features | None) -> dict[str, Any]:
        """The report, JSON-able."""
        fallen = self.fallen()
        stays, places = self.kinds.array("stays"), dedupe.places(self.indexed)
        texts = self.samples(np.concatenate([report.spread(numbers) for _, _, _, numbers in fallen]))
        faults = self.indexed.facts()["faults"]
        rows = [Fallen("reading", reason, fault["count"]) for reason, fault in sorted(faults.items())]
        samples: dict[str, list[dict[str, str]]] = {}
        for step, reason, _, numbers in fallen:
            chosen = [dict(texts[number]) for number in report.spread(numbers).tolist()]
            if step == "duplicates":
                for number, sample in zip(report.spread(numbers).tolist(), chosen, strict=True):
                    sample["stays"] = self.where(places[stays[number]])
            rows.append(Fallen(step, reason, len(numbers)))
            if chosen:
                samples[reason] = chosen
        lines = len(stays) + sum(fault["count"] for fault in faults.values())
        values = self.scored.array("scores")
        scored = scores.REGISTRY[self.selection.score.name]
        return {
            "selection": as_dict(self.selection),
            "pool": [file.record() for file in self.pool],
            "lines": lines,
            "chosen": len(self.choice.chosen),
            "steps": report.flow(lines, rows),
            "domains": self.domains(),
            "score": {
                "name": scored.name,
                "order": self.selection.score.order or scored.order,
                "all": report.quantiles(values[~np.isnan(values)]),
                "chosen": report.quantiles(values[self.choice.chosen]),
            },
            "features": "none" if features is None else features.kind,
            "picture": features is not None and len(self.choice.chosen) > 0,
            "faults": faults,
            "samples": samples,
        }

    def domains(self) -> dict[str, dict[str, Any]]:
        """Per domain: how many the rules leave, how many are chosen, and how many places it has."""
        names, chosen = self.left.names, self.left.domains[self.choice.chosen]
        before = np.bincount(self.left.domains, minlength=len(names)).tolist()
        after = np.bincount(chosen, minlength=len(names)).tolist()
        fractions = self.selection.domains.fractions
        of_name, room = domains.places(fractions, names, self.selection.count)
        found = {}
        for number in sorted(range(len(names)), key=lambda number: (-after[number], names[number])):
            found[names[number]] = {
                "before": before[number],
                "before_share": before[number] / max(sum(before), 1),
                "chosen": after[number],
                "chosen_share": after[number] / max(sum(after), 1),
                "places": int(room[of_name[number]]) if names[number] in fractions else None,
            }
        return found

    def picture(self, features: Features) -> bytes:
        """The picture as PNG."""
        most = min(SHOWN, len(self.choice.chosen))
        numbers = self.choice.chosen[np.linspace(0, len(self.choice.chosen) - 1, most).round().astype(np.int64)]
        counts = np.bincount(self.left.domains[self.choice.chosen], minlength=len(self.left.names)).tolist()
        rest = features.of_sample[~np.isnan(features.of_sample[:, 0])]
        return picture.draw(rest, features.of(numbers, "picture"), self.left.domains[numbers], self.left.names, counts)

    def write_page(self, path: Path, found: dict[str, Any]) -> None:
        """Writes the report as text."""
        meanings = {reason: meaning for _, reason, meaning, _ in self.fallen()}
        atomic_write(path, report.markdown(found, meanings, scores.REGISTRY[self.selection.score.name].meaning))
