"""Trains one model at several widths or depths for a few steps, and measures how the size of activations follows.

The width is that of the residual stream, the depth the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flm_jax.config import ModelConfig
from flm_jax.loss import loss_sum
from flm_jax.model import Attention, Mlp, Params, Transformer, declared, init_params
from flm_jax.optimizer import OptimizerConfig, depth_mult, direction, width_mult

# What is measured besides the streams that the model itself records: the outputs of these, and the logits.
MEASURED = (Attention, Mlp, Transformer)
# Tokens of the texts that are learned: a walk over so many ids, each step one of a few.
IDS, BRANCHES = 61, 3


@dataclass(frozen=True)
class Check:
    """What is checked, and how.

    Attributes:
      model: at any width; the others keep its layers, the width of its heads, and the ratios of heads and MLP to width.
        At another depth everything else stays.
      optimizer: its rate is constant, without warm-up, schedule and clipping.
      widths: of the residual stream, two or more.
      depths: numbers of layers, two or more, which are checked in place of the widths; empty: the widths are checked.
      steps: of training.
      seeds: runs at each width; sizes are averaged.
      batch: windows per step.
      context: tokens per window.
      same_rate: whether matrices learn at the same rate at every width, which muP would not do.
      same_residual: whether the residual multiplier is the same at every depth, which CompleteP would not do.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    widths: Sequence[int] = (64, 128, 256, 512)
    depths: Sequence[int] = ()
    steps: int = 10
    seeds: int = 2
    batch: int = 8
    context: int = 32
    same_rate: bool = False
    same_residual: bool = False

    def __post_init__(self) -> None:
        given = self.depths or self.widths
        if len(set(given)) < 2 or len(set(given)) < len(given):
            raise ValueError(f"The {self.axis}s {', '.join(map(str, given))}: give two or more that differ.")
        if min(given) < 1:
            raise ValueError(f"The {self.axis}s {', '.join(map(str, given))}: each must be at least 1.")
        for size in given:
            self.model_at(size)

    @property
    def axis(self) -> str:
        """What is varied: width or depth."""
        return "depth" if self.depths else "width"

    @property
    def at(self) -> tuple[int, ...]:
        """The widths or depths, sorted."""
        return tuple(sorted(self.depths or self.widths))

    def model_at(self, size: int) -> ModelConfig:
        """The model at one width or depth.

        Raises:
          ValueError: as `widened`.
        """
        if not self.depths:
            return widened(self.model, size)
        constant = dict(residual_mult=self.model.effective_residual_mult, base_layers=None)
        return self.model.replace(layers=size, **(constant if self.same_residual else {}))


@dataclass(frozen=True)
class Found:
    """What a check has found.

    Attributes:
      at: the widths or depths as they were given, sorted.
      sizes: by kind of layer, the mean absolute size of its activations, [step][width or depth], from step 0 on.
      slopes: by kind, for each step, the slope of the size's logarithm over that of the width or depth: 0 is flat.
      axis: width or depth.
    """

    at: tuple[int, ...]
    sizes: Mapping[str, list[list[float]]]
    slopes: Mapping[str, list[float]] = field(default_factory=dict)
    axis: str = "width"

    def beyond(self, limit: float) -> dict[str, float]:
        """The kinds whose slope after the last step is more than `limit` away from 0, or is no number."""
        return {kind: each[-1] for kind, each in self.slopes.items() if not abs(each[-1]) <= limit}

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {f"{self.axis}s": list(self.at), "sizes": dict(self.sizes), "slopes": dict(self.slopes)}


def widened(model: ModelConfig, width: int) -> ModelConfig:
    """A model at another width, with heads as wide, and as many heads and an MLP as wide in proportion.

    Raises:
      ValueError: the width does not divide into whole heads; the message names one that does.
    """
    heads, kv_heads = (n * width / model.embed for n in (model.heads, model.k_heads))
    if not (heads.is_integer() and kv_heads.is_integer() and heads >= 1 and kv_heads >= 1):
        unit = model.embed // np.gcd(model.embed, np.gcd(model.heads, model.k_heads))
        raise ValueError(
            f"A width of {width} has no whole number of heads like those of the model ({model.heads} query and "
            f"{model.k_heads} key heads at {model.embed}): take a multiple of {unit}."
        )
    mlp = max(round(model.mlp * width / model.embed), 1)
    return model.replace(
        embed=width,
        heads=int(heads),
        kv_heads=int(kv_heads),
        head_dim=model.h_dim,
        mlp=mlp,
        norm_width=None,
    )


