"""The signature of a parameter: which axes it reads and which axes it writes.

Every parameter is declared with one line: ``embed -> heads head_dim`` for the query projection, ``embed`` for the scale
of a norm, ``vocab -> embed`` for the token embedding. That line alone determines its shape, its initial standard
deviation, its muP class (and with it learning rate and weight decay), its sharding, and how it grows. Code that treats
parameters differently asks their signatures; there is no table of parameter names.

The width of the residual stream has two names. In parameters it is ``embed``, in activations ``residual``. The size is
the same, the sharding is not: parameters are split over the mesh axis ``fsdp`` along ``embed``, while activations are
already split over ``fsdp`` along ``batch``, so their width must stay whole (`flm_jax.sharding.RULES`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from flm_jax.counter_rng import truncated_normal

Sizes = Mapping[str, float]


class Kind(enum.Enum):
    """The function of an axis in the network; it decides how the axis can grow without changing the output."""

    RESIDUAL = "residual"  # the residual stream, which blocks write into and read through a norm
    INNER = "inner"  # between a writer and a reader inside one block
    PAIRED = "paired"  # inner, and rotated in pairs; the frequency of a pair depends on its position
    STACK = "stack"  # the sequence of blocks
    OUTSIDE = "outside"  # fixed by the data


KINDS: Mapping[str, Kind] = {
    "embed": Kind.RESIDUAL,
    "heads": Kind.INNER,
    "kv_heads": Kind.INNER,
    "head_dim": Kind.PAIRED,
    "mlp": Kind.INNER,
    "layers": Kind.STACK,
    "vocab": Kind.OUTSIDE,
}

STACK_AXIS = "layers"
# The part of a block that has an inner axis; an axis that is not named here is a part of its own.
PARTS: Mapping[str, str] = {"heads": "attention", "kv_heads": "attention", "head_dim": "attention", "mlp": "mlp"}


class Role(enum.Enum):
    """What a parameter does on one of its axes."""

    READER = "reader"
    WRITER = "writer"
    GAIN = "gain"


@dataclass(frozen=True)
class Signature:
    """The axes that one parameter reads, writes or scales.

    Attributes:
      reads: axes that it contracts over.
      writes: axes that it produces.
      gains: axes that it multiplies entry by entry; a parameter with gains neither reads nor writes.
      stacked: whether it has one slice per layer, on its first dimension.
      contracted: written axes along which its product is later contracted with the product of another parameter, and
        along which it counts as the reader. An attention score contracts `head_dim` of queries and keys: the query
        writes its entries, the key reads them.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    gains: tuple[str, ...] = ()
    stacked: bool = False
    contracted: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Parses ``"embed -> heads head_dim"``, ``"embed"`` (a gain), or ``"layers: embed -> mlp"`` (stacked).

        A parameter that reads nothing, as in ``"-> heads head_dim"``, is a bias. A star marks an axis of `contracted`:
        ``"embed -> kv_heads head_dim*"`` for keys.

        Raises:
          ValueError: an axis has no entry in `KINDS`, or the arrow is misplaced.
        """
        body, stacked = text, False
        if ":" in text:
            prefix, body = text.split(":", 1)
            if prefix.strip() != STACK_AXIS:
                raise ValueError(f"Signature {text!r}: only {STACK_AXIS!r} may stand before a colon.")
            stacked = True
        sides = [tuple(side.split()) for side in body.split("->")]
        contracted = frozenset(axis[:-1] for axis in sides[-1] if axis.endswith("*") and len(sides) == 2)
        sides[-1] = tuple(axis.removesuffix("*") if axis[:-1] in contracted else axis for axis in sides[-1])
        if len(sides) > 2 or not sides[-1]:
            raise ValueError(
                f"Signature {text!r}: expected 'reads -> writes', axis names alone for a gain, '-> writes' for a bias."
            )
        for axis in (axis for side in sides for axis in side):
            if axis not in KINDS or KINDS[axis] is Kind.STACK:
                known = ", ".join(name for name, kind in KINDS.items() if kind is not Kind.STACK)
                raise ValueError(f"Signature {text!r}: unknown axis {axis!r}; known axes are {known}.")
        if len(sides) == 1:
            return cls(gains=sides[0], stacked=stacked)
        return cls(reads=sides[0], writes=sides[1], stacked=stacked, contracted=contracted)

    def __str__(self) -> str:
        writes = (f"{axis}*" if axis in self.contracted else axis for axis in self.writes)
        body = " ".join(self.gains) if self.gains else f"{' '.join(self.reads)} -> {' '.join(writes)}".lstrip()
        return f"{STACK_AXIS}: {body}" if self.stacked else body

    def stack(self, stacked: bool = True) -> Signature:
        """The signature of this parameter with (or without) one slice per layer."""
        return replace(self, stacked=stacked)

    @property
    def axes(self) -> tuple[str, ...]:
        """Axis names in the order of the array's dimensions."""
        return (*((STACK_AXIS,) if self.stacked else ()), *self.gains, *self.reads, *self.writes)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The array's shape for these axis sizes."""
        return tuple(sizes[axis] for axis in self.axes)

    def role(self, axis: str) -> Role:
        """The parameter's role on `axis`.

        Along the stack a parameter is a writer if it writes the residual stream: setting those slices to zero, and no
        others, makes a new layer the identity.
        """
        if self.gains:
            return Role.GAIN
        if KINDS[axis] is Kind.STACK:
            return Role.WRITER if any(KINDS[a] is Kind.RESIDUAL for a in self.writes) else Role.READER
        return Role.READER if axis in self.reads or axis in self.contracted else Role.WRITER

    @property
    def is_matrix_like(self) -> bool:
        """Whether both sides grow with the model's width (muP, 2203.03466, Table 8); otherwise it is vector-like."""
        inside = (Kind.RESIDUAL, Kind.INNER, Kind.PAIRED)
        return all(any(KINDS[a] in inside for a in side) for side in (self.reads, self.writes))

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias: it reads nothing, and is added to the product of another parameter."""
        return not self.gains and not self.reads

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to parameters that read, not to gains and biases."""
        return bool(self.reads)

    @property
    def part(self) -> str:
        """The part of the model that it belongs to: gains, embedding, head, attention or mlp.

        A parameter on another inner axis belongs to the part that bears the axis's name.
        """
        if self.gains:
            return "gains"
        if "vocab" in self.reads:
            return "embedding"
        if "vocab" in self.writes:
            return "head"
        axis = next((a for a in (*self.reads, *self.writes) if KINDS[a] is not Kind.RESIDUAL), "residual")
        return PARTS.get(axis, axis)

    def width_mult(self, sizes: Sizes, base: Sizes) -> float:
        """MuP's width multiplier: fan-in divided by fan-in at the base width, for matrix-like parameters; otherwise 1.

        The initial standard deviation is divided by its square root, the learning rate by the multiplier itself.
        Tele-FLM has one multiplier for the whole model (hidden width / 256); here each matrix has its own, from its
        fan-in. The two agree on every shape whose MLP is 8/3 as wide as the model.
        """
        if not self.is_matrix_like:
            return 1.0
        return self.fans(sizes)[0] / self.fans(base)[0]

    def fans(self, sizes: Sizes) -> tuple[float, float]:
        """Fan-in and fan-out: how many entries each output is a sum of, and how many outputs each entry is part of."""
        return math.prod(sizes[a] for a in self.reads), math.prod(sizes[a] for a in self.writes)


