"""AdamW and Muon as transformations of gradients, with muP's multipliers, built from the parameters' signatures."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import ModelConfig
from flm_jax.kernels.orthogonal import orthogonalized
from flm_jax.optimizer.averages import joined, only
from flm_jax.optimizer.config import OptimizerConfig
from flm_jax.signature import Signature, Sizes

# The root mean square of Muon's updates at the base width, about that of AdamW's (2502.16982, section 2.2).
MUON_RMS = 0.2


def scale_by_width(mults: Any) -> optax.GradientTransformation:
    """The transformation that divides each parameter's update by a number, such as its width multiplier."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        del params
        return jax.tree.map(lambda mult, u: u if mult == 1 else u / mult, mults, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def decay(rate: float, decays: Any) -> optax.GradientTransformation:
    """The transformation that adds `rate` times the parameters that decay.

    It has no state, so that the optimizer's state has the same form in every stage.
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if rate:
            updates = jax.tree.map(lambda on, u, p: u + rate * p if on else u, decays, updates, params)
        return updates, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def width_mult(cfg: OptimizerConfig, sig: Signature, sizes: Sizes, base: Sizes) -> float:
    """The number that a parameter's update is divided by, so that one rate serves every width.

    For AdamW this is muP's width multiplier (2203.03466, Table 8). The singular values of Muon's updates are about 1,
    whatever the width. They become 0.2 sqrt(max(fan-in, fan-out)) at the base width, where the root mean square of the
    update is then 0.2, and grow as sqrt(fan-out / fan-in) from there: so do the largest ones of AdamW's under muP.

    Args:
      cfg: the optimizer's name, and its `matrix_rate`.
      sig: the parameter's signature.
      sizes: of the model's axes.
      base: of the axes of muP's base model.
    """
    if not sig.is_matrix_like:
        return 1.0
    mult = sig.width_mult(sizes, base)
    if cfg.name == "muon":
        (fan_in, fan_out), (base_in, base_out) = sig.fans(sizes), sig.fans(base)
        mult = 1 / (MUON_RMS * math.sqrt(max(base_in, base_out) * (fan_out / base_out) / (fan_in / base_in)))
    return mult / cfg.matrix_rate


def depth_mult(sig: Signature, model: ModelConfig) -> float:
    """The factor on Adam's eps, which follows the depth for the blocks' parameters (`ModelConfig.base_layers`).

    The gradients of a block are as small as the multiplier of what it adds to the residual stream (CompleteP,
    2505.01618, Table 1).
    """
    return model.depth_mult if sig.stacked else 1.0


def scale_by_adam(cfg: OptimizerConfig, eps_mults: Any) -> optax.GradientTransformation:
    """Adam's direction, m / (sqrt(v) + eps), with an eps for each parameter, and the state of `optax.scale_by_adam`."""
    adam = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps)
    if all(mult == 1 for mult in jax.tree.leaves(eps_mults)):
        return adam

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(grads, state, params)
        m, v = (
            optax.tree_utils.tree_bias_correction(moment, b, state.count)
            for moment, b in ((state.mu, cfg.b1), (state.nu, cfg.b2))
        )
        return jax.tree.map(lambda mult, m, v: m / (jnp.sqrt(v) + cfg.eps * mult), eps_mults, m, v), state

    return optax.GradientTransformation(adam.init, update)


def direction(
    cfg: OptimizerConfig, signatures: Any, mults: Any, eps_mults: Any, dtype: Any, shares: Any = None
) -> optax.GradientTransformation:
    """The optimizer without clipping, sign and learning rate: the train step adds minus the rate times these updates.

    Weight decay is added after muP's division. This is the published rule, where the decay is multiplied by the width
    multiplier and the rate divided by it: every parameter that decays shrinks by the same fraction per step, at any
    width.

    Args:
      cfg: the optimizer's settings and weight decay.
      signatures: tree of the parameters' signatures.
      mults: tree of what their updates are divided by, see `width_mult`.
      eps_mults: tree of factors on Adam's eps, see `depth_mult`.
      dtype: of Muon's orthogonalisation.
      shares: see `scale_by_muon`.
    """
    decays = jax.tree.map(lambda sig: sig.decays, signatures)
    muon = cfg.name == "muon"
    first = scale_by_muon(cfg, signatures, eps_mults, dtype, shares) if muon else scale_by_adam(cfg, eps_mults)
    return optax.chain(first, scale_by_width(mults), decay(cfg.weight_decay, decays))


# One vector per dimension, shaped to broadcast; the factor of an entry is the product of its vectors' values.
Factors = tuple[np.ndarray, ...]


def times(x: jax.Array, factors: Factors, power: float = 1) -> jax.Array:
    """`x` times the product of `factors`, each to the given power, in the dtype of `x`."""
    for factor in factors:
        if not np.all(factor == 1):
            x = x * np.power(factor, float(power)).astype(x.dtype)
    return x


def scale_by_muon(
    cfg: OptimizerConfig, signatures: Any, eps_mults: Any, dtype: Any, shares: Any = None
) -> optax.GradientTransformation:
    """The transformation of Muon for matrix-like parameters, and of Adam for the others.

    Its state is that of Adam, without the second moments of matrices. The momentum m is a moving average of gradients
    without bias correction, since the size of m has no effect. With a gradient g the direction is
    b m + (1 - b) g, orthogonalised; m itself without Nesterov's look ahead.

    Args:
      cfg: its settings.
      signatures: tree of the parameters' signatures.
      eps_mults: tree of factors on Adam's eps.
      dtype: of the orthogonalisation.
      shares: tree of `Factors`; the entries of a matrix that are copies of one entry have shares that add up to 1. The
        matrix is orthogonalised without the copies, and copies get the update of what they are copies of. None: no
        entries are copies.
    """
    matrices = jax.tree.map(lambda sig: sig.is_matrix_like, signatures)
    others = jax.tree.map(lambda sig: not sig.is_matrix_like, signatures)
    adam, b = scale_by_adam(cfg, only(others, eps_mults)), cfg.momentum

    def init(params: Any) -> optax.ScaleByAdamState:
        state = adam.init(only(others, params))
        return state._replace(mu=joined(matrices, optax.tree.zeros_like(params), state.mu))

    def step(sig: Signature, ahead: jax.Array, share: Factors = ()) -> jax.Array:
        # With counts n of copies, the rows and columns of P G Q' / sqrt(n_r n_c) have the singular values of G.
        return times(orthogonalized(times(ahead, share, 0.5), sig, cfg.newton_schulz_steps, dtype), share, -0.5)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        of_others, rest = adam.update(only(others, grads), state._replace(mu=only(others, state.mu)))
        seen = only(matrices, grads)
        m = jax.tree.map(lambda m, g: b * m + (1 - b) * g, only(matrices, state.mu), seen)
        ahead = jax.tree.map(lambda m, g: b * m + (1 - b) * g, m, seen) if cfg.nesterov else m
        given = [only(matrices, shares)] if shares is not None else []
        of_matrices = jax.tree.map(step, only(matrices, signatures), ahead, *given)
        return joined(matrices, of_matrices, of_others), rest._replace(mu=joined(matrices, m, rest.mu))

    return optax.GradientTransformation(init, update)
