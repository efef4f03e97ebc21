"""What one step measures: losses, rates, and norms of gradient, update and parameters, also by part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from flm_jax.growth.trained import Trained
from flm_jax.model import Masks, declared
from flm_jax.optimizer import is_masked

# The name of the entries that the last growth added, whatever part of the model they belong to.
NEW = "new"
ABSENT = -1.0


class PartNorms(struct.PyTreeNode):
    """Norms of the gradient, the update and the parameters of each part of the model, (P,) float32 each.

    A part is named by the signatures of its parameters (`Signature.part`). The squares of the norms add up to that of
    the whole, except for `new`: the entries that the growth of this stage added, in all parts. What is not measured is
    -1, such as the gradient of a part of which nothing trains.
    """

    grad: jax.Array
    update: jax.Array
    param: jax.Array
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def by_name(self) -> dict[str, float]:
        """The norms as numbers, such as `grad_norm/attention`."""
        kinds = {"grad_norm": self.grad, "update_norm": self.update, "param_norm": self.param}
        return {
            f"{kind}/{name}": float(x)
            for kind, norms in kinds.items()
            for name, x in zip(self.names, np.asarray(norms), strict=True)
            if not x < 0
        }


class Metrics(struct.PyTreeNode):
    """Measurements of one step, each () float32.

    `mask` is the smallest value of any growth mask (1 without masks); `bad` is 1 if the step was skipped because its
    loss, gradient or update was not finite. Of steps with a teacher, `kl` is the divergence from it, in nats per token,
    and `kl_weight` its weight; with `Stage.z_loss`, `z_loss` is what that adds to the loss that is minimised. `loss` is
    the cross-entropy in any case. Of steps on a mixture, `source_losses_S` is the loss on the rows of each source; NaN
    where the batch has none.
    """

    loss: jax.Array
    grad_norm: jax.Array
    update_norm: jax.Array
    param_norm: jax.Array
    learning_rate: jax.Array
    mask: jax.Array
    bad: jax.Array
    parts: PartNorms
    kl: jax.Array | None = None
    kl_weight: jax.Array | None = None
    z_loss: jax.Array | None = None
    source_losses_S: jax.Array | None = None

    def by_name(self, sources: Sequence[str] = ()) -> dict[str, float]:
        """The measurements as numbers; the loss of each source that the batch had rows of is `name/loss`."""
        found = {name: x for name, x in vars(jax.device_get(self)).items() if x is not None}
        parts: PartNorms = found.pop("parts")
        losses = found.pop("source_losses_S", np.full(len(sources), np.nan))
        own = {f"{name}/loss": float(x) for name, x in zip(sources, losses, strict=True) if np.isfinite(x)}
        return {**{name: float(x) for name, x in found.items()}, **parts.by_name(), **own}


def part_norms(trained: Trained, logged: jax.Array | None, grads: Any, updates: Any, params: Any) -> PartNorms:
    """The norms by part of the model.

    The sums of squares of whole arrays are those that the global norms are made of: the compiler computes them once.

    Args:
      trained: what of the model trains.
      logged: () bool, whether to measure the entries that the last growth added, too: their gradient and their values,
        in a pass of its own over both. None: there is no such pass in the program.
      grads: tree of gradients; parameters of which nothing trains are left out, as in the next.
      updates: tree of updates.
      params: tree of all parameters.
    """
    parts = jax.tree.map(lambda sig: sig.part, declared(trained.lineage.cfg)[1])
    names = list(dict.fromkeys(jax.tree.leaves(parts)))
    rows = [_norms(parts, names, tree) for tree in (grads, updates, params)]
    if logged is not None:
        new = Trained(trained.lineage, "new")
        # Not the updates: for these, the program would have to keep an array of each parameter's size.
        found = jax.lax.cond(
            logged,
            lambda: tuple(jnp.float32(optax.tree.norm(new.only(tree))) for tree in (grads, params)),
            lambda: (jnp.float32(ABSENT), jnp.float32(ABSENT)),
        )
        names.append(NEW)
        of_new = found[0], jnp.float32(ABSENT), found[1]
        rows = [jnp.append(row, own) for row, own in zip(rows, of_new, strict=True)]
    grad, update, param = rows
    return PartNorms(grad, update, param, tuple(names))


def _norms(parts: Any, names: Sequence[str], tree: Any) -> jax.Array:
    """The norm of each part of a model, (P,) float32; a tree like the parameters may leave some out."""
    squares: dict[str, jax.Array] = {}
    leaves = jax.tree.leaves(tree, is_leaf=is_masked)
    for part, leaf in zip(jax.tree.leaves(parts), leaves, strict=True):
        if not is_masked(leaf):
            square = optax.tree.norm(leaf, squared=True)
            squares[part] = squares[part] + square if part in squares else square
    return jnp.stack([jnp.sqrt(jnp.float32(squares[n])) if n in squares else jnp.float32(ABSENT) for n in names])


def lowest(masks: Masks | None) -> jax.Array:
    """The smallest value of any mask; 1 without masks."""
    flags = [] if masks is None else [m for m in masks._replace(norm_width=None) if m is not None]
    return jnp.min(jnp.concatenate([*flags, jnp.ones(1)]))
