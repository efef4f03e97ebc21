"""AdamW and Muon: their settings and schedules, what they make of gradients, and what their states hold."""

from flm_jax.optimizer.averages import (
    AVERAGES,
    in_form,
    is_masked,
    joined,
    map_average,
    map_parts,
    only,
    state_shardings,
)
from flm_jax.optimizer.config import OPTIMIZERS, OptimizerConfig, schedule
from flm_jax.optimizer.directions import Factors, depth_mult, direction, times, width_mult

__all__ = [
    "AVERAGES",
    "OPTIMIZERS",
    "Factors",
    "OptimizerConfig",
    "depth_mult",
    "direction",
    "in_form",
    "is_masked",
    "joined",
    "map_average",
    "map_parts",
    "only",
    "schedule",
    "state_shardings",
    "times",
    "width_mult",
]
