"""Measures how much each layer changes its input, and places new layers by these distances."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flm_jax.config import ModelConfig
from flm_jax.distributed import fetch
from flm_jax.growth.depth import METRICS
from flm_jax.growth.lineage import Lineage
from flm_jax.model import Params, Transformer
from flm_jax.records import meant


def layer_distances(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    metric: str = "angular",
) -> tuple[float, ...]:
    """The distance between each layer's input x and output y, averaged over all positions of a calibration batch.

    Args:
      cfg: the model; it is run in at least float32.
      params: its parameters.
      tokens_BT: int32 token ids.
      segments_BT: int32, equal within a document.
      metric: angular, arccos(cos(x, y)) / pi; cosine, 1 - cos(x, y); or relative_l2, |y - x| / |x|.

    Returns:
      One number per layer, so none if there are no layers; 0 means that the layer changes nothing.

    Raises:
      ValueError: unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"Unknown distance {metric!r}; use one of {', '.join(METRICS)}{meant(metric, METRICS) or '.'}")
    if not cfg.layers:
        return ()

    @jax.jit
    def measure(params: Params, tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        _, state = Transformer(cfg.for_comparison).apply(
            {"params": params}, tokens_BT, segments_BT, mutable=["intermediates"]
        )
        seen = state["intermediates"]
        y_LBTD = seen["blocks"]["hidden_BTD"][0]
        x_LBTD = jnp.concatenate([seen["embedded_BTD"][0][None], y_LBTD[:-1]])
        size_x, size_y = (jnp.linalg.norm(h, axis=-1) for h in (x_LBTD, y_LBTD))
        if metric == "relative_l2":
            found_LBT = jnp.linalg.norm(y_LBTD - x_LBTD, axis=-1) / size_x
        else:
            cosine_LBT = jnp.clip(jnp.sum(x_LBTD * y_LBTD, axis=-1) / (size_x * size_y), -1.0, 1.0)
            found_LBT = jnp.arccos(cosine_LBT) / jnp.pi if metric == "angular" else 1.0 - cosine_LBT
        return jnp.mean(found_LBT, axis=(1, 2))

    return tuple(float(d) for d in fetch(measure(params, tokens_BT, segments_BT)))


def settle(
    lineage: Lineage, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array | None = None
) -> tuple[Lineage, tuple[float, ...]]:
    """The lineage with all new layers placed, and the distances that were measured for it (empty if it needed none).

    Args:
      lineage: of the model to grow into.
      params: of the model before growth.
      tokens_BT: int32 token ids, the calibration batch.
      segments_BT: int32, equal within a document.
    """
    if lineage.is_settled:
        return lineage, ()
    metric = lineage.last_growth.distance
    distances = layer_distances(lineage.before.cfg, params, tokens_BT, segments_BT, metric=metric)
    return lineage.settled(distances), distances
