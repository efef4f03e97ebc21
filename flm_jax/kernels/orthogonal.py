"""The orthogonalisation of Muon: a matrix's singular values brought near 1, by Newton-Schulz steps of optax."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flm_jax.sharding import constrain, mesh_axes
from flm_jax.signature import Signature

# Keller Jordan's coefficients of X, X X'X and (X X')^2 X: the steepest that still lead to singular values near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(x: jax.Array, signature: Signature, steps: int, dtype: Any) -> jax.Array:
    """An array with the singular vectors of `x`, whose singular values are about 1 where those of `x` are not 0.

    The axes that the parameter reads are the rows of one matrix, those that it writes are its columns; every layer has
    a matrix of its own. The result does not depend on the size of `x`. After five steps, singular values of at
    least 0.0015 times the root of the sum of all their squares lie between 0.68 and 1.21; smaller ones have been
    multiplied by up to 485.

    On the mesh of `jax.set_mesh`, whole layers go to the devices that otherwise hold copies or parts along `embed`: a
    product of two matrices that are split along the axis over which they are contracted would exchange far more.

    Args:
      x: like the parameter; (layers, ...) if that is stacked.
      signature: of the parameter, which reads and writes.
      steps: Newton-Schulz steps.
      dtype: of the products; the division by the norm is computed in the dtype of `x`.

    Returns:
      An array with the shape and dtype of `x`.
    """
    if not signature.stacked:
        return orthogonalized(x[None], signature.stack(), steps, dtype)[0]
    sides, reads = tuple(range(1, x.ndim)), len(signature.reads)
    norm = jnp.sqrt(jnp.sum(x * x, axis=sides, keepdims=True))
    unit = (x / jnp.where(norm > 0, norm, 1)).astype(dtype)
    # Optax offers its Newton-Schulz steps within Muon alone; without memory, Muon's update is that of its gradient.
    dimensions = optax.contrib.MuonDimensionNumbers(sides[:reads], sides[reads:])
    # With the coefficients of every step it loops over them: the program is a fifth as long.
    one_step = optax.contrib.scale_by_muon(
        (COEFFICIENTS,) * steps, steps, beta=0.0, nesterov=False, weight_dimension_numbers=dimensions
    )
    missing = -len(x) % layer_groups()
    unit = jnp.pad(unit, [(0, missing)] + [(0, 0)] * len(sides))
    whole = constrain(unit, "matrices", *("residual" if axis == "embed" else axis for axis in signature.axes[1:]))
    found, _ = one_step.update(whole, one_step.init(whole))
    return constrain(found[: len(x)], *signature.axes).astype(x.dtype)


def layer_groups(shape: Any = None) -> int:
    """How many groups of devices the layers are divided among.

    Args:
      shape: the sizes of the mesh's axes, by name; None: those of the mesh of `jax.set_mesh`.
    """
    if shape is None:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.manual_axes:
            return 1
        shape = mesh.shape
    return math.prod(shape[name] for name in mesh_axes("matrices"))
