"""The model: what it computes, and that no arrangement of the computation changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import model
from flm_jax.attention import empty_cache
from flm_jax.config import REMAT_POLICIES, small_52b
from flm_jax.loss import loss_sum
from tests import reference, small

VARIANTS = {
    "plain": {},
    "grouped queries": dict(heads=6, kv_heads=2, head_dim=4),
    "tied": dict(tied=True),
    "multipliers": dict(input_mult=3.0, output_mult=0.5, residual_mult=0.3, attention_mult=0.7),
    "the depth of a base model": dict(layers=3, base_layers=2, residual_mult=1.5),
    "no layers": dict(layers=0, base_layers=2),
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


@pytest.mark.battery
@pytest.mark.parametrize(
    "changes", [dict(scan_unroll=3), *(dict(remat=name) for name in REMAT_POLICIES if name != "none")]
)
def test_scan_unrolled_and_rematerialised_give_the_same_loss_and_gradient(changes):
    cfg = small.config(layers=3)
    params, tokens = small.params(cfg), small.tokens((2, 13))

    def loss(cfg, params):
        x, y = tokens[:, :-1], tokens[:, 1:]
        return loss_sum(cfg, params, x, y, jnp.ones(x.shape), jnp.zeros_like(x))

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    plain = value_and_grad(cfg.replace(remat="none"), params)
    other = value_and_grad(cfg.replace(**changes), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), plain, other)


@pytest.mark.parametrize("changes", [{}, dict(qk_norm=True), dict(qkv_bias=True, kv_heads=1)], ids=str)
def test_remat_products_computes_no_product_with_a_weight_twice(changes):
    params, tokens = small.params(small.config(**changes)), small.tokens((2, 9))

    def products(remat):
        cfg = small.config(remat=remat, **changes)
        text = jax.jit(jax.grad(lambda p: jnp.sum(small.apply(cfg, p, tokens)[0]))).lower(params).as_text()
        # Products with weights contract the width (or what is as wide) and have no batch axes; attention's have.
        return sum("dot_general" in line and "batching_dims" not in line for line in text.splitlines())

    # The output projection is what "inner" computes again.
    assert products("products") == products("none") == products("inner") - 1


@pytest.mark.parametrize("layers, scan_unroll, looped", [(1, 1, False), (2, 2, False), (3, 2, False), (4, 2, True)])
def test_only_a_loop_spares_what_is_computed_again_a_barrier(layers, scan_unroll, looped):
    params, tokens = small.params(small.config(layers=layers)), small.tokens((2, 9))

    def gradient(remat):
        cfg = small.config(layers=layers, remat=remat, scan_unroll=scan_unroll)
        return jax.jit(jax.grad(lambda p: jnp.sum(small.apply(cfg, p, tokens)[0]))).lower(params)

    def barriers(remat):
        return gradient(remat).as_text().count("optimization_barrier")

    def products(remat):
        return gradient(remat).compile().as_text().count("dot_general")

    assert (barriers("full") == barriers("none")) == looped
    assert products("full") > products("none")


def test_scan_equals_a_python_loop_over_blocks():
    cfg = small.config(layers=3)
    params, tokens = small.params(cfg), small.tokens((2, 10))
    one = cfg.replace(layers=1)
    x = params["embedding"][tokens]
    # Layer by layer: a one-layer model whose final norm and head are left out.
    shared = model.Shared(
        model.rotary_tables(jnp.arange(10)[None], model.rotary_frequencies(cfg)),
        model.see(one, (2, 10), None),
        model.Masks(),
    )
    for layer in range(cfg.layers):
        block = jax.tree.map(lambda w, layer=layer: w[layer], params["blocks"])
        (x, _), _ = model.Block(one).apply({"params": block}, (x, None), None, None, shared)
    hidden = model.RMSNorm(one).apply({"params": params["final_norm"]}, x, model.Masks())
    logits = hidden @ params["head"] * cfg.logits_mult
    np.testing.assert_allclose(small.apply(cfg, params, tokens), logits, rtol=1e-5, atol=1e-6)


def test_a_multiplier_is_not_rounded_to_the_dtype_of_activations():
    """Growth folds the ratio of two multipliers into float32 weights: rounded ones would have another ratio."""
    x = jnp.asarray([3.0], jnp.bfloat16)
    assert model.multiplied(x, 0.3) == jnp.asarray(0.9, jnp.bfloat16) != x * 0.3
    assert model.multiplied(x, 1.0) is x


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


def test_a_token_at_a_time_through_the_cache_equals_all_at_once():
    cfg = small.config(heads=4, kv_heads=2)
    params, tokens = small.params(cfg), small.tokens((2, 9))
    whole = small.apply(cfg, params, tokens)
    decode, cache, parts = jax.jit(model.Transformer(cfg).apply), empty_cache(cfg, 2, 12), []
    for piece in (tokens[:, :4], *[tokens[:, i : i + 1] for i in range(4, 9)]):
        logits, cache = decode({"params": params}, piece, cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(whole, jnp.concatenate(parts, axis=1), rtol=1e-4, atol=1e-5)


def test_what_lies_before_a_prompt_changes_no_logit():
    cfg = small.config(heads=4, kv_heads=2)
    params, tokens = small.params(cfg), small.tokens((2, 9))
    cache = empty_cache(cfg, 2, 9, jnp.array([0, 4], jnp.int32))
    logits, after = jax.jit(model.Transformer(cfg).apply)({"params": params}, tokens, cache=cache)
    np.testing.assert_array_equal(after.start_B, cache.start_B)
    np.testing.assert_allclose(logits[0], small.apply(cfg, params, tokens[:1])[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[1, 4:], small.apply(cfg, params, tokens[1:, 4:])[0], rtol=1e-4, atol=1e-5)


def test_every_parameter_of_the_model_is_declared_with_the_shape_it_has():
    cfg = small.config(heads=4, kv_heads=2)
    shapes, signatures = model.declared(cfg)
    assert jax.tree.map(lambda s: s.shape(cfg.sizes), signatures) == jax.tree.map(lambda x: x.shape, shapes)
    assert jax.tree.map(
        jnp.shape, jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0))
    ) == jax.tree.map(lambda x: x.shape, shapes)


def test_a_bias_begins_at_zero_and_neither_decays_nor_scales_with_the_width():
    cfg = small.config(qkv_bias=True)
    params, signatures = jax.jit(model.init_params, static_argnums=0)(cfg, jax.random.key(0)), model.declared(cfg)[1]
    biases = [
        (x, sig) for x, sig in zip(jax.tree.leaves(params), jax.tree.leaves(signatures), strict=True) if sig.is_bias
    ]
    assert len(biases) == 3
    for x, sig in biases:
        assert not np.any(x)
        assert (sig.decays, sig.is_matrix_like, cfg.std(sig)) == (False, False, 0.0)
    decaying = {str(sig) for sig in jax.tree.leaves(signatures) if sig.decays}
    assert "vocab -> embed" in decaying and "embed" not in decaying
