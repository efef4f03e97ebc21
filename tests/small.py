"""Small models for tests, and hypothesis strategies over their shapes."""

import jax
import numpy as np
from hypothesis import strategies as st

from flm_jax import model
from flm_jax.config import ModelConfig

VOCAB = 61


def config(**changes) -> ModelConfig:
    """A model of a few thousand parameters, with the numerics that make growth hard: small embeddings, eps 1e-5."""
    fields = dict(
        embed=24,
        layers=2,
        heads=2,
        head_dim=8,
        mlp=40,
        vocab=VOCAB,
        base_width=16,
        init_std=0.3,
        init_std_vector=0.02,
        compute_dtype="float32",
    )
    return ModelConfig(**{**fields, **changes})


def tokens(shape=(2, 12), seed=0) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape, dtype=np.int32)


init = jax.jit(model.init_params, static_argnums=0)
apply = jax.jit(model.apply, static_argnums=0)


def params(cfg: ModelConfig, seed: int = 0):
    """Initial parameters with norm scales that are not 1, as after training."""
    values = init(cfg, jax.random.key(seed))
    _, signatures = model.declared(cfg)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x, sig: x * rng.uniform(0.5, 1.5, x.shape).astype(x.dtype) if sig.gains else x,
        values,
        signatures,
    )


@st.composite
def growths(draw, axes=("embed", "mlp", "heads", "kv_heads", "layers"), **fixed):
    """A pair of configurations: any subset of axes grows, at any ratio; grouped queries, tied embeddings included."""
    kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    old = dict(
        embed=draw(st.integers(3, 20)) * 2,
        layers=draw(st.integers(1, 3)),
        mlp=draw(st.integers(2, 40)),
        kv_heads=kv,
        heads=kv * group,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        tied=draw(st.booleans()),
        **fixed,
    )
    grown = draw(st.sets(st.sampled_from(axes), min_size=1))
    new = dict(old)
    for axis in ("embed", "mlp", "layers"):
        if axis in grown:
            new[axis] = old[axis] + draw(st.integers(1, 2 * old[axis]))
    new_kv = kv + (draw(st.integers(1, 2)) if "kv_heads" in grown else 0)
    new_group = group + (draw(st.integers(1, 2)) if "heads" in grown else 0)
    new |= dict(kv_heads=new_kv, heads=new_kv * new_group)
    before = config(**old)
    after = config(**new)
    if before.tied:
        after = after.replace(output_mult=before.logits_mult * after.embed / after.base_width)
    return before, after
