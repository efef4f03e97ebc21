"""The report of a selection: counts after every step, samples of what fell out, domains, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flm_jax.chat.conversation import Conversation
from flm_jax.records import counted

SAMPLES = 10
_TURN, _TEXT = 160, 480


class Fallen(NamedTuple):
    """How many fell out at a step, for one reason."""

    step: str
    reason: str
    number: int


def spread(numbers: np.ndarray) -> np.ndarray:
    """Ten of the numbers, evenly spaced; all, if there are fewer."""
    if len(numbers) <= SAMPLES:
        return numbers
    found: np.ndarray = numbers[np.linspace(0, len(numbers) - 1, SAMPLES).round().astype(np.int64)]
    return found


def cut(text: str, most: int) -> str:
    """A text on one line, with its middle left out where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - most // 4]} ... {text[-(most // 4) :]}"


def shown(conversation: Conversation) -> str:
    """A conversation on one line of readable length."""
    turns = [f"{m.role}: {cut(m.content, _TURN)}" for m in conversation.messages]
    return cut(" | ".join(turns if len(turns) <= 3 else [*turns[:2], "...", turns[-1]]), _TEXT)


def quantiles(scores: np.ndarray) -> dict[str, float]:
    """The lowest and the highest score, and what a tenth, half and nine tenths are below; {} without scores."""
    if not len(scores):
        return {}
    names = {"lowest": 0.0, "tenth": 0.1, "half": 0.5, "nine_tenths": 0.9, "highest": 1.0}
    return {name: float(np.quantile(scores, share, method="lower")) for name, share in names.items()}


def in_words(found: Mapping[str, float]) -> str:
    """Quantiles as a sentence."""
    if not found:
        return "no scores."
    numbers = {name: f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}" for name, value in found.items()}
    return (
        f"lowest {numbers['lowest']}, a tenth below {numbers['tenth']}, half below {numbers['half']}, a tenth above "
        f"{numbers['nine_tenths']}, highest {numbers['highest']}."
    )


def flow(lines: int, fallen: Sequence[Fallen]) -> list[dict[str, Any]]:
    """Rows of the table of steps: how many fell out for which reason, and how many were left then."""
    rows = []
    for one in fallen:
        lines -= one.number
        rows.append({"step": one.step, "reason": one.reason, "out": one.number, "left": lines})
    return rows


# How conversations are compared, by the kind of their features.
_COMPARED = {
    "none": "Conversations are not compared with each other.",
    "hashed": "They are compared by their words and pairs of words (features: hashed).",
    "hidden": "They are compared by the checkpoint's last hidden states (features: hidden).",
}


def markdown(report: Mapping[str, Any], meanings: Mapping[str, str], about_score: str) -> str:
    """The report as a page.

    Args:
      report: as it is in report.json.
      meanings: what each reason means.
      about_score: what the score is, such as 'bytes of the answers'.
    """
    wanted, chosen, score = report["selection"]["count"], report["chosen"], report["score"]
    first = {"high": "highest", "low": "lowest"}[score["order"]]
    idle = [row["reason"] for row in report["steps"] if not row["out"]]
    parts = [
        "# Selection",
        f"{chosen:,} of {counted(report['lines'], 'line')} {'is' if chosen == 1 else 'are'} chosen"
        + (f"; {wanted:,} were asked for, and no more are left." if chosen < wanted else "."),
        f"Conversations are taken by their score {score['name']} ({about_score}), the {first} first. "
        + _COMPARED[report["features"]],
        "![chosen conversations on top of a sample of the rest](selection.png)" if report["picture"] else "",
        "## What fell out",
        _table(
            ("step", "reason", "fell out", "left"),
            [
                (row["step"], row["reason"], f"{row['out']:,}", f"{row['left']:,}")
                for row in report["steps"]
                if row["out"]
            ],
        ),
        f"Nothing fell out for these reasons: {', '.join(idle)}." if idle else "",
        "## Domains",
        _table(
            ("domain", "kept by the rules", "share of these", "chosen", "share of the chosen", "places"),
            [
                (
                    name,
                    f"{row['before']:,}",
                    f"{row['before_share']:.1%}",
                    f"{row['chosen']:,}",
                    f"{row['chosen_share']:.1%}",
                    "what is left" if row["places"] is None else f"{row['places']:,}",
                )
                for name, row in report["domains"].items()
            ],
        ),
        "Places: how many Domains.fractions keeps for a domain; domains that it does not name share what is left. With "
        "Domains.fill, places that a domain cannot fill go to the others.",
        "## Scores",
        f"- {score['name']} of all that have a score: {in_words(score['all'])}\n"
        f"- {score['name']} of the chosen: {in_words(score['chosen'])}",
        "## Pool",
        _table(
            ("file", "bytes", "sha256"),
            [(file["name"], f"{file['bytes']:,}", file["sha256"][:16]) for file in report["pool"]],
        ),
        "## Samples of what fell out",
    ]
    for reason, fault in sorted(report["faults"].items()):
        parts.append(f"### {reason}")
        parts.append("\n".join(f"- {_fenced(example)}" for example in fault["examples"]))
    for reason, samples in report["samples"].items():
        meaning = meanings.get(reason, "")
        parts.append(f"### {reason}" + (f": {meaning}" if meaning else ""))
        parts.append("\n".join(f"- {_escaped(sample)}" for sample in samples))
    return "\n\n".join(part for part in parts if part) + "\n"


def _escaped(sample: Mapping[str, str]) -> str:
    like = f" (a duplicate of {sample['stays']}, which stays)" if "stays" in sample else ""
    return f"{sample['where']}{like}: {_fenced(sample['text'])}"


def _fenced(text: str) -> str:
    # A fence of any length inside the text would end a shorter one around it.
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
