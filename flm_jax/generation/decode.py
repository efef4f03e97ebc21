"""The compiled programs of generation: prompts are read into a cache, then continued by some tokens per call.

Prompts of a batch are padded on the left to one length, so all rows write the same slot of the cache. Positions are
counted from the start of each prompt, and padding is masked: a row is computed as it is alone. The sizes of arrays are
rounded up to buckets, and a program is compiled once for each pair of rows and bucket.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from flm_jax.attention import Cache, empty_cache
from flm_jax.config import ModelConfig
from flm_jax.generation.sampling import GREEDY, Form, Sampling, Values, choose
from flm_jax.model import Layers, Masks, Params, Transformer
from flm_jax.sharding import fitting_spec

# Prompts are padded to 16, 32, 64, ... tokens, and caches have 64, 128, 256, ... slots.
SHORTEST_PROMPT, SMALLEST_CACHE = 16, 64
# The longest run of tokens that one call of `extend` computes.
MOST = 64
# In place of a token: the row ended before.
ENDED = -1


class Rows(NamedTuple):
    """A batch between two calls.

    Attributes:
      cache: what the model has read; `token_B` is not in it yet.
      token_B: int32, the last token of each row.
      made: () int32, how many tokens each answer has.
      keys_B: for the random numbers of each row.
      seen_BV: bool, the tokens of prompt and answer; None without a repetition penalty.
    """

    cache: Cache
    token_B: jax.Array
    made: jax.Array
    keys_B: jax.Array
    seen_BV: jax.Array | None


def bucket(length: int, least: int) -> int:
    """The size that `length` is rounded up to: `least` times a power of two."""
    size = least
    while size < length:
        size *= 2
    return size


def padded(prompts: Sequence[Sequence[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array (rows, T), T a bucket, padded on the left; and where each starts, (rows,), both int32.

    Rows without a prompt hold one token.
    """
    length = bucket(max(map(len, prompts)), SHORTEST_PROMPT)
    prompt_BT, start_B = np.zeros((rows, length), np.int32), np.full(rows, length - 1, np.int32)
    for row, prompt in enumerate(prompts):
        start_B[row] = length - len(prompt)
        prompt_BT[row, start_B[row] :] = prompt
    return prompt_BT, start_B


def _whole_rows(x: jax.Array) -> jax.Array:
    """`x` (B, ...), split over the mesh by its rows alone."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape[:1], ("batch",)))


def _replicated(x: jax.Array) -> jax.Array:
    """Replicated on the mesh, if there is one, so that every process can read the whole result."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def _next(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    rows: Rows,
    form: Form,
    values: Values,
    masks: Masks | None,
    layers: Layers | None = None,
) -> Rows:
    """The batch after reading `tokens_BT`, with the token that comes next in each row."""
    # Only the last position's logits are computed: those of a whole prompt would take gigabytes.
    model = Transformer(cfg.replace(remat="none"))
    out: Any = model.apply({"params": params}, tokens_BT, masks=masks, cache=rows.cache, layers=layers, method="hidden")
    x_BTD, cache = out
    logits_B1V: Any = model.apply({"params": params}, x_BTD[:, -1:], method="logits")
    token_B = choose(_whole_rows(logits_B1V[:, 0]), rows.keys_B, rows.made, rows.seen_BV, form, values)
    return Rows(cache, token_B, rows.made + 1, rows.keys_B, _with(rows.seen_BV, token_B[:, None]))


def _with(seen_BV: jax.Array | None, tokens_BT: jax.Array) -> jax.Array | None:
    """`seen_BV` with more tokens; those beyond its end are left out."""
    if seen_BV is None:
        return None
    return seen_BV.at[jnp.arange(len(seen_BV))[:, None], tokens_BT].set(True, mode="drop")


@functools.partial(jax.jit, static_argnames=("cfg", "slots", "form"))
def read(
    cfg: ModelConfig,
    params: Params,
    prompt_BT: jax.Array | np.ndarray,
    start_B: jax.Array | np.ndarray,
    keys_B: jax.Array,
    values: Values,
    masks: Masks | None,
    slots: int,
    form: Form,
) -> Rows:
    """A batch whose prompts are read, with the first token of each answer.

    Args:
      cfg: the model.
      params: its parameters.
      prompt_BT: int32, padded on the left.
      start_B: int32, where each prompt starts.
      keys_B: for the random numbers of each row.
      values: numbers of the filters.
      masks: growth masks, during their ramp.
      slots: of the cache: at least T, plus the length of the answers.
      form: the filters.
    """
    rows, length = prompt_BT.shape
    seen_BV = None
    if form.penalised:
        is_prompt_BT = jnp.arange(length, dtype=jnp.int32)[None] >= start_B[:, None]
        seen_BV = _with(jnp.zeros((rows, cfg.vocab), bool), jnp.where(is_prompt_BT, prompt_BT, cfg.vocab))
    zero = jnp.zeros((), jnp.int32)
    empty = Rows(empty_cache(cfg, rows, slots, jnp.asarray(start_B)), jnp.zeros(rows, jnp.int32), zero, keys_B, seen_BV)
    return _next(cfg, params, jnp.asarray(prompt_BT), empty, form, values, masks)


