"""The coordinate check of muP: whether activations keep their size as a model grows wider (2203.03466)."""

from flm_jax.mup.coordinates import Check, Found, check, widened

__all__ = ["Check", "Found", "check", "widened"]
