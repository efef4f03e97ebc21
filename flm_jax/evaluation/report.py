"""The report of judged answers: as a record, as text for a terminal, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from flm_jax.data.json_lines import in_words
from flm_jax.evaluation import table
from flm_jax.evaluation.compare import RESAMPLES, Table
from flm_jax.evaluation.judges import Judgement
from flm_jax.records import counted

REPORT = "report"


def as_record(settings: Mapping[str, Any], tables: Sequence[Table], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The report, JSON-able.

    Args:
      settings: what was judged, and how.
      tables: the results.
      judgements: what they are made of; the unjudged ones are counted by their reasons.
    """
    reasons = Counter(judgement.unjudged for judgement in judgements if judgement.unjudged)
    return {
        **settings,
        "judged": sum(judgement.own is not None for judgement in judgements),
        "unjudged": dict(reasons.most_common()),
        "tables": [found.record() for found in tables],
    }


def as_text(report: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """The report for a terminal."""
    parts = [table.as_text(found) for found in tables]
    return "\n\n".join([*parts, "\n".join(_notes(report, tables))])


def as_markdown(report: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """The report as a page."""
    made, other = report["answers"], report["reference_answers"]
    what = made.get("file") or f"{made['checkpoint']}, step {made['step']}, template {made['template']['name']}"
    lines = [
        f"- questions: {report['questions']['path']}",
        f"- answers: {what}",
        *([f"- reference system: {other}"] if other else []),
        f"- judge: {report['judge']['judge']}",
    ]
    notes = [f"- {note}" for note in _notes(report, tables)]
    parts = [table.as_markdown(found) for found in tables]
    return "\n\n".join(["# Answers by category", "\n".join(lines), *parts, "\n".join(notes)]) + "\n"


def _notes(report: Mapping[str, Any], tables: Sequence[Table]) -> list[str]:
    """What one must know to read the tables, a sentence each."""
    rows = [row for made in tables for row in (made.overall, *made.rows)]
    found = [
        "n: questions whose answer was judged.",
        f"95 %: the interval that holds the results of 95 % of {RESAMPLES:,} bootstrap samples of the questions, seed "
        f"{report['seed']}.",
    ]
    if any(row.relative is not None for row in rows):
        found.append(
            "relative: the sum of the values divided by that of the reference system, on the questions on which both "
            "were judged."
        )
    if any(row.pairs for row in rows):
        found.append("win/tie/loss: questions on which the answer is better than the reference's, as good, worse.")
    if any(made.overall.disagreed for made in tables):
        found.append("disagreed: ties because the verdict changed with the order of the two answers.")
    if report["unjudged"]:
        theirs = any(reason.startswith("reference: ") for reason in report["unjudged"])
        whose = "the answer, or the one to compare it with ('reference')," if theirs else "the answer"
        found.append(f"unjudged: questions on which {whose} was not judged: {in_words(report['unjudged'].items())}.")
    if left_out := report["questions"]["left_out"]:
        number = counted(left_out, "question")
        found.append(
            f"left out: {number} of the kind 'judged', for which there are no rules; another --judge judges it."
        )
    if faulty := report["faulty_lines"]:
        found.append(f"faulty lines left out: {in_words(faulty.items())}.")
    if spent := report["judge"].get("this_run"):
        found.append(
            f"the judge: {counted(spent['requests'], 'request')} now, "
            f"{counted(report['judge']['kept'], 'verdict')} kept "
            f"from before; {counted(spent['prompt_tokens'], 'token')} of prompts, {spent['reply_tokens']:,} of replies."
        )
    return found
