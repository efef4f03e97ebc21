"""The mask ramp: which entries are new, and how far they have come."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.model import Masks

# What is masked, by the axis that grew. New key heads serve only new query heads, whose outputs are masked already.
FIELDS = {"embed": "embed_D", "heads": "heads_N", "mlp": "mlp_F", "layers": "layers_L"}


def ramp(step: jax.Array | int, steps: int) -> jax.Array:
    """The mask of new entries after `step` steps of a linear ramp over `steps`, in [0, 1]."""
    return jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0.0, 1.0)


def at(
    fresh: Mapping[str, jax.Array | np.ndarray], value: jax.Array | float, norm_widths: tuple[float, float]
) -> Masks:
    """The masks when new entries stand at `value`.

    Args:
      fresh: by axis, (size,) bool, which of its entries are new and masked.
      value: () in [0, 1].
      norm_widths: what norms divide by when `value` is 0 and when it is 1.
    """
    fields = {FIELDS[axis]: 1.0 - jnp.asarray(flags, jnp.float32) * (1.0 - value) for axis, flags in fresh.items()}
    if "embed" in fresh:
        before, after = norm_widths
        fields["norm_width"] = jnp.asarray(before + (after - before) * value, jnp.float32)
    return Masks(**fields)
