"""Growing checkpoints outside a run, in memory or block by block, and verifying a grown one against its source."""

from flm_jax.checkpoint_growth.grow import grow_checkpoint
from flm_jax.checkpoint_growth.record import GrowthRecord
from flm_jax.checkpoint_growth.verify import verify_checkpoints

__all__ = ["GrowthRecord", "grow_checkpoint", "verify_checkpoints"]
