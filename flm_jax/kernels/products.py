"""Products with weights, and functions that the backward pass computes again instead of keeping what is inside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

F = TypeVar("F", bound=Callable[..., Any])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`jnp.einsum(equation, x, w)`, of activations and a weight, with a faster gradient of the weight.

    That gradient is a product of the activations and of the gradient of the result, and contracts the first axes of
    both. CPUs then transpose the left operand. By itself JAX puts the gradient of the result there; here the
    activations are there, which are smaller where a layer widens (gate, up, the head).

    Args:
      equation: every axis of an operand is in the other operand or in the result, and all axes have one letter.
      x: activations.
      w: the weight, in the dtype of `x`.
    """
    return jnp.einsum(equation, x, w)


def _forward(equation: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(equation, x, w), (x, w)


def _backward(equation: str, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    operands, of_y = equation.split("->")
    of_x, of_w = operands.split(",")
    dx = jnp.einsum(f"{of_y},{of_w}->{of_x}", dy, w)
    return dx, jnp.einsum(f"{of_x},{of_y}->{of_w}", x, dy)


product.defvjp(_forward, _backward)


def recomputed(function: F) -> F:
    """`function`, of which the backward pass keeps the arguments alone: for functions of few operations per entry."""
    # In a scan, where blocks are, nothing has to keep XLA from merging what is computed again with what was computed.
    # Elsewhere it may merge them, which costs memory and changes no value.
    return jax.checkpoint(function, prevent_cse=False)  # type: ignore[return-value]