class Declared(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A parameter's value with its signature, as Flax's `init` returns it; `nn.scan` stacks the signature too."""

    value: Any
    signature: Signature = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        """The bare array."""
        return self.value

    def replace_boxed(self, val: Any) -> Declared:
        """The same declaration around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        """Called by `nn.scan` when it stacks the parameter over layers."""
        if index != 0 or params.get(meta.PARTITION_NAME) != STACK_AXIS:
            raise ValueError(f"Parameters are stacked on dimension 0, named {STACK_AXIS!r}; got {index}, {params}.")
        return self.replace(signature=self.signature.stack())

    def remove_axis(self, index: int, params: dict[Any, Any]) -> Declared:
        """Called by `nn.scan` when it takes one layer's slice."""
        del index, params
        return self.replace(signature=self.signature.stack(False))


def draw(
    signature: Signature,
    key: jax.Array,
    shape: tuple[int, ...],
    *,
    std: float,
    dtype: jnp.dtype,
    offset: int | jax.Array = 0,
) -> jax.Array:
    """Initial values: ones for a gain, zeros for a bias, otherwise normal, truncated at three standard deviations.

    Every value depends only on the key and on its position, so a block of a parameter can be drawn without the rest.

    Args:
      signature: of the parameter.
      key: of the random numbers.
      shape: of the parameter, or of a block of it that is contiguous in row-major order.
      std: standard deviation of the normal before truncation.
      dtype: of the result.
      offset: number of the parameter's values before the block; if traced, uint32[2] with the high word first.
    """
    if signature.gains:
        return jnp.ones(shape, dtype)
    if signature.is_bias:
        return jnp.zeros(shape, dtype)
    return (std * truncated_normal(key, 3.0, shape, offset)).astype(dtype)