@functools.partial(jax.jit, static_argnames=("cfg", "form", "most"), donate_argnames="rows")
def extend(
    cfg: ModelConfig,
    params: Params,
    rows: Rows,
    ended_B: jax.Array | np.ndarray,
    ends_E: jax.Array | np.ndarray,
    limit: jax.Array | int,
    values: Values,
    masks: Masks | None,
    form: Form,
    most: int = MOST,
    layers: Layers | None = None,
) -> tuple[jax.Array, Rows]:
    """The next tokens of every row, (B, most) int32, and the batch after them.

    Args:
      cfg: the model.
      params: its parameters.
      rows: the batch, which is donated.
      ended_B: bool, rows that need no more tokens.
      ends_E: int32, tokens that end a row.
      limit: how many tokens at most; fewer are computed if all rows end before.
      values: numbers of the filters.
      masks: growth masks, during their ramp.
      form: the filters.
      most: the width of the result; places without a token hold `ENDED`.
      layers: the parameters of each block (`layers_apart`), to be used in the place of those in `params`; or None.
    """

    def goes_on(carry: tuple[jax.Array, jax.Array, jax.Array, Rows]) -> jax.Array:
        done, ended_B, _, _ = carry
        return (done < limit) & ~jnp.all(ended_B)

    def step(carry: tuple[jax.Array, jax.Array, jax.Array, Rows]) -> tuple[jax.Array, jax.Array, jax.Array, Rows]:
        done, ended_B, out_BM, rows = carry
        rows = _next(cfg, params, rows.token_B[:, None], rows, form, values, masks, layers)
        out_BM = jax.lax.dynamic_update_slice(
            out_BM, jnp.where(ended_B, ENDED, rows.token_B)[:, None], (jnp.zeros((), jnp.int32), done)
        )
        ended_B |= jnp.any(rows.token_B[:, None] == ends_E[None], axis=1)
        return done + 1, ended_B, out_BM, rows

    ends_E = jnp.asarray(ends_E, jnp.int32)
    out_BM = jnp.full((len(rows.token_B), most), ENDED, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), jnp.asarray(ended_B), out_BM, rows)
    _, _, out_BM, rows = jax.lax.while_loop(goes_on, step, carry)
    return _replicated(out_BM), rows


@functools.partial(jax.jit, static_argnames=("cfg", "steps", "sampling"))
def continued(
    cfg: ModelConfig,
    params: Params,
    prompt_BT: jax.Array | np.ndarray,
    steps: int,
    sampling: Sampling = GREEDY,
    masks: Masks | None = None,
    start_B: jax.Array | None = None,
) -> jax.Array:
    """The tokens that continue each prompt, (B, steps) int32, whatever they are: arrays in, arrays out.

    Args:
      cfg: the model.
      params: its parameters.
      prompt_BT: (B, T) int32, T at least 1; shorter prompts are padded on the left.
      steps: number of tokens to add.
      sampling: how they are chosen; row b has the random numbers of number b.
      masks: growth masks, during their ramp.
      start_B: int32 below T, where the prompt of each row starts; positions before it are ignored. None: at 0.
    """
    count, length = prompt_BT.shape
    start_B = jnp.zeros(count, jnp.int32) if start_B is None else start_B
    form, values = sampling.form, sampling.values
    keys_B = sampling.keys(jnp.arange(count, dtype=jnp.uint32))
    rows = read(cfg, params, prompt_BT, start_B, keys_B, values, masks, length + steps, form)
    first_B, ended_B, none = rows.token_B, np.zeros(count, bool), np.full(1, ENDED, np.int32)
    rest_BM, _ = extend(cfg, params, rows, ended_B, none, steps - 1, values, masks, form, most=steps)
    return _replicated(jnp.concatenate([first_B[:, None], rest_BM[:, : steps - 1]], axis=1))
