"""One stage of a run: how it begins, its loop of steps, what it measures and saves."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from flm_jax.guards import (
    MEMORY,
    Spike,
    StageFacts,
    StepGuards,
    StepLimits,
    Watch,
    batch_text,
    restore_before,
    skip_behind,
    spike_text,
)
from flm_jax.guards.watch import DATA, EVAL, FIRST_STEP, REWIND, SAVE, START, STEP, VOTE
from flm_jax.loss import bits_per_byte, make_heldout_sums
from flm_jax.model import Params
from flm_jax.progress import Interrupts, Progress
from flm_jax.recipe import Recipe, ResolvedStage, Run
from flm_jax.sharding import make_mesh, own_rows, put_batch
from flm_jax.source_checkpoint import POSITION, CheckpointMeta, SourceCheckpoint, signature_texts
from flm_jax.state import TrainState, shardings_of
from flm_jax.step import Metrics, StageProgram, quietly_donated
from flm_jax.tracking import MetricsLog, Session, Totals, growth_values, heldout_values, unwritten

log = logging.getLogger(__name__)


class _Spiked(NamedTuple):
    """A spike, and the first window of the batch that it was seen at, of the run."""

    spike: Spike
    first: int


def beginning(recipe: Recipe, index: int) -> dict[str, Any]:
    """The part of a stage's provenance that its recipe decides: random numbers, and where a tokenizer came from."""
    vocabulary = recipe.data.vocabulary
    origin = hub.origin(vocabulary.path) if isinstance(vocabulary, Pretrained) else None
    return {"seed": recipe.seed, "key": index, **({"vocabulary": origin} if origin else {})}


