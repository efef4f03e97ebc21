"""Products with weights, and functions that the backward pass computes again instead of keeping what is inside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from flm_jax.sharding import platform

F = TypeVar("F", bound=Callable[..., Any])


def contracted(equation: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """`jnp.einsum(equation, x, y)`, where axes that are summed over are paired in the order of `x`.

    `jnp.einsum` pairs them the other way round. Of two such axes, as heads and their width, a CPU would then exchange
    both in memory, in activations and in weights.

    Args:
      equation: every axis of an operand is in the other operand or in the result, and all axes have one letter.
      x: an operand.
      y: the other one.
      dtype: of the result; None: that of the operands, the wider one of two.
    """
    operands, of_result = equation.split("->")
    of_x, of_y = operands.split(",")
    batch = [axis for axis in of_x if axis in of_y and axis in of_result]
    summed = [axis for axis in of_x if axis in of_y and axis not in of_result]
    at = lambda axes, of: tuple(of.index(axis) for axis in axes)  # noqa: E731
    pairs = (at(summed, of_x), at(summed, of_y)), (at(batch, of_x), at(batch, of_y))
    found = jax.lax.dot_general(x, y, pairs, preferred_element_type=dtype)
    of_found = batch + [axis for axis in of_x + of_y if axis not in batch + summed]
    return jnp.transpose(found, at(of_result, of_found))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, x: jax.Array, w: jax.Array, dtype: Any = None) -> jax.Array:
    """`jnp.einsum(equation, x, w)`, of activations and a weight, with faster gradients.

    The gradient of the weight is a product of the activations and of the gradient of the result, and contracts the
    first axes of both. CPUs then transpose the left operand. JAX puts the gradient of the result there; here it is the
    smaller of both: the activations where a layer widens (gate, up, the head), the gradient where it narrows (down).

    Args:
      equation: every axis of an operand is in the other operand or in the result, and all axes have one letter.
      x: activations.
      w: the weight, in the dtype of `x`.
      dtype: of the result; None: that of `x`. The gradient of a wider result is rounded to the dtype of `x`, so that
        the products of the backward pass are as fast as that of the forward pass; except in float16, which has no
        exponents for small gradients.
    """
    return contracted(equation, x, w, dtype)


def backward_dtype(narrow: Any, wide: Any) -> Any:
    """The dtype in which the backward pass multiplies a gradient computed in `wide` with values in `narrow`."""
    return wide if narrow == jnp.float16 else narrow


def _forward(equation: str, x: jax.Array, w: jax.Array, dtype: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(equation, x, w, dtype), (x, w)


def _backward(
    equation: str, dtype: Any, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del dtype
    x, w = kept
    dy = dy.astype(backward_dtype(x.dtype, dy.dtype))
    operands, of_y = equation.split("->")
    of_x, of_w = operands.split(",")
    dx = contracted(f"{of_y},{of_w}->{of_x}", dy, w)
    dw = _gradient_of_weight(of_x, of_y, of_w, x, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _gradient_of_weight(of_x: str, of_y: str, of_w: str, x: jax.Array, dy: jax.Array) -> jax.Array:
    """The product of `x` and `dy` over the axes that the weight does not have."""
    if platform() != "cpu":
        return contracted(f"{of_x},{of_y}->{of_w}", x, dy)
    # What is transposed is computed first, in the order in which it lies in memory: XLA would compute it, norms and
    # SwiGLU again, column by column. And XLA would exchange the operands again to save transposing the result.
    if x.size <= dy.size:
        return contracted(f"{of_x},{of_y}->{of_w}", jax.lax.optimization_barrier(x), dy)
    new = "".join(axis for axis in of_y if axis not in of_x)
    old = "".join(axis for axis in of_x if axis not in of_y)
    dw = jax.lax.optimization_barrier(contracted(f"{of_y},{of_x}->{new}{old}", dy, x))
    return jnp.einsum(f"{new}{old}->{of_w}", dw)


product.defvjp(_forward, _backward)


def recomputed(function: F) -> F:
    """`function`, of which the backward pass keeps the arguments alone: for functions of few operations per entry."""
    # In a scan, where blocks are, nothing has to keep XLA from merging what is computed again with what was computed.
    # Elsewhere it may merge them, which costs memory and changes no value.
    return jax.checkpoint(function, prevent_cse=False)  # type: ignore[return-value]
