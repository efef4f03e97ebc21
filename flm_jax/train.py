"""The training loop: runs a recipe's stages in order, with a growth between stages, and resumes where it stopped.

The order of decisions:

1. The recipe is checked. A work directory that was begun with another recipe is refused.
2. The data is opened and must be the data that the work directory was begun with. Nothing is written before this point.
3. The run continues from the newest intact checkpoint of the latest stage that has one.
4. A stage without a checkpoint starts: the first one by initialisation, every other one by growing the last state of
   the stage before. A growth is verified before any step of the new stage, and then saved as step 0 of that stage with
   its provenance. It is therefore applied once, and never on resume.
5. The loop: a step is dispatched; while the devices run it, the next batch is read and the metrics of the previous step
   are checked; when they are due, the held-out loss is measured and the state is saved.
6. After the last stage, the report is written.

A checkpoint holds everything that an exact resume needs: state, data position, and the history of measurements.

With several processes, every process runs this code, each with its own rows of every batch. All decisions depend on
values that are equal in all processes or are broadcast from one (see `flm_jax.distributed`). Every process writes its
part of the arrays; everything else is written and printed by the first process only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flm_jax import costs, distributed, report
from flm_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    NoCheckpointError,
    Restored,
    read_manifest,
)
from flm_jax.checkpoint.directory import take_lock
from flm_jax.checkpoint.find import STAGES
from flm_jax.checkpoint_growth.record import GrowthRecord
from flm_jax.checkpoint_growth.text import growth_lines
from flm_jax.checkpoint_growth.verify import failures_text, heldout_text, observe_before, verify_growth
from flm_jax.data.batches import TokenBatches
from flm_jax.data.source import Data, open_data
from flm_jax.files import sha256_json
from flm_jax.generate import generate
from flm_jax.growth.distance import settle
from flm_jax.growth.verify import GrowthError
from flm_jax.loss import bits_per_byte, make_heldout_loss
from flm_jax.progress import Interrupts, Progress
from flm_jax.recipe import Recipe, ResolvedStage, Run, begin, resolve
from flm_jax.records import DATA, RECIPE, as_dict, check_identity, write_identity, write_record
from flm_jax.sharding import make_mesh, own_rows, put_batch
from flm_jax.source_checkpoint import POSITION, CheckpointMeta, SourceCheckpoint, signature_texts
from flm_jax.state import TrainState, abstract_state, shardings_of
from flm_jax.step import Metrics, StageProgram, make_grower, quietly_donated

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Raised when too many consecutive steps had a loss or gradient that is not finite."""


