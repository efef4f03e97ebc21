"""The model's configuration, and the shapes of the Tele-FLM series.

`ModelConfig` holds everything that decides what the network computes. Training, data and growth have configurations of
their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import jax.numpy as jnp

from flm_jax.records import meant, recorded
from flm_jax.records.fields import Count, Limit, NonNegative, Positive, Size, at_least, between, one_of
from flm_jax.signature import STACK_AXIS, Role, Signature

REMAT_POLICIES = ("none", "dots", "products", "inner", "mlp", "full")
ATTENTION = ("plain", "cudnn", "splash", "auto")
Dtype = Annotated[str, one_of(("float32", "bfloat16", "float16", "float64"))]


@dataclass(frozen=True)
@recorded
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies, for contexts longer than those it was trained on (2407.21783).

    Fast pairs keep their frequency, slow pairs have it divided by `factor`, and pairs in between are interpolated.

    Attributes:
      factor: divides the frequencies of slow pairs.
      low_freq_factor: pairs with fewer turns than this over `original_context` are slow.
      high_freq_factor: pairs with more turns than this over `original_context` are fast.
      original_context: number of positions that the model was trained on before the scaling.
    """

    factor: Annotated[float, at_least(1)]
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_context: Size

    def __post_init__(self) -> None:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"{self}: low_freq_factor must be less than high_freq_factor.")


