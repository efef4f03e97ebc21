"""The page and the plot of `study_sft.py`, from the results of its arms."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import disk, sft_data

Result = Mapping[str, Any]
EQUAL = {"passes": "equal passes over each set", "steps": "equal optimizer steps"}
SETS = ("all", "random", "longest", "selected")


def accuracies(judged: Mapping[str, Any]) -> dict[str, float]:
    """The accuracy per category, and overall, of the report of `judge_answers`."""
    (table,) = judged["tables"]
    rows = {row["category"]: row["mean"] for row in table["categories"]}
    return {**rows, "overall": table["overall"]["mean"]}


def line(found: Result) -> str:
    """One result in a line of text."""
    if "answer_loss" not in found:
        return f"rate {found['rate']:g}, own held-out loss {found['own_heldout_loss']:.4f}"
    overall = found["accuracy"]["overall"]
    return (
        f"answers {found['answer_loss']:.3f} nats, {overall:.1%} right, text {found['bits_per_byte']:.3f} bits per byte"
    )


def selection_line(asked: int, report: Mapping[str, Any], answers: Sequence[str], pool: Sequence[str]) -> str:
    """A line about a selection: what it holds and what fell out, from its report and from the last answers of both."""
    (similar,) = (step for step in report["steps"] if step["reason"] == "too similar")
    broken, in_pool = (found.count(sft_data.BROKEN_OFF) / len(found) for found in (answers, pool))
    scored = similar["out"] + similar["left"]
    return (
        f"- of {asked:,} asked for {report['chosen']:,}; {similar['out']:,} of {scored:,} conversations with a score "
        f"fell out as too similar to a chosen one; {broken:.1%} of the chosen break off, {in_pool:.1%} of the pool."
    )


def _groups(results: Sequence[Result]) -> dict[tuple[str, str, int], list[Result]]:
    """The results by what is equal, set and size; several seeds of a random set are one group."""
    found: dict[tuple[str, str, int], list[Result]] = {}
    for one in results:
        found.setdefault((one["equal"], one["set"], one["size"]), []).append(one)
    return found


def _spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """The mean; of several values also the least and the greatest."""
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({scale * min(values):.{digits}f} to {scale * max(values):.{digits}f})"


def _table(results: Sequence[Result], equal: str) -> str:
    domains = [name for name in results[0]["accuracy"] if name != "overall"]
    head = ["set", "N", "steps", "passes", "answer loss", "right", *domains, "bits per byte"]
    rows = [head, ["---"] * len(head)]
    for (kind, name, size), found in _groups(results).items():
        if name != "base" and kind != equal:
            continue
        accuracy = {d: [one["accuracy"][d] for one in found] for d in ("overall", *domains)}
        rows.append(
            [
                name,
                "" if name == "base" else f"{f'{size:,}' if size else 'all'} ({found[0]['conversations']:,})",
                "" if name == "base" else f"{statistics.mean(one['steps'] for one in found):.0f}",
                "" if name == "base" else f"{statistics.mean(one['passes'] for one in found):.1f}",
                _spread([one["answer_loss"] for one in found], 3),
                _spread(accuracy["overall"], 1, 100),
                *(f"{100 * statistics.mean(accuracy[d]):.0f}" for d in domains),
                f"{statistics.mean(one['bits_per_byte'] for one in found):.3f}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _verdict(results: Sequence[Result]) -> str:
    """For each size, selected and longest against the random samples, in sentences that follow from the figures."""
    groups, said = _groups(results), []
    for (equal, name, size), found in groups.items():
        if name not in ("selected", "longest"):
            continue
        random = groups[equal, "random", size]
        mine, others = found[0]["accuracy"]["overall"], [one["accuracy"]["overall"] for one in random]
        where = (
            "above all random samples"
            if mine > max(others)
            else "below all random samples"
            if mine < min(others)
            else "within the random samples"
        )
        loss, losses = found[0]["answer_loss"], [one["answer_loss"] for one in random]
        lower = "lower" if loss < min(losses) else "higher" if loss > max(losses) else "within theirs"
        said.append(f"- {name}, N = {size:,}, {EQUAL[equal]}: accuracy {where}; answer loss {lower}.")
    tuned = [one for one in results if one["set"] != "base"]
    best = max(tuned, key=lambda one: one["accuracy"]["overall"])
    least = min(tuned, key=lambda one: one["bits_per_byte"])
    said.append(
        f"- Most right: {best['set']}, {best['conversations']:,} conversations, {EQUAL[best['equal']]}, with "
        f"{100 * best['accuracy']['overall']:.1f} per cent. Least forgotten: {least['set']}, "
        f"{least['conversations']:,} conversations, {EQUAL[least['equal']]}, with "
        f"{least['bits_per_byte']:.3f} bits per byte."
    )
    return "\n".join(said)


PAGE = """# Which conversations to tune on: a study

    {command}

