"""The train state: what it holds, its shapes and shardings for a model on a mesh, and what checkpoints keep of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from flm_jax.growth.lineage import Lineage
from flm_jax.growth.rescaling import rescaled_optimizer
from flm_jax.growth.trained import Trained
from flm_jax.model import Params, declared
from flm_jax.optimizer import OptimizerConfig, state_shardings
from flm_jax.sharding import abstract, param_shardings, replicated


class TrainState(struct.PyTreeNode):
    """Everything that training changes.

    Attributes:
      step: () int32, steps done in this stage.
      params: parameters.
      opt_state: moments, and their count, which continues from stage to stage; () if there are only weights. A
        parameter of which nothing trains has no moments.
    """

    step: Any
    params: Params
    opt_state: Any


def abstract_state(
    lineage: Lineage, mesh: Mesh, weights: bool = False, optimizer: str = "adamw", train: str = "all"
) -> TrainState:
    """Shapes, dtypes and shardings of a model's state: `jax.ShapeDtypeStruct`s.

    Args:
      lineage: the model; its new layers need not be placed yet.
      mesh: where the state lives.
      weights: True: without optimizer state.
      optimizer: the name of the optimizer that the state belongs to.
      train: what trains, see `Stage.train`.
    """
    shapes, signatures = declared(lineage.cfg)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    where = param_shardings(signatures, shapes, mesh)
    if weights:
        opt_shapes: Any = ()
        opt_shardings: Any = ()
    else:
        # Rates and rescalings do not change the structure of a state.
        trained = Trained(lineage, train)
        part = trained.part(signatures)
        tx = rescaled_optimizer(OptimizerConfig(name=optimizer), lineage.cfg, part)
        opt_shapes, opt_shardings = state_shardings(tx, part, trained.part(shapes), mesh)
    found: TrainState = abstract(
        TrainState(step, shapes, opt_shapes), TrainState(replicated(mesh), where, opt_shardings)
    )
    return found


def shardings_of(tree: Any) -> Any:
    """The shardings of a tree of arrays or `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda like: like.sharding, tree)


def kept(state: TrainState) -> Any:
    """What a checkpoint keeps of a state: all of it or, if it has only weights, step and parameters."""
    return state if jax.tree.leaves(state.opt_state) else {"step": state.step, "params": state.params}
