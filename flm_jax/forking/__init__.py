"""Runs that go on from a checkpoint of another run, with its optimizer, its data position and other settings."""

from flm_jax.forking.begin import Fork, located, needs, place, planned, preview, with_fork

__all__ = ["Fork", "located", "needs", "place", "planned", "preview", "with_fork"]