@dataclass(frozen=True)
@recorded
class ModelConfig:
    """A decoder of the Tele-FLM form: Llama's forward pass with an input and an output multiplier.

    The fields from `qkv_bias` to `rope_scaling`, `residual_mult` and `attention_mult` are for relatives of Llama (Qwen,
    Mistral, Granite); Tele-FLM uses none of them.

    Attributes:
      embed: width of the residual stream (D).
      layers: number of blocks (L). 0: the embedding, the final norm and the head alone, as a start to grow from.
      heads: query heads (N).
      mlp: width of the SwiGLU product (F).
      vocab: number of token ids, the embedding's rows (V).
      kv_heads: key and value heads (K); must divide `heads`. None: as many as `heads`.
      head_dim: width of one head (H), even. None: `embed / heads`.
      tied: whether the logits reuse the embedding; then there is no head parameter.
      norm_eps: added to the mean square in RMSNorm.
      norm_width: the number that RMSNorm divides the sum of squares by. None: `embed`. A growth by `zero` keeps the old
        width here, which makes it exact at any ratio: the new entries are zero and add nothing to the sum.
      head_width: the head width in the scores' scale, 1 / sqrt(head_width), and in the rotary frequencies. None:
        `head_dim`. A growth of `head_dim` keeps the old width here, so that old rotary pairs keep their frequencies.
      rope_theta: base of the rotary frequencies (half-split layout).
      qkv_bias: whether queries, keys and values have biases (Qwen2).
      qk_norm: whether RMSNorm is applied to each query and key head before its rotation (Qwen3).
      sliding_window: how many positions a query sees, its own included (Mistral); None: all positions up to its own.
      rope_scaling: scaling of the rotary frequencies for long contexts (Llama 3.1); None: no scaling.
      input_mult: multiplies the embedding's output.
      output_mult: multiplies the logits, before division by `embed / base_width`.
      residual_mult: multiplies what each block's attention and MLP add to the residual stream.
      base_layers: if given, `residual_mult` is multiplied by `base_layers / layers`, so that learning rates transfer
        over depth (CompleteP, 2505.01618), and so is AdamW's eps of the blocks' parameters. None: neither depends on
        the depth.
      attention_mult: multiplies the scores: attention_mult * q k / sqrt(head_width).
      base_width: width at which muP's multipliers are 1.
      init_std: standard deviation of matrix-like parameters at the base width; divided by the root of the width
        multiplier at other widths.
      init_std_vector: standard deviation of vector-like parameters (embedding, head), at every width.
      compute_dtype: dtype of activations. Norms, softmax and logits are at least float32.
      param_dtype: dtype of parameters.
      remat: what the backward pass recomputes. products: norms, SwiGLU and the like, but no product with a weight, and
        attention only as far as its kernel needs. none: the least, with the most memory; slower than products, which
        writes and reads less. dots: everything but products with weights, so attention too. inner: as products, and
        the attention's output projection. mlp: everything but the MLP's gate and up products. full: everything.
      attention: the kernel: plain, cudnn (NVIDIA GPUs, 16 bits), splash (TPUs), or auto (splash on TPUs if its blocks
        divide the window; cudnn on NVIDIA GPUs if it can compute what is asked and agrees with plain; otherwise plain).
      scan_unroll: layers per step of the scan over layers; the value of `layers` unrolls the scan completely.
    """

    embed: Size
    layers: Count
    heads: Size
    mlp: Size
    vocab: Size
    kv_heads: Size | None = None
    head_dim: Annotated[int, Limit("even and at least 2, for rotary pairs", lambda n: n >= 2 and n % 2 == 0)] | None = (
        None
    )
    tied: bool = False
    norm_eps: NonNegative = 1e-5
    norm_width: Positive | None = None
    head_width: Positive | None = None
    rope_theta: Positive = 10_000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: Size | None = None
    rope_scaling: RopeScaling | None = None
    input_mult: Positive = 1.0
    output_mult: Positive = 1.0
    residual_mult: Positive = 1.0
    base_layers: Size | None = None
    attention_mult: Annotated[float, between(1e-6, 1e6)] = 1.0
    base_width: Size = 256
    init_std: NonNegative = 0.024
    init_std_vector: NonNegative = 4e-3
    compute_dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    # What is recomputed, and how the scan is cut, changes rounding at most, as another mesh does: it may change.
    remat: Annotated[str, one_of(REMAT_POLICIES)] = field(default="products", metadata={"compared": False})
    attention: Annotated[str, one_of(ATTENTION)] = "plain"
    scan_unroll: Size = field(default=1, metadata={"compared": False})

    def __post_init__(self) -> None:
        if self.head_dim is None:
            if self.embed % self.heads:
                raise ValueError(
                    f"ModelConfig: embed={self.embed} is not divisible by heads={self.heads}; choose a width that is "
                    f"a multiple of {self.heads}, such as {max(round(self.embed / self.heads), 1) * self.heads}, or "
                    "give head_dim."
                )
            object.__setattr__(self, "head_dim", self.embed // self.heads)
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.heads % self.k_heads:
            raise ValueError(
                f"ModelConfig: kv_heads={self.kv_heads} must divide heads={self.heads}: every key head "
                "has the same number of query heads."
            )
        if self.h_dim % 2:  # embed / heads; a given one has been checked
            raise ValueError(f"ModelConfig: embed / heads = {self.h_dim} must be even, for rotary pairs.")

    @property
    def k_heads(self) -> int:
        """Number of key and value heads (`kv_heads`, resolved)."""
        assert self.kv_heads is not None
        return self.kv_heads

    @property
    def h_dim(self) -> int:
        """Width of one head (`head_dim`, resolved)."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size of every axis that a signature may name."""
        return {
            "embed": self.embed,
            "heads": self.heads,
            "kv_heads": self.k_heads,
            "head_dim": self.h_dim,
            "mlp": self.mlp,
            "vocab": self.vocab,
            "layers": self.layers,
        }

    @property
    def base_sizes(self) -> Mapping[str, float]:
        """Axis sizes of muP's base model: width `base_width`, as many heads as fill it, an MLP 8/3 times as wide."""
        heads = self.base_width / self.h_dim
        return {
            "embed": self.base_width,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": self.h_dim,
            "mlp": self.base_width * 8 / 3,
        }

    @property
    def effective_norm_width(self) -> float:
        """The number that RMSNorm divides the sum of squares by (`norm_width`, resolved)."""
        return float(self.embed if self.norm_width is None else self.norm_width)

    @property
    def effective_head_width(self) -> float:
        """The head width in the scores' scale and in the rotary frequencies (`head_width`, resolved)."""
        return float(self.h_dim if self.head_width is None else self.head_width)

    @property
    def scores_width(self) -> float:
        """The width w of scores q k / sqrt(w): `head_width`, with `attention_mult` in it."""
        return self.effective_head_width / self.attention_mult**2

    @property
    def depth_mult(self) -> float:
        """The part of the residual multiplier, and of AdamW's eps, that follows the depth; 1 without `base_layers`."""
        return 1.0 if self.base_layers is None else self.base_layers / max(self.layers, 1)

    @property
    def effective_residual_mult(self) -> float:
        """The number that what a block adds to the residual stream is multiplied by."""
        return self.residual_mult * self.depth_mult

    @property
    def logits_mult(self) -> float:
        """The number that logits are multiplied by: 0.03125 for Tele-FLM-52B, 0.025 for Tele-FLM-1T."""
        return self.output_mult * self.base_width / self.embed

    @property
    def compute(self) -> jnp.dtype:
        """`compute_dtype` as a dtype."""
        return jnp.dtype(self.compute_dtype)

    @property
    def for_comparison(self) -> ModelConfig:
        """The same model computed in at least float32, with the plain kernel, since not all kernels take float32."""
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        return self.replace(compute_dtype=str(wide), attention="plain")

    def forward_mult(self, signature: Signature) -> float:
        """The constant that the forward pass multiplies this parameter's product by."""
        if "vocab" in signature.reads:
            return self.input_mult
        if signature.stacked and signature.role(STACK_AXIS) is Role.WRITER:
            return self.effective_residual_mult
        return self.logits_mult if "vocab" in signature.writes else 1.0

    def std(self, signature: Signature) -> float:
        """Initial standard deviation (Tele-FLM, 2404.16645, Table 4: 4.242e-3 at 52B is 0.024 at the base width)."""
        if signature.is_bias:
            return 0.0
        if not signature.is_matrix_like:
            return self.init_std_vector
        return self.init_std / signature.width_mult(self.sizes, self.base_sizes) ** 0.5

    def replace(self, **changes: object) -> ModelConfig:
        """This configuration with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def changed(self, changes: Mapping[str, Any]) -> ModelConfig:
        """This configuration with the fields of `changes` replaced.

        If `heads` changes and `kv_heads` is not given, the number of query heads per key head stays.

        Raises:
          ValueError: there is no such field, or the values do not fit.
        """
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            near = meant(unknown[0], known) or "."
            raise ValueError(f"A model has no field {', '.join(unknown)}; its fields are {', '.join(known)}{near}")
        heads, group = changes.get("heads", self.heads), self.heads // self.k_heads
        follow = {"kv_heads": heads // group} if heads != self.heads and heads % group == 0 else {}
        return self.replace(**{**follow, **changes})


def tele_flm_52b(remat: str = "full", attention: str = "auto") -> ModelConfig:
    """Tele-FLM-52B (2404.16645, Tables 3 and 4; read in the paper). 52.85 B parameters.

    The vocabulary is the padded one (81,920; the tokenizer has 80,000 entries): the parameter count confirms it.
    """
    return ModelConfig(embed=8192, layers=64, heads=64, mlp=21_824, vocab=81_920, remat=remat, attention=attention)


def tele_flm_102b(remat: str = "full", attention: str = "auto") -> ModelConfig:
    """The 102B stage of 2407.02783. 102.24 B parameters.

    The shape is recalled and agrees with the published size; no released configuration confirms it. Its output
    multiplier is not public: with 1.0 the effective one is 0.025, the value of the released 1T stage.
    """
    return ModelConfig(embed=10_240, layers=80, heads=80, mlp=27_264, vocab=81_920, remat=remat, attention=attention)


def tele_flm_1t(remat: str = "full", attention: str = "auto") -> ModelConfig:
    """Tele-FLM-1T (shape and effective multiplier 0.025 from the released configuration). 1,083.8 B parameters."""
    shape: dict[str, Any] = dict(embed=20_480, layers=140, heads=160, mlp=98_304, vocab=81_920)
    return ModelConfig(**shape, output_mult=2.0, remat=remat, attention=attention)


def _small(embed: int, layers: int, mlp: int, vocab: int) -> ModelConfig:
    # Head width and base width shrink with the model, so that muP's multipliers keep the order they have at full size.
    return ModelConfig(
        embed=embed,
        layers=layers,
        heads=embed // 16,
        mlp=mlp,
        vocab=vocab,
        base_width=16,
        init_std=0.25,
        init_std_vector=0.02,
        compute_dtype="float32",
    )


def small_52b(vocab: int = 2048) -> ModelConfig:
    """Tele-FLM-52B scaled down for one laptop: layers / 16, width / 128, the MLP 2.7 times as wide as the model."""
    return _small(64, 4, 172, vocab)


def small_102b(vocab: int = 2048) -> ModelConfig:
    """Tele-FLM-102B scaled down: 1.25 times as wide and as deep as `small_52b`."""
    return _small(80, 5, 216, vocab)


def small_1t(vocab: int = 2048) -> ModelConfig:
    """Tele-FLM-1T scaled down: 2.5 times as wide as `small_52b`, 9 layers (8.75 rounded), the MLP 4.8 times as wide."""
    return _small(160, 9, 768, vocab)
