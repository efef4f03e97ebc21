"""The checkpoint that a run, a growth, an export or an evaluation starts from: its record, its state, its lineage."""

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
from flm_jax.checkpoint.commit import BLOBS, META
from flm_jax.checkpoint.find import step_directory
from flm_jax.checkpoint.manifest import file_faults
from flm_jax.config import ModelConfig
from flm_jax.costs import leaves
from flm_jax.data.vocabulary import TokenizerVocabulary, Vocabulary
from flm_jax.growth.exact_adamw import rescaled_adamw
from flm_jax.growth.lineage import Lineage
from flm_jax.model import Masks, Params, declared
from flm_jax.optimizer import OptimizerConfig
from flm_jax.records import as_dict
from flm_jax.state import TrainState, abstract_state, kept, shardings_of

# The file of a checkpoint that says where its data stands; it is of the run alone.
POSITION = "data"
# Of a converted model: its configuration there, and its tokenizer.
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint's meta.json says, whoever wrote it: a run, a growth, or an import.

    Attributes:
      stage: the stage's name.
      lineage: the model and how it came to be.
      newborn: whether the stage began with the lineage's last growth, so that its masks and its new entries' rate count
        from the stage's first step; False for a stage that went on with a model which had trained since.
      provenance: what led to step 0, where this is one.
      data: what was trained on, as the data describes itself.
      history: measurements, growths and skipped steps of the run so far.
      converted: the config.json that an imported model came with.
    """

    stage: str
    lineage: Lineage
    newborn: bool = True
    provenance: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    history: Mapping[str, Any] | None = None
    converted: Mapping[str, Any] | None = None

    @property
    def ramp_steps(self) -> int:
        """Steps at the start of the stage that run with masks."""
        return self.lineage.ramp_steps if self.newborn else 0

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        cfg = as_dict(self.lineage.cfg)
        lineage = self.lineage.record() + ([] if self.newborn else [{"model": cfg, "growth": None}])
        given = {"data": self.data, "history": self.history, "converted": self.converted}
        return {
            "stage": self.stage,
            "model": cfg,
            "lineage": lineage,
            "ramp_steps": self.ramp_steps,
            "provenance": self.provenance,
            **{name: value for name, value in given.items() if value is not None},
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CheckpointMeta:
        """Reads what `record` returns.

        Raises:
          ValueError: the record has no lineage, or names what this version does not know.
        """
        if not record.get("lineage"):
            raise ValueError("it does not record its model and the growths that led to it")
        lineage = record["lineage"]
        newborn = len(lineage) == 1 or lineage[-1]["growth"] is not None
        rest = {name: record.get(name) for name in ("provenance", "data", "history", "converted")}
        return cls(record["stage"], Lineage.from_record(lineage), newborn, **rest)


def signature_texts(cfg: ModelConfig) -> dict[str, str]:
    """The signatures of a model's parameters by leaf path, as a checkpoint's manifest keeps them."""
    return {f"params/{path}": str(signature) for path, _, signature in leaves(cfg)}


@dataclass(frozen=True, eq=False)
class SourceCheckpoint:
    """A checkpoint, and what its record says of it. Its arrays are read by `restore`, and checked then.

    Attributes:
      directory: of the step.
      step: within its stage.
      digest: over all of its state.
      meta: its record.
      trained: whether an optimizer's state is there too; a converted checkpoint has weights alone.
    """

    directory: Path
    step: int
    digest: str
    meta: CheckpointMeta
    trained: bool

    @property
    def lineage(self) -> Lineage:
        """Its model, and how it came to be."""
        return self.meta.lineage

    @property
    def cfg(self) -> ModelConfig:
        """Its model's configuration."""
        return self.meta.lineage.cfg

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """What came with the weights and goes with them, by file name: a tokenizer, say.

        Raises:
          DamagedError: one is not as it was saved.
        """
        names = sorted(path.name for path in (self.directory / BLOBS).glob("*") if path.name != POSITION)
        if faults := file_faults(self.directory, read_manifest(self.directory), contents=True) if names else []:
            raise DamagedError("; ".join(faults[:3]))
        return {name: (self.directory / BLOBS / name).read_bytes() for name in names}

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
        abstract = abstract_state(self.lineage, mesh, weights=not self.trained)
        with Checkpoints(self.directory.parent, read_only=True) as store:
            found = store.restore(kept(abstract), self.step).state
        if self.trained:
            state: TrainState = found
            return state
        if not optimizer:
            return TrainState(found["step"], found["params"], ())
        tx = rescaled_adamw(OptimizerConfig(), self.cfg, declared(self.cfg)[1])
        init = jax.jit(tx.init, out_shardings=shardings_of(abstract_state(self.lineage, mesh).opt_state))
        return TrainState(found["step"], found["params"], init(found["params"]))

    def restore_params(self, mesh: Mesh) -> Params:
        """The parameters alone on a mesh, every bit of them checked.

        Raises:
          DamagedError: the checkpoint is not as it was saved.
        """
        abstract = {"params": abstract_state(self.lineage, mesh, weights=True).params}
        with Checkpoints(self.directory.parent, read_only=True) as store:
            return store.restore(abstract, self.step, partial=True).state["params"]

    def masks(self) -> Masks | None:
        """The masks of its own growth, where they are still rising: the model is what they let through."""
        return self.lineage.masks(self.step) if self.step < self.meta.ramp_steps else None

    def check_settled(self, grows: bool) -> None:
        """Checks that nothing of its own growth is still on its way that would be lost.

        Args:
          grows: whether it is to grow now, rather than go on from step 0 with all that is on its way.

        Raises:
          ValueError: its masks, or the rate of its new entries, are still rising.
        """
        growth = self.lineage.growth if self.meta.newborn else None
        rising = {} if growth is None else {"masks": self.meta.ramp_steps, "new entries' rate": growth.rewarm_steps}
        for what, steps in rising.items():
            if self.step < steps and (self.step or grows):
                raise ValueError(
                    f"{self.directory} is at step {self.step}, and its {what} rise over {steps}: take a later "
                    "checkpoint" + ("." if grows else ", or the grown one at step 0.")
                )


def model_of(checkpoint: str, changes: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of a checkpoint's model, so that no recipe needs to repeat it.

    Args:
      checkpoint: a step, a stage's directory or a work directory.
      changes: fields that are to differ.

    Raises:
      ValueError: there is no such field.
      CheckpointError: as `read_source`.
    """
    return read_source(checkpoint).cfg.changed(changes or {})


def read_source(path: str | Path) -> SourceCheckpoint:
    """Finds a checkpoint: a step's directory, or the newest step of a stage or of a work directory.

    Raises:
      NoCheckpointError: there is none.
      CheckpointError: it was not written by a run or a growth of this project.
    """
    directory = step_directory(path)
    manifest = read_manifest(directory)
    try:
        record = json.loads((directory / META).read_text())
    except ValueError as error:
        raise DamagedError(f"{directory / META} is damaged: {error}; take another checkpoint.") from error
    try:
        meta = CheckpointMeta.from_record(record)
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}.") from error
    trained = any(name.startswith("opt_state/") for name in manifest.leaves)
    return SourceCheckpoint(directory, int(directory.name), manifest.state_digest, meta, trained)
