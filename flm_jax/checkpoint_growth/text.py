"""What a growth did and what its verification found, as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flm_jax import costs
from flm_jax.checkpoint_growth.record import GrowthRecord
from flm_jax.checkpoint_growth.verify import failures_text
from flm_jax.records import counted


def verification_lines(found: Mapping[str, Any]) -> str:
    """A verification as text for a terminal."""
    if "streamed" in found:
        source, target = (found["streamed"][side] for side in ("source", "target"))
        return (
            f"{found['method']}, streamed: {source['bytes'] / 1e9:.3f} GB read in "
            f"{counted(source['leaves'], 'leaf', 'leaves')}, all with "
            f"the checksums of the source; {target['bytes'] / 1e9:.3f} GB written in "
            f"{counted(target['leaves'], 'leaf', 'leaves')}.\n"
            f"  The models were not run. Where both fit in memory: {found['command']}"
        )
    promise = f"{'promises' if found['preserving'] else 'does NOT promise'} to preserve the function"
    axes = ", ".join(f"{axis} {old} -> {new}" for axis, (old, new) in found["axes"].items())
    loss, logits, greedy = found["eval_loss"], found["logits"], found["greedy"]
    apart = found["copies_apart"]
    rows = [
        f"{found['method']}, which {promise}: {axes}",
        f"  measured on {found['tokens']}",
        f"  logits: max |difference| {logits['max_abs']:.2e} (relative {logits['max_rel']:.2e})",
        f"  layers: max relative difference {max(found['hidden']['max_rel_by_layer'], default=0.0):.2e}",
        f"  loss: {loss['before']:.6f} -> {loss['after']:.6f}",
        f"  greedy continuation of {counted(greedy['tokens'], 'token')}: {'equal' if greedy['equal'] else 'different'}"
        + ("" if greedy["equal"] or not found["holds"] or not found["preserving"] else ", at a near tie of two tokens"),
        f"  dead slices after two steps: {'; '.join(found['dead']) or 'none'}",
    ]
    if apart is not None:
        rows.append(
            f"  copies: {f'{apart:.1e} apart' if apart > 1e-6 else 'identical until an optimizer separates them'}"
        )
    verdict = "HOLDS" if found["preserving"] else "measured"
    rows.append(f"  {verdict}" if found["holds"] else f"  DOES NOT HOLD: {failures_text(found)}")
    return "\n".join(rows)


def growth_lines(record: GrowthRecord) -> str:
    """What a growth inside a run did, as a few lines for the terminal."""
    found = record.verification
    before, after = costs.param_count(record.before), costs.param_count(record.after)
    dead, loss = found["dead"], found["eval_loss"]
    return "\n".join(
        [
            f"Growth to {record.stage!r} by {record.growth.name}: "
            f"{costs.count(before)} -> {costs.count(after)} parameters",
            f"  before: {costs.shape_line(record.before)}",
            f"  after:  {costs.shape_line(record.after)}",
            f"  max |difference| of logits: {found['logits']['max_abs']:.2e} "
            f"(relative {found['logits']['max_rel']:.2e})",
            f"  held-out loss: {loss['before']:.6f} -> {loss['after']:.6f}",
            f"  greedy continuations: {'equal' if found['greedy']['equal'] else 'different'}; "
            f"dead slices: {'; '.join(dead) or 'none'}",
        ]
    )
