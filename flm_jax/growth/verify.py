"""Compares a grown model with the model before: how far logits and layers differ, and where they first differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flm_jax.config import ModelConfig
from flm_jax.distributed import fetch
from flm_jax.growth.lineage import Lineage, lineage_of
from flm_jax.growth.plan import Growth
from flm_jax.model import Masks, Params, Transformer
from flm_jax.signature import Role


class GrowthError(RuntimeError):
    """A growth did not preserve the function, although its method promises to."""


@dataclass(frozen=True)
class Verification:
    """The measured difference between a model and what it grew into, at the growth, in float32.

    Attributes:
      preserving: whether the method promises to preserve the function.
      max_abs_logit_diff: largest absolute difference of a logit of the old vocabulary.
      max_rel_logit_diff: that, divided by the largest absolute logit before.
      layer_diffs: by layer of the grown model, how far its output differs on old entries and their copies from that of
        the old layer it corresponds to: the largest difference, divided by the largest output of the old layer.
    """

    preserving: bool
    max_abs_logit_diff: float
    max_rel_logit_diff: float
    layer_diffs: tuple[float, ...]

    def first_difference(self, tolerance: float) -> str:
        """Names the first layer in which the two models differ."""
        for layer, diff in enumerate(self.layer_diffs):
            if not diff <= tolerance:
                return f"layer {layer} of the grown model is the first that differs (relative {diff:.2e})"
        return "all layers agree; the difference arises in the final norm, the head or the logit multiplier"

    def fault(self, tolerance: float) -> str | None:
        """A sentence on what is wrong if the method promises preservation and the logits differ by more; else None."""
        if not self.preserving or self.max_rel_logit_diff <= tolerance:
            return None
        return (
            f"logits differ by {self.max_rel_logit_diff:.2e} relative, more than the tolerance of {tolerance:.0e}; "
            f"{self.first_difference(tolerance)} (parameters in fewer bits than float32 are rounded again wherever a "
            "growth scales them: they need a wider tolerance)"
        )

    def check(self, tolerance: float) -> None:
        """Raises `GrowthError` if there is a fault."""
        if fault := self.fault(tolerance):
            raise GrowthError(f"The grown model is not what its method promises: {fault}.")

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON-able data."""
        return {**asdict(self), "layer_diffs": list(self.layer_diffs)}


def forward(
    cfg: ModelConfig, params: Params, tokens_BT: jax.Array, segments_BT: jax.Array | None, masks: Masks | None
) -> tuple[jax.Array, jax.Array]:
    """Logits (B, T, V) and the output of every layer (L, B, T, D); without layers, the embedding's output alone."""
    (logits_BTV, _), state = Transformer(cfg).apply(
        {"params": params}, tokens_BT, segments_BT, masks, mutable=["intermediates"]
    )
    seen = state["intermediates"]
    return logits_BTV, seen["blocks"]["hidden_BTD"][0] if cfg.layers else seen["embedded_BTD"][0][None]


class Observed(NamedTuple):
    """Outputs of a model on some tokens: logits (B, T, V) and the output of every layer (L, B, T, D), see `forward`."""

    logits_BTV: jax.Array
    hidden_LBTD: jax.Array


def observe(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    masks: Masks | None = None,
) -> Observed:
    """Logits and layer outputs of a model, in float32 (float64 if the parameters are) and by the plain kernel."""
    # Accelerators round float32 products to fewer bits unless told not to.
    with jax.default_matmul_precision("highest"):
        return Observed(*_forward(cfg.for_comparison, params, tokens_BT, segments_BT, masks))


_forward = jax.jit(forward, static_argnums=0)


def compare(
    old: ModelConfig,
    old_params: Params,
    new: ModelConfig,
    new_params: Params,
    growth: Growth,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
) -> Verification:
    """Measures on some tokens what a growth changed.

    Args:
      old: the configuration before growth.
      old_params: its parameters.
      new: the configuration after growth, from `grown_config`.
      new_params: its parameters.
      growth: how the one grew into the other.
      tokens_BT: int32 token ids.
      segments_BT: int32, equal within a document.
    """
    lineage = lineage_of(old, new, growth)
    before = observe(old, old_params, tokens_BT, segments_BT)
    after = observe(new, new_params, tokens_BT, segments_BT, lineage.masks(0))
    return judge(lineage, before, after)


def judge(lineage: Lineage, before: Observed, after: Observed) -> Verification:
    """The verification of a growth from the outputs of both models; their parameters are no longer needed.

    Args:
      lineage: of the grown model.
      before: outputs of the model before growth on some tokens.
      after: outputs of the grown model on the same tokens, with its masks.
    """
    old, new, maps = lineage.before.cfg, lineage.cfg, lineage.maps

    # A fresh layer adds nothing yet: its output is that of the last old layer below it, or of the embedding.
    old_layer = np.arange(max(new.layers, 1))
    if "layers" in maps:
        span = maps["layers"].span
        old_layer = span.source[np.maximum.accumulate(np.where(span.fresh, 0, np.arange(new.layers)))]
    # Old entries, and copies, which hold a known multiple of their source.
    kept, source, scale = np.arange(new.embed), np.arange(new.embed), np.ones(new.embed)
    if "embed" in maps:
        span, rule = maps["embed"].span, maps["embed"].rules[Role.WRITER]
        kept = np.flatnonzero(~span.fresh | (rule.fill == "copy"))
        source, scale = span.source[kept], np.broadcast_to(rule.scale, span.new)[kept]

    @jax.jit
    def differences(a: jax.Array, b: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        absolute = jnp.max(jnp.abs(a - b[..., : old.vocab]))
        expected = x[old_layer][..., source] * jnp.asarray(scale, x.dtype)[None, None, None]
        found = y[..., kept]
        per_layer = jnp.max(jnp.abs(expected - found), axis=(1, 2, 3)) / jnp.max(jnp.abs(expected), axis=(1, 2, 3))
        return absolute, absolute / jnp.max(jnp.abs(a)), per_layer

    absolute, relative, per_layer = fetch(
        differences(before.logits_BTV, after.logits_BTV, before.hidden_LBTD, after.hidden_LBTD)
    )
    layers = tuple(float(x) for x in per_layer[: new.layers])
    return Verification(lineage.preserving, float(absolute), float(relative), layers)
