"""A checkpoint that something begins with: found, read, and placed in the line of models that led to it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, read_manifest
from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint.manifest import file_faults
from flm_jax.config import ModelConfig
from flm_jax.data.vocabulary import TokenizerVocabulary, Vocabulary
from flm_jax.growth.plan import masks_at
from flm_jax.model import Masks, Params
from flm_jax.recipe import Recipe, ResolvedStage, Stage, resolve
from flm_jax.records import as_dict, from_dict
from flm_jax.step import StageProgram, TrainState

# The file of a checkpoint that says where its data stands; it is of the run alone.
POSITION = "data"
# Of a converted model: its configuration there, and its tokenizer.
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@dataclass(frozen=True, eq=False)
class SourceCheckpoint:
    """A checkpoint, and what its record says of it. Its arrays are read by `restore`, and checked then.

    Attributes:
      directory: of the step.
      step: within its stage.
      digest: over all of its state.
      stage: its stage, with those before it as far as they decide how training goes on.
      meta: its record.
      trained: whether an optimizer's state is there too; a converted checkpoint has weights alone.
    """

    directory: Path
    step: int
    digest: str
    stage: ResolvedStage
    meta: dict[str, Any]
    trained: bool

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """What came with the weights and goes with them, by file name: a tokenizer, say.

        Raises:
            DamagedError: one is not as it was saved.
        """
        names = sorted(path.name for path in (self.directory / "blobs").glob("*") if path.name != POSITION)
        if faults := file_faults(self.directory, read_manifest(self.directory), contents=True) if names else []:
            raise DamagedError("; ".join(faults[:3]))
        return {name: (self.directory / "blobs" / name).read_bytes() for name in names}

    def files_with(self, vocabulary: Vocabulary) -> dict[str, bytes]:
        """What goes on with the weights where training reads with a vocabulary.

        Another one makes the tokenizer that came with them, and the ids of its special tokens, another model's.
        """
        same = isinstance(vocabulary, TokenizerVocabulary) and vocabulary.model == self.files.get(TOKENIZER)
        return {name: content for name, content in self.files.items() if same or name == CONFIG}

    def restore(self, mesh: Mesh, optimizer: bool = True) -> TrainState:
        """The state on a mesh, every bit of it checked; of weights alone, with the optimizer's state of a first step.

        Args:
            mesh: where to.
            optimizer: False: of weights alone, without an optimizer's state.

        Raises:
            DamagedError: it is not as it was saved.
        """
        program = StageProgram(self.stage, mesh, 1)
        with Checkpoints(self.directory.parent, read_only=True) as store:
            found = store.restore(kept(program.abstract_state, self.trained), self.step).state
        if self.trained:
            state: TrainState = found
            return state
        if not optimizer:
            return TrainState(found["step"], found["params"], ())
        init = jax.jit(program.tx.init, out_shardings=program.shardings.opt_state)
        return TrainState(found["step"], found["params"], init(found["params"]))

    def restore_params(self, mesh: Mesh) -> Params:
        """The parameters alone on a mesh, every bit of them checked.

        Raises:
            DamagedError: the checkpoint is not as it was saved.
        """
        abstract = {"params": StageProgram(self.stage, mesh, 1).abstract_state.params}
        with Checkpoints(self.directory.parent, read_only=True) as store:
            return store.restore(abstract, self.step, partial=True).state["params"]

    def masks(self) -> Masks | None:
        """The masks of its own growth, where they are still rising: the model is what they let through."""
        growth, before = self.stage.stage.growth, self.stage.before
        if growth is None or before is None or self.step >= self.stage.ramp_steps:
            return None
        return masks_at(before.cfg, self.stage.cfg, growth, self.step)

    def check_settled(self, grows: bool) -> None:
        """Checks that nothing of its own growth is still on its way that would be lost.

        Args:
            grows: whether it shall grow now, rather than go on from step 0 with all that is on its way.

        Raises:
            ValueError: its masks, or the rate of its new entries, are still rising.
        """
        growth = self.stage.stage.growth
        rising = {} if growth is None else {"masks": self.stage.ramp_steps, "new entries' rate": growth.rewarm_steps}
        for what, steps in rising.items():
            if self.step < steps and (self.step or grows):
                raise ValueError(
                    f"{self.directory} is at step {self.step}, and its {what} rise over {steps}: take a later "
                    "checkpoint" + ("." if grows else ", or the grown one at step 0.")
                )


def kept(state: TrainState, trained: bool) -> Any:
    """What a checkpoint holds of a state: all of it, or the weights alone."""
    return state if trained else {"step": state.step, "params": state.params}


def model_of(checkpoint: str, changes: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of a checkpoint's model, so that no recipe needs to repeat it.

    Args:
        checkpoint: a step, a stage's directory or a work directory.
        changes: fields that are to differ.

    Raises:
        ValueError: there is no such field.
        CheckpointError: as `read_source`.
    """
    return read_source(checkpoint).stage.cfg.changed(changes or {})


def read_source(path: str | Path) -> SourceCheckpoint:
    """Finds a checkpoint: a step's directory, or the newest step of a stage or of a work directory.

    Raises:
        NoCheckpointError: there is none.
        CheckpointError: it was not written by a run or a growth of this project.
    """
    directory = step_directory(path)
    manifest = read_manifest(directory)
    try:
        meta = json.loads((directory / "meta.json").read_text())
    except ValueError as error:
        raise DamagedError(f"{directory / 'meta.json'} is damaged: {error}; take another checkpoint.") from error
    if "lineage" not in meta:
        raise CheckpointError(f"{directory} does not record its model and the growths that led to it.")
    stage: ResolvedStage | None = None
    generations = meta["lineage"]
    for index, generation in enumerate(generations):
        model, growth = from_dict(generation["model"]), from_dict(generation["growth"])
        # It is no stage of any recipe: what is trained, and how, is for others to say.
        described = Stage(meta["stage"], model, steps=0, batch_size=0, growth=growth)
        stage = ResolvedStage(index - len(generations), described, stage)
    assert stage is not None
    trained = any(path.startswith("opt_state/") for path in manifest.leaves)
    return SourceCheckpoint(directory, int(directory.name), manifest.state_digest, stage, meta, trained)


def begin(recipe: Recipe) -> tuple[SourceCheckpoint | None, tuple[ResolvedStage, ...]]:
    """The checkpoint that a recipe starts with, if any, and its stages.

    Raises:
        ValueError: as `resolve`, or the checkpoint is within a ramp.
        CheckpointError: as `read_source`.
    """
    if not recipe.start:
        return None, resolve(recipe)
    origin = read_source(recipe.start)
    origin.check_settled(grows=bool(recipe.stages) and recipe.stages[0].growth is not None)
    return origin, resolve(recipe, (origin.stage, origin.step))


def lineage(stage: ResolvedStage) -> list[dict[str, Any]]:
    """The models that led to a stage, oldest first, each with the plan that it grew by; as a record."""
    earlier = lineage(stage.before) if stage.before is not None else []
    return [*earlier, {"model": as_dict(stage.cfg), "growth": as_dict(stage.stage.growth)}]
