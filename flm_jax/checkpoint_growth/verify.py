"""The full verification of a growth, inside a run or outside: outputs, loss, continuations, new entries, state.

It has two halves, `observe_before` and `verify_growth`, so that the model before growth may be freed before the grown
one is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flm_jax.checkpoint import CheckpointError
from flm_jax.data.batches import Batch
from flm_jax.data.config import DataConfig
from flm_jax.data.source import Data, open_data, recorded_data
from flm_jax.distributed import fetch
from flm_jax.generation.decode import continued
from flm_jax.growth.diagnostics import copies_apart, dead_slices, fresh_entries
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.verify import Observed, judge, observe
from flm_jax.loss import make_heldout_loss
from flm_jax.model import Masks, Params
from flm_jax.progress import phases
from flm_jax.sharding import MeshConfig, few_rows, make_mesh, put_batch
from flm_jax.source_checkpoint import SourceCheckpoint, read_source
from flm_jax.state import TrainState, abstract_state

# Length of the prompts, and of their greedy continuations.
PROMPT_TOKENS, GREEDY_TOKENS = 16, 64
# The constants of the forward pass that a verification shows before and after a growth.
SHOWN = ("input_mult", "logits_mult", "effective_residual_mult", "effective_norm_width", "effective_head_width")


@dataclass(frozen=True)
class VerificationText:
    """The text that a growth is verified on.

    Attributes:
      name: its origin, for records.
      few: one batch of a few rows, on which whole logits are compared; on the host.
      batches: held-out batches, on which the loss is measured.
    """

    name: str
    few: Any
    batches: tuple[Any, ...]


def heldout_text(data: Data, mesh: Mesh, windows: int = 32) -> VerificationText:
    """Verification text from the held-out split of open data.

    Args:
      data: the data.
      mesh: decides how many rows a batch has.
      windows: held-out windows that the loss is measured on.
    """
    # A few rows at a time: models are compared by the plain attention kernel, which has large scores in memory.
    rows = few_rows(mesh)
    few = next(iter(data.heldout(rows, rows)))
    return VerificationText(f"held-out text, digest {data.digest[:12]}", few, tuple(data.heldout(rows, windows)))


def verification_text(source: SourceCheckpoint, data: DataConfig | None, mesh: Mesh) -> VerificationText:
    """Verification text for a checkpoint.

    It is held-out text of `data`, if given; else of the token store that the checkpoint records, if it is still there;
    else random tokens, which are good enough to compare two models.

    Raises:
      ValueError: `data` has another vocabulary than the checkpoint, or more tokens than its model.
    """
    vocab = source.cfg.vocab
    if data is not None:
        opened = open_data(data)
        if opened.vocabulary.size > vocab:
            raise ValueError(f"the data's vocabulary has {opened.vocabulary.size} tokens, the model only {vocab}.")
        if not source.unknown_vocabulary and (other := source.other_vocabulary(opened.vocabulary)):
            raise ValueError(other)
        return heldout_text(opened, mesh)
    try:
        return heldout_text(recorded_data(source.meta.data), mesh)
    except LookupError as error:
        why = str(error)
    rows = few_rows(mesh)
    rng, shape = np.random.default_rng(0), (rows, 64)
    drawn = [rng.integers(0, vocab, (rows, 65), dtype=np.int32) for _ in range(max(32 // rows, 1))]
    segments, weights = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    batches = tuple(Batch(ids[:, :-1], ids[:, 1:], weights, segments) for ids in drawn)
    return VerificationText(f"random tokens: {why}", batches[0], batches)


class Before(NamedTuple):
    """What the comparison needs of the model before growth."""

    observed: Observed
    loss: float
    greedy: np.ndarray


def observe_before(lineage: Lineage, params: Params, text: VerificationText, mesh: Mesh, chunks: int = 1) -> Before:
    """Runs the model before a growth.

    Args:
      lineage: of the grown model.
      params: of the model before growth.
      text: what it is run on.
      mesh: where the parameters live.
      chunks: parts of a window that the head runs on, one at a time.
    """
    cfg, batch = lineage.before.cfg, put_batch(text.few, mesh)
    observed = observe(cfg, params, batch.inputs_BT, batch.segments_BT)
    loss = _loss(cfg, params, text, mesh, chunks, None)
    return Before(observed, loss, _greedy(cfg, params, batch.inputs_BT, None))


def verify_growth(
    lineage: Lineage,
    before: Before,
    grown: TrainState,
    text: VerificationText,
    mesh: Mesh,
    tolerance: float,
    chunks: int = 1,
    optimizer: str = "adamw",
    train: str = "all",
) -> dict[str, Any]:
    """Checks a grown state against what its method promises.

    Args:
      lineage: of the grown model.
      before: from `observe_before`, on the same text.
      grown: the state at the growth.
      text: what the grown model is run on.
      mesh: where the state lives.
      tolerance: largest relative difference of logits, in float32.
      chunks: parts of a window that the head runs on, one at a time.
      optimizer: the name of the optimizer that the state belongs to.
      train: what will train, see `Stage.train`.

    Returns:
      JSON-able: method, preserving, holds, failures (sentences), logits, hidden, eval_loss, greedy, fresh, dead,
      copies_apart, optimizer, multipliers, tokens. Greedy continuations are reported but not judged: if the logits
      agree, they can differ only at a tie.
    """
    old, new, growth = lineage.before.cfg, lineage.cfg, lineage.last_growth
    masks, batch = lineage.masks(0), put_batch(text.few, mesh)
    after = observe(new, grown.params, batch.inputs_BT, batch.segments_BT, masks)
    measured = judge(lineage, before.observed, after)
    del after
    loss = _loss(new, grown.params, text, mesh, chunks, masks)
    greedy = _greedy(new, grown.params, batch.inputs_BT, masks)
    faults = _optimizer_faults(lineage, grown, mesh, optimizer, train)
    dead = dead_slices(grown.params, lineage, batch.inputs_BT)
    failures = []
    if measured.preserving:
        if fault := measured.fault(tolerance):
            failures.append(fault)
        far = not abs(before.loss - loss) <= 10 * tolerance * max(1.0, abs(before.loss))
        if old.vocab == new.vocab and far:
            failures.append(f"held-out loss goes from {before.loss:.6f} to {loss:.6f}")
        failures += [f"{line} would never learn" for line in dead]
    failures += faults
    return {
        "method": growth.name,
        "preserving": measured.preserving,
        "holds": not failures,
        "failures": failures,
        "tolerance": tolerance,
        "tokens": text.name,
        "logits": {"max_abs": measured.max_abs_logit_diff, "max_rel": measured.max_rel_logit_diff},
        "hidden": {"max_rel_by_layer": list(measured.layer_diffs)},
        "eval_loss": {"before": before.loss, "after": loss},
        "greedy": {"tokens": GREEDY_TOKENS, "equal": bool((before.greedy == greedy).all())},
        "fresh": fresh_entries(grown.params, lineage),
        "dead": dead,
        "copies_apart": copies_apart(grown.params, lineage),
        "optimizer": {"mode": growth.optimizer, "problems": faults},
        "multipliers": {name: {"before": getattr(old, name), "after": getattr(new, name)} for name in SHOWN},
        "axes": {axis: [m.span.old, m.span.new] for axis, m in lineage.maps.items()},
    }


def _loss(cfg: Any, params: Params, text: VerificationText, mesh: Mesh, chunks: int, masks: Masks | None) -> float:
    with jax.default_matmul_precision("highest"):
        return make_heldout_loss(cfg.for_comparison, mesh, chunks)(params, text.batches, masks)


def _greedy(cfg: Any, params: Params, tokens_BT: jax.Array, masks: Masks | None) -> np.ndarray:
    """Greedy continuations of the first tokens of each row, in at least float32."""
    prompt_BT = tokens_BT[:, :PROMPT_TOKENS]
    found: np.ndarray = fetch(continued(cfg.for_comparison, params, prompt_BT, GREEDY_TOKENS, masks=masks))
    return found


def _optimizer_faults(lineage: Lineage, grown: TrainState, mesh: Mesh, optimizer: str, train: str) -> list[str]:
    """Leaves of the state whose shape or dtype is not that of a fresh state."""
    weights = not jax.tree.leaves(grown.opt_state)
    expected = abstract_state(lineage, mesh, weights, optimizer, train)
    pairs = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree_util.tree_leaves_with_path(grown), strict=True)
    return [
        f"{jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}, not {like.dtype}{list(like.shape)}"
        for (path, like), (_, leaf) in pairs
        if (like.shape, like.dtype) != (leaf.shape, leaf.dtype)
    ]


def verify_checkpoints(
    source: str | Path,
    target: str | Path,
    mesh: MeshConfig | None = None,
    data: DataConfig | None = None,
    tolerance: float = 1e-5,
) -> dict[str, Any]:
    """Checks that a grown checkpoint is what its method promises, against the one that it grew from.

    Both are read in full and checked against their checksums; then both models are run.

    Args:
      source: the checkpoint before growth: a step, a stage's directory or a work directory.
      target: the grown one, at step 0 of its stage.
      mesh: how devices are laid out.
      data: held-out text; None: that of the token store that the source records, if it is still there, else random
        tokens.
      tolerance: largest relative difference of logits, in float32.

    Returns:
      See `verify_growth`.

    Raises:
      DamagedError: one of them is not as it was saved.
      CheckpointError: the target did not grow from the source, or holds another vocabulary.
    """
    before, after = read_source(source), read_source(target)
    if after.step != 0:
        raise CheckpointError(f"{after.directory} has trained since it grew: give step 0 of its stage.")
    if after.meta.since_growth != 0:
        raise CheckpointError(f"{after.directory} goes on with a checkpoint of its own shape: nothing grew.")
    if after.lineage.growth is None:
        raise CheckpointError(f"{after.directory} did not grow from anything: it is an initialisation.")
    claimed = (after.meta.provenance or {}).get("source_digest")
    if claimed != before.digest:
        raise CheckpointError(
            f"{after.directory} grew from a state with digest {str(claimed)[:12]}, but {before.directory} has "
            f"{before.digest[:12]}."
        )
    known = not (before.unknown_vocabulary or after.unknown_vocabulary)
    if known and after.vocabulary.digest != before.vocabulary.digest:
        raise CheckpointError(
            f"{after.directory} holds a {after.vocabulary.kind} vocabulary, sha256 {after.vocabulary.digest[:12]}, but "
            f"{before.directory} a {before.vocabulary.kind} vocabulary, sha256 {before.vocabulary.digest[:12]}."
        )
    placed = make_mesh(mesh)
    text = verification_text(before, data, placed)
    names = ("reading the source", "running it", "reading the grown model", "running it")
    with jax.set_mesh(placed), phases(*names) as begin:
        # Whole states are read, so that every bit is checked, whatever the comparison needs.
        begin()
        params = before.restore(placed, optimizer=None).params
        begin()
        observed = observe_before(after.lineage, params, text, placed)
        del params
        begin()
        grown = after.restore(placed, optimizer=None)
        begin()
        form: dict[str, Any] = {"optimizer": after.meta.optimizer, "train": after.meta.train}
        return verify_growth(after.lineage, observed, grown, text, placed, tolerance, **form)


def failures_text(found: Mapping[str, Any]) -> str:
    """The failures of a verification, as one sentence."""
    return "; ".join(found["failures"]) + "."
