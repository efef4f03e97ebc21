"""A plan as text: the records of `flm_jax.planning.stages`, stage by stage, and their totals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from flm_jax import costs
from flm_jax.data.batches import StageNeed
from flm_jax.data.supply import expected_supply
from flm_jax.data.survey import survey, survey_text
from flm_jax.planning import stages
from flm_jax.planning.topology import Topology
from flm_jax.recipe import Recipe, Run, begin, check_vocabulary
from flm_jax.records import counted, from_dict
from flm_jax.tracking import check_installed


def dry_run(recipe: Recipe, run: Run) -> Iterator[str]:
    """The plan of a recipe on this machine's devices, as text; programs are lowered, not compiled.

    The data is opened first, but not prepared.

    Raises:
      ValueError: the recipe is not valid, or the mesh does not divide one of its axes.
      ValueError, FileNotFoundError: as `survey`: the data cannot be read; or the sources of a mixture do not suffice.
    """
    _, resolved = begin(recipe)
    check_installed(run.tracker)
    found = survey(recipe.data)
    check_vocabulary(resolved, found.ids or 0)
    yield survey_text(found)
    if recipe.data.mixture is not None:
        counts = [own.splits.get("train", {}).get("tokens") for own in found.sources]
        needs = [StageNeed(s.name, s.steps, s.batch_size, s.source_weights) for s in resolved]
        yield from expected_supply(recipe.data.mixture, counts, recipe.data.context, needs)
    tokens, context = found.splits.get("train", {}).get("tokens"), recipe.data.context
    windows = None if tokens is None else (tokens - 1) // context  # as the token store counts them
    records = []
    for record in stages.stages(recipe, run, jax.devices(), None):
        records.append(record)
        yield stage_text(record)
        if windows:
            yield f"  {record['tokens'] / context / windows:,.2f} passes over the {windows:,} windows to train on"
        yield indent(costs.param_table(from_dict(record["model"])))
    yield total_text(records, None)


def indent(text: str) -> str:
    """`text` with two spaces before every line."""
    return "\n".join("  " + line for line in text.splitlines())


def stage_text(record: dict[str, Any]) -> str:
    """The text of one stage's record."""
    mesh = " x ".join(f"{name} {size}" for name, size in record["mesh"].items() if size > 1) or "one device"
    parts = f", accumulated in {record['accumulate']} parts" if record["accumulate"] > 1 else ""
    trained = ""
    if record["trained_params"] < record["params"]:
        trained = f", {costs.count(record['trained_params'])} of them train"
    lines = [
        f"\nStage {record['name']!r}: {record['shape']}",
        f"  {costs.count(record['params'])} parameters{trained}; mesh {mesh}",
        f"  {counted(record['steps'], 'step')} of {costs.count(record['batch_tokens'])} tokens{parts}: "
        f"{costs.count(record['tokens'])} tokens, {record['flops']:.3g} FLOPs "
        f"({record['flops_per_token']:.3g} FLOPs per token)"
        + (f", {record['days']:.1f} days" if record["days"] is not None else ""),
        f"  bytes per device: {_sizes(record['bytes_per_device'])}",
    ]
    if taught := record["teacher"]:
        lines.insert(
            3,
            f"  a teacher of {costs.count(taught['params'])} parameters for {counted(taught['steps'], 'step')}: "
            f"{taught['flops']:.3g} of these FLOPs ({taught['flops_per_token']:.3g} FLOPs per token)",
        )
    if muon := record["orthogonalisation"]:
        part = muon["flops"] / (record["flops_per_token"] * record["batch_tokens"])
        lines.append(
            f"  Muon orthogonalises in {muon['flops']:.3g} FLOPs per step, {part:.2%} of the step's, not counted in "
            f"them; {muon['flops_per_device']:.3g} on one device, with {costs.size(muon['bytes_per_device'])} there"
        )
    least = record["least_sent_bytes"]
    if total := sum(least.values()):
        lines.append(f"  a step sends {costs.size(total)} per device at least, in this layout: {_sizes(least)}")
    if record["fits"] is not None:
        verdict = "fits" if record["fits"] else "DOES NOT FIT"
        lines.append(f"  {verdict} in {costs.size(record['memory'])}, according to {record['fits_by']}")
    if record["growth"] is not None:
        lines += _growth(record)
    if record["programs"]:
        lines.append(f"  lowered: {', '.join(record['programs'])}")
    if record["programs"] and not {"growth", "initialisation"} & set(record["programs"]):
        lines.append("  lowered: no initialisation, the stage starts from a checkpoint")
    for name, about in record["programs"].items():
        if "compile_seconds" in about:
            lines += _program(name, about)
    return "\n".join(lines)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {costs.size(size)}" for name, size in sizes.items())


