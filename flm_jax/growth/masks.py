"""Growth masks and their ramps: the mask value of new entries at each step after a growth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.model import Masks
from flm_jax.records import recorded
from flm_jax.records.fields import Count, one_of

# The field of `Masks` by the axis that grew. Key heads have none: new ones serve only new query heads, whose outputs
# are masked already.
FIELDS = {
    "embed": "embed_D",
    "heads": "heads_N",
    "head_dim": "head_dim_H",
    "mlp": "mlp_F",
    "layers": "layers_L",
}
SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
@recorded
class Ramp:
    """How masks rise from 0 to 1.

    Attributes:
      steps: length of the rise.
      delay: steps at 0 before it. At 0 no new entry has a gradient: a delay is for axes that rise after others.
      shape: linear (MSG, 2305.02869) or cosine (slow at both ends).
    """

    steps: Count = 0
    delay: Count = 0
    shape: Annotated[str, one_of(SHAPES)] = "linear"

    @property
    def end(self) -> int:
        """The first step at which the mask is 1."""
        return self.delay + self.steps

    def at(self, step: jax.Array | int) -> jax.Array:
        """The mask value of new entries after `step` steps, in [0, 1]."""
        part = jnp.clip((jnp.asarray(step, jnp.float32) - self.delay) / max(self.steps, 1), 0.0, 1.0)
        return part if self.shape == "linear" else 0.5 - 0.5 * jnp.cos(jnp.pi * part)


def at(
    fresh: Mapping[str, jax.Array | np.ndarray],
    values: Mapping[str, jax.Array | float],
    norm_widths: tuple[float, float] | None = None,
) -> Masks:
    """The masks for given mask values of new entries.

    Args:
      fresh: by axis, (size,) bool, the entries that are new and masked.
      values: by axis, () in [0, 1], the mask value of its new entries; norm widths follow that of `embed`.
      norm_widths: what norms divide by at mask value 0 and at 1; None: it does not change.
    """
    fields = {
        FIELDS[axis]: 1.0 - jnp.asarray(flags, jnp.float32) * (1.0 - values[axis]) for axis, flags in fresh.items()
    }
    if norm_widths is not None:
        before, after = norm_widths
        fields["norm_width"] = jnp.asarray(before + (after - before) * values["embed"], jnp.float32)
    return Masks(**fields)