def train(
    recipe: Recipe, run: Run, workdir: str | Path, records: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Runs a recipe in a work directory, from its start or from the newest checkpoint, and returns the report.

    Args:
      recipe: what to compute.
      run: how to run it.
      workdir: the work directory; it belongs to this recipe, and is made if it does not exist.
      records: texts to write into it, by file name, for example the configuration as given and the state of the code.

    Returns:
      The report, which is also written to the work directory; None if a signal to any process stopped the run. The
      state is saved in that case.

    Raises:
      ValueError: the recipe is not valid, or the work directory belongs to another recipe or other data. Nothing is
        overwritten.
      GrowthError: a growth did not preserve what its method promises.
      NonFiniteError: the loss or the gradient was not finite for `run.max_bad_steps` steps in a row.
      CheckpointError: a checkpoint cannot be written or does not fit the model.
      PeerError: one of these errors was raised in another process.
    """
    distributed.check_joined()
    workdir = Path(workdir).expanduser()
    with distributed.together("recipe"):
        origin, stages = begin(recipe)
        check_identity(workdir, RECIPE, as_dict(recipe), "another recipe")
        if origin is not None:
            distributed.print0(f"The run starts with {origin.directory}.")
        run.check(recipe)
        programs = _programs(recipe, run, stages)
        for program in programs:
            program.check_trains(recipe.data.context)
    settings = sha256_json([as_dict(recipe), as_dict(run)])
    distributed.assert_equal("The recipe or its Run", settings, "Start every process with the same command.")
    with contextlib.ExitStack() as stack:
        with distributed.together("lock"):
            if distributed.is_primary():
                # Held while data is prepared, or two runs could both find the work directory new.
                stack.enter_context(take_lock(workdir))
                check_identity(workdir, RECIPE, as_dict(recipe), "another recipe")
        data = open_data(recipe.data)
        _check_vocabulary(stages, data)
        # The path of the data may change between starts, its contents may not.
        identity = {key: value for key, value in data.describe().items() if key in ("read", "context", "seed")}
        identity |= {"digest": data.digest, "vocabulary": data.vocabulary.digest}
        identity |= {} if origin is None else {"start": origin.digest}
        with distributed.together("data"):
            check_identity(workdir, DATA, identity, "other data or another start")
        stores = [
            stack.enter_context(Checkpoints(workdir / STAGES / s.directory, keep=run.keep, keep_steps=(0, s.steps)))
            for s in stages
        ]
        write_identity(workdir, RECIPE, as_dict(recipe))
        write_identity(workdir, DATA, identity)
        tables = "\n\n".join(f"{s.name}\n{costs.param_table(s.cfg)}" for s in stages)
        for name, text in {"parameters.txt": tables + "\n", **(records or {})}.items():
            write_record(workdir, name, text)
        first, restored = _newest(programs, stores)
        begins = restored is None
        state: TrainState | None = None
        history: dict[str, list[Any]] = {"evals": [], "growths": [], "skipped": []}
        position: bytes | None = None
        if restored is not None:
            state, history = restored.state, json.loads(json.dumps(restored.meta["history"]))
            position = restored.blobs[POSITION]
        elif origin is not None:
            state = origin.restore(programs[0].mesh)
        del restored  # or it would keep the restored arrays in memory for the whole run
        interrupts = stack.enter_context(Interrupts())
        for index in range(first, len(stages)):
            # The lineage of this stage needs the layer placement that earlier growths by distance have measured.
            stages = _placed(recipe, origin, history)
            worker = _StageRun(recipe, run, workdir, data, stages[index], stores[index], history, position, origin)
            with jax.set_mesh(worker.mesh):
                if begins or index > first:
                    state = worker.start(state)
                assert state is not None
                state = worker.run(state, interrupts)
            position = worker.batches.state()
            if distributed.any_process("stop", interrupts.requested is not None):
                return None
        assert state is not None
        with jax.set_mesh(programs[-1].mesh):
            sample = _sample(stages[-1], state, data, run, recipe.seed)
        context = recipe.data.context
        result = report.summary(stages, history, data.describe(), data.bytes_per_token, context, sample)
        with distributed.together("report"):
            if distributed.is_primary():
                report.write(workdir, result)
        return result


def _programs(recipe: Recipe, run: Run, stages: Sequence[ResolvedStage]) -> list[StageProgram]:
    return [
        StageProgram(stage, make_mesh(run.mesh_of(stage.stage)), recipe.loss_chunks, run.compiler_options)
        for stage in stages
    ]


def _placed(recipe: Recipe, origin: SourceCheckpoint | None, history: Mapping[str, Any]) -> tuple[ResolvedStage, ...]:
    """The stages, with new layers placed as the growths of this run so far have placed them."""
    placed = {record["stage"]: GrowthRecord.from_record(record).growth for record in history["growths"]}
    stages = [dataclasses.replace(stage, growth=placed.get(stage.name, stage.growth)) for stage in recipe.stages]
    return resolve(dataclasses.replace(recipe, stages=tuple(stages)), origin)


class _StageRun:
    """One stage during one start of the program: the objects that its start and its loop share."""

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        workdir: Path,
        data: Data,
        stage: ResolvedStage,
        store: Checkpoints,
        history: dict[str, list[Any]],
        position: bytes | None,
        origin: SourceCheckpoint | None,
    ) -> None:
        self.recipe, self.settings, self.workdir, self.data = recipe, run, workdir, data
        self.store, self.history, self.origin = store, history, origin
        (self.program,) = _programs(recipe, run, [stage])
        self.mesh: Mesh = self.program.mesh
        self.batches: TokenBatches = data.train()
        if position is not None:
            self.batches.restore(position)
        self.heldout_loss = make_heldout_loss(stage.cfg, self.mesh, recipe.loss_chunks)
        self.flops_per_token = costs.train_flops_per_token(stage.cfg, recipe.data.context)

    @property
    def stage(self) -> ResolvedStage:
        """The stage; after its growth, with the measured placement of its layers."""
        return self.program.stage

    def start(self, state: TrainState | None) -> TrainState:
        """The state at step 0, measured and saved.

        It is initialised, taken from the recipe's start checkpoint, or grown from the given state and verified.
        """
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), self.stage.index)
        provenance: dict[str, Any] = {"seed": self.recipe.seed, "key": self.stage.index}
        if state is None:
            state = self.program.initialiser()(key)
        elif self.stage.restored:
            assert self.origin is not None
            state = state.replace(step=jax.numpy.zeros_like(state.step))
            provenance |= {"start": self.origin.digest}
        else:
            state, record = self._grow(state, key)
            provenance |= record
        self._measure(0, state)
        self._save(0, state, provenance)
        self.store.wait()
        return state

    def _grow(self, state: TrainState, key: jax.Array) -> tuple[TrainState, dict[str, Any]]:
        """The grown state, verified, and the record of the growth; the given state is donated."""
        lineage, chunks = self.stage.lineage, self.recipe.loss_chunks
        # The stage before may have used another mesh; if not, this moves nothing.
        state = jax.device_put(state, shardings_of(abstract_state(lineage.before, self.mesh)))
        text = heldout_text(self.data, self.mesh, self.recipe.eval_windows)
        batch = put_batch(text.few, self.mesh)
        lineage, distances = settle(lineage, state.params, batch.inputs_BT, batch.segments_BT)
        stage = dataclasses.replace(self.stage, lineage=lineage)
        (self.program,) = _programs(self.recipe, self.settings, [stage])
        # The old model's outputs are computed before the growth, so that its memory is free for the new model.
        before = observe_before(lineage, state.params, text, self.mesh, chunks)
        with quietly_donated():
            grown = make_grower(lineage, self.mesh, donate=True)(state, key)
        found = verify_growth(lineage, before, grown, text, self.mesh, self.recipe.tolerance, chunks)
        if not found["holds"]:
            raise GrowthError(f"The growth does not preserve what its method promises: {failures_text(found)}")
        source = self._grown_from()
        record = GrowthRecord.of(
            stage.name,
            lineage,
            found,
            source=f"{source.parent.name}/{source.name}",
            source_digest=distributed.from_primary("source", lambda: read_manifest(source).state_digest),
            seed=self.recipe.seed,
            distances=distances,
        )
        self.history["growths"].append(record.record())
        distributed.print0(growth_lines(record))
        return grown, record.record()

    def _grown_from(self) -> Path:
        """The checkpoint step that the stage grew from: the last of the stage before, or the recipe's start."""
        if self.stage.index == 0:
            assert self.origin is not None
            return self.origin.directory
        before = self.stage.index - 1, self.recipe.stages[self.stage.index - 1]
        return self.store.directory.parent / f"{before[0]}_{before[1].name}" / str(before[1].steps)

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
        masked, stepper = None, None
        events, tokens = self.workdir / "events" / stage.directory, stage.batch_size * self.recipe.data.context
        with Progress(events, stage.name, stage.steps, tokens, self.flops_per_token, step) as show:

            def look(at: int, metrics: Metrics) -> None:
                nonlocal bad_in_a_row
                values = {f: float(x) for f, x in vars(jax.device_get(metrics)).items()}
                show.step(at, values, write=at % settings.log_every == 0 or at == stage.steps)
                bad_in_a_row = bad_in_a_row + 1 if values["bad"] else 0
                if values["bad"]:
                    self.history["skipped"].append({"stage": stage.name, "step": at})
                    if distributed.is_primary():
                        log.warning("Stage %s, step %d: loss or gradient is not finite; skipped.", stage.name, at)
                if bad_in_a_row >= settings.max_bad_steps:
                    raise NonFiniteError(
                        f"Stage {stage.name!r}: {bad_in_a_row} steps in a row, up to step {at}, had a loss or "
                        f"gradient that is not finite (loss {values['loss']}, gradient norm {values['grad_norm']}). "
                        "None of them was applied. Lower the learning rate, or look at the data."
                    )

            while step < stage.steps and not stop:
                if masked != (step < stage.ramp_steps):
                    masked = step < stage.ramp_steps
                    stepper = self.program.stepper(masked)
                batch = put_batch(self.batches.next(stage.batch_size, rows), self.mesh, stage.batch_size)
                assert stepper is not None
                with jax.transfer_guard("disallow"):
                    state, metrics = stepper(state, batch)
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
                    show.evaluated(step, self._measure(step, state))
                if due_save or stop:
                    self._save(step, state, None)
            self.store.wait()
        return state

    def _heldout(self) -> Any:
        return self.data.heldout(self.stage.batch_size, self.recipe.eval_windows)

    def _measure(self, step: int, state: TrainState) -> dict[str, Any]:
        """The record of the held-out loss at this step, which is also added to the history."""
        loss = self.heldout_loss(state.params, self._heldout(), self.program.masks(step))
        tokens = step * self.stage.batch_size * self.recipe.data.context
        record = {
            "stage": self.stage.name,
            "step": step,
            "tokens": tokens,
            "flops": tokens * self.flops_per_token,
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, self.data.bytes_per_token),
        }
        self.history["evals"].append(record)
        return record

    def _save(self, step: int, state: TrainState, provenance: dict[str, Any] | None) -> None:
        about = {"provenance": provenance, "data": self.data.describe(), "history": self.history}
        meta = CheckpointMeta(self.stage.name, self.stage.lineage, self.stage.newborn, **about).record()
        advice = "Read the data from a token store, with streamed=False."
        distributed.assert_equal("The data read so far", self.batches.mark(), advice)
        self.store.discard_after(step - 1)
        files = {} if self.origin is None else self.origin.files_with(self.data.vocabulary)
        blobs = {**files, POSITION: self.batches.state()}
        self.store.save(step, state, signatures=signature_texts(self.stage.cfg), meta=meta, blobs=blobs)


