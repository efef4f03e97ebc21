"""How the next token is chosen from logits: `Sampling`, its filters, and random numbers by row and position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.records import recorded
from flm_jax.records.fields import Fraction, NonNegative, Positive, PositiveFraction, Seed, Size


@dataclass(frozen=True)
@recorded
class Sampling:
    """How tokens are chosen. The filters apply in the order of their fields, as in transformers.

    Attributes:
      repetition_penalty: of tokens that prompt or answer hold already, positive logits are divided by this, and
        negative ones multiplied (CTRL, 1909.05858); 1: none. A chat uses 1.03, which is recalled of Tele-FLM and not
        confirmed (docs/facts.md).
      temperature: divides the logits; 0: greedy, the likeliest token each time, and no other filter than the penalty.
      top_k: only so many of the likeliest tokens are kept; None: all.
      top_p: the likeliest tokens are kept until their probabilities, among those that `top_k` keeps, sum to this
        (nucleus sampling, 1904.09751); 1: all.
      min_p: tokens are kept whose probability is at least this fraction of the likeliest one's (2407.01082); 0: all.
      seed: of the random numbers. Each row has its own, by its number and the position in its answer, so its text does
        not depend on the batch that it is in, nor on the number of devices.
    """

    repetition_penalty: Positive = 1.0
    temperature: NonNegative = 0.0
    top_k: Size | None = None
    top_p: PositiveFraction = 1.0
    min_p: Fraction = 0.0
    seed: Seed = 0

    @property
    def form(self) -> Form:
        """What is compiled for it."""
        sampled = self.temperature > 0
        return Form(
            sampled=sampled,
            top_k=sampled and self.top_k is not None,
            top_p=sampled and self.top_p < 1,
            min_p=sampled and self.min_p > 0,
            penalised=self.repetition_penalty != 1,
        )

    @property
    def values(self) -> Values:
        """Its numbers, which may change without another compilation."""
        numbers = (self.repetition_penalty, self.temperature or 1.0, self.top_p, self.min_p)
        penalty, temperature, top_p, min_p = map(np.float32, numbers)
        return Values(penalty, temperature, np.int32(min(self.top_k or 1, 2**31 - 1)), top_p, min_p)

    def keys(self, rows: jax.Array) -> jax.Array:
        """The key of each row, (B,), from the rows' numbers, (B,) uint32."""
        return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(self.seed), row))(rows)


GREEDY = Sampling()


class Form(NamedTuple):
    """Which filters a compiled program contains."""

    sampled: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalised: bool = False


class Values(NamedTuple):
    """The numbers of the filters; see `Sampling`."""

    penalty: jax.Array | np.float32
    temperature: jax.Array | np.float32
    top_k: jax.Array | np.int32
    top_p: jax.Array | np.float32
    min_p: jax.Array | np.float32


def choose(
    logits_BV: jax.Array, keys_B: jax.Array, position: jax.Array, seen_BV: jax.Array | None, form: Form, values: Values
) -> jax.Array:
    """A token per row, (B,) int32.

    Args:
      logits_BV: whole rows on each device, so that sums and ties do not depend on the mesh.
      keys_B: of the rows.
      position: (), how many tokens of the answer come before.
      seen_BV: bool, the tokens of prompt and answer so far; None without a penalty.
      form: the filters.
      values: their numbers.
    """
    if form.penalised:
        assert seen_BV is not None
        logits_BV = penalised(logits_BV, seen_BV, values.penalty)
    if not form.sampled:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = filtered(logits_BV / values.temperature, form, values)
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | np.float32) -> jax.Array:
    """Logits (B, V) where tokens that were seen are less likely, for a penalty above 1."""
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def filtered(logits_BV: jax.Array, form: Form, values: Values) -> jax.Array:
    """Logits (B, V), -inf where a filter leaves a token out; the likeliest token is always kept."""
    if not (form.top_k or form.top_p or form.min_p):
        return logits_BV
    probs_BV, order_BV = jax.nn.softmax(logits_BV, axis=-1), _ordered(logits_BV)
    kept_BV = jnp.ones(logits_BV.shape, bool)
    if form.top_k:
        kept_BV = _likeliest(order_BV, jnp.ones_like(probs_BV), values.top_k.astype(probs_BV.dtype))
    if form.top_p:
        probs_BV = jnp.where(kept_BV, probs_BV, 0)
        kept_BV &= _likeliest(order_BV, probs_BV, values.top_p * jnp.sum(probs_BV, axis=-1, keepdims=True))
    if form.min_p:
        kept_BV &= probs_BV >= values.min_p * jnp.max(probs_BV, axis=-1, keepdims=True)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """Float32 numbers as uint32 that are in the same order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _likeliest(order_BV: jax.Array, weights_BV: jax.Array, enough: jax.Array) -> jax.Array:
    """Which tokens are kept, (B, V): the first in descending order until their weights sum to `enough`, ties included.

    The last one's value is found bit by bit, in 32 passes. Sorting a vocabulary takes longer than a model's step.
    """

    def sums(least_B1: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(order_BV >= least_B1, weights_BV, 0), axis=-1, keepdims=True)

    def bit(number: jax.Array, least_B1: jax.Array) -> jax.Array:
        higher_B1 = least_B1 | (jnp.uint32(1) << (31 - number).astype(jnp.uint32))
        return jnp.where(sums(higher_B1) >= enough, higher_B1, least_B1)

    start = jnp.zeros((order_BV.shape[0], 1), jnp.uint32)
    return order_BV >= jax.lax.fori_loop(0, 32, bit, start)
