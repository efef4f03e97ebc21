"""One stage of a run: how it begins, its loop of steps, what it measures and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax import costs, distributed, report
from flm_jax.checkpoint import (
    Checkpoints,
    read_manifest,
)
from flm_jax.checkpoint_growth.record import GrowthRecord
from flm_jax.checkpoint_growth.text import growth_lines
from flm_jax.checkpoint_growth.verify import failures_text, heldout_text, observe_before, verify_growth
from flm_jax.data import hub
from flm_jax.data.batches import TokenBatches
from flm_jax.data.source import Data
from flm_jax.data.train_vocabulary import Pretrained
from flm_jax.data.vocabulary_files import to_files
from flm_jax.growth.distance import settle
from flm_jax.growth.verify import GrowthError
from flm_jax.loss import bits_per_byte, make_heldout_sums
from flm_jax.model import Params
from flm_jax.progress import Interrupts, Progress
from flm_jax.recipe import Recipe, ResolvedStage, Run
from flm_jax.sharding import make_mesh, own_rows, put_batch
from flm_jax.source_checkpoint import POSITION, CheckpointMeta, SourceCheckpoint, signature_texts
from flm_jax.state import TrainState, shardings_of
from flm_jax.step import Metrics, StageProgram, quietly_donated
from flm_jax.tracking import MetricsLog, Session, Totals

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Raised when too many consecutive steps were not finite, or when the loss exceeds `Run.max_loss`."""


def beginning(recipe: Recipe, index: int) -> dict[str, Any]:
    """The part of a stage's provenance that its recipe decides: random numbers, and where a tokenizer came from."""
    vocabulary = recipe.data.vocabulary
    origin = hub.origin(vocabulary.path) if isinstance(vocabulary, Pretrained) else None
    return {"seed": recipe.seed, "key": index, **({"vocabulary": origin} if origin else {})}


def stage_program(recipe: Recipe, run: Run, stage: ResolvedStage) -> StageProgram:
    """The programs of a stage, on its mesh."""
    return StageProgram(stage, make_mesh(run.mesh_of(stage.stage)), recipe.loss_chunks, run.compiler_options)