def _growth(record: dict[str, Any]) -> list[str]:
    growth = record["growth"]
    masks = f", masks ramp over {counted(record['ramp_steps'], 'step')}" if record["ramp_steps"] else ""
    lines = [
        f"  grows from {costs.count(growth['params_before'])} parameters by {growth['method']}{masks}",
        f"    reads {costs.size(growth['read_bytes'])}, writes {costs.size(growth['written_bytes'])}; both states: "
        f"{costs.size(growth['on_device_bytes'])} per device",
    ]
    if "read_seconds" in growth:
        lines.append(
            f"    on the mesh: {growth['read_seconds']:.0f} s to read and {growth['write_seconds']:.0f} s to write "
            f"with all hosts, {growth['on_device_seconds']:.2f} s to move through the devices' memory; streamed by one "
            f"host: {growth['streamed_seconds'] / 3600:.1f} h"
        )
    return lines


def _program(name: str, about: dict[str, Any]) -> list[str]:
    if not about["fits"]:
        return [f"  {name}: DOES NOT COMPILE: {about['compiler_said']}"]
    lines = [f"  {name}: compiled in {about['compile_seconds']:.0f} s"]
    if "bytes_per_device" in about:
        lines.append(f"    bytes per device: {_sizes(about['bytes_per_device'])}")
    if about["collectives"]:
        moved = ", ".join(
            f"{kind} {c['count']:.0f} ({costs.size(c['sent_bytes'])})" for kind, c in about["collectives"].items()
        )
        lines.append(f"    collectives (bytes sent per device): {moved}")
    if "predicted" in about:
        p = about["predicted"]
        lines.append(
            f"    predicted: {p['seconds']:.3g} s (work {p['work_seconds']:.3g}, waiting for collectives "
            f"{p['collectives_waited_seconds']:.3g}, collectives beside work {p['collectives_beside_seconds']:.3g}"
            + (f", attention kernel {p['kernel_seconds']:.3g})" if "kernel_seconds" in p else ")")
            + (f", model FLOPs utilisation {p['utilisation']:.1%}" if "utilisation" in p else "")
        )
    return lines


def totals(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens, FLOPs and days of all stages, and the FLOPs of training the last shape on as many tokens from scratch."""
    flops, tokens = sum(r["flops"] for r in records), sum(r["tokens"] for r in records)
    scratch = tokens * records[-1]["flops_per_token"]
    days = [r["days"] for r in records]
    return {
        "tokens": tokens,
        "flops": flops,
        "days": None if None in days else sum(days),
        "scratch_flops": scratch,
        "scratch_over_grown": scratch / flops,
    }


def cost(records: Sequence[dict[str, Any]], machine: Topology, price: float | None) -> dict[str, Any]:
    """Chip-hours of all stages on a machine, and what they cost at `price` per chip-hour; None where that is unknown.

    Growths, saves, compilation and waiting for the machine are not counted.
    """
    days = totals(records)["days"]
    hours = None if days is None else days * 24 * machine.devices
    return {"chip_hours": hours, "cost": None if hours is None or price is None else hours * price}


def total_text(records: Sequence[dict[str, Any]], topology: Topology | None, price: float | None = None) -> str:
    """The text of the totals; with a machine and a price per chip-hour, what all stages cost."""
    total = totals(records)
    lines = [f"\nAll stages: {costs.count(total['tokens'])} tokens, {total['flops']:.3g} FLOPs"]
    if topology is not None and total["days"] is not None:
        lines[0] += f", {total['days']:.1f} days on {counted(topology.devices, 'device')} of {topology.name}"
        found = cost(records, topology, price)
        lines[0] += f", {found['chip_hours']:,.0f} chip-hours"
        if price is not None:
            lines[0] += f", {found['cost']:,.0f} at {price:g} per chip-hour"
    if len(records) > 1:
        lines.append(
            f"The last shape from scratch, on as many tokens: {total['scratch_flops']:.3g} FLOPs, "
            f"{total['scratch_over_grown']:.2f} times as many; it is not known whether it would need as many tokens."
        )
    return "\n".join(lines)
