"""A stage's teacher in its place: which model it is, what is checked of it, and its weights on a mesh."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flm_jax import distributed
from flm_jax.checkpoint import CheckpointError, DamagedError, NoCheckpointError
from flm_jax.config import ModelConfig
from flm_jax.data.vocabulary import Vocabulary
from flm_jax.distillation.config import Teacher
from flm_jax.growth.lineage import Lineage
from flm_jax.growth.plan import NUMERICS
from flm_jax.model import Params, declared
from flm_jax.records import as_dict, counted
from flm_jax.source_checkpoint import SourceCheckpoint, read_source
from flm_jax.state import abstract_state, shardings_of


@dataclass(frozen=True, eq=False)
class ResolvedTeacher:
    """A stage's teacher, with its model.

    Attributes:
      teacher: as the recipe gives it.
      lineage: its model, computed with the stage's numerics.
      steps: steps at the start of the stage that have it.
      source: its checkpoint; None: the last one of the stage before.
    """

    teacher: Teacher
    lineage: Lineage
    steps: int
    source: SourceCheckpoint | None

    @property
    def cfg(self) -> ModelConfig:
        """The model's configuration."""
        return self.lineage.cfg

    def weight_at(self, step: int | jax.Array) -> jax.Array:
        """The weight of the divergence in the loss after `step` steps of the stage: (), float32."""
        return self.teacher.weight_at(step, self.steps)

    def record(self) -> dict[str, Any]:
        """What data.json of a work directory keeps of it: its model and, if it is known at the start, its digest."""
        return {"model": as_dict(self.cfg), **({} if self.source is None else {"digest": self.source.digest})}

    def check_ids(self, size: int, stage: str) -> None:
        """Checks that its embedding has a row for every token of a vocabulary of `size` ids; `stage` names its stage.

        Raises:
          ValueError: it has not.
        """
        if size > self.cfg.vocab:
            raise ValueError(
                f"Stage {stage!r}: the vocabulary has {size} tokens, its teacher's embedding only {self.cfg.vocab}: a "
                "teacher must know every token that the model reads."
            )

    def other_vocabulary(self, vocabulary: Vocabulary, stage: str) -> str:
        """What there is to say, as text, if its own vocabulary is not known; '' if it is `vocabulary`.

        Args:
          vocabulary: of the run.
          stage: its stage's name.

        Raises:
          ValueError: it was trained with another one.
        """
        if self.source is None:  # of the same run
            return ""
        text = self.source.other_vocabulary(vocabulary)
        if text and not self.source.unknown_vocabulary:
            raise ValueError(f"Stage {stage!r}: as its teacher, {text} Take a teacher of the run's vocabulary.")
        return text

    def abstract(self, mesh: Mesh) -> Params:
        """Shapes, dtypes and shardings of its weights on a mesh, in the compute dtype where that is the smaller one."""
        like = abstract_state(self.lineage, mesh, weights=True).params
        compute = self.cfg.compute

        def held(x: jax.ShapeDtypeStruct, signature: Any) -> jax.ShapeDtypeStruct:
            # As `model.parameter` reads them, so nothing changes.
            read = jnp.promote_types(compute, jnp.float32) if signature.gains else compute
            dtype = read if read.itemsize < x.dtype.itemsize else x.dtype
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

        return jax.tree.map(held, like, declared(self.cfg)[1])

    def restore(self, mesh: Mesh, digest: str, directory: Path) -> Params:
        """Its weights on a mesh, with every bit of their checkpoint checked.

        Args:
          mesh: of the stage.
          digest: that the checkpoint must have.
          directory: of its step, where the teacher has no `source`.

        Raises:
          NoCheckpointError: it is not there.
          CheckpointError: it has another digest.
          DamagedError: it is not as it was saved.
        """
        with distributed.together("teacher", CheckpointError, DamagedError, NoCheckpointError):
            source = self.source or _read(directory)
            if source.digest != digest:
                raise CheckpointError(
                    f"{source.directory} has the digest {source.digest}, and the teacher that this stage began with "
                    f"{digest}: put the original back, or start again with a new --workdir."
                )
        params, like = source.restore_params(mesh), self.abstract(mesh)
        if all(x.dtype == to.dtype for x, to in zip(jax.tree.leaves(params), jax.tree.leaves(like), strict=True)):
            return params

        def cast(params: Params) -> Params:
            return jax.tree.map(lambda x, to: x.astype(to.dtype), params, like)

        return jax.jit(cast, out_shardings=shardings_of(like))(params)


def resolve_teacher(
    teacher: Teacher, model: ModelConfig, steps: int, before: Lineage | None, source: SourceCheckpoint | None
) -> ResolvedTeacher:
    """A stage's teacher, checked.

    Args:
      teacher: as the recipe gives it.
      model: that the stage trains.
      steps: of the stage.
      before: the model that the stage grows from; None: it does not grow.
      source: what has been read already: the teacher's checkpoint, or the one that the stage grows from; None: nothing.

    Raises:
      ValueError: the message names the field, and what would be right.
      CheckpointError: as `read_source`.
    """
    if not teacher.checkpoint and before is None:
        raise ValueError(
            "Teacher.checkpoint is empty, which means the model that the stage grows from, and the stage has no "
            "Growth: name a checkpoint."
        )
    if teacher.checkpoint:
        source = source or _read(Path(teacher.checkpoint))
        before = source.lineage
        if source.masks() is not None:
            left = counted(source.rising["masks"], "more step")
            raise ValueError(
                f"its teacher {source.directory} is at step {source.step}, and its masks rise for {left}: take a later "
                "checkpoint."
            )
    assert before is not None
    taught = steps if teacher.steps is None else teacher.steps
    if taught > steps:
        raise ValueError(f"Teacher.steps={taught} is more than its {counted(steps, 'step')}.")
    if before.cfg.vocab > model.vocab:
        raise ValueError(
            f"its teacher gives probabilities to {before.cfg.vocab} ids, and its model only to {model.vocab}: a "
            "teacher has at most as many."
        )
    cfg = before.cfg.replace(**{name: getattr(model, name) for name in NUMERICS})
    return ResolvedTeacher(teacher, dataclasses.replace(before, cfg=cfg), taught, source)


def _read(path: Path) -> SourceCheckpoint:
    """The record of a teacher's checkpoint.

    Raises:
      CheckpointError: as `read_source`; the message says that it is about a teacher.
    """
    try:
        return read_source(path)
    except CheckpointError as error:
        raise type(error)(f"The teacher cannot be read: {error}") from error
