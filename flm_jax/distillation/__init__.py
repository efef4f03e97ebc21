"""Distillation in a stage: a frozen model, the teacher, whose next-token distribution the stage's model learns too."""

from flm_jax.distillation.config import Teacher
from flm_jax.distillation.loss import distilled_sums, divergence
from flm_jax.distillation.resolved import ResolvedTeacher, resolve_teacher

__all__ = [
    "ResolvedTeacher",
    "Teacher",
    "distilled_sums",
    "divergence",
    "resolve_teacher",
]
