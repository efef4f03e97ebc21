"""The training loop: runs a recipe's stages in order, with a growth between stages, and resumes where it stopped.

The order of decisions:

1. The recipe is checked. A work directory that was begun with another recipe is refused.
2. The data is opened and must be the data that the work directory was begun with. Nothing is written before this point.
   A run that forks from another one (see `flm_jax.forking`), and has no checkpoint of its own yet, reads that run's.
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
part of the arrays; everything else is written and printed by process 0 only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flm_jax import costs, distributed, forking, report, run_comparison
from flm_jax.chat.conversation import USER, Message
from flm_jax.chat.template import ChatEncoder, Template
from flm_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    NoCheckpointError,
    Restored,
)
from flm_jax.checkpoint.directory import locked
from flm_jax.checkpoint.find import STAGES
from flm_jax.checkpoint_growth.record import GrowthRecord
from flm_jax.data.known import forget
from flm_jax.data.source import Data, open_data, verified_behind
from flm_jax.files import sha256_json
from flm_jax.generation import Sampling
from flm_jax.generation.decode import continued
from flm_jax.guards import MEMORY, ending_if_lost, watching
from flm_jax.progress import Interrupts
from flm_jax.recipe import Recipe, ResolvedStage, Run, begin, check_vocabulary, resolve
from flm_jax.records import DATA, RECIPE, as_dict, check_identity, write_identity, write_record
from flm_jax.source_checkpoint import SourceCheckpoint
from flm_jax.stage_run import StageRun, stage_program
from flm_jax.state import TrainState
from flm_jax.step import StageProgram
from flm_jax.tracking import Session, check_installed, devices, read_fork, tracked, where_to_look

log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    run: Run,
    workdir: str | Path,
    records: Mapping[str, str] | None = None,
    fork: str | Path | None = None,
) -> dict[str, Any] | None:
    """Runs a recipe in a work directory, from its start or from the newest checkpoint, and returns the report.

    Args:
      recipe: what to compute.
      run: how to run it.
      workdir: the work directory; it belongs to this recipe, and is made if it does not exist.
      records: texts to write into it, by file name, for example the configuration as given and the state of the code.
      fork: a checkpoint of another run, or that run's work directory, to go on from: with its optimizer, data position
        and history, and with what this recipe changes. It is read until the work directory has a checkpoint of its own.

    Returns:
      The report, which is also written to the work directory; None if a signal to any process stopped the run. The
      state is saved in that case.

    Raises:
      ValueError: the recipe is not valid, or the work directory belongs to another recipe or other data, or the recipe
        cannot go on from the other run. Nothing is overwritten.
      GrowthError: a growth did not preserve what its method promises.
      NonFiniteError: the loss or the gradient was not finite for `run.max_bad_steps` steps in a row.
      SpikeError: the loss spiked more often than `recipe.spike_guard` allows.
      CheckpointError: a checkpoint cannot be written or does not fit the model.
      PeerError: one of these errors was raised in another process.
    """
    distributed.check_joined()
    workdir = Path(workdir).expanduser()
    origin = distributed.from_primary("fork", lambda: forking.located(workdir, fork))
    with distributed.together("recipe"):
        source, stages = begin(recipe)
        check_identity(workdir, RECIPE, as_dict(recipe), "another recipe")
        if source is not None:
            distributed.print0(f"The run starts with {source.directory}.")
        forked = None if origin is None else forking.planned(recipe, stages, source, origin, fork)
        run.check(recipe)
        if distributed.is_primary():  # no other process writes measurements
            check_installed(run.tracker)
        programs = [stage_program(recipe, run, stage) for stage in stages]
        for program in programs:
            program.check_trains(recipe.data.context)
    settings = sha256_json([as_dict(recipe), as_dict(run)])
    distributed.assert_equal("The recipe or its Run", settings, "Start every process with the same command.")
    with contextlib.ExitStack() as stack:
        with distributed.together("lock"):
            if distributed.is_primary():
                # Held while data is prepared, or two runs could both find the work directory new.
                stack.enter_context(locked(workdir))
                check_identity(workdir, RECIPE, as_dict(recipe), "another recipe")
        if run.verify_data and distributed.is_primary():
            forget(recipe.data.cache_dir)
        data = open_data(recipe.data)
        if forked is not None:  # before the model is told to be too small for another vocabulary
            forked.check_vocabulary(data.vocabulary)
        check_vocabulary(stages, data.vocabulary.size)
        if source is not None and (other := source.other_vocabulary(data.vocabulary)):
            distributed.print0(other)
        taught = {s.name: s.teacher for s in stages if s.teacher is not None}
        for name, teacher in taught.items():
            if other := teacher.other_vocabulary(data.vocabulary, name):
                distributed.print0(other)
        # The path of the data may change between starts, its contents may not.
        identity = {key: value for key, value in data.describe().items() if key in ("read", "context", "seed")}
        identity |= {"digest": data.digest, "vocabulary": data.vocabulary.digest}
        identity |= {} if source is None else {"start": source.digest}
        identity |= {"teachers": {name: teacher.record() for name, teacher in taught.items()}} if taught else {}
        with distributed.together("data"):
            what = "another teacher, other data" if taught else "other data"
            check_identity(workdir, DATA, identity, f"{what} or another start")
            position: bytes | None = None
            record = read_fork(workdir)
            if forked is not None:
                record, position = forked.record(data, identity, recipe.eval_windows)
            needed = forking.needs(stages, record)
            said = data.supply(needed, None if record is None else record.begun)
        for line in [*said, *([] if record is None else record.lines())]:
            distributed.print0(line)
        stages = forking.with_fork(stages, record)
        # What lies before the stage that a fork goes on with is no beginning of it.
        first = 0 if record is None else forking.place(stages, record)
        state: TrainState | None = None
        if forked is not None and record is not None:
            state = forked.restore(programs[first])
            with distributed.together("fork"):
                forked.claim(workdir, recipe, identity, record)
        stores = [
            stack.enter_context(Checkpoints(workdir / STAGES / s.directory, keep=run.keep, keep_steps=s.kept_steps))
            for s in stages
        ]
        write_identity(workdir, RECIPE, as_dict(recipe))
        write_identity(workdir, DATA, identity)
        tables = "\n\n".join(f"{s.name}\n{costs.param_table(s.cfg)}" for s in stages)
        for name, text in {"parameters.txt": tables + "\n", **(records or {})}.items():
            write_record(workdir, name, text)
        service = stack.enter_context(tracked(run.tracker, workdir, {"recipe": as_dict(recipe), "run": as_dict(run)}))
        session = Session(service, devices())
        for line in where_to_look(workdir, service):
            distributed.print0(line)
        first, restored = _newest(programs[first:], stores[first:])
        begins = restored is None
        history: dict[str, list[Any]] = {"evals": [], "growths": [], "skipped": []}
        step, memory = 0, None
        if restored is not None:
            where = stores[first].directory / str(restored.step)
            state, (history, position) = restored.state, report.read_run(restored.meta, restored.blobs, where)
            step, memory, forked = restored.step, restored.blobs.get(MEMORY), None
        elif forked is not None and record is not None:
            history, step, memory = forked.history(record), forked.old.step, forked.memory(identity)
        elif source is not None:
            state = source.restore(programs[0].mesh, stages[0].optimizer.name)
        del restored  # or it would keep the restored arrays in memory for the whole run
        stack.enter_context(verified_behind(data, run.verify_data))
        watch = stack.enter_context(watching(run.watchdog, workdir))
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(ending_if_lost())  # the innermost: closing checkpoints waits for all processes
        for index in range(first, len(stages)):
            # The lineage of this stage needs the layer placement that earlier growths by distance have measured.
            stages = forking.with_fork(_placed(recipe, source, stages, history), record)
            worker = StageRun(
                *(recipe, run, workdir, data, stages, index, stores[index], history, position, source, session, watch),
                *((step, memory) if index == first else (0, None)),
            )
            with jax.set_mesh(worker.mesh):
                if forked is not None and index == first and state is not None:
                    measured = forked.measured(identity, recipe.eval_windows)
                    worker.adopt(state, measured, forked.provenance)
                elif begins or index > first:
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
                _page(workdir)
                report.write(workdir, result)
        return result


def _page(workdir: Path) -> None:
    """Writes report.html from what lies in the work directory; it is no reason for a run to fail."""
    try:
        run_comparison.write_page([run_comparison.read_run_curves(workdir)], workdir / "report.html")
    except (OSError, ValueError) as error:
        log.error("report.html cannot be written: %s", error)


def _placed(
    recipe: Recipe, source: SourceCheckpoint | None, known: Sequence[ResolvedStage], history: Mapping[str, Any]
) -> tuple[ResolvedStage, ...]:
    """The stages, with new layers placed as the growths of this run so far have placed them."""
    placed = {record["stage"]: GrowthRecord.from_record(record).growth for record in history["growths"]}
    stages = [dataclasses.replace(stage, growth=placed.get(stage.name, stage.growth)) for stage in recipe.stages]
    # Read again, a path could mean a later checkpoint than at the start.
    teachers = {s.name: s.teacher.source for s in known if s.teacher is not None and s.teacher.source is not None}
    return resolve(dataclasses.replace(recipe, stages=tuple(stages)), source, teachers)


def _newest(programs: list[StageProgram], stores: list[Checkpoints]) -> tuple[int, Restored | None]:
    """The index of the stage to continue, and its newest intact checkpoint; the first and None if there is none."""
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
        raise CheckpointError(
            f"No checkpoint of any stage can be restored: {'; '.join(damaged)}. Restore one from a copy, or take a new "
            "--workdir."
        )
    return programs[0].stage.index, None


def _sample(stage: ResolvedStage, state: TrainState, data: Data, run: Run, seed: int) -> str:
    """The prompt `run.prompt` and its continuation by the last model; of conversations, a question and its answer."""
    template, encoder = data.describe()["corpus"].get("template"), None
    if isinstance(template, Mapping):
        encoder = ChatEncoder(Template.from_record(template), data.vocabulary)
        ids = encoder.prompt([Message(USER, run.prompt)])
    else:
        ids = data.vocabulary.encode(run.prompt)
    prompt = np.asarray([ids or [data.vocabulary.eos_id]], np.int32)
    how = Sampling(temperature=0.7, seed=seed)
    found = distributed.fetch(continued(stage.cfg, state.params, prompt, run.sample_tokens, how))
    tokens = [int(token) for token in found[0]]
    if encoder is None:
        return run.prompt + data.vocabulary.decode(tokens)
    end = next((i for i, token in enumerate(tokens) if token in encoder.stop_ids), len(tokens))
    answer = data.vocabulary.decode(tokens[:end])
    for stop in encoder.stop_texts:
        answer = answer.split(stop)[0]
    return f"{run.prompt}\n{answer}"
