"""The lines of the log about a growth and a held-out measurement, also those that a killed process did not write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flm_jax.records.foreign_json import JsonError
from flm_jax.tracking.reading import METRICS, read_log


def growth_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """The measurements of a growth, from its record."""
    found, sizes = record["verification"], {name: record[name] for name in ("params_before", "params_after")}
    losses = {f"loss_{when}": loss for when, loss in found["eval_loss"].items()}
    return {**sizes, **losses, "max_rel_logit_diff": found["logits"]["max_rel"]}


def heldout_values(measured: Mapping[str, Any]) -> dict[str, float]:
    """A held-out measurement, from its record; of a mixture also that of each source."""
    names = ("loss", "bits_per_byte")
    of_sources = {f"{s}/{n}": own[n] for s, own in measured.get("sources", {}).items() for n in names}
    return {**{name: measured[name] for name in names}, **of_sources}


def unwritten(
    workdir: Path, stage: str, step: int, history: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields kind and values of what the log lacks of a step at which a stage was saved.

    A process that is killed between a save and these lines does not write them, and what is resumed does not measure
    that step again. Nothing is yielded if the log cannot be read.
    """
    try:
        lines = list(read_log(workdir / METRICS))
    except (OSError, JsonError):
        return
    there = {line["kind"] for line in lines if (line["stage"], line["stage_step"]) == (stage, step)}
    if step == 0 and "growth" not in there:
        for record in history["growths"]:
            if record["stage"] == stage and "verification" in record:  # version 0.1.0 had none
                yield "growth", growth_values(record)
    if "heldout" not in there:
        for measured in history["evals"]:
            if (measured["stage"], measured["step"]) == (stage, step):
                yield "heldout", heldout_values(measured)
    if step and "save" not in there:
        yield "save", {}
