"""Train-step throughput compared with a plain hand-written JAX step of the same shapes, on this machine.

  python benchmarks/step.py [--json=FILE]

The plain step is a minimal implementation without a framework: a dictionary of arrays, a scan over layers, AdamW by
hand, no signatures, no masks, no sharding. The two steps alternate within one run, so that other load on the machine
affects both. The main result is the median of the ratios of neighbouring steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
_ROUNDS = flags.DEFINE_integer("rounds", 30, "Number of timed steps of each implementation.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Windows per step.")
_CONTEXT = flags.DEFINE_integer("context", 128, "Tokens per window.")

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


def main(argv: list[str]) -> None:
    """Times both implementations for the three models of the small family."""
    del argv
    from flm_jax.config import small_1t, small_52b, small_102b
    from flm_jax.data.batches import Batch
    from flm_jax.optimizer import OptimizerConfig
    from flm_jax.recipe import Recipe, Stage, resolve
    from flm_jax.sharding import make_mesh
    from flm_jax.step import StageProgram

    rows = []
    mesh = make_mesh()
    rng = np.random.default_rng(0)
    for name, cfg in (("small_52b", small_52b()), ("small_102b", small_102b()), ("small_1t", small_1t())):
        stage = Stage(name, cfg, 1000, _BATCH.value, OptimizerConfig(learning_rate=LEARNING_RATE))
        program = StageProgram(resolve(Recipe(stages=(stage,)))[0], mesh, 1)
        tokens = rng.integers(0, cfg.vocab, (_BATCH.value, _CONTEXT.value + 1), dtype=np.int32)
        x, y = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
        segments = jnp.zeros_like(x)
        with jax.set_mesh(mesh):
            ours = program.initialiser()(jax.random.key(0))
            plain = plain_state(ours.params)
            step, by_hand = program.stepper(masked=False), plain_step(cfg)
            batch = Batch(x, y, jnp.ones(x.shape, jnp.float32), segments)
            losses: tuple[float, float] = (0.0, 0.0)
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(_ROUNDS.value + 2):
                since = time.perf_counter()
                ours, metrics = step(ours, batch)
                jax.block_until_ready(ours)
                between = time.perf_counter()
                plain, loss = by_hand(plain, (x, y, segments))
                jax.block_until_ready(plain)
                until = time.perf_counter()
                if turn == 0:
                    losses = float(metrics.loss), float(loss)
                elif turn > 1:
                    times[0].append(between - since)
                    times[1].append(until - between)
        assert abs(losses[0] - losses[1]) < 1e-4, f"not the same model: losses {losses}"
        a, b = (statistics.median(t) for t in times)
        tokens_a_step = _BATCH.value * _CONTEXT.value
        row = {
            "model": name,
            "flm_jax_tokens_per_s": tokens_a_step / a,
            "plain_tokens_per_s": tokens_a_step / b,
            "throughput_ratio": statistics.median(y / x for x, y in zip(*times, strict=True)),
        }
        rows.append(row)
        print(
            f"{name:<11} flm_jax {row['flm_jax_tokens_per_s']:>9,.0f} tokens/s   plain "
            f"{row['plain_tokens_per_s']:>9,.0f} tokens/s   ratio {row['throughput_ratio']:.3f}",
            flush=True,
        )
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
