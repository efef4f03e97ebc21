"""Launchers: each runs one program of `flm_jax.cli`."""
