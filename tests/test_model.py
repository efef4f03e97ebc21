"""The model: what it computes, and that no arrangement of the computation changes it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import model
from flm_jax.config import ModelConfig, small_52b, tele_flm_1t, tele_flm_52b, tele_flm_102b
from flm_jax.costs import forward_flops_per_token, param_count
from flm_jax.generate import empty_cache, generate
from flm_jax.loss import loss_sum
from flm_jax.sharding import MeshConfig, make_mesh
from tests import reference, small

VARIANTS = {
    "plain": {},
    "grouped queries": dict(heads=6, kv_heads=2, head_dim=4),
    "tied": dict(tied=True),
    "multipliers": dict(input_mult=3.0, output_mult=0.5),
    "biases": dict(qkv_bias=True, heads=4, kv_heads=2, head_dim=4),
    "query and key norms": dict(qk_norm=True, heads=4, kv_heads=2, head_dim=4),
    "sliding window": dict(sliding_window=3),
    "scaled frequencies": dict(rope_scaling=small.SCALING, head_dim=16),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_equals_a_numpy_decoder_written_in_loops(changes, x64):
    cfg = small.config(compute_dtype="float64", param_dtype="float64", **changes)
    params, tokens = small.params(cfg), small.tokens((1, 9))
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]], np.int32)
    logits = small.apply(cfg, params, tokens, segments)[0]
    np.testing.assert_allclose(logits, reference.forward(cfg, params, tokens[0], segments[0]), rtol=1e-11, atol=1e-13)


def test_no_position_depends_on_a_later_one_or_on_another_document():
    cfg = small.config()
    params = small.params(cfg)
    segments = np.array([[0, 0, 0, 0, 1, 1, 1, 1]], np.int32)

    def logits(embeddings_VD, tokens):
        return small.apply(cfg, {**params, "embedding": embeddings_VD}, tokens, segments)[0]

    tokens = np.arange(8, dtype=np.int32)[None]  # every position has an embedding row of its own
    jacobian_TVRD = jax.jit(jax.jacrev(logits))(params["embedding"], tokens)
    seen_TR = np.abs(np.asarray(jacobian_TVRD)).max(axis=(1, 3))[:, :8] > 0
    t, r = np.indices((8, 8))
    expected = (r <= t) & (segments[0][r] == segments[0][t])
    np.testing.assert_array_equal(seen_TR, expected)


@pytest.mark.parametrize(
    "changes", [dict(scan_unroll=3), dict(remat="full"), dict(remat="dots"), dict(remat="inner"), dict(remat="mlp")]
)
def test_scan_unrolled_and_rematerialised_give_the_same_loss_and_gradient(changes):
    cfg = small.config(layers=3)
    params, tokens = small.params(cfg), small.tokens((2, 13))

    def loss(cfg, params):
        x, y = tokens[:, :-1], tokens[:, 1:]
        return loss_sum(cfg, params, x, y, jnp.ones(x.shape), jnp.zeros_like(x))

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    plain = value_and_grad(cfg, params)
    other = value_and_grad(cfg.replace(**changes), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), plain, other)


def test_scan_equals_a_python_loop_over_blocks():
    cfg = small.config(layers=3)
    params, tokens = small.params(cfg), small.tokens((2, 10))
    one = cfg.replace(layers=1)
    x = params["embedding"][tokens]
    # Layer by layer: a one-layer model whose final norm and head are left out.
    shared = model.Shared(
        model.rotary_tables(jnp.arange(10)[None], model.rotary_frequencies(cfg)),
        model.attention_mask(*[jnp.arange(10)[None]] * 2, *[jnp.zeros((1, 10), int)] * 2),
        None,
        model.Masks(),
        None,
    )
    for layer in range(cfg.layers):
        block = jax.tree.map(lambda w, layer=layer: w[layer], params["blocks"])
        x, _ = model.Block(one).apply({"params": block}, x, None, None, shared)
    hidden = model.RMSNorm(one).apply({"params": params["final_norm"]}, x, model.Masks())
    logits = hidden @ params["head"] * cfg.logits_mult
    np.testing.assert_allclose(small.apply(cfg, params, tokens), logits, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_close_to_float32():
    cfg = small_52b(vocab=small.VOCAB)
    params, tokens = small.params(cfg), small.tokens((4, 32))
    wide = small.apply(cfg, params, tokens)
    narrow = small.apply(cfg.replace(compute_dtype="bfloat16"), params, tokens)
    assert narrow.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(wide - narrow)) / jnp.max(jnp.abs(wide))) < 0.05
    assert not np.array_equal(wide, narrow)


def test_logits_of_an_untrained_model_have_muP_size_at_every_width():
    deviations = []
    for heads in (4, 16):
        cfg = small.config(embed=8 * heads, heads=heads, mlp=20 * heads, init_std=0.25, init_std_vector=1.0)
        deviations.append(float(jnp.std(small.apply(cfg, small.params(cfg), small.tokens()))))
    # The head's fan-in grows by 4 and the multiplier falls by 4: the logits shrink by the root, as muP has it.
    assert 0.35 < deviations[1] / deviations[0] < 0.7


def test_a_norm_under_a_mask_is_the_norm_of_what_the_mask_lets_through():
    """x * rsqrt(sum(m x^2) / width + eps) * scale * m (MSG, 2305.02869), also between 0 and 1."""
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 6)).astype(np.float32), rng.uniform(0.5, 1.5, 6).astype(np.float32)
    m = np.array([1, 1, 1, 1, 0.3, 0.3], np.float32)
    cfg = small.config(embed=6, heads=1)
    masks = model.Masks(embed_D=jnp.asarray(m), norm_width=jnp.float32(4.6))
    found = model.RMSNorm(cfg).apply({"params": {"scale": scale}}, x, masks)
    mean_square = (m * x * x).sum(-1, keepdims=True) / 4.6
    np.testing.assert_allclose(found, x / np.sqrt(mean_square + cfg.norm_eps) * scale * m, rtol=1e-6)


@pytest.mark.parametrize("chunks", [2, 6])
def test_loss_in_chunks_is_the_loss(chunks):
    cfg = small.config()
    params, tokens = small.params(cfg), small.tokens((3, 13))
    x, y = tokens[:, :-1], tokens[:, 1:]
    weights = np.random.default_rng(0).uniform(size=x.shape).astype(np.float32)

    def loss(params, chunks):
        return loss_sum(cfg, params, x, y, weights, jnp.zeros_like(x), chunks=chunks)

    whole = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, 1)
    parts = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, chunks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), whole, parts)
    with pytest.raises(ValueError, match="chunks=5 must divide the context of 12"):
        loss(params, 5)


def test_a_token_at_a_time_through_the_cache_equals_all_at_once():
    cfg = small.config(heads=4, kv_heads=2)
    params, tokens = small.params(cfg), small.tokens((2, 9))
    whole = small.apply(cfg, params, tokens)
    decode, cache, parts = jax.jit(model.Transformer(cfg).apply), empty_cache(cfg, 2, 12), []
    for piece in (tokens[:, :4], *[tokens[:, i : i + 1] for i in range(4, 9)]):
        logits, cache = decode({"params": params}, piece, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(whole, jnp.concatenate(parts, axis=1), rtol=1e-4, atol=1e-5)


def test_greedy_generation_takes_the_likeliest_token_each_time():
    cfg = small.config(init_std_vector=1.0)
    params, prompt = small.params(cfg), small.tokens((2, 4))
    out = generate(cfg, params, prompt, 5, jax.random.key(0), temperature=0)
    rows = prompt
    for _ in range(5):
        rows = np.concatenate([rows, np.argmax(small.apply(cfg, params, rows)[:, -1:], -1).astype(np.int32)], axis=1)
    np.testing.assert_array_equal(out, rows[:, 4:])


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one device", "mesh"])
def test_a_padded_prompt_is_continued_as_alone(mesh):
    cfg = small.config(init_std_vector=1.0, heads=4, kv_heads=2, vocab=64)
    params, lengths = small.params(cfg), (1, 3, 7, 9)
    prompts = [small.tokens((1, n), seed=n) for n in lengths]
    alone = [generate(cfg, params, prompt, 5, jax.random.key(0), temperature=0)[0] for prompt in prompts]
    padded, start = np.full((4, 9), 60, np.int32), np.array([9 - n for n in lengths], np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[9 - prompt.shape[1] :] = prompt
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        found = generate(cfg, params, padded, 5, jax.random.key(0), temperature=0, start_B=start)
    np.testing.assert_array_equal(found, alone)


def test_what_lies_before_a_prompt_changes_no_logit():
    cfg = small.config(heads=4, kv_heads=2)
    params, tokens = small.params(cfg), small.tokens((2, 9))
    cache = empty_cache(cfg, 2, 9)._replace(start_B=jnp.array([0, 4], jnp.int32))
    logits, after = jax.jit(model.Transformer(cfg).apply)({"params": params}, tokens, cache=cache)
    np.testing.assert_array_equal(after.start_B, cache.start_B)
    np.testing.assert_allclose(logits[0], small.apply(cfg, params, tokens[:1])[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[1, 4:], small.apply(cfg, params, tokens[1:, 4:])[0], rtol=1e-4, atol=1e-5)


def test_one_row_is_continued_on_a_mesh_as_without_one():
    """A single row, and a single position at a time, that a mesh cannot split stay whole."""
    cfg = small.config(init_std_vector=1.0, heads=4, vocab=64)
    params, prompt = small.params(cfg), small.tokens((1, 5))
    expected = generate(cfg, params, prompt, 4, jax.random.key(0), temperature=0)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))):
        found = generate(cfg, params, prompt, 4, jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("cfg", "billions", "mult"),
    [(tele_flm_52b(), 52.85, 0.03125), (tele_flm_102b(), 102.24, 0.025), (tele_flm_1t(), 1083.8, 0.025)],
)
def test_named_shapes_have_the_published_size(cfg, billions, mult):
    assert param_count(cfg) / 1e9 == pytest.approx(billions, abs=0.05)
    assert cfg.logits_mult == mult


def test_52b_initial_deviation_is_the_published_one():
    _, signatures = model.declared(tele_flm_52b())
    assert tele_flm_52b().std(signatures["blocks"]["attention"]["query"]) == pytest.approx(4.242e-3, rel=1e-3)
    assert tele_flm_52b().std(signatures["embedding"]) == 4e-3


def test_flops_count_what_xla_counts():
    cfg = small.config(layers=1, embed=32, mlp=96, heads=4, vocab=512)
    tokens = jnp.zeros((1, 64), jnp.int32)
    compiled = small.apply.lower(cfg, small.params(cfg), tokens).compile()
    measured = compiled.cost_analysis()["flops"]
    assert measured == pytest.approx(64 * forward_flops_per_token(cfg, 64), rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(embed=25, head_dim=None), "embed=25 is not divisible by heads=2.*such as 24"),
        (dict(kv_heads=4), "kv_heads=4 must divide heads=2"),
        (dict(head_dim=3), "head_dim=3 must be even"),
        (dict(remat="some"), "remat='some' is unknown; use one of none, dots, inner, mlp, full"),
        (dict(layers=0), "layers must be a positive integer, got 0"),
        (dict(mlp=1.5), "mlp must be a positive integer"),
    ],
)
def test_wrong_shapes_are_refused_with_what_would_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        small.config(**changes)


def test_config_is_hashable_and_static():
    assert hash(small.config()) == hash(small.config())
    assert isinstance(small.config(), ModelConfig)
