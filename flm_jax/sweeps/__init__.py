"""Sweeps: many runs of one recipe that differ in some gin bindings, and what they show.

`config` says what is varied, `space` makes points of it, `halving` says which of them go on, `execute` runs them,
`results` and `picture` compare what they leave. No module here uses gin: a point is names of bindings and their values.
"""

from flm_jax.sweeps.config import Halving, Range, Sweep

__all__ = ["Halving", "Range", "Sweep"]
