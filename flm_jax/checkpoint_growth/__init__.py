"""Growing checkpoints outside a run, in memory or block by block, and verifying one against another."""

from flm_jax.checkpoint_growth.grow import grow_checkpoint, lines, verify_checkpoints

__all__ = ["grow_checkpoint", "lines", "verify_checkpoints"]
