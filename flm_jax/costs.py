"""The number of parameters and FLOPs of a model, computed from its configuration alone, and how numbers are printed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax

from flm_jax.config import ModelConfig
from flm_jax.model import declared
from flm_jax.records import counted
from flm_jax.signature import Signature


def leaves(cfg: ModelConfig) -> Iterator[tuple[str, jax.ShapeDtypeStruct, Signature]]:
    """Path, shape and signature of every parameter."""
    shapes, signatures = declared(cfg)
    for (path, like), sig in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(signatures), strict=True):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), like, sig


def param_count(cfg: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(like.shape) for _, like, _ in leaves(cfg))


def forward_flops_per_token(cfg: ModelConfig, context: int) -> int:
    """FLOPs per token of the forward pass in a window of `context` tokens.

    The sum of 2 per weight in a matrix product (all parameters except gains, biases and the embedding, which is looked
    up; a tied head counts), and 4 L T N H for attention: scores and weighted values for all positions of the window,
    masked or not, as the plain kernel computes them. Norms, rotary positions, softmax and SiLU are not counted.
    """
    weights = sum(math.prod(like.shape) for _, like, sig in leaves(cfg) if sig.reads and "vocab" not in sig.reads)
    if cfg.tied:
        weights += cfg.embed * cfg.vocab
    return 2 * weights + 4 * cfg.layers * context * cfg.heads * cfg.h_dim


def train_flops_per_token(cfg: ModelConfig, context: int) -> int:
    """FLOPs per token of training: the forward pass, plus twice that for the backward pass; remat is not counted."""
    return 3 * forward_flops_per_token(cfg, context)


def orthogonalisation_flops(cfg: ModelConfig, steps: int) -> float:
    """FLOPs per train step of Muon's orthogonalisation of all matrices, by so many Newton-Schulz steps.

    Each of these has three products for each matrix of a x b, a <= b: X X', its square, and their sum times X.
    """
    total = 0.0
    for _, _, sig in leaves(cfg):
        if sig.is_matrix_like:
            a, b = sorted(sig.fans(cfg.sizes))
            total += (cfg.layers if sig.stacked else 1) * steps * (4 * a**2 * b + 2 * a**3)
    return total


def count(number: float) -> str:
    """A count as text with a metric suffix: 52.85 B."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g} {suffix}"
    return f"{number:.4g}"


def size(number: float) -> str:
    """A number of bytes as text with a metric suffix: 52.85 GB."""
    for unit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= unit:
            return f"{number / unit:.4g} {suffix}"
    return f"{number:.4g} B"


def shape_line(cfg: ModelConfig) -> str:
    """A configuration's shape as one line of text."""
    heads = f"{cfg.heads} ({cfg.k_heads} kv) heads" if cfg.k_heads != cfg.heads else counted(cfg.heads, "head")
    blocks = f"{counted(cfg.layers, 'layer')} x {cfg.embed} wide, {heads} of {cfg.h_dim}"
    return f"{blocks}, MLP {cfg.mlp}, vocabulary {cfg.vocab}"


def param_table(cfg: ModelConfig) -> str:
    """A table as text, one line per parameter: path, signature, shape, initial standard deviation, width multiplier."""
    rows: list[tuple[Any, ...]] = [("parameter", "signature", "shape", "std", "width mult")]
    for path, like, sig in leaves(cfg):
        std = "ones" if sig.gains else f"{cfg.std(sig):.4g}"
        mult = f"{sig.width_mult(cfg.sizes, cfg.base_sizes):.4g}" if sig.is_matrix_like else "-"
        rows.append((path, str(sig), "x".join(map(str, like.shape)), std, mult))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{count(param_count(cfg))} parameters"])
