"""Text generation with a key-value cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.attention import Cache, empty_cache
from flm_jax.config import ModelConfig
from flm_jax.distributed import fetch
from flm_jax.model import Masks, Params, Transformer


def _choose(logits_BV: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
    """A token per row: the likeliest at temperature 0, else a sample."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)


def _first(
    cfg: ModelConfig,
    params: Params,
    prompt_BT: jax.Array,
    length: int,
    key: jax.Array,
    temperature: float,
    masks: Masks | None,
    start_B: jax.Array | None,
) -> tuple[jax.Array, Cache]:
    """The token (B,) after each prompt, and a cache for `length` positions that holds the prompt."""
    cache = empty_cache(cfg, prompt_BT.shape[0], length, start_B)
    out: Any = Transformer(cfg).apply({"params": params}, prompt_BT, masks=masks, cache=cache)
    return _choose(out[0][:, -1], key, temperature), out[1]


def _more(
    cfg: ModelConfig,
    params: Params,
    token_B: jax.Array,
    cache: Cache,
    keys: jax.Array,
    temperature: float,
    masks: Masks | None,
) -> tuple[jax.Array, Cache]:
    """The tokens (S, B) that follow `token_B`, one for each of S keys, and the extended cache."""

    def step(carry: tuple[jax.Array, Cache], key: jax.Array) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        token_B, cache = carry
        out: Any = Transformer(cfg).apply({"params": params}, token_B[:, None], masks=masks, cache=cache)
        token_B = _choose(out[0][:, -1], key, temperature)
        return (token_B, out[1]), token_B

    (_, cache), tokens_SB = jax.lax.scan(step, (token_B, cache), keys)
    return tokens_SB, cache


def _replicated(tokens: jax.Array) -> jax.Array:
    """Replicated on the mesh, if there is one, so that every process can read the whole result."""
    if jax.sharding.get_abstract_mesh().empty:
        return tokens
    return jax.lax.with_sharding_constraint(tokens, jax.sharding.PartitionSpec())


@functools.partial(jax.jit, static_argnames=("cfg", "steps", "temperature"))
def generate(
    cfg: ModelConfig,
    params: Params,
    prompt_BT: jax.Array,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
    masks: Masks | None = None,
    start_B: jax.Array | None = None,
) -> jax.Array:
    """The tokens that continue each prompt.

    Args:
      cfg: the model.
      params: its parameters.
      prompt_BT: (B, T) int32, T at least 1; shorter prompts are padded on the left.
      steps: number of tokens to add.
      key: for sampling.
      temperature: divides the logits; 0: greedy, the likeliest token each time.
      masks: growth masks, during their ramp.
      start_B: int32 below T, where the prompt of each row starts; positions before it are ignored. None: at 0.

    Returns:
      (B, steps) int32.
    """
    keys, length = jax.random.split(key, steps), prompt_BT.shape[1] + steps
    first_B, cache = _first(cfg, params, prompt_BT, length, keys[0], temperature, masks, start_B)
    rest_SB, _ = _more(cfg, params, first_B, cache, keys[1:], temperature, masks)
    return _replicated(jnp.concatenate([first_B[None], rest_SB]).T)


@functools.partial(jax.jit, static_argnames=("cfg", "length", "temperature"))
def _begin(
    cfg: ModelConfig, params: Params, prompt_1T: jax.Array, length: int, key: jax.Array, temperature: float, masks: Any
) -> tuple[jax.Array, Cache]:
    token_B, cache = _first(cfg, params, prompt_1T, length, key, temperature, masks, None)
    return _replicated(token_B), cache


@functools.partial(jax.jit, static_argnames=("cfg", "temperature"), donate_argnames="cache")
def _go_on(
    cfg: ModelConfig, params: Params, token_B: jax.Array, cache: Cache, keys: jax.Array, temperature: float, masks: Any
) -> tuple[jax.Array, Cache]:
    tokens_SB, cache = _more(cfg, params, token_B, cache, keys, temperature, masks)
    return _replicated(tokens_SB), cache


def stream(
    cfg: ModelConfig,
    params: Params,
    prompt_1T: jax.Array,
    steps: int,
    key: jax.Array,
    temperature: float = 1.0,
    masks: Masks | None = None,
    piece: int = 16,
) -> Iterator[list[int]]:
    """Yields the tokens of `generate` for one prompt as they are computed, `piece` at a time; stop when you like.

    Args: as for `generate`; prompt_1T: (1, T) int32.
    """
    keys, length = jax.random.split(key, steps), prompt_1T.shape[1] + steps
    token_B, cache = _begin(cfg, params, prompt_1T, length, keys[0], temperature, masks)
    yield [int(fetch(token_B)[0])]
    for start in range(1, steps, piece):
        wanted = min(piece, steps - start)
        tokens_SB, cache = _go_on(cfg, params, token_B, cache, keys[start : start + wanted], temperature, masks)
        token_B = tokens_SB[-1]
        yield [int(token) for token in fetch(tokens_SB)[:, 0]]