def walk(seed: int, step: int, rows: int, length: int) -> np.ndarray:
    """Texts that can be learned, int32 (rows, length + 1): each id follows from the one before, but for a choice."""
    rng = np.random.default_rng((seed, step))
    tokens = np.empty((rows, length + 1), np.int32)
    tokens[:, 0] = rng.integers(0, IDS, rows)
    for t in range(length):
        tokens[:, t + 1] = (7 * tokens[:, t] + 1 + 5 * rng.integers(0, BRANCHES, rows)) % IDS
    return tokens


def check(asked: Check, show: Callable[[int, Mapping[str, float]], None] = lambda *_: None) -> Found:
    """Trains the model at every width or depth and measures its activations before every step and after the last.

    Args:
      asked: what to check.
      show: called after each width or depth, with the sizes after the last step.
    """
    found: list[list[dict[str, float]]] = []
    for size in asked.at:
        runs = _run(asked, asked.model_at(size))
        found.append([_mean(each) for each in zip(*runs, strict=True)])
        show(size, found[-1][-1])
    kinds = found[0][0]
    sizes = {kind: [[steps[t][kind] for steps in found] for t in range(asked.steps + 1)] for kind in kinds}
    slopes = {kind: [slope(asked.at, each) for each in steps] for kind, steps in sizes.items()}
    return Found(asked.at, sizes, slopes, asked.axis)


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {kind: float(np.mean([each[kind] for each in found])) for kind in found[0]}


def slope(at: Sequence[int], sizes: Sequence[float]) -> float:
    """The slope of log(size) over log(width or depth), by least squares; NaN if a size is not a positive number."""
    if not all(np.isfinite(sizes)) or min(sizes) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(at), np.log(sizes), 1)[0])


def _run(asked: Check, cfg: ModelConfig) -> list[list[dict[str, float]]]:
    """For each seed and each step, the mean absolute size of each kind of activation."""
    cfg = cfg.for_comparison.replace(remat="none", vocab=max(cfg.vocab, IDS))
    signatures = declared(cfg)[1]
    # Without muP every width is a base width.
    base = cfg.sizes if asked.same_rate else cfg.base_sizes
    mults = jax.tree.map(lambda sig: width_mult(asked.optimizer, sig, cfg.sizes, base), signatures)
    eps_mults = jax.tree.map(lambda sig: depth_mult(sig, cfg), signatures)
    tx = direction(asked.optimizer, signatures, mults, eps_mults, cfg.compute)
    rate = asked.optimizer.learning_rate

    def sizes(params: Params, tokens_BT: jax.Array) -> dict[str, jax.Array]:
        _, state = Transformer(cfg).apply(
            {"params": params},
            tokens_BT,
            mutable=["intermediates"],
            capture_intermediates=lambda module, method: method == "__call__" and isinstance(module, MEASURED),
        )
        leaves = jax.tree_util.tree_leaves_with_path(state["intermediates"])
        return {_kind(path): jnp.mean(jnp.abs(leaf)) for path, leaf in leaves}

    @jax.jit
    def step(params: Params, state: Any, tokens_BT: jax.Array) -> tuple[Params, Any]:
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        ones, one_document = jnp.ones(inputs_BT.shape), jnp.zeros(inputs_BT.shape, jnp.int32)

        def loss(params: Params) -> jax.Array:
            return loss_sum(cfg, params, inputs_BT, targets_BT, ones, one_document) / inputs_BT.size

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), state

    initialise, measure = jax.jit(lambda key: init_params(cfg, key)), jax.jit(sizes)
    found = []
    for seed in range(asked.seeds):
        params = initialise(jax.random.key(seed))
        state, measured = tx.init(params), []
        probe = jnp.asarray(walk(seed, asked.steps, asked.batch, asked.context)[:, :-1])
        for number in range(asked.steps + 1):
            measured.append({kind: float(size) for kind, size in measure(params, probe).items()})
            if number < asked.steps:
                batch = jnp.asarray(walk(seed, number, asked.batch, asked.context))
                params, state = step(params, state, batch)
        found.append(measured)
    return found


def _kind(path: Any) -> str:
    """The kind of layer from the path of a recorded activation: its module, or the name under which it is recorded."""
    names = [str(part.key) for part in path if hasattr(part, "key")]
    if names[-1] != "__call__":
        return names[-1].rpartition("_")[0] or names[-1]
    return names[-2] if len(names) > 1 else "logits"
