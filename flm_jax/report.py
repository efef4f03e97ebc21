"""The report of a run: report.json for programs, report.md and loss.png for readers."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flm_jax import costs
from flm_jax.checkpoint import CheckpointError
from flm_jax.checkpoint_growth.record import GrowthRecord
from flm_jax.files import atomic_write
from flm_jax.guards import Spike, batch_text, spike_text
from flm_jax.recipe import ResolvedStage
from flm_jax.records import as_dict, from_dict
from flm_jax.records.foreign_json import check, field
from flm_jax.source_checkpoint import POSITION
from flm_jax.tracking import recorded_forks

_LEFT_OUT = ("config_before", "config_after", "verification")

# The fields of a measurement, and of a step that was skipped.
_EVAL = {"stage": str, "step": int, "tokens": int, "flops": float, "loss": float, "bits_per_byte": float}
_SKIPPED = {"stage": str, "step": int}
# What guards have found; histories of runs in which they have found nothing lack it.
_SPIKE = {"since": int, "what": str, "value": float, "median": float, "bound": float}
_GUARDED = {
    "rewinds": {**_SKIPPED, "to": int, **_SPIKE, "windows": list},
    "alarms": {**_SKIPPED, "grad_norm": float, "median": float, "windows": list},
}


def read_history(meta: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The measurements, growths and skipped steps of a run so far, from the meta.json of its checkpoint.

    Raises:
      ValueError: they are missing, or not as a run records them.
    """
    history = field(dict(meta), "history", dict, "it")
    found = {name: list(field(history, name, list, "its history")) for name in ("evals", "growths", "skipped")}
    found |= {name: list(field(history, name, list, "its history")) for name in _GUARDED if name in history}
    for name, fields in {"evals": _EVAL, "skipped": _SKIPPED, **_GUARDED}.items():
        for number, entry in enumerate(found.get(name, [])):
            where = f"entry {number} of its {name}"
            for key, kind in fields.items():
                field(check(entry, dict, where), key, kind, where)
            if name != "evals":  # whose sources are losses
                _check_batch(entry, where)
    for number, entry in enumerate(found["growths"]):
        _measured(GrowthRecord.from_record(check(entry, dict, f"entry {number} of its growths")))
    if "forks" in history:
        found["forks"] = [fork.record() for fork in recorded_forks(history, "its history")]
    return found


def _check_batch(entry: Mapping[str, Any], where: str) -> None:
    """Checks the windows and sources of a batch in an entry, if it names any.

    Raises:
      ValueError: they are not as `batch_record` returns them.
    """
    windows = check(entry.get("windows", [0, 0]), list, f"{where}: its windows")
    if len(windows) != 2:
        raise ValueError(f"{where}: its windows are {len(windows)}, not the first and the last")
    for number in (*windows, *check(entry.get("sources", {}), dict, f"{where}: its sources").values()):
        check(number, int, f"{where}: a count of windows")


def read_run(meta: Mapping[str, Any], blobs: Mapping[str, bytes], where: Path) -> tuple[dict[str, list[Any]], bytes]:
    """The history of a run, and its position in the data, from what a checkpoint of it holds.

    Raises:
      CheckpointError: it is not a run's checkpoint.
    """
    try:
        history = read_history(meta)
    except ValueError as error:
        raise CheckpointError(f"{where} does not record a run: {error}.") from error
    if POSITION not in blobs:
        raise CheckpointError(f"{where} does not record a run: it has no position in the data.")
    return history, blobs[POSITION]


def summary(
    stages: Sequence[ResolvedStage],
    history: Mapping[str, Any],
    data: Mapping[str, Any],
    bytes_per_token: float,
    context: int,
    sample: str,
) -> dict[str, Any]:
    """The report as JSON-able data.

    In a stage, `tokens` and `flops` are those of the stage alone, with its teacher; `total_tokens` and `total_flops`
    include all earlier stages.
    """
    rows, tokens, flops = [], 0, 0
    for s in stages:
        cost = s.cost(context)
        own, own_flops = cost.tokens(s.steps), cost.flops(s.steps)
        tokens, flops = tokens + own, flops + own_flops
        evals = [e for e in history["evals"] if e["stage"] == s.name]
        rows.append(
            {
                "name": s.name,
                "config": as_dict(s.cfg),
                "params": costs.param_count(s.cfg),
                "trained_params": s.trained.count,
                "steps": s.steps,
                "batch_size": s.batch_size,
                "tokens": own,
                "flops": own_flops,
                "total_tokens": tokens,
                "total_flops": flops,
                "eval_loss": evals[-1]["loss"],
                "eval_bits_per_byte": evals[-1]["bits_per_byte"],
                **({"sources": evals[-1]["sources"]} if "sources" in evals[-1] else {}),
                **_teacher(s, context),
            }
        )
    growths = [_growth(GrowthRecord.from_record(record)) for record in history["growths"]]
    return {
        "stages": rows,
        "growths": growths,
        "evals": history["evals"],
        "skipped_steps": history["skipped"],
        **({"forks": history["forks"]} if "forks" in history else {}),
        **{name: history.get(name, []) for name in _GUARDED},
        "data": data,
        "context": context,
        "sample": sample,
        "bytes_per_token": bytes_per_token,
    }


