"""The jitted functions that grow a state, or one parameter of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flm_jax.growth.grow import grow_opt_state, grow_params
from flm_jax.growth.lineage import Lineage
from flm_jax.model import Params
from flm_jax.state import TrainState, abstract_state, shardings_of


@contextlib.contextmanager
def quietly_donated() -> Iterator[None]:
    """Silences the warning about donated buffers that no output can reuse; in a growth most cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        yield


def make_grower(
    lineage: Lineage,
    mesh: Mesh,
    donate: bool = False,
    weights: bool = False,
    optimizer: str = "adamw",
    train: str = "all",
) -> Any:
    """The jitted function (state before the growth, key) -> state of the grown model at step 0.

    Args:
      lineage: of the grown model.
      mesh: the mesh of both states.
      donate: whether the given state is donated. Leaves that keep their shape and sharding then reuse their memory, for
        example the embedding if only the depth grows. Other leaves cannot, and XLA warns (see `quietly_donated`).
      weights: whether the state has no optimizer state.
      optimizer: whose state the grown one is. If the growth takes over no moments, the given one may be another's.
      train: what will train, which decides about moments (see `Stage.train`); the given state may have others.
    """
    target = abstract_state(lineage, mesh, weights, optimizer, train)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), target.opt_state)

    def grow_opt(state: Any) -> Any:
        if weights:
            return ()
        if lineage.last_growth.optimizer == "fresh":
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return grow_opt_state(lineage, state, like)

    def grow_state(state: TrainState, key: jax.Array) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=grow_params(lineage, state.params, key),
            opt_state=grow_opt(state.opt_state),
        )

    return jax.jit(grow_state, donate_argnums=(0,) if donate else (), out_shardings=shardings_of(target))


def parameter_growers(lineage: Lineage, mesh: Mesh) -> Iterator[Any]:
    """For each parameter, the jitted function (all parameters before the growth, key) -> this parameter, grown."""
    for number, where in enumerate(jax.tree.leaves(shardings_of(abstract_state(lineage, mesh, weights=True).params))):

        def one(params: Params, key: jax.Array, number: int = number) -> jax.Array:
            grown: jax.Array = jax.tree.leaves(grow_params(lineage, params, key))[number]
            return grown

        yield jax.jit(one, out_shardings=where)
