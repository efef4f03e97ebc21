"""The guards of a long run: loss spikes, gradient norms, steps that are not finite, and what takes far too long."""

from flm_jax.guards.config import GradientAlarm, SpikeGuard, Watchdog
from flm_jax.guards.lost import ending_if_lost
from flm_jax.guards.rewind import restore_before, skip_behind
from flm_jax.guards.spikes import Spike, SpikeDetector
from flm_jax.guards.steps import (
    MEMORY,
    NonFiniteError,
    SpikeError,
    StageFacts,
    StepGuards,
    StepLimits,
    batch_text,
    spike_text,
)
from flm_jax.guards.watch import STALLED, Watch, watching

__all__ = [
    "MEMORY",
    "STALLED",
    "GradientAlarm",
    "NonFiniteError",
    "Spike",
    "SpikeDetector",
    "SpikeError",
    "SpikeGuard",
    "StageFacts",
    "StepGuards",
    "StepLimits",
    "Watch",
    "Watchdog",
    "batch_text",
    "ending_if_lost",
    "restore_before",
    "skip_behind",
    "spike_text",
    "watching",
]
