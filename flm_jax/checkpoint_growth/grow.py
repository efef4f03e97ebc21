"""Growing a checkpoint into a new work directory, and verifying one checkpoint against another, outside of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flm_jax import costs
from flm_jax.checkpoint import CheckpointError, Checkpoints
from flm_jax.checkpoint_growth.streaming import CHUNK_BYTES, finish, grow_streamed, unfinished
from flm_jax.config import ModelConfig
from flm_jax.data.config import DataConfig
from flm_jax.data.source import Data, open_data
from flm_jax.generate import generate
from flm_jax.growth.diagnostics import copies_apart, dead_slices, fresh_entries
from flm_jax.growth.distance import settle
from flm_jax.growth.plan import Growth, axis_maps, changed, grown_config, masks_at, promises
from flm_jax.growth.verify import compare
from flm_jax.loss import make_heldout_loss
from flm_jax.model import Params
from flm_jax.recipe import ResolvedStage, Stage
from flm_jax.records import as_dict, write_identity, write_record
from flm_jax.sharding import MeshConfig, few_rows, make_mesh, put_batch
from flm_jax.source_checkpoint import SourceCheckpoint, kept, lineage, read_source
from flm_jax.step import StageProgram, TrainState

TRANSPLANT = "growth.json"


@dataclass(frozen=True)
class Tokens:
    """What growths are measured on.

    Attributes:
      name: where they are from, for records.
      batches: held-out batches, as training has them.
    """

    name: str
    batches: tuple[Any, ...]


def held_out(data: DataConfig | None, vocab: int, rows: int, windows: int = 32) -> Tokens:
    """Held-out text of some data; without data, random tokens, which serve to compare models and nothing else."""
    if data is not None:
        opened: Data = open_data(data)
        if opened.vocabulary.size > vocab:
            raise ValueError(f"the data's vocabulary has {opened.vocabulary.size} tokens, the model only {vocab}.")
        return Tokens(f"held-out text, digest {opened.digest[:12]}", tuple(opened.heldout(rows, windows)))
    from flm_jax.data.batches import Batch

    rng, shape = np.random.default_rng(0), (rows, 64)
    drawn = [rng.integers(0, vocab, (rows, 65), dtype=np.int32) for _ in range(max(windows // rows, 1))]
    segments, weights = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    batches = tuple(Batch(ids[:, :-1], ids[:, 1:], weights, segments) for ids in drawn)
    return Tokens("random tokens", batches)


def grow_checkpoint(
    source: str | Path,
    workdir: str | Path,
    target: ModelConfig | Mapping[str, Any],
    growth: Growth,
    seed: int = 0,
    mesh: MeshConfig | None = None,
    data: DataConfig | None = None,
    tolerance: float = 1e-5,
    records: Mapping[str, str] | None = None,
    streamed: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Any]:
    """Grows a checkpoint, optimizer state included, into step 0 of a new work directory; the source is only read.

    Streamed, it may be larger than memory: the result is the same, bit for bit, but neither model is run. Killed and
    called again, a streamed growth goes on where it was.

    Args:
      source: a step, a stage's directory or a work directory.
      workdir: new, or empty.
      target: the shape to grow to; or the fields in which it differs from the source's.
      growth: how.
      seed: for what is drawn.
      mesh: how devices are laid out.
      data: held-out text for distances and the report; None: random tokens.
      tolerance: largest relative difference of logits that a preserving method may show, in float32.
      records: texts to keep, by file name.
      streamed: block by block from disk to disk; nothing is run then, on a mesh or on data.
      chunk_bytes: the largest block, streamed.

    Returns:
      The record of the growth, also in the work directory as growth.json: plan, source and its digest, both
      configurations, and under "verification" what `verify_checkpoints` finds, or, streamed, what was compared.
      `Recipe.start` goes on from there.

    Raises:
      ValueError: the plan does not fit, it wants distances where nothing is run, or the work directory is in use.
      DamagedError: the source is not as it was saved.
      CheckpointError: it does not record what it is, or the growth does not keep its promise; nothing is written.
    """
    if streamed and (mesh is not None or data is not None):
        raise ValueError("A streamed growth runs no model: it has no use for a mesh, nor for data. Leave them out.")
    workdir = Path(workdir).expanduser()
    directory = workdir / "checkpoints" / "0_grown"
    if workdir.exists() and any(workdir.iterdir()) and not (streamed and _begun(workdir, directory)):
        raise ValueError(f"{workdir} is not empty; grow into a new directory.")
    origin = read_source(source)
    origin.check_settled(grows=True)
    old = origin.stage.cfg
    new = grown_config(old, changed(old, target, growth) if isinstance(target, Mapping) else target, growth)
    if not axis_maps(old, new, growth.placeholder):
        raise ValueError(f"Nothing grows: the checkpoint has the target's shape already, {costs.shape_line(old)}.")

    def describe(growth: Growth, distances: tuple[float, ...], found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "stage": "grown",
            "plan": as_dict(growth),
            "source": str(origin.directory),
            "source_digest": origin.digest,
            "seed": seed,
            "distances": list(distances),
            "config_before": as_dict(old),
            "config_after": as_dict(new),
            "params_before": costs.param_count(old),
            "params_after": costs.param_count(new),
            "verification": found,
        }

    def meta(stage: ResolvedStage, ramp: int, record: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "stage": "grown",
            "model": as_dict(new),
            "lineage": lineage(stage),
            "ramp_steps": ramp,
            "provenance": record,
        }

    if streamed:
        if growth.depth == "distance":
            raise ValueError(
                "Growth.depth='distance' needs a run of the source model, which a streamed growth does without: "
                "measure where it fits in memory (flm_jax.growth.distance.settle), and give Growth.depth as the "
                "copies that follow each layer; or take a place, such as 'interleave'."
            )
        stage = ResolvedStage(0, Stage("grown", new, 0, 0, growth=growth), origin.stage)

        def described(verified: Mapping[str, Any]) -> dict[str, Any]:
            command = f"python experiments/verify.py --source={origin.directory} --target={workdir}"
            run = {"models": "not run: they may not fit in memory; where they do, run the command", "command": command}
            found = {"method": growth.name, "preserving": promises(old, new, growth), "streamed": verified, **run}
            return describe(growth, (), found)

        ramp = stage.ramp_steps
        recorded = lambda found: meta(stage, ramp, described(found))  # noqa: E731
        done = grow_streamed(origin, stage, directory, seed, recorded, chunk_bytes)
        record = described(done)
    else:
        record = _grow_in_memory(origin, new, growth, seed, make_mesh(mesh), data, tolerance, directory, describe, meta)
    write_identity(workdir, TRANSPLANT, record)
    for name, text in (records or {}).items():
        write_record(workdir, name, text)
    finish(directory)
    return record


def _begun(workdir: Path, directory: Path) -> bool:
    """Whether all that a work directory holds is a streamed growth that did not finish."""
    # The record and texts may lie beside it already: the journal is what goes last.
    inside = [path.relative_to(workdir).parts for path in (*workdir.iterdir(), *workdir.glob("*/*")) if path.is_dir()]
    alone = sorted(inside) == [("checkpoints",), ("checkpoints", directory.name)]
    return alone and unfinished(directory)


def _grow_in_memory(
    origin: SourceCheckpoint,
    new: ModelConfig,
    growth: Growth,
    seed: int,
    placed: Mesh,
    data: DataConfig | None,
    tolerance: float,
    directory: Path,
    describe: Callable[..., dict[str, Any]],
    meta: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """Grows, verifies and saves; returns the record."""
    old = origin.stage.cfg
    tokens = held_out(data, old.vocab, few_rows(placed))
    with jax.set_mesh(placed):
        state = origin.restore(placed, optimizer=False)
        batch = put_batch(tokens.batches[0], placed)
        growth, distances = settle(growth, old, new.layers, state.params, batch.inputs_BT, batch.segments_BT)
        stage = ResolvedStage(0, Stage("grown", new, 0, 0, growth=growth), origin.stage)
        recorded = functools.partial(meta, stage, stage.ramp_steps)  # refuses a ramp that does not fit, before it grows
        program = StageProgram(stage, placed, 1)
        grown = program.grower(weights=not origin.trained)(state, jax.random.key(seed))
        found = _verify(origin.stage, state, stage, grown, tokens, tolerance, placed)
        record = describe(growth, distances, found)
        if not found["holds"]:
            raise CheckpointError(f"The growth does not hold, and nothing was written: {_failures(found)}")
        signatures = {f"params/{path}": str(sig) for path, _, sig in costs.leaves(new)}
        with Checkpoints(directory) as store:
            held = kept(grown, origin.trained)
            store.save(0, held, signatures=signatures, meta=recorded(record), blobs=origin.files)
            store.wait()
    return record


def verify_checkpoints(
    source: str | Path,
    target: str | Path,
    mesh: MeshConfig | None = None,
    data: DataConfig | None = None,
    tolerance: float = 1e-5,
) -> dict[str, Any]:
    """Checks that a grown checkpoint is what its method promises, against the one that it grew from.

    Both are read in full and their checksums compared; then both models are run.

    Args:
      source: the checkpoint before: a step, a stage's directory or a work directory.
      target: the grown one, at step 0 of its stage.
      mesh: how devices are laid out.
      data: held-out text; None: random tokens.
      tolerance: largest relative difference of logits, in float32.

    Returns:
      JSON-able: method, preserving, holds, failures (in words), logits, hidden, eval_loss, greedy, fresh, dead,
      copies_apart, optimizer, multipliers, tokens. Greedy continuations are reported and not judged: where the logits
      hold, they can differ at a tie alone.

    Raises:
      DamagedError: one of them is not as it was saved.
      CheckpointError: the target did not grow from the source.
    """
    before, after = read_source(source), read_source(target)
    if after.step == 0 and after.stage.before is None:
        raise CheckpointError(f"{after.directory} did not grow from anything: it is an initialisation.")
    if after.step != 0:
        raise CheckpointError(f"{after.directory} has trained since it grew: give step 0 of its stage.")
    if after.stage.stage.growth is None:
        raise CheckpointError(f"{after.directory} goes on with a checkpoint of its own shape: nothing grew.")
    claimed = (after.meta.get("provenance") or {}).get("source_digest")
    if claimed != before.digest:
        raise CheckpointError(
            f"{after.directory} grew from a state with digest {str(claimed)[:12]}, but {before.directory} has "
            f"{before.digest[:12]}."
        )
    placed = make_mesh(mesh)
    tokens = held_out(data, before.stage.cfg.vocab, few_rows(placed))
    with jax.set_mesh(placed):
        states = (origin.restore(placed, optimizer=False) for origin in (before, after))
        return _verify(before.stage, next(states), after.stage, next(states), tokens, tolerance, placed)


def _verify(
    before: ResolvedStage,
    state: TrainState,
    after: ResolvedStage,
    grown: TrainState,
    tokens: Tokens,
    tolerance: float,
    mesh: Mesh,
) -> dict[str, Any]:
    growth = after.stage.growth
    assert growth is not None
    old, new = before.cfg, after.cfg
    masks = masks_at(old, new, growth, 0)
    batch = put_batch(tokens.batches[0], mesh)
    measured = compare(old, state.params, new, grown.params, growth, batch.inputs_BT, batch.segments_BT)
    with jax.default_matmul_precision("highest"):
        losses = [
            make_heldout_loss(cfg.for_comparison, mesh)(params, tokens.batches, under)
            for cfg, params, under in ((old, state.params, None), (new, grown.params, masks))
        ]
    greedy = _greedy(old, state.params, new, grown.params, masks, batch.inputs_BT[:, :16])
    same_vocab = old.vocab == new.vocab
    optimizer = _optimizer_faults(after, grown, mesh)
    dead = dead_slices(grown.params, old, new, growth, batch.inputs_BT)
    failures = []
    if measured.preserving:
        if fault := measured.fault(tolerance):
            failures.append(fault)
        if same_vocab and not abs(losses[0] - losses[1]) <= 10 * tolerance * max(1.0, abs(losses[0])):
            failures.append(f"held-out loss goes from {losses[0]:.6f} to {losses[1]:.6f}")
        failures += [f"{line} would never learn" for line in dead]
    failures += optimizer
    return {
        "method": growth.name,
        "preserving": measured.preserving,
        "holds": not failures,
        "failures": failures,
        "tolerance": tolerance,
        "tokens": tokens.name,
        "logits": {"max_abs": measured.max_abs_logit_diff, "max_rel": measured.max_rel_logit_diff},
        "hidden": {"max_rel_by_layer": list(measured.layer_diffs)},
        "eval_loss": {"before": losses[0], "after": losses[1]},
        "greedy": {"tokens": 64, "equal": greedy},
        "fresh": fresh_entries(grown.params, old, new, growth),
        "dead": dead,
        "copies_apart": copies_apart(grown.params, old, new, growth),
        "optimizer": {"mode": growth.optimizer, "problems": optimizer},
        "multipliers": {
            name: {"before": getattr(old, name), "after": getattr(new, name)}
            for name in ("input_mult", "logits_mult", "effective_norm_width", "effective_head_width")
        },
        "axes": {axis: [m.span.old, m.span.new] for axis, m in axis_maps(old, new, growth).items()},
    }


def _greedy(
    old: ModelConfig, params: Params, new: ModelConfig, grown: Params, masks: Any, prompt_BT: jax.Array
) -> bool:
    """Whether both models continue prompts alike for 64 tokens, in at least float32."""
    found = []
    for cfg, values, under in ((old, params, None), (new, grown, masks)):
        found.append(np.asarray(generate(cfg.for_comparison, values, prompt_BT, 64, jax.random.key(0), 0.0, under)))
    return bool((found[0] == found[1]).all())


def _optimizer_faults(after: ResolvedStage, grown: TrainState, mesh: Mesh) -> list[str]:
    """Leaves of the state whose shape or dtype is not that of a fresh one."""
    expected = StageProgram(after, mesh, 1).abstract_state
    if not jax.tree.leaves(grown.opt_state):  # weights alone
        expected = expected.replace(opt_state=())
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree_util.tree_leaves_with_path(grown), strict=True)
    return [
        f"{jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}, not {like.dtype}{list(like.shape)}"
        for (path, like), (_, leaf) in pairs
        if (like.shape, like.dtype) != (leaf.shape, leaf.dtype)
    ]


def _failures(found: Mapping[str, Any]) -> str:
    return "; ".join(found["failures"]) + "."


def lines(found: Mapping[str, Any]) -> str:
    """A verification, for a terminal."""
    if "streamed" in found:
        source, target = (found["streamed"][side] for side in ("source", "target"))
        return (
            f"{found['method']}, streamed: {source['bytes'] / 1e9:.3f} GB read in {source['leaves']} leaves, all with "
            f"the checksums of the source; {target['bytes'] / 1e9:.3f} GB written in {target['leaves']} leaves.\n"
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
        f"  layers: max relative difference {max(found['hidden']['max_rel_by_layer']):.2e}",
        f"  loss: {loss['before']:.6f} -> {loss['after']:.6f}",
        f"  greedy continuation of {greedy['tokens']} tokens: {'equal' if greedy['equal'] else 'different'}"
        + ("" if greedy["equal"] or not found["holds"] or not found["preserving"] else ", at a near tie of two tokens"),
        f"  dead slices after two steps: {'; '.join(found['dead']) or 'none'}",
    ]
    if apart is not None:
        rows.append(f"  copies: {f'{apart:.1e} apart' if apart > 1e-6 else 'alike, until an optimizer parts them'}")
    verdict = "HOLDS" if found["preserving"] else "measured"
    rows.append(f"  {verdict}" if found["holds"] else f"  DOES NOT HOLD: {_failures(found)}")
    return "\n".join(rows)