def stage_program(recipe: Recipe, run: Run, stage: ResolvedStage) -> StageProgram:
    """The programs of a stage, on its mesh."""
    mesh = make_mesh(run.mesh_of(stage.stage))
    return StageProgram(stage, mesh, recipe.loss_chunks, run.compiler_options, run.log_every)


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
        watch: Watch,
        step: int = 0,
        memory: bytes | None = None,
    ) -> None:
        """Prepares the stage, which goes on after `step` steps, with what the guards remember of them."""
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
        self.watch = watch
        self._compiled: tuple[bool, Any] | None = None
        self.guards = self._guards(step, memory)

    @property
    def stage(self) -> ResolvedStage:
        """The stage; after its growth, with the measured placement of its layers."""
        return self.program.stage

    def start(self, state: TrainState | None) -> TrainState:
        """The state at step 0, measured and saved.

        It is initialised, grown from the given state and verified, or the given state itself: that of the stage before
        or of the recipe's start checkpoint.
        """
        self.watch.at(START, 0)
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
            self.metrics.write("growth", 0, growth_values(provenance))
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
        stage, step = self.stage, int(state.step)
        if stage.train != "all":
            sizes = (costs.count(size) for size in (stage.trained.count, costs.param_count(stage.cfg)))
            distributed.print0("Stage {!r} trains what is new: {} of {} parameters.".format(stage.name, *sizes))
        if self.metrics.open(step):
            for kind, values in unwritten(self.workdir, stage.name, step, self.history):
                self.metrics.write(kind, step, values)
            self._plot()
        with contextlib.closing(self.metrics), Progress(self.metrics, stage.name, stage.steps, step) as show:
            while True:
                found = self._steps(state, interrupts, show)
                if not isinstance(found, _Spiked):
                    break
                del state  # donated to the steps; the state before the spike takes its memory
                state = self._rewound(found, show)
            self.watch.at(SAVE, int(found.step))
            self.store.wait()
        self.watch.pause()
        return found

    def _steps(self, state: TrainState, interrupts: Interrupts, show: Progress) -> TrainState | _Spiked:
        """The state at the end of the stage or where it was stopped, or a spike because of which the run is rewound."""
        stage, settings, watch = self.stage, self.settings, self.watch
        step = int(state.step)
        compiled_after = step, stage.ramp_steps, stage.teacher_steps
        after_rewind = step + 1 if self._last_rewind() == step else None
        stop = distributed.any_process("stop", interrupts.requested is not None)
        vote = distributed.Vote(self.mesh)
        rows = own_rows(self.mesh, stage.batch_size)
        pending: tuple[int, int, Metrics] | None = None
        teacher = self._teacher(step)

        def look(at: int, first: int, metrics: Metrics) -> _Spiked | None:
            with show.waiting("device"):
                values = metrics.by_name(tuple(self.data.sources))
            show.step(at, values, write=at % settings.log_every == 0 or at == stage.steps)
            spike = self.guards.look(at, first, values)
            return None if spike is None else _Spiked(spike, first)

        while step < stage.steps and not stop:
            stepper = self._stepper(masked=step < stage.ramp_steps)
            if step == stage.teacher_steps:
                teacher = None  # frees its memory
            step += 1
            watch.at(DATA, step)
            first = self.batches.position
            with show.reading(None if pending is None else pending[2].loss):
                batch = put_batch(self.batches.next(stage.batch_size, rows), self.mesh, stage.batch_size)
            watch.at(FIRST_STEP if step - 1 in compiled_after else STEP, step)
            with jax.transfer_guard("disallow"), show.waiting("device"):
                state, metrics = stepper(state, batch, teacher=teacher)
            spiked = None if pending is None else look(*pending)
            pending = (step, first, metrics)
            watch.at(VOTE, step)
            # Asked once per step, so that all decisions below, and all processes, use the same answer.
            stop, failed = vote(interrupts.requested is not None, self.store.failed())
            if failed:
                self.store.wait()
            due_eval = step % self.recipe.eval_every == 0 or step == stage.steps
            due_save = step % settings.checkpoint_every == 0 or step in (stage.steps, after_rewind)
            due_save = due_save or step in self.guards.needed(step)
            if spiked is None and (due_eval or due_save or stop):
                spiked, pending = look(*pending), None
            if spiked is not None:
                return spiked
            if due_eval:
                watch.at(EVAL, step)
                with show.waiting("heldout"):
                    measured = self._measure(step, state)
                show.evaluated(step, measured)
                self._written(step, measured)
            if due_save or stop:
                watch.at(SAVE, step)
                with show.waiting("save"):
                    self._save(step, state, None)
        return state

    def _stepper(self, masked: bool) -> Any:
        """The train step, compiled once, though the stage may be rewound; the one for the other steps is forgotten."""
        if self._compiled is None or self._compiled[0] != masked:
            self._compiled = masked, self.program.stepper(masked)
        return self._compiled[1]

    def _last_rewind(self) -> int | None:
        """The step that this stage was last rewound to."""
        mine = [record["to"] for record in self.history.get("rewinds", []) if record["stage"] == self.stage.name]
        return mine[-1] if mine else None

    def _rewound(self, spiked: _Spiked, show: Progress) -> TrainState:
        """The state before a spike; the data goes on after it.

        Where the run is killed before its next save, it comes to the spike again, and to the same decision.
        """
        stage, (spike, first), guard = self.stage, spiked, self.recipe.spike_guard
        assert guard is not None
        self.watch.at(REWIND, spike.step)
        restored = restore_before(spike, guard, self.store, self.program.abstract_state, stage.begins)
        step, rewinds = restored.step, self.history.get("rewinds", [])
        where = self.store.directory / str(step)
        before, position = report.read_run(restored.meta, restored.blobs, where)
        self.batches.restore(position)
        skipped = skip_behind(spike, first, guard, self.batches, stage.batch_size)
        record = {"stage": stage.name, "step": spike.step, "to": step, **spike.record(), **skipped}
        self.history.clear()
        self.history.update(before, rewinds=[*rewinds, record])
        self.store.discard_after(step)
        self.guards = self._guards(step, restored.blobs.get(MEMORY))
        self.metrics.close()
        self.metrics.open(step)
        # At the step that comes first now: what is resumed from a checkpoint before it writes the line again.
        self.metrics.write("rewind", step + 1, {"to": step, "spike": spike.step, **spike.record(), **skipped})
        show.rewound(step)
        if distributed.is_primary():
            log.warning(
                "Stage %s, step %d: %s, a spike that began at step %d. The stage goes on from step %d, without %s.",
                *(stage.name, spike.step, spike_text(spike), spike.since, step, batch_text(skipped)),
            )
        state: TrainState = restored.state
        return state

    def _guards(self, step: int, memory: bytes | None) -> StepGuards:
        stage, settings = self.stage, self.settings
        rewarm = 0 if stage.growth is None else stage.growth.rewarm_steps - (stage.since_growth or 0)
        quiet = max(stage.ramp_steps, stage.optimizer.warmup_steps, rewarm)
        facts = StageFacts(stage.name, stage.batch_size, stage.cfg.vocab, quiet, stage.begins)
        limits = StepLimits(settings.max_bad_steps, settings.max_loss, self.recipe.spike_guard, settings.gradient_alarm)
        return StepGuards(facts, limits, self.history, self.batches, self.metrics.write, step, memory)

    def _written(self, step: int, measured: Mapping[str, Any]) -> None:
        """Writes a held-out measurement, and the plot of all so far."""
        self.metrics.write("heldout", step, heldout_values(measured))
        self._plot()

    def _plot(self) -> None:
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
        if memory := self.guards.memory():
            blobs[MEMORY] = memory
        self.store.kept_for_now = self.guards.needed(step)
        self.store.save(step, state, signatures=signature_texts(stage.cfg), meta=meta, blobs=blobs)
        self.metrics.write("save", step, {})
