"""Launchers, one per program of `flm_jax.cli`."""
