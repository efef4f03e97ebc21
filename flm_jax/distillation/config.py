"""The configuration of a stage's teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp

from flm_jax.records import recorded
from flm_jax.records.fields import Positive, PositiveFraction, Size, one_of


@dataclass(frozen=True)
@recorded
class Teacher:
    """A frozen model that a stage's model learns from, besides the text.

    The loss of a step is (1 - w) * cross-entropy + w * temperature^2 * KL(teacher || model), where w is `weight`, or
    decays from it, and both distributions are softmax(logits / temperature) over the next token (1503.02531).

    Attributes:
      checkpoint: a step, a stage's directory or a work directory; it must be there whenever the run is resumed. Empty:
        the model that the stage grows from.
      weight: w at the first step.
      decay: constant, or linear: w falls to 0 over `steps`.
      steps: steps at the start of the stage that have the teacher; None: all. Later ones do not hold it in memory.
      temperature: above 1, tokens that are unlikely to the teacher count more.
    """

    # The path may change: the checkpoint is identified by its digest, which is recorded.
    checkpoint: str = field(default="", metadata={"identity": False})
    weight: PositiveFraction = 0.5  # 0 would pay for a teacher that has no effect
    decay: Annotated[str, one_of(("constant", "linear"))] = "linear"
    steps: Size | None = None
    temperature: Positive = 1.0

    def weight_at(self, step: int | jax.Array, steps: int) -> jax.Array:
        """The weight w after `step` steps of the `steps` that have the teacher: (), float32."""
        left = 1.0 - jnp.asarray(step, jnp.float32) / steps if self.decay == "linear" else jnp.ones((), jnp.float32)
        return self.weight * left
