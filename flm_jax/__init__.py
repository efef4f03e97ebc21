"""Train a decoder-only language model, grow it without changing what it computes, and train on.

The system of "52B to 1T: Lessons Learned via Tele-FLM Series" (arXiv 2407.02783), in JAX. The names below are loaded
when they are first used; importing the package imports neither JAX nor TensorFlow nor gin.

>>> import flm_jax
>>> new = flm_jax.grown_config(old, target, flm_jax.Growth(method="zero"))
>>> new_params = flm_jax.grow(params, old, new, flm_jax.Growth(method="zero"), key)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flm_jax.checkpoint_growth import grow_checkpoint, verify_checkpoints
    from flm_jax.config import ModelConfig
    from flm_jax.growth import Growth, Lineage, compare, grow, grow_optimizer, grown_config
    from flm_jax.model import apply, init_params
    from flm_jax.recipe import Recipe, Run, Stage

_HOME = {
    "Growth": "growth",
    "Lineage": "growth",
    "ModelConfig": "config",
    "Recipe": "recipe",
    "Run": "recipe",
    "Stage": "recipe",
    "apply": "model",
    "compare": "growth",
    "grow": "growth",
    "grow_checkpoint": "checkpoint_growth",
    "grow_optimizer": "growth",
    "grown_config": "growth",
    "init_params": "model",
    "verify_checkpoints": "checkpoint_growth",
}

__all__ = [
    "Growth",
    "Lineage",
    "ModelConfig",
    "Recipe",
    "Run",
    "Stage",
    "apply",
    "compare",
    "grow",
    "grow_checkpoint",
    "grow_optimizer",
    "grown_config",
    "init_params",
    "verify_checkpoints",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flm_jax' has no {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"flm_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
