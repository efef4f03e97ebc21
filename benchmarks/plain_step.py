"""The hand-written JAX train step that ours is compared with: one file, no framework.

A dictionary of arrays, a scan over layers, AdamW by hand with gradient clipping; no signatures, no masks, no
sharding, no metrics. It computes what the step of flm_jax computes, so that first losses from the same parameters
must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LEARNING_RATE, B1, B2, EPS, CLIP = 1e-3, 0.9, 0.95, 1e-8, 1.0


def plain_loss(cfg: Any, p: dict[str, Any], x_BT: jax.Array, y_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The mean loss of a batch, in nats per token, by the plain implementation."""
    time_T, half = jnp.arange(x_BT.shape[1]), cfg.head_dim // 2
    angles = time_T[:, None] * cfg.rope_theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    same = segments_BT[:, :, None] == segments_BT[:, None]
    mask = ((time_T[:, None] >= time_T[None])[None] & same)[:, None]

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + cfg.norm_eps) * scale

    def rope(x: jax.Array) -> jax.Array:
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def block(x: jax.Array, w: dict[str, Any]) -> tuple[jax.Array, None]:
        h = norm(x, w["norm1"])
        q, k, v = (jnp.einsum("btd,dnh->btnh", h, w[n]) for n in "qkv")
        scores = jnp.einsum("btnh,bsnh->bnts", rope(q), rope(k)) / cfg.head_dim**0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), -1)
        x = x + jnp.einsum("bnts,bsnh,nhd->btd", weights, v, w["o"])
        h = norm(x, w["norm2"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    x, _ = jax.lax.scan(block, p["embed"][x_BT], p["blocks"])
    logits = norm(x, p["norm"]) @ p["head"] * cfg.logits_mult
    chosen = jnp.take_along_axis(logits, y_BT[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def plain_step(cfg: Any) -> Callable[..., Any]:
    """The plain train step: AdamW with clipping, jitted with donation."""

    def step(state: Any, batch: Any) -> Any:
        p, m, v, t = state
        loss, g = jax.value_and_grad(lambda p: plain_loss(cfg, p, *batch))(p)
        size = jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(g)))
        g = jax.tree.map(lambda x: x * jnp.minimum(1.0, CLIP / size), g)
        m = jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, m, g)
        v = jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g * g, v, g)
        t = t + 1
        p = jax.tree.map(
            lambda p, m, v: p - LEARNING_RATE * (m / (1 - B1**t)) / (jnp.sqrt(v / (1 - B2**t)) + EPS), p, m, v
        )
        return (p, m, v, t), loss

    return jax.jit(step, donate_argnums=0)


def plain_state(params: Any) -> Any:
    """The plain implementation's state with the same parameters, in its own layout."""
    b = params["blocks"]
    attention, mlp = b["attention"], b["mlp"]
    blocks = {
        "norm1": b["attention_norm"]["scale"][:, None],
        "norm2": b["mlp_norm"]["scale"][:, None],
        **{short: attention[name] for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))},
        **{name: mlp[name] for name in ("gate", "up", "down")},
    }
    p = {
        "embed": params["embedding"],
        "head": params["head"],
        "norm": params["final_norm"]["scale"],
        "blocks": blocks,
    }
    p = jax.tree.map(jnp.array, p)
    return p, jax.tree.map(jnp.zeros_like, p), jax.tree.map(jnp.zeros_like, p), jnp.zeros(())
