"""The jitted programs of one stage: initialisation, growth, and the train step, with what it minimises and measures."""

from flm_jax.step.growers import make_grower, parameter_growers, quietly_donated
from flm_jax.step.metrics import Metrics
from flm_jax.step.program import StageProgram

__all__ = ["Metrics", "StageProgram", "make_grower", "parameter_growers", "quietly_donated"]
