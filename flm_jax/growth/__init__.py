"""Function-preserving growth of parameters and optimizer state, as pure functions.

>>> from flm_jax.growth import Growth, compare, grow, grown_config
>>> growth = Growth(method="zero")
>>> new = grown_config(old, target, growth)                   # target: any larger ModelConfig
>>> new_params = grow(params, old, new, growth, jax.random.key(0))
>>> compare(old, params, new, new_params, growth, tokens_BT).max_rel_logit_diff
"""

from flm_jax.growth.grow import grow, grow_moments, grow_optimizer
from flm_jax.growth.lineage import Lineage, masks_at
from flm_jax.growth.masks import Ramp
from flm_jax.growth.operators import REGISTRY, Operator, register
from flm_jax.growth.plan import Growth, axis_maps, grown_config
from flm_jax.growth.verify import GrowthError, Verification, compare

__all__ = [
    "REGISTRY",
    "Growth",
    "GrowthError",
    "Lineage",
    "Operator",
    "Ramp",
    "Verification",
    "axis_maps",
    "compare",
    "grow",
    "grow_moments",
    "grow_optimizer",
    "grown_config",
    "masks_at",
    "register",
]
