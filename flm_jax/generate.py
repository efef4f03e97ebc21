"""Text generation with a key-value cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from flm_jax.attention import Cache
from flm_jax.config import ModelConfig
from flm_jax.model import Masks, Params, Transformer
from flm_jax.sharding import constrain


def empty_cache(cfg: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache for `length` positions, in the compute dtype."""
    shape = (cfg.layers, batch, length, cfg.k_heads, cfg.h_dim)
    empty = constrain(jnp.zeros(shape, cfg.compute), "layers", "batch", "history", "kv_heads", "head_dim")
    return Cache(empty, empty, jnp.zeros((), jnp.int32))


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
    model = Transformer(cfg)
    B, T = prompt_BT.shape

    def choose(logits_BV: jax.Array, key: jax.Array) -> jax.Array:
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)

    def forward(tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        out: Any = model.apply({"params": params}, tokens_BT, masks=masks, cache=cache)
        return out[0][:, -1], out[1]

    def step(carry: tuple[jax.Array, Cache], key: jax.Array) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        token_B, cache = carry
        logits_BV, cache = forward(token_B[:, None], cache)
        token_B = choose(logits_BV, key)
        return (token_B, cache), token_B

    keys = jax.random.split(key, steps)
    # Rotary positions are relative, so the start of a prompt in its row changes the result only by rounding.
    logits_BV, cache = forward(prompt_BT, empty_cache(cfg, B, T + steps)._replace(start_B=start_B))
    first_B = choose(logits_BV, keys[0])
    _, rest_SB = jax.lax.scan(step, (first_B, cache), keys[1:])
    tokens_BS = jnp.concatenate([first_B[None], rest_SB]).T
    if jax.sharding.get_abstract_mesh().empty:
        return tokens_BS
    # Replicated, so that every process can read the whole result.
    return jax.lax.with_sharding_constraint(tokens_BS, jax.sharding.PartitionSpec())