def _newest(programs: list[StageProgram], stores: list[Checkpoints]) -> tuple[int, Restored | None]:
    """The index of the stage to continue, and its newest intact checkpoint; (0, None) if there is no checkpoint."""
    damaged: list[str] = []
    for program, store in reversed(list(zip(programs, stores, strict=True))):
        try:
            restored = store.restore(program.abstract_state)
        except NoCheckpointError:
            continue
        except DamagedError as error:
            if distributed.is_primary():
                log.error("Stage %s starts again from the stage before: %s", program.stage.name, error)
            damaged.append(str(error))
            continue
        distributed.print0(f"Continuing stage {program.stage.name!r} at step {restored.step}.")
        return program.stage.index, restored
    if damaged:
        raise CheckpointError(f"No checkpoint of any stage can be restored: {'; '.join(damaged)}")
    return 0, None


def _check_vocabulary(stages: tuple[ResolvedStage, ...], data: Data) -> None:
    """Checks that the embedding of every stage has a row for every token of the vocabulary.

    Raises:
      ValueError: one has not.
    """
    for s in stages:
        if data.vocabulary.size > s.cfg.vocab:
            raise ValueError(
                f"Stage {s.name!r}: the vocabulary has {data.vocabulary.size} tokens, the model's embedding only "
                f"{s.cfg.vocab}; set its vocab to {data.vocabulary.size} or more."
            )


def _sample(stage: ResolvedStage, state: TrainState, data: Data, run: Run, seed: int) -> str:
    """The prompt `run.prompt` and its continuation by the last model."""
    ids = data.vocabulary.encode(run.prompt)
    prompt = np.asarray([ids or [data.vocabulary.eos_id]], np.int32)
    key = jax.random.fold_in(jax.random.key(seed), 0x5A)
    tokens = generate(stage.cfg, state.params, prompt, run.sample_tokens, key, temperature=0.7)
    return run.prompt + data.vocabulary.decode([int(t) for t in distributed.fetch(tokens)[0]])
