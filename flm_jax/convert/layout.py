"""Names and layout of parameters in Hugging Face files, derived from signatures.

In those files a matrix has the shape (written, read), with the axes of each side flattened, and each layer has a tensor
of its own. In our checkpoints a matrix has the axes of its signature, read axes first, and all layers are one array.
The token embedding, which is looked up and not multiplied, has the same layout in both. In this module "theirs" means
the layout in those files, and "ours" the layout in our checkpoints.
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

# Their names for the parts of our parameter paths.
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
    """One parameter, with its layout in one layer, which is the same for all layers.

    Attributes:
      path: its path in our parameter tree.
      signature: its signature.
      shape: our shape of one layer.
      layers: number of layers; 0: the parameter is not stacked.
      dtype: our dtype.
    """

    path: str
    signature: Signature
    shape: tuple[int, ...]
    layers: int
    dtype: np.dtype

    @property
    def leads(self) -> list[tuple[int, ...]]:
        """The index of each layer in our array, as a tuple; one empty tuple if the parameter is not stacked."""
        return [(layer,) for layer in range(self.layers)] or [()]

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of our array, all layers included."""
        return (*((self.layers,) if self.layers else ()), *self.shape)

    def name(self, lead: tuple[int, ...]) -> str:
        """Their name of the tensor of one layer."""
        words = [word.removesuffix("_bias") for word in self.path.split("/") if word != "scale"]
        name = ".".join(WORDS.get(word, word) for word in words).format(layer=lead[0] if lead else "")
        return f"{name}.{'bias' if self.signature.is_bias else 'weight'}"

    @property
    def turned(self) -> bool:
        """Whether it is a matrix that activations are multiplied by, which they store transposed: (written, read)."""
        return bool(self.signature.reads) and "vocab" not in self.signature.reads

    @property
    def dim(self) -> int:
        """Our dimension, not counting layers, that corresponds to their rows."""
        return len(self.signature.reads) if self.turned else 0

    @property
    def row_step(self) -> int:
        """The number of their rows per index along `dim`."""
        return math.prod(self.shape[self.dim + 1 :]) if self.turned or self.signature.is_bias else 1

    @property
    def index_bytes(self) -> int:
        """Our bytes per index along `dim`, in one layer."""
        return math.prod(self.shape) // self.shape[self.dim] * self.dtype.itemsize

    @property
    def theirs(self) -> tuple[int, ...]:
        """Their shape of the tensor of one layer."""
        if self.turned:
            return math.prod(self.shape[self.dim :]), math.prod(self.shape[: self.dim])
        return (math.prod(self.shape),) if self.signature.is_bias else self.shape

    def to_ours(self, rows: np.ndarray) -> np.ndarray:
        """A range of their rows in our layout: whole along all dimensions except `dim`; contiguous if `rows` is."""
        if not self.turned:
            return rows.reshape(-1, *self.shape[1:])
        out = np.empty(rows.shape[::-1], rows.dtype)
        _turn(rows, out)
        return out.reshape(*self.shape[: self.dim], -1, *self.shape[self.dim + 1 :])

    def to_theirs(self, block: np.ndarray, tensor: np.ndarray, first: int) -> None:
        """Writes a range of our first dimension to its place in their tensor.

        Args:
          block: ours; from index `first` of the first dimension, whole along the others.
          tensor: theirs; the whole tensor, in the dtype of the block.
          first: index of the block's first entry along the first dimension.
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
    """Writes the transpose into `out`, in square blocks.

    Without blocks, rows whose length is a power of two map to the same cache sets and evict each other.
    """
    for i in range(0, matrix.shape[0], _SQUARE):
        for j in range(0, matrix.shape[1], _SQUARE):
            out[j : j + _SQUARE, i : i + _SQUARE] = matrix[i : i + _SQUARE, j : j + _SQUARE].T


def parts(cfg: ModelConfig) -> Iterator[Part]:
    """The `Part` of every parameter of a model."""
    for path, like, signature in costs.leaves(cfg):
        stacked = signature.stacked
        yield Part(path, signature, like.shape[stacked:], like.shape[0] if stacked else 0, np.dtype(like.dtype))


def tensors(cfg: ModelConfig, dtype: np.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of all tensors in their files, by name, in the order of the forward pass."""
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
