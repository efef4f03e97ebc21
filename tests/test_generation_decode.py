"""Generation through the cache: what the whole forward pass gives, for any prompt, in a batch and on a mesh."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import model
from flm_jax.attention import empty_cache
from flm_jax.generation import Sampling, decode
from flm_jax.generation.decode import continued
from flm_jax.growth import Growth, masks_at
from flm_jax.sharding import MeshConfig, make_mesh
from tests import small

LENGTHS = (9, 1, 4)
# Sizes of a model and what grew into it: in the middle of a ramp, every axis has a mask.
BEFORE = dict(embed=16, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=24)
AFTER = dict(embed=24, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=40)
VARIANTS = {
    "grouped queries, a sliding window": dict(heads=4, kv_heads=2, sliding_window=3),
    "one key head, tied, multipliers": dict(
        **dict(heads=3, kv_heads=1, tied=True, input_mult=3.0, output_mult=0.5),
        **dict(residual_mult=0.4, base_layers=3, attention_mult=0.6),
    ),
    "no layers": dict(layers=0),
    "query and key norms, scaled frequencies": dict(
        qk_norm=True, heads=4, kv_heads=2, head_dim=16, rope_scaling=small.SCALING
    ),
    "in a ramp, with biases": dict(qkv_bias=True, **AFTER),
}


@pytest.mark.battery
@pytest.mark.parametrize("name", VARIANTS)
def test_padded_prompts_and_single_tokens_have_the_logits_of_the_whole_forward_pass(name):
    cfg = small.config(init_std_vector=1.0, **VARIANTS[name])
    params, masks, T = small.params(cfg), None, max(LENGTHS)
    if "ramp" in name:
        before = small.config(init_std_vector=1.0, qkv_bias=True, **BEFORE)
        masks = masks_at(before, cfg, Growth("mask", ramp_steps=4), 2)
    tokens = small.tokens((len(LENGTHS), T + 4))
    # Later tokens change nothing before them, so rows of different lengths can be padded at their ends.
    whole = jax.jit(model.apply, static_argnums=0)(cfg, params, tokens, None, masks)
    prompt_BT, start_B = np.full((len(LENGTHS), 16), 60, np.int32), np.array([16 - n for n in LENGTHS], np.int32)
    for row, length in enumerate(LENGTHS):
        prompt_BT[row, 16 - length :] = tokens[row, :length]
    forward = jax.jit(model.Transformer(cfg).apply)
    logits, cache = forward({"params": params}, prompt_BT, masks=masks, cache=empty_cache(cfg, 3, 24, start_B))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row, 16 - length :], whole[row, :length], rtol=1e-4, atol=1e-4)
    for ahead in range(4):
        next_B1 = np.array([[tokens[row, length + ahead]] for row, length in enumerate(LENGTHS)])
        logits, cache = forward({"params": params}, next_B1, masks=masks, cache=cache)
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(logits[row, 0], whole[row, length + ahead], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*VARIANTS, "bfloat16"])
def test_layers_apart_compute_what_stacked_ones_do(name):
    narrow = dict(compute_dtype="bfloat16", param_dtype="bfloat16")
    cfg = small.config(init_std_vector=1.0, **{"layers": 3, **VARIANTS.get(name, narrow)})
    close = dict(rtol=1e-5, atol=1e-5) if name in VARIANTS else dict(rtol=0.05, atol=0.05)
    params, masks = small.params(cfg), None
    if "ramp" in name:
        before = small.config(init_std_vector=1.0, qkv_bias=True, **BEFORE)
        masks = masks_at(before, cfg, Growth("mask", ramp_steps=4), 2)
    layers = tuple(jax.tree.map(lambda x_L, at=index: x_L[at], params["blocks"]) for index in range(cfg.layers))
    forward = jax.jit(functools.partial(model.Transformer(cfg).apply, method="hidden"))
    cache = empty_cache(cfg, 2, 16, np.array([0, 3], np.int32))
    _, cache = forward({"params": params}, small.tokens((2, 6)), masks=masks, cache=cache)
    given = {"masks": masks, "cache": cache}
    stacked = forward({"params": params}, small.tokens((2, 2), seed=1), **given)
    # Without the stacked ones, so that nothing can come from them.
    rest = {name: value for name, value in params.items() if name != "blocks"}
    found = forward({"params": rest}, small.tokens((2, 2), seed=1), **given, layers=layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), **close), found, stacked)
    with pytest.raises(ValueError, match=f"of 4 layers were given to a model with {cfg.layers}"):
        forward({"params": rest}, small.tokens((2, 2)), **given, layers=({},) * 4)


def greedy(cfg, params, prompt, steps, penalty=1.0):
    """Token by token, what the whole forward pass holds for likeliest, with a penalty on what the row holds already."""
    row = list(prompt)
    for _ in range(steps):
        padded = np.pad(np.array([row], np.int32), ((0, 0), (0, 24 - len(row))))
        logits = np.array(small.apply(cfg, params, padded)[0, len(row) - 1])
        for token in set(row):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        row.append(int(np.argmax(logits)))
    return row[len(prompt) :]


@pytest.fixture(scope="module")
def grouped():
    cfg = small.config(init_std_vector=1.0, heads=4, kv_heads=2, vocab=64)
    params, prompts = small.params(cfg), [small.tokens((n,), seed=n).tolist() for n in LENGTHS]
    return cfg, params, prompts, [greedy(cfg, params, prompt, 5) for prompt in prompts]


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one device", "mesh"])
def test_greedy_takes_the_likeliest_token_each_time(mesh, grouped):
    """Three rows are no multiple of the devices that rows are split over, and stay whole."""
    cfg, params, prompts, expected = grouped
    prompt_BT, start_B = decode.padded(prompts, 3)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        found = continued(cfg, params, prompt_BT, 5, start_B=start_B)
    np.testing.assert_array_equal(found, expected)


def test_the_penalty_is_for_tokens_of_the_prompt_and_of_the_answer(grouped):
    cfg, params, prompts, unpenalised = grouped
    prompt_BT, start_B = decode.padded(prompts, 3)
    found = continued(cfg, params, prompt_BT, 9, Sampling(repetition_penalty=4.0), start_B=start_B)
    expected = [greedy(cfg, params, prompt, 9, 4.0) for prompt in prompts]
    np.testing.assert_array_equal(found, expected)
    assert [row[:5] for row in expected] != unpenalised
    # Padding is no token of a prompt, though it is written as token 0.
    sampling = Sampling(repetition_penalty=4.0)
    given = (sampling.keys(jnp.arange(3, dtype=jnp.uint32)), sampling.values, None)
    rows = decode.read(cfg, params, prompt_BT, start_B, *given, slots=64, form=sampling.form)
    assert [set(np.flatnonzero(seen)) for seen in rows.seen_BV] == [
        {*prompt, row[0]} for prompt, row in zip(prompts, expected, strict=True)
    ]


def test_a_row_ends_at_an_end_and_the_loop_with_the_last_row(grouped):
    cfg, params, prompts, expected = grouped
    form, values = Sampling().form, Sampling().values
    prompt_BT, start_B = decode.padded(prompts, 3)
    keys = Sampling().keys(jnp.arange(3, dtype=jnp.uint32))
    rows = decode.read(cfg, params, prompt_BT, start_B, keys, values, None, slots=64, form=form)
    ends = np.array([expected[0][2], decode.ENDED], np.int32)
    ended = np.array([False, True, True])
    out, rows = decode.extend(cfg, params, rows, ended, ends, np.int32(20), values, None, form)
    at = expected[0].index(ends[0])
    np.testing.assert_array_equal(out[0, :at], expected[0][1 : at + 1])
    assert np.all(np.asarray(out)[0, at:] == decode.ENDED) and np.all(np.asarray(out)[1:] == decode.ENDED)
    assert int(rows.made) == 1 + at


def test_lengths_are_rounded_up_to_buckets():
    assert [decode.bucket(n, 16) for n in (1, 16, 17, 33)] == [16, 16, 32, 64]
    prompt_BT, start_B = decode.padded([[1, 2], [3] * 17], 4)
    assert prompt_BT.shape == (4, 32) and list(start_B) == [30, 15, 31, 31]
    assert list(prompt_BT[0, 30:]) == [1, 2]