def _teacher(stage: ResolvedStage, context: int) -> dict[str, Any]:
    """The report's entry of a stage's teacher, if it has one: `flops` of its forward passes are among the stage's."""
    if stage.teacher is None:
        return {}
    cost, params = stage.cost(context), costs.param_count(stage.teacher.cfg)
    return {"teacher": {"params": params, "steps": stage.teacher_steps, "flops": cost.teacher_flops(stage.steps)}}


def _growth(growth: GrowthRecord) -> dict[str, Any]:
    """The report's entry of a growth: its record and main measurements as one flat dict, without configurations."""
    recorded = {name: value for name, value in growth.record().items() if name not in _LEFT_OUT}
    return {**recorded, "method": growth.growth.name, **_measured(growth)}


def _measured(growth: GrowthRecord) -> dict[str, Any]:
    """The main measurements of a growth.

    Raises:
      ValueError: one is missing or has the wrong type.
    """
    found = dict(growth.verification)

    def measured(group: str, name: str, kind: type = float) -> Any:
        where = f"the verification of the growth to {growth.stage!r}"
        return field(field(found, group, dict, where), name, kind, f"{where}, {group}")

    return {
        "preserving": field(found, "preserving", bool, "a growth's verification"),
        "max_abs_logit_diff": measured("logits", "max_abs"),
        "max_rel_logit_diff": measured("logits", "max_rel"),
        "layer_diffs": measured("hidden", "max_rel_by_layer", list),
        "eval_loss_before": measured("eval_loss", "before"),
        "eval_loss_after": measured("eval_loss", "after"),
    }


class Curve(NamedTuple):
    """The held-out losses of a stage.

    Attributes:
      label: the stage and its size.
      flops: training FLOPs of the run at each measurement, all stages.
      losses: nats per token.
      grown: the method of the growth that the stage began with, if it did.
    """

    label: str
    flops: list[float]
    losses: list[float]
    grown: str | None


def curves(stages: Sequence[ResolvedStage], history: Mapping[str, Any], context: int) -> list[Curve]:
    """The curve of each stage that has been measured so far."""
    grown = {record["stage"]: GrowthRecord.from_record(record).growth.name for record in history["growths"]}
    found, before = [], 0.0
    for s in stages:
        points = [(before + e["flops"], float(e["loss"])) for e in history["evals"] if e["stage"] == s.name]
        label = f"{s.name}: {costs.count(costs.param_count(s.cfg))} parameters"
        found += [Curve(label, [x for x, _ in points], [y for _, y in points], grown.get(s.name))] if points else []
        before += s.cost(context).flops(s.steps)
    return found


def forked_at(stages: Sequence[ResolvedStage], history: Mapping[str, Any], context: int) -> list[tuple[str, float]]:
    """For each fork that led to a run, where it was, in words, and the training FLOPs until there."""
    found: list[tuple[str, float]] = []
    for fork in recorded_forks(history, "the history"):
        place = next(place for place, s in enumerate(stages) if s.name == fork.stage)
        before = sum(s.cost(context).flops(s.steps) for s in stages[:place])
        found.append((f"forked at step {fork.step}", before + stages[place].cost(context).flops(fork.step)))
    return found


