"""The decoder as Flax Linen modules: the forward pass of Tele-FLM (2404.16645, section 2; 2407.02783).

Pre-norm blocks of attention with rotary positions and SwiGLU, RMSNorm, a final norm, no biases, an input multiplier on
the embedding and an output multiplier on the logits. Llama, Mistral, Qwen2, Qwen3 and Granite differ from it only by
fields of `ModelConfig`. Growth masks are applied in this module and nowhere else.

Shapes: B batch, T time, D embed, N heads, K kv_heads, H head_dim, F mlp, L layers, V vocab.
"""

from __future__ import annotations

import contextvars
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from flm_jax.attention import (
    Cache,
    Seen,
    append,
    attend,
    attend_cached,
    cached_mask,
    rotary_frequencies,
    rotary_tables,
    rotate,
    see,
)
from flm_jax.config import ModelConfig
from flm_jax.kernels import ATTENDED
from flm_jax.kernels.products import product, recomputed
from flm_jax.kernels.table import look_up
from flm_jax.sharding import constrain
from flm_jax.signature import Declared, Signature, draw

Params = Any
# The parameters of each block, apart.
Layers = tuple[Params, ...]

# Whether a model is traced for the shapes of its parameters: their draws are three quarters of that trace.
_SHAPES_ALONE = contextvars.ContextVar("_SHAPES_ALONE", default=False)


class Masks(NamedTuple):
    """Growth masks (MSG, 2305.02869): 1 on old entries, a ramp from 0 to 1 on new ones; None if an axis has no mask.

    Attributes:
      embed_D: applied to everything that is written into the residual stream, and in its norms.
      norm_width: (), the number that norms divide by while `embed_D` ramps.
      heads_N: applied to the outputs of heads.
      head_dim_H: applied to queries and to the outputs of heads.
      mlp_F: applied to the SwiGLU product.
      layers_L: applied to whole blocks: y = x + m (block(x) - x).
    """

    embed_D: jax.Array | None = None
    norm_width: jax.Array | None = None
    heads_N: jax.Array | None = None
    head_dim_H: jax.Array | None = None
    mlp_F: jax.Array | None = None
    layers_L: jax.Array | None = None


class Shared(NamedTuple):
    """The inputs that all blocks share, besides the residual stream."""

    rotary: tuple[jax.Array, jax.Array]
    seen: Seen
    masks: Masks


# Rank promotion is an error in the tests, so all broadcasting goes through the next two functions.
def scaled_by_axis(x: jax.Array, last: jax.Array) -> jax.Array:
    """`x` times `last`, which has the shape of the last axes of `x`, in the dtype of `x`."""
    return x * jnp.expand_dims(last.astype(x.dtype), range(x.ndim - last.ndim))


def plus(x: jax.Array, last: jax.Array) -> jax.Array:
    """`x` plus `last`, a bias with the shape of the last axes of `x`."""
    return x + jnp.expand_dims(last, range(x.ndim - last.ndim))


def masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` times a growth mask with the shape of its last axes; `x` itself if there is no mask."""
    return x if mask is None else scaled_by_axis(x, mask)


def parameter(module: nn.Module, cfg: ModelConfig, name: str, text: str) -> jax.Array:
    """Declares a parameter by its signature `text` and returns it in the compute dtype (a gain: at least float32)."""
    signature = Signature.parse(text)
    shape, dtype = signature.shape(cfg.sizes), jnp.dtype(cfg.param_dtype)
    # Of a parameter that exists, Flax compares the shape with what `init` would give.
    shape_alone = _SHAPES_ALONE.get() or module.has_variable("params", name)

    def init(key: jax.Array) -> Declared:
        drawn = functools.partial(draw, signature, key, shape, std=cfg.std(signature), dtype=dtype)
        return Declared(jnp.zeros(shape, dtype) if shape_alone else drawn(), signature)

    value: Any = module.param(name, init)
    return value.astype(jnp.promote_types(cfg.compute, jnp.float32) if signature.gains else cfg.compute)


def normalised(x: jax.Array, width: Any, eps: float, mask: jax.Array | None) -> jax.Array:
    """The normalised `x`: x * rsqrt(sum(m x^2) / width + eps) over the last axis; m is the mask, 1 without one."""
    square = jnp.sum(masked(x * x, mask), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square / width + eps)


def multiplied(x: jax.Array, by: float) -> jax.Array:
    """`x` times a constant, which 16 bits would round, in at least float32; `x` itself if that is 1."""
    return x if by == 1 else (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * by).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm: x * rsqrt(sum(x^2) / width + eps) * scale, computed in at least float32."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, masks: Masks) -> jax.Array:
        """(B, T, D) -> (B, T, D); with a mask m: x * rsqrt(sum(m x^2) / width + eps) * scale * m."""
        scale_D, cfg = parameter(self, self.cfg, "scale", "embed"), self.cfg

        @recomputed
        def norm(x_BTD: jax.Array, scale_D: jax.Array, masks: Masks) -> jax.Array:
            x = x_BTD.astype(scale_D.dtype)
            width = cfg.effective_norm_width if masks.norm_width is None else masks.norm_width.astype(x.dtype)
            y = masked(normalised(x, width, cfg.norm_eps, masks.embed_D), masks.embed_D)
            return scaled_by_axis(y, scale_D).astype(x_BTD.dtype)

        return constrain(norm(x_BTD, scale_D, masks), "batch", "time", "residual")


class HeadNorm(nn.Module):
    """RMSNorm of each head, with one scale for all heads, computed in at least float32 (Qwen3, 2505.09388)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTNH: jax.Array, masks: Masks) -> jax.Array:
        """(B, T, N, H) -> (B, T, N, H); with a mask, the mean square is weighted: sum(m x^2) / sum(m)."""
        scale_H = parameter(self, self.cfg, "scale", "head_dim")
        x, mask_H = x_BTNH.astype(scale_H.dtype), masks.head_dim_H
        width = float(self.cfg.h_dim) if mask_H is None else jnp.sum(mask_H.astype(x.dtype))
        return scaled_by_axis(normalised(x, width, self.cfg.norm_eps, mask_H), scale_H).astype(x_BTNH.dtype)


class Attention(nn.Module):
    """Causal attention within the documents of a window; grouped-query attention if `kv_heads` < `heads`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, cache: Cache | None, layer: jax.Array | None, shared: Shared
    ) -> tuple[jax.Array, Cache | None]:
        """(B, T, D) -> (B, T, D), and the cache with the keys and values of these positions in this layer, or None."""
        cfg = self.cfg
        q_BTNH = product("BTD,DNH->BTNH", x_BTD, parameter(self, cfg, "query", "embed -> heads head_dim"))
        k_BSKH = product("BTD,DKH->BTKH", x_BTD, parameter(self, cfg, "key", "embed -> kv_heads head_dim*"))
        v_BSKH = product("BTD,DKH->BTKH", x_BTD, parameter(self, cfg, "value", "embed -> kv_heads head_dim"))
        if cfg.qkv_bias:
            q_BTNH = plus(q_BTNH, parameter(self, cfg, "query_bias", "-> heads head_dim"))
            k_BSKH = plus(k_BSKH, parameter(self, cfg, "key_bias", "-> kv_heads head_dim*"))
            v_BSKH = plus(v_BSKH, parameter(self, cfg, "value_bias", "-> kv_heads head_dim"))
        v_BSKH = checkpoint_name(v_BSKH, "value")
        if cfg.qk_norm:
            # The gradient of a norm needs what was normalised, and that of the rotation alone needs nothing.
            q_BTNH, k_BSKH = checkpoint_name(q_BTNH, "query"), checkpoint_name(k_BSKH, "key")
            q_BTNH = HeadNorm(cfg, name="query_norm")(q_BTNH, shared.masks)
            k_BSKH = HeadNorm(cfg, name="key_norm")(k_BSKH, shared.masks)
        q_BTNH = masked(rotate(q_BTNH, shared.rotary), shared.masks.head_dim_H)
        q_BTNH = constrain(q_BTNH, "batch", "time", "heads", "head_dim")
        k_BSKH = constrain(rotate(k_BSKH, shared.rotary), "batch", "time", "kv_heads", "head_dim")
        if not cfg.qk_norm:
            q_BTNH, k_BSKH = checkpoint_name(q_BTNH, "query"), checkpoint_name(k_BSKH, "key")
        if cache is None or layer is None:
            o_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, shared.seen, cfg.scores_width, cfg.attention, cfg.sliding_window)
        else:
            cache = append(cache, layer, k_BSKH, v_BSKH)
            o_BTNH = attend_cached(q_BTNH, cache, layer, shared.seen, cfg.scores_width)
        o_BTNH = masked(o_BTNH, shared.masks.head_dim_H)
        if shared.masks.heads_N is not None:
            o_BTNH = masked(o_BTNH, shared.masks.heads_N[:, None])
        y_BTD = product("BTNH,NHD->BTD", o_BTNH, parameter(self, cfg, "out", "heads head_dim -> embed"))
        return constrain(masked(y_BTD, shared.masks.embed_D), "batch", "stream", "residual"), cache


@recomputed
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """The SwiGLU product, silu(gate) * up."""
    return jax.nn.silu(gate) * up


class Mlp(nn.Module):
    """SwiGLU (2002.05202): down(silu(gate x) * up x)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, masks: Masks) -> jax.Array:
        """(B, T, D) -> (B, T, D)."""
        gate_BTF = product("BTD,DF->BTF", x_BTD, parameter(self, self.cfg, "gate", "embed -> mlp"))
        up_BTF = product("BTD,DF->BTF", x_BTD, parameter(self, self.cfg, "up", "embed -> mlp"))
        gate_BTF, up_BTF = checkpoint_name(gate_BTF, "gate"), checkpoint_name(up_BTF, "up")
        h_BTF = constrain(masked(swiglu(gate_BTF, up_BTF), masks.mlp_F), "batch", "time", "mlp")
        y_BTD = product("BTF,FD->BTD", h_BTF, parameter(self, self.cfg, "down", "mlp -> embed"))
        return constrain(masked(y_BTD, masks.embed_D), "batch", "stream", "residual")


class Block(nn.Module):
    """One pre-norm block: x + r attention(norm(x)), then + r mlp(norm(.)), with the residual multiplier r."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, Cache | None], layer_mask: Any, layer: Any, shared: Shared
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        """One step over layers: a scan carries the residual stream and the cache; masks and index are the layer's."""
        x_BTD, cache = carry
        attended_BTD, cache = Attention(self.cfg, name="attention")(
            RMSNorm(self.cfg, name="attention_norm")(x_BTD, shared.masks), cache, layer, shared
        )
        r = self.cfg.effective_residual_mult
        y_BTD = checkpoint_name(x_BTD + multiplied(attended_BTD, r), "stream")
        mlp_BTD = Mlp(self.cfg, name="mlp")(RMSNorm(self.cfg, name="mlp_norm")(y_BTD, shared.masks), shared.masks)
        y_BTD = y_BTD + multiplied(mlp_BTD, r)
        if layer_mask is not None:
            # Old layers have mask 1 and take the block's output unchanged; the formula would round it once more.
            m = layer_mask.astype(y_BTD.dtype)
            y_BTD = jnp.where(m < 1, x_BTD + m * (y_BTD - x_BTD), y_BTD)
        y_BTD = constrain(y_BTD, "batch", "stream", "residual")
        self.sow("intermediates", "hidden_BTD", y_BTD)
        return (y_BTD, cache), None


# The products that each remat policy saves for the backward pass, by their checkpoint names; the rest is recomputed.
SAVED = {
    "full": (),
    "mlp": ("gate", "up"),
    "inner": ("query", "key", "value", ATTENDED, "gate", "up"),
    "products": ("query", "key", "value", ATTENDED, "gate", "up", "stream"),
}


def remat_policy(remat: str) -> Any:
    """The `jax.checkpoint` policy of a block for a value of `ModelConfig.remat` other than none."""
    if remat == "dots":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint_policies.save_only_these_names(*SAVED[remat])


class Transformer(nn.Module):
    """The decoder; calling it applies `hidden`, then `logits`."""

    cfg: ModelConfig

    def setup(self) -> None:
        """Declares the embedding, the stacked blocks, the final norm and the head."""
        cfg = self.cfg
        self.embedding_VD = parameter(self, cfg, "embedding", "vocab -> embed")
        # Without a loop (XLA also inlines one of a single iteration) what is computed again would be merged and kept.
        merged, remat = cfg.layers < 2 * cfg.scan_unroll, cfg.remat != "none"
        block = nn.remat(Block, policy=remat_policy(cfg.remat), prevent_cse=merged) if remat else Block
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),
            length=cfg.layers,
            unroll=cfg.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg)
        self.final_norm = RMSNorm(cfg)
        if not cfg.tied:
            self.head_DV = parameter(self, cfg, "head", "embed -> vocab")

    def hidden(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        masks: Masks | None = None,
        cache: Cache | None = None,
        positions_BT: jax.Array | None = None,
        layers: Layers | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The residual stream after the final norm, (B, T, D), and the cache, extended by T positions.

        Args:
          tokens_BT: int32 token ids.
          segments_BT: int32, equal within a document; None: one document per row. Ignored if there is a cache.
          masks: growth masks; with None, the compiled program contains no masks.
          cache: keys and values of the earlier positions; None: these positions are the first.
          positions_BT: int32, what heads are rotated by; None: 0 to T - 1 in each row. Ignored if there is a cache.
          layers: the parameters of each block, which are then applied without a loop in the place of the stacked ones;
            no `intermediates` of blocks are kept.

        Raises:
          ValueError: `layers` are not as many as the model has.
        """
        cfg, masks = self.cfg, masks or Masks()
        if layers is not None and len(layers) != cfg.layers:
            raise ValueError(f"Parameters of {len(layers)} layers were given to a model with {cfg.layers}.")
        time = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
        layers_L = None
        if cache is None:
            positions, seen = time if positions_BT is None else positions_BT, see(cfg, tokens_BT.shape, segments_BT)
        else:
            layers_L, slots = jnp.arange(cfg.layers, dtype=jnp.int32), time + cache.length
            positions, seen = slots, Seen(cached_mask(cache, slots, cfg.sliding_window))
            if cache.start_B is not None:
                positions = slots - cache.start_B[:, None]
        rotary = rotary_tables(positions, rotary_frequencies(cfg))
        x_BTD = masked(look_up(self.embedding_VD, tokens_BT) * cfg.input_mult, masks.embed_D)
        x_BTD = constrain(x_BTD, "batch", "stream", "residual")
        self.sow("intermediates", "embedded_BTD", x_BTD)
        shared = Shared(rotary, seen, masks)
        if layers is not None:
            for index, own in enumerate(layers):
                of_layer = jax.tree.map(lambda x_L, at=index: x_L[at], (masks.layers_L, layers_L))
                (x_BTD, cache), _ = Block(cfg, parent=None).apply({"params": own}, (x_BTD, cache), *of_layer, shared)
        # A block is traced even where there is none, and cannot write into a cache without layers.
        elif cfg.layers or cache is None:
            (x_BTD, cache), _ = self.blocks((x_BTD, cache), masks.layers_L, layers_L, shared)
        if cache is not None:
            cache = cache._replace(length=cache.length + tokens_BT.shape[1])
        return self.final_norm(x_BTD, masks), cache

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Logits (B, T, V) of hidden states, in at least float32."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        if self.cfg.tied:
            return product("BTD,VD->BTV", x_BTD, self.embedding_VD, wide) * self.cfg.logits_mult
        return product("BTD,DV->BTV", x_BTD, self.head_DV, wide) * self.cfg.logits_mult

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        masks: Masks | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Logits (B, T, V) and the extended cache; arguments as for `hidden`."""
        x_BTD, cache = self.hidden(tokens_BT, segments_BT, masks, cache)
        return self.logits(x_BTD), cache


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Initial parameters, each with its signature (`Declared`); for a large model, jit it with output shardings."""
    # Parameters do not depend on the attention kernel, and this machine may not support the configured one.
    return Transformer(cfg.replace(attention="plain")).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Initial parameters as a plain tree of arrays."""
    return meta.unbox(init(cfg, key))


def declared(cfg: ModelConfig) -> tuple[Params, Params]:
    """The trees of shapes (`jax.ShapeDtypeStruct`) and signatures of all parameters; no array is allocated."""
    return _declared(cfg, jax.config.read("jax_enable_x64"))


@functools.lru_cache(maxsize=128)
def _declared(cfg: ModelConfig, x64: bool) -> tuple[Params, Params]:
    """`declared`, remembered: tracing a model takes a tenth of a second. Without x64, float64 becomes float32."""
    del x64
    alone = contextvars.copy_context()
    alone.run(_SHAPES_ALONE.set, True)
    boxed = alone.run(jax.eval_shape, lambda: init(cfg, jax.random.key(0)))
    signatures = jax.tree.map(lambda box: box.signature, boxed, is_leaf=lambda x: isinstance(x, Declared))
    return meta.unbox(boxed), signatures


def apply(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    masks: Masks | None = None,
) -> jax.Array:
    """Logits (B, T, V) of token ids (B, T); arguments as for `Transformer.hidden`."""
    return Transformer(cfg).apply({"params": params}, tokens_BT, segments_BT, masks)[0]
