"""Tools for those who work on flm_jax, and the log of experiments."""