def plot(lines: Sequence[Curve], file: Path, forks: Sequence[tuple[str, float]] = ()) -> None:
    """Writes a plot of held-out loss against training FLOPs over all stages, with growths and forks marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        axes.plot(line.flops, line.losses, marker="o", markersize=3, label=line.label)
        if line.grown is not None:
            axes.axvline(line.flops[0], color="grey", linewidth=0.8, linestyle="--")
            axes.annotate(
                f"grown by {line.grown}",
                (line.flops[0], line.losses[0]),
                xytext=(6, 28),
                textcoords="offset points",
                fontsize=9,
                color="dimgrey",
            )
    for name, flops in forks:
        axes.axvline(flops, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(
            name,
            (flops, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -10),
            textcoords="offset points",
            fontsize=9,
            color="dimgrey",
        )
    axes.set_xlabel("training FLOPs, all stages")
    axes.set_ylabel("held-out loss (nats per token)")
    # The first point is the loss of a random model; an axis that includes it would flatten the other points.
    losses = sorted(loss for line in lines for loss in line.losses if math.isfinite(loss))
    if len(losses) > 4:
        axes.set_ylim(losses[0] - 0.15, losses[-2] + 0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    atomic_write(file, image.getvalue())


def markdown(result: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Report", "", "![held-out loss](loss.png)", "", "## Stages", ""]
    lines += ["| stage | shape | parameters | steps | tokens | FLOPs | held-out loss | bits per byte |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r['name']} | {costs.shape_line(from_dict(r['config']))} | {_parameters(r)} | {r['steps']} | "
        f"{costs.count(r['tokens'])} | {r['flops']:.3g} | {r['eval_loss']:.4f} | {r['eval_bits_per_byte']:.3f} |"
        for r in result["stages"]
    ]
    last = result["stages"][-1]
    lines += ["", f"All stages: {costs.count(last['total_tokens'])} tokens and {last['total_flops']:.3g} FLOPs."]
    for r in result["stages"]:
        if taught := r.get("teacher"):
            size, flops = costs.count(taught["params"]), f"{taught['flops']:.3g}"
            until = f"Until step {taught['steps']}, {r['name']} also learns from"
            lines += ["", f"{until} a teacher of {size} parameters: {flops} of its FLOPs."]
    lines += _sources(result["stages"])
    if forks := recorded_forks(result, "the report"):
        lines += ["", "## Forks", ""]
        for fork in forks:
            first, *rest = fork.lines()
            lines += [f"- {first}", *(f"  - {line.strip()}" for line in rest)]
    if result["growths"]:
        lines += [
            "",
            "## Growths",
            "",
            "Measured at the growth, in float32, before the first step of the larger model.",
            "",
        ]
        lines += ["| to | method | parameters | logits: max difference | relative | held-out loss before | after |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [
            f"| {g['stage']} | {g['method']} | {costs.count(g['params_before'])} -> {costs.count(g['params_after'])} | "
            f"{g['max_abs_logit_diff']:.2e} | {g['max_rel_logit_diff']:.2e} | {g['eval_loss_before']:.6f} | "
            f"{g['eval_loss_after']:.6f} |"
            for g in result["growths"]
        ]
    lines += _guarded(result)
    lines += ["", "## Data", "", "```json", json.dumps(result["data"], indent=1), "```"]
    lines += ["", "## Sample", "", "```", result["sample"], "```", ""]
    return "\n".join(lines)


def _sources(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines about the sources of a mixture: the held-out loss of each at the end of every stage."""
    last = rows[-1].get("sources")
    if not last:
        return []
    lines = ["", "## Sources", "", "Held-out loss of each source at the end of each stage.", ""]
    lines += [f"| source | {' | '.join(r['name'] for r in rows)} | bits per byte |", "|---" * (len(rows) + 2) + "|"]
    for name, own in last.items():
        # A run that forks may have other sources than before.
        losses = " | ".join(f"{r['sources'][name]['loss']:.4f}" if name in r.get("sources", {}) else "-" for r in rows)
        lines.append(f"| {name} | {losses} | {own['bits_per_byte']:.3f} |")
    return lines


def _guarded(result: Mapping[str, Any]) -> list[str]:
    """The lines about what the guards have found: rewinds, skipped steps and alarms."""
    found = [
        f"| {r['stage']} | {r['step']} | {spike_text(Spike(r['step'], *(r[name] for name in _SPIKE)))} | to step "
        f"{r['to']}, without {batch_text(r)} |"
        for r in result["rewinds"]
    ]
    found += [
        f"| {r['stage']} | {r['step']} | not finite | skipped{': ' + batch_text(r) if 'windows' in r else ''} |"
        for r in result["skipped_steps"]
    ]
    found += [
        f"| {r['stage']} | {r['step']} | gradient norm {r['grad_norm']:.4g}, median {r['median']:.4g} | recorded: "
        f"{batch_text(r)} |"
        for r in result["alarms"]
    ]
    return ["", "## Guards", "", "| stage | step | what | then |", "|---|---|---|---|", *found] if found else []


def _parameters(row: Mapping[str, Any]) -> str:
    whole, trained = row["params"], row["trained_params"]
    return costs.count(whole) + (f", {costs.count(trained)} of them trained" if trained < whole else "")


def write(workdir: Path, result: Mapping[str, Any]) -> None:
    """Writes report.json and report.md into the work directory, and prints the paths of all that a run leaves."""
    atomic_write(workdir / "report.json", json.dumps(result, indent=1, sort_keys=True) + "\n")
    atomic_write(workdir / "report.md", markdown(result))
    print("\nSample of the last model:\n" + "\n".join("  | " + line for line in result["sample"].splitlines()))
    last = result["stages"][-1]
    print(f"\nHeld-out loss {last['eval_loss']:.4f} ({last['eval_bits_per_byte']:.3f} bits per byte).")
    for name, what in (
        ("report.md", "the report"),
        ("report.json", "the report for programs"),
        ("loss.png", "held-out loss against FLOPs"),
        ("report.html", "every loss, to hover over in a browser"),
        ("metrics.jsonl", "every measurement"),
        ("events", "TensorBoard: tensorboard --logdir"),
        ("checkpoints", "one directory per stage"),
    ):
        print(f"  {workdir / name!s:<40} {what}")
