"""How parameters lie in the files of other programs: their names there, and their layout, which signatures decide.

A matrix is kept there as (written, read), both sides flat, a layer at a time; here it is as its signature says, read
axes first, all layers in one array. The token embedding, which is looked up and not multiplied by, is as it is here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.signature import Signature

# Their words for ours, wherever they stand in a path.
WORDS = {
    "embedding": "model.embed_tokens",
    "blocks": "model.layers.{layer}",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
_SQUARE = 256


@dataclass(frozen=True)
class Part:
    """One parameter; of a stacked one, any of its layers: both are alike but for the name.

    Attributes:
      path: its own.
      signature: its own.
      shape: here, of one layer.
      layers: how many there are; 0: it is not stacked.
      dtype: here.
    """

    path: str
    signature: Signature
    shape: tuple[int, ...]
    layers: int
    dtype: np.dtype

    @property
    def leads(self) -> list[tuple[int, ...]]:
        """The layers, each as the first index of the array; one empty index, if it is not stacked."""
        return [(layer,) for layer in range(self.layers)] or [()]

    @property
    def whole(self) -> tuple[int, ...]:
        """The array's shape."""
        return (*((self.layers,) if self.layers else ()), *self.shape)

    def name(self, lead: tuple[int, ...]) -> str:
        """What it is called there."""
        words = [word.removesuffix("_bias") for word in self.path.split("/") if word != "scale"]
        name = ".".join(WORDS.get(word, word) for word in words).format(layer=lead[0] if lead else "")
        return f"{name}.{'bias' if self.signature.is_bias else 'weight'}"

    @property
    def turned(self) -> bool:
        """Whether it is multiplied by, and so kept as (written, read)."""
        return bool(self.signature.reads) and "vocab" not in self.signature.reads

    @property
    def dim(self) -> int:
        """The dimension here, layers not counted, along which runs of their rows lie."""
        return len(self.signature.reads) if self.turned else 0

    @property
    def row_step(self) -> int:
        """How many of their rows one index along `dim` is."""
        return math.prod(self.shape[self.dim + 1 :]) if self.turned or self.signature.is_bias else 1

    @property
    def index_bytes(self) -> int:
        """Bytes here of one index along `dim`."""
        return math.prod(self.shape) // self.shape[self.dim] * self.dtype.itemsize

    @property
    def theirs(self) -> tuple[int, ...]:
        """The shape there."""
        if self.turned:
            return math.prod(self.shape[self.dim :]), math.prod(self.shape[: self.dim])
        return (math.prod(self.shape),) if self.signature.is_bias else self.shape

    def to_ours(self, rows: np.ndarray) -> np.ndarray:
        """A run of their rows as it lies here: whole along all dimensions but `dim`, contiguous if they are."""
        if not self.turned:
            return rows.reshape(-1, *self.shape[1:])
        out = np.empty(rows.shape[::-1], rows.dtype)
        _turn(rows, out)
        return out.reshape(*self.shape[: self.dim], -1, *self.shape[self.dim + 1 :])

    def to_theirs(self, block: np.ndarray, tensor: np.ndarray, first: int) -> None:
        """Writes a run of indices along the first dimension here to its place in the tensor there.

        Args:
          block: here; from index `first` of the first dimension, whole along the others.
          tensor: there, whole, in the dtype of the block.
          first: where the block begins.
        """
        if not self.turned:
            at = first * self.row_step
            rows = tensor[at : at + len(block) * self.row_step]
            rows[...] = block.reshape(rows.shape)
            return
        flat = block.reshape(math.prod(block.shape[: self.dim]), -1)
        at = first * (len(flat) // len(block))
        _turn(flat, tensor[:, at : at + len(flat)])


def _turn(matrix: np.ndarray, out: np.ndarray) -> None:
    """Writes the transpose, by squares: lines that are a power of two long would push each other out of the cache."""
    for i in range(0, matrix.shape[0], _SQUARE):
        for j in range(0, matrix.shape[1], _SQUARE):
            out[j : j + _SQUARE, i : i + _SQUARE] = matrix[i : i + _SQUARE, j : j + _SQUARE].T


def parts(cfg: ModelConfig) -> Iterator[Part]:
    """Every parameter of a model."""
    for path, like, signature in costs.leaves(cfg):
        stacked = signature.stacked
        yield Part(path, signature, like.shape[stacked:], like.shape[0] if stacked else 0, np.dtype(like.dtype))


def tensors(cfg: ModelConfig, dtype: np.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """All of a model's tensors there: name to shape and dtype, layer after layer as a forward pass meets them."""
    first: dict[str, jax.ShapeDtypeStruct] = {}
    last: dict[str, jax.ShapeDtypeStruct] = {}
    stacked = []
    for part in parts(cfg):
        like = jax.ShapeDtypeStruct(part.theirs, dtype)
        if part.layers:
            stacked.append((part, like))
        else:
            (first if "vocab" in part.signature.reads else last)[part.name(())] = like
    blocks = {part.name((layer,)): like for layer in range(cfg.layers) for part, like in stacked}
    return {**first, **blocks, **last}
