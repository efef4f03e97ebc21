"""Small models for tests, and hypothesis strategies over their shapes."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from flm_jax import model
from flm_jax.config import ModelConfig, RopeScaling
from flm_jax.signature import KINDS

VOCAB = 61
# Within a dozen positions some pairs of a head are fast, some slow, some between.
SCALING = RopeScaling(factor=4.0, low_freq_factor=0.05, high_freq_factor=0.4, original_context=8)


def examples(count: int) -> settings:
    """Settings of a property test that is held to so many examples; to two of them in `make check`."""
    return settings(max_examples=min(count, 2) if os.environ.get("HYPOTHESIS_PROFILE") == "quick" else count)


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


def shape(**changes) -> ModelConfig:
    """A model whose axes eight devices divide, over the byte vocabulary."""
    return config(**{**dict(vocab=264, heads=4, head_dim=4, kv_heads=2), **changes})


def write_corpus(folder: Path) -> None:
    """Eight small documents."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = [
        "grow",
        "the",
        "small",
        "model",
        "and",
        "go",
        "on",
        "training",
        "it",
        "as",
        "if",
        "nothing",
        "had",
        "happened",
    ]
    for i in range(8):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choice(words, 70)) + "\n")


apply = jax.jit(model.apply, static_argnums=0)


def params(cfg: ModelConfig, seed: int = 0):
    """Parameters of the sizes that initialisation gives, drawn by numpy (compiling each shape's draw takes seconds).

    The scales of norms are not 1, and biases not 0, as after training.
    """
    shapes, signatures = model.declared(cfg)
    rng = np.random.default_rng(seed)

    def one(like, sig):
        std = 0.3 if sig.is_bias else cfg.std(sig)
        value = rng.uniform(0.5, 1.5, like.shape) if sig.gains else std * rng.standard_normal(like.shape)
        return jax.device_put(np.asarray(value, like.dtype))  # jnp.asarray compiles a program for every shape

    return jax.tree.map(one, shapes, signatures)


def waves(signature, key, shape, *, std, dtype):
    """In place of `draw`: as arbitrary, as dependent on its key, and compiled at once."""
    if signature.gains:
        return jnp.ones(shape, dtype)
    std = std or 0.3  # biases, too
    phase = jax.random.key_data(key).astype(jnp.float32).sum() * 1e-9
    index = jnp.arange(np.prod(shape, dtype=int), dtype=jnp.float32).reshape(shape)
    return (1.4 * std * jnp.cos(index * 1.618 + phase)).astype(dtype)


@st.composite
def growths(draw, axes=tuple(KINDS), multiples=False, least_layers=1, **fixed):
    """A pair of configurations: any subset of axes grows, at any ratio; any field that a relative of Llama has.

    Under query and key norms heads keep their width: only masks can change it. The residual multiplier may change.
    """
    residual = dict(residual_mult=st.sampled_from([1.0, 0.3]), base_layers=st.sampled_from([None, 1, 3]))
    kv, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 4]))
    old = dict(
        embed=draw(st.integers(3, 20)) * 2,
        layers=draw(st.integers(least_layers, 3)),
        mlp=draw(st.integers(2, 40)),
        kv_heads=kv,
        heads=kv * group,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        tied=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, 5])),
        rope_scaling=draw(st.sampled_from([None, SCALING])),
        attention_mult=draw(st.sampled_from([1.0, 0.6])),
        **{name: draw(values) for name, values in residual.items()},
        vocab=VOCAB,
        **fixed,
    )
    grown = draw(st.sets(st.sampled_from(sorted(axes)), min_size=1))
    new = {**old, **{name: draw(values) for name, values in residual.items() if draw(st.booleans())}}
    if old["qk_norm"]:
        grown = (grown - {"head_dim"}) or {"mlp"}
    for axis, most, step in (("embed", 2, 1), ("mlp", 2, 1), ("layers", 2, 1), ("head_dim", 1, 2), ("vocab", 1, 1)):
        if axis in grown:
            most *= old[axis]
            new[axis] = (
                draw(st.integers(2, 3)) * old[axis]
                if multiples
                else old[axis] + step * draw(st.integers(1, max(most // step, 1)))
            )
    # Key heads may be divided among their queries before any are added.
    parts = draw(st.sampled_from([n for n in (1, 2, 3) if group % n == 0])) if "kv_heads" in grown else 1
    more_kv, more_group = (draw(st.integers(1, 2)) if axis in grown else 0 for axis in ("kv_heads", "heads"))
    new_kv, new_group = kv * parts, group // parts
    if multiples:
        new_kv, new_group = new_kv * (1 + more_kv), new_group * (1 + more_group * (parts == 1))
    else:
        new_kv, new_group = new_kv + more_kv, new_group + more_group * (parts == 1)
    new |= dict(kv_heads=new_kv, heads=new_kv * new_group)
    return config(**old), config(**new)
