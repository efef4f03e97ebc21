"""The fewest bytes that a device must send in one train step, for a layout; compiled programs are compared with it."""

from __future__ import annotations

from collections.abc import Mapping

from flm_jax import costs
from flm_jax.config import ModelConfig


def least_sent(cfg: ModelConfig, rows: int, context: int, mesh: Mapping[str, int], parts: int) -> dict[str, float]:
    """Bytes that each device must send in a train step, on rings, by what they are for.

    Of a layout that keeps parameters split over `fsdp` and `tensor`, and the residual stream over `sequence` and
    `tensor` too, in every part of the batch: no collective moves more than it must, and what was sent is kept only
    within one layer's pass. Values travel in the compute dtype, those of embedding and head included.

    - weights: those of every layer are gathered over `fsdp` for the forward pass and for the backward pass; embedding
      and head once.
    - gradients: scattered over `fsdp`, and the scattered part summed over `data` and `sequence`.
    - activations: over `tensor`, the stream is gathered before the attention and before the MLP and scattered after
      them; the backward pass does the same with gradients, and gathers the stream again for the gradients of weights.
      The embedding scatters once, the head gathers once and scatters its gradient.
    - keys and values: gathered over `sequence` once, kept, and their gradients scattered.

    Args:
      cfg: the model.
      rows: the batch, in windows; with `context` tokens each.
      context: tokens per window.
      mesh: devices per mesh axis.
      parts: how many parts of the batch are computed one after the other.
    """
    item = cfg.compute.itemsize
    fsdp, sequence, tensor = mesh["fsdp"], mesh["sequence"], mesh["tensor"]

    def ring(devices: int) -> float:
        """What one device sends of an array that is gathered or scattered, over the array's bytes."""
        return (devices - 1) / devices

    weights = gradients = 0.0
    for _, like, sig in costs.leaves(cfg):
        split = tensor if any(axis in ("vocab", "heads", "kv_heads", "mlp") for axis in sig.axes) else 1
        held = like.size * item / split
        over = fsdp if "embed" in sig.axes and not sig.gains else 1
        weights += ring(over) * held * (2 if sig.stacked else 1)
        gradients += ring(over) * held + 2 * ring(mesh["data"] * sequence) * held / over
    local = rows // parts // (mesh["data"] * fsdp) * (context // sequence)
    stream = ring(tensor) * local * cfg.embed * item
    keys = ring(sequence) * local * sequence * cfg.k_heads * cfg.h_dim * item / min(tensor, cfg.k_heads)
    return {
        "weights": parts * weights,
        "gradients": parts * gradients,
        "activations": parts * stream * (10 * cfg.layers + 3),
        "keys and values": parts * keys * 4 * cfg.layers,
    }