class StageRun:
    """One stage during one start of the program: the objects that its start and its loop share."""

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        workdir: Path,
        data: Data,
        stages: Sequence[ResolvedStage],
        index: int,
        store: Checkpoints,
        history: dict[str, list[Any]],
        position: bytes | None,
        source: SourceCheckpoint | None,
        session: Session,
    ) -> None:
        self.recipe, self.settings, self.workdir, self.data, self.stages = recipe, run, workdir, data, stages
        self.store, self.history, self.source = store, history, source
        self.program = stage_program(recipe, run, stages[index])
        self.mesh: Mesh = self.program.mesh
        self.batches: TokenBatches = data.train(stages[index].source_weights)
        if position is not None:
            self.batches.restore(position)
        stage, context = stages[index], recipe.data.context
        self.files = to_files(data.vocabulary) if source is None else source.files_with(data.vocabulary)
        self.heldout_sums = make_heldout_sums(stage.cfg, self.mesh, recipe.loss_chunks)
        self.cost = stage.cost(context)
        before = Totals(0, 0, 0)
        for s in stages[:index]:
            before = before.plus(s.steps, s.cost(context))
        self.metrics = MetricsLog(workdir, stage.directory, stage.name, before, self.cost, session)

    @property
    def stage(self) -> ResolvedStage:
        """The stage; after its growth, with the measured placement of its layers."""
        return self.program.stage

    def start(self, state: TrainState | None) -> TrainState:
        """The state at step 0, measured and saved.

        It is initialised, grown from the given state and verified, or the given state itself: that of the stage before
        or of the recipe's start checkpoint.
        """
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), self.stage.index)
        provenance = beginning(self.recipe, self.stage.index)
        if state is None:
            state = self.program.initialiser()(key)
        elif self.stage.continues:
            state = self.program.continued(state)
            if self.stage.index == 0:
                assert self.source is not None
                provenance |= {"start": self.source.digest}
        else:
            state, record = self._grow(state, key)
            provenance |= record
        if self.stage.teacher is not None:
            provenance |= {"teacher": self._teacher_digest()}
        measured = self._measure(0, state)
        self._save(0, state, provenance)
        self.store.wait()
        self.metrics.open(0)
        if "verification" in provenance:
            found = provenance["verification"]
            sizes = {name: provenance[name] for name in ("params_before", "params_after")}
            losses = {f"loss_{when}": loss for when, loss in found["eval_loss"].items()}
            self.metrics.write("growth", 0, {**sizes, **losses, "max_rel_logit_diff": found["logits"]["max_rel"]})
        self._written(0, measured)
        return state

    def adopt(self, state: TrainState, measured: Mapping[str, Any] | None, provenance: dict[str, Any] | None) -> None:
        """Saves the state of another run, at its step, as the first of this one.

        Args:
          state: that of the other run.
          measured: its held-out measurement there, on the same text; None: it is measured.
          provenance: what led to step 0, if it is that step.
        """
        step = int(state.step)
        measured = measured or self._measure(step, state)
        self._save(step, state, provenance)
        self.store.wait()
        self.metrics.open(step)
        self._written(step, measured)

    def _grow(self, state: TrainState, key: jax.Array) -> tuple[TrainState, dict[str, Any]]:
        """The grown state, verified, and the record of the growth; the given state is donated."""
        lineage, chunks = self.stage.lineage, self.recipe.loss_chunks
        # The stage before may have used another mesh; if not, this moves nothing.
        state = jax.device_put(state, shardings_of(self.program.state_before))
        text = heldout_text(self.data, self.mesh, self.recipe.eval_windows)
        batch = put_batch(text.few, self.mesh)
        lineage, distances = settle(lineage, state.params, batch.inputs_BT, batch.segments_BT)
        stage = dataclasses.replace(self.stage, lineage=lineage)
        self.program = stage_program(self.recipe, self.settings, stage)
        # The old model's outputs are computed before the growth, so that its memory is free for the new model.
        before = observe_before(lineage, state.params, text, self.mesh, chunks)
        with quietly_donated():
            grown = self.program.grower(donate=True)(state, key)
        form = {"optimizer": stage.optimizer.name, "train": stage.train}
        found = verify_growth(lineage, before, grown, text, self.mesh, self.recipe.tolerance, chunks, **form)
        if not found["holds"]:
            raise GrowthError(f"The growth does not preserve what its method promises: {failures_text(found)}")
        step = self._grown_from()
        record = GrowthRecord.of(
            stage.name,
            lineage,
            found,
            source=f"{step.parent.name}/{step.name}",
            source_digest=distributed.from_primary("source", lambda: read_manifest(step).state_digest),
            seed=self.recipe.seed,
            distances=distances,
        )
        self.history["growths"].append(record.record())
        distributed.print0(growth_lines(record))
        return grown, record.record()

    def _teacher_digest(self) -> str:
        """The digest of the teacher's checkpoint; of the model that the stage grew from, as the growth recorded it."""
        assert self.stage.teacher is not None
        if self.stage.teacher.source is not None:
            return self.stage.teacher.source.digest
        growths = {record["stage"]: record for record in self.history["growths"]}
        return GrowthRecord.from_record(growths[self.stage.name]).source_digest

    def _teacher(self, step: int) -> Params | None:
        """The teacher's weights, if the step after `step` steps has a teacher."""
        if self.stage.teacher is None or step >= self.stage.teacher_steps:
            return None
        source = self.stage.teacher.source
        where = self._grown_from() if source is None else source.directory
        return self.stage.teacher.restore(self.mesh, self._teacher_digest(), where)

    def _grown_from(self) -> Path:
        """The checkpoint step that the stage grew from: the last of the stage before, or the recipe's start."""
        if self.stage.index == 0:
            assert self.source is not None
            return self.source.directory
        before = self.stages[self.stage.index - 1]
        return self.store.directory.parent / before.directory / str(before.steps)

    def run(self, state: TrainState, interrupts: Interrupts) -> TrainState:
        """The state at the end of the stage, or at the step where the processes agreed to stop; it is saved."""
        stage, settings = self.stage, self.settings
        step = int(state.step)
        skipped = {s["step"] for s in self.history["skipped"] if s["stage"] == stage.name}
        bad_in_a_row = next(n for n in range(step + 1) if step - n not in skipped)
        stop = distributed.any_process("stop", interrupts.requested is not None)
        vote = distributed.Vote(self.mesh)
        rows = own_rows(self.mesh, stage.batch_size)
        pending: tuple[int, Metrics] | None = None
        masked, stepper, teacher = None, None, self._teacher(step)
        if stage.train != "all":
            sizes = (costs.count(size) for size in (stage.trained.count, costs.param_count(stage.cfg)))
            distributed.print0("Stage {!r} trains what is new: {} of {} parameters.".format(stage.name, *sizes))
        self.metrics.open(step)
        with contextlib.closing(self.metrics), Progress(self.metrics, stage.name, stage.steps, step) as show:

            def look(at: int, metrics: Metrics) -> None:
                nonlocal bad_in_a_row
                values = metrics.by_name(tuple(self.data.sources))
                show.step(at, values, write=at % settings.log_every == 0 or at == stage.steps)
                bad_in_a_row = bad_in_a_row + 1 if values["bad"] else 0
                if values["bad"]:
                    self.history["skipped"].append({"stage": stage.name, "step": at})
                    self.metrics.write("skip", at, values)
                    if distributed.is_primary():
                        log.warning("Stage %s, step %d: not finite, skipped; %s.", stage.name, at, self._batch_name(at))
                if bad_in_a_row >= settings.max_bad_steps:
                    raise NonFiniteError(
                        f"Stage {stage.name!r}: {bad_in_a_row} steps in a row, up to step {at}, had a loss, gradient "
                        f"or update that is not finite (loss {values['loss']}, gradient norm {values['grad_norm']}, "
                        f"update norm {values['update_norm']}; {self._batch_name(at)}). None of them was applied. "
                        "Lower the learning rate, or look at the data."
                    )
                bound = settings.max_loss * math.log(stage.cfg.vocab)
                if values["loss"] > bound:
                    raise NonFiniteError(
                        f"Stage {stage.name!r}, step {at}: the loss is {values['loss']:.6g} nats per token, more than "
                        f"{settings.max_loss:g} times that of a uniform guess ({math.log(stage.cfg.vocab):.4g}; "
                        f"{self._batch_name(at)}): training has diverged. Start again from an earlier checkpoint with "
                        "a lower learning rate. Run.max_loss sets this bound."
                    )

            while step < stage.steps and not stop:
                if masked != (step < stage.ramp_steps):
                    masked = step < stage.ramp_steps
                    stepper = self.program.stepper(masked)
                if step == stage.teacher_steps:
                    teacher = None  # frees its memory
                batch = put_batch(self.batches.next(stage.batch_size, rows), self.mesh, stage.batch_size)
                assert stepper is not None
                with jax.transfer_guard("disallow"):
                    state, metrics = stepper(state, batch, teacher=teacher)
                step += 1
                if pending is not None:
                    look(*pending)
                pending = (step, metrics)
                # Asked once per step, so that all decisions below, and all processes, use the same answer.
                stop, failed = vote(interrupts.requested is not None, self.store.failed())
                if failed:
                    self.store.wait()
                due_eval = step % self.recipe.eval_every == 0 or step == stage.steps
                due_save = step % settings.checkpoint_every == 0 or step == stage.steps
                if due_eval or due_save or stop:
                    look(*pending)
                    pending = None
                if due_eval:
                    measured = self._measure(step, state)
                    show.evaluated(step, measured)
                    self._written(step, measured)
                if due_save or stop:
                    self._save(step, state, None)
            self.store.wait()
        return state

    def _batch_name(self, step: int) -> str:
        """Which windows, in the order of training, the batch of a step held."""
        first = self.metrics.totals(step - 1).tokens // self.recipe.data.context
        return f"its batch: windows {first} to {first + self.stage.batch_size - 1} of the run"

    def _written(self, step: int, measured: Mapping[str, Any]) -> None:
        """Writes a held-out measurement, and the plot of all so far."""
        names = ("loss", "bits_per_byte")
        of_sources = {f"{s}/{n}": own[n] for s, own in measured.get("sources", {}).items() for n in names}
        self.metrics.write("heldout", step, {**{name: measured[name] for name in names}, **of_sources})
        if distributed.is_primary():
            shown = self.stages, self.history, self.recipe.data.context
            report.plot(report.curves(*shown), self.workdir / "loss.png", report.forked_at(*shown))

    def _heldout(self) -> Any:
        return self.data.heldout(self.stage.batch_size, self.recipe.eval_windows)

    def _measure(self, step: int, state: TrainState) -> dict[str, Any]:
        """The record of the held-out loss at this step, which is also added to the history."""
        total, weight = self.heldout_sums(state.params, self._heldout(), self.program.masks(step))
        loss = float(total.sum() / weight.sum())
        record = {
            "stage": self.stage.name,
            "step": step,
            "tokens": self.cost.tokens(step),
            "flops": self.cost.flops(step),
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, self.data.bytes_per_token),
        }
        if sources := self.data.sources:
            losses = {name: float(x) for name, x in zip(sources, total / weight, strict=True)}
            record["sources"] = {
                name: {"loss": own, "bits_per_byte": bits_per_byte(own, sources[name])} for name, own in losses.items()
            }
        self.history["evals"].append(record)
        return record

    def _save(self, step: int, state: TrainState, provenance: dict[str, Any] | None) -> None:
        stage = self.stage
        about: dict[str, Any] = {"provenance": provenance, "data": self.data.describe(), "history": self.history}
        about |= {"optimizer": stage.optimizer.name, "train": stage.train}
        meta = CheckpointMeta(stage.name, stage.lineage, stage.since_growth, **about).record()
        advice = "Read the data from a token store, with streamed=False."
        distributed.assert_equal("The data read so far", self.batches.mark(), advice)
        self.store.discard_after(step - 1)
        blobs = {**self.files, POSITION: self.batches.state()}
        self.store.save(step, state, signatures=signature_texts(stage.cfg), meta=meta, blobs=blobs)
        self.metrics.write("save", step, {})
