"""The coordinate check: whether activations keep their size with growing width (2203.03466) or depth (2505.01618)."""

from flm_jax.mup.coordinates import Check, Found, check, widened

__all__ = ["Check", "Found", "check", "widened"]