The base is {base}.
The pool has {pool:,} conversations in five domains, made from the Python standard library and by computation
(`benchmarks/sft_data.py`), with faults as real pools have them:
{faults}.
What was expected before the first run, from what is published (2410.09335): on small models, selected samples within
the noise of random ones, or above it, since this pool has faults that selection removes.

- Sets: all of the pool; N random conversations, {seeds} samples, of which the tables show the mean and the range; the N
  with the longest answers; N selected by `flm_jax.selection`: no duplicates, rules on the text, IFD under the base, no
  two too similar in the base's hidden states, as many of each domain. 1 % of each set is held out for the run's own
  curve.
- Answer loss: nats per token of the answers of {heldout} conversations that are held out, about functions that the pool
  does not mention. Right: per cent of {questions} questions, answered greedily and checked by exact rules; of
  signatures and docstrings, the likeliest of four answers (25 per cent by chance). Bits per byte: of held-out plain
  text {text}; it rises by what is forgotten.
- All arms have the same learning rate, {rate:g}: the best of {rates}
  for a random sample that no arm uses, by the loss of its own held-out conversations ({losses}).
- N is what was asked for; in brackets what a set holds, without what is held out or does not fit. Selection finds fewer
  where the rest is too similar to what it has.

## Equal passes over each set

{passes}

## Equal optimizer steps

{steps}

![Answer loss and accuracy against the number of conversations]({plot})

## What came out

{verdict}

One run per set, but for random ones, and one pool: the ranges of the random samples say how much a difference means.
The paper says "less is more" of a base of 52 billion parameters. What was selected:

{selections}

{machine}.
"""


def page(
    results: Sequence[Result],
    sweep: Sequence[Result],
    command: str,
    base: str,
    text: str,
    sizes: Mapping[str, int],
    plot: str,
    selections: Sequence[str],
) -> str:
    """The page in Markdown.

    Args:
      results: of every arm.
      sweep: of the learning rates.
      command: that makes the page.
      base: what was tuned, in words.
      text: what bits per byte are measured on, in words.
      sizes: number of lines of the data's files, by name.
      plot: file name of the plot.
      selections: a line about each selection, see `selection_line`.
    """
    best = min(sweep, key=lambda found: found["own_heldout_loss"])
    return PAGE.format(
        command=command,
        base=base,
        text=text,
        pool=sizes["pool"],
        heldout=sizes["heldout"],
        questions=sizes["questions"],
        faults=", ".join(f"{share:.0%} {fault}" for fault, share in sft_data.FAULTS.items()),
        seeds=len({one["seed"] for one in results if one["set"] == "random"}),
        rate=best["rate"],
        rates=", ".join(f"{found['rate']:g}" for found in sweep),
        losses=", ".join(f"{found['own_heldout_loss']:.3f}" for found in sweep),
        passes=_table(results, "passes"),
        steps=_table(results, "steps"),
        plot=plot,
        verdict=_verdict(results),
        selections="\n".join(selections),
        machine=disk.machine(),
    )


def plot(results: Sequence[Result], path: Path) -> None:
    """Draws answer loss and accuracy against the number of conversations, for both comparisons."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(SETS, ("#444444", "#1f77b4", "#ff7f0e", "#2ca02c"), strict=True))
    measures = {
        "answer loss, nats per token": lambda r: r["answer_loss"],
        "right, %": lambda r: 100 * r["accuracy"]["overall"],
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, sharey="row", layout="constrained")
    (base,) = (one for one in results if one["set"] == "base")
    for column, (equal, title) in enumerate(EQUAL.items()):
        for row, (label, value) in enumerate(measures.items()):
            axis = axes[row][column]
            for name in SETS:
                points = [one for one in results if one["equal"] == equal and one["set"] == name]
                axis.plot(
                    [one["conversations"] for one in points],
                    [value(one) for one in points],
                    linestyle="none",
                    marker="o" if name == "random" else "D",
                    label=name,
                    color=colours[name],
                    alpha=0.6 if name == "random" else 1.0,
                )
            axis.axhline(value(base), color="#bbbbbb", linestyle="--", label="base, not tuned")
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(title)
            else:
                axis.set_xlabel("conversations")
            if column == 0:
                axis.set_ylabel(label)
    axes[0][0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
