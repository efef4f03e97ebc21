"""The fewest bytes that a device must send in one train step, for a layout; compiled programs are compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.sharding import mesh_axes


def least_sent(
    cfg: ModelConfig,
    rows: int,
    context: int,
    mesh: Mapping[str, int],
    parts: int,
    trained: Sequence[bool] | None = None,
) -> dict[str, float]:
    """Bytes that each device must send in a train step, on rings, by what they are for.

    Of the layout that keeps parameters split over `fsdp` and `tensor`, and the residual stream over `sequence` and
    `tensor` too, with no collective that moves more than it must. Values travel in the compute dtype.

    - weights: those of every layer are gathered over `fsdp` for the forward pass and again for the backward pass;
      embedding and head once. All of it in every part of the batch.
    - gradients: scattered over `fsdp` in every part, and once, after all parts, summed over `data` and `sequence`.
    - activations: over `tensor`, the stream is gathered before the attention and before the MLP and scattered after
      them; the backward pass does the same with gradients, and gathers the stream again for the gradients of weights.
      The embedding scatters once, the head gathers once and scatters its gradient.
    - keys and values: whole windows are gathered over `sequence` once, kept for the backward pass, and their gradients
      scattered; a kernel that passes them on in a ring, or sees a sliding window, could do with less.

    Not counted: Muon's orthogonalisation, which gathers matrices, and a teacher's forward pass.

    Args:
      cfg: the model.
      rows: the batch, in windows; with `context` tokens each.
      context: tokens per window.
      mesh: devices per mesh axis.
      parts: how many parts of the batch are computed one after the other.
      trained: for every parameter whether anything of it trains, in the order of `costs.leaves`: others have no
        gradients. None: all.
    """
    item = cfg.compute.itemsize
    fsdp, sequence, tensor = mesh["fsdp"], mesh["sequence"], mesh["tensor"]

    def ring(devices: int) -> float:
        """What one device sends of an array that is gathered or scattered, over the array's bytes."""
        return (devices - 1) / devices

    weights = scattered = summed = 0.0
    known = list(costs.leaves(cfg))
    for (_, like, sig), trains in zip(known, trained or [True] * len(known), strict=True):
        over = {name for axis in sig.axes for name in mesh_axes(axis)}
        split = tensor if "tensor" in over else 1
        held = like.size * item / split
        copies = mesh["data"] * sequence
        if "fsdp" in over:
            weights += ring(fsdp) * held * (2 if sig.stacked else 1)
            scattered += ring(fsdp) * held * trains
            summed += 2 * ring(copies) * held / fsdp * trains
        else:  # a bias, which every device along `fsdp` has
            summed += 2 * ring(copies * fsdp) * held * trains
    local = rows // parts // (mesh["data"] * fsdp) * (context // sequence)
    stream = ring(tensor) * local * cfg.embed * item
    keys = ring(sequence) * local * sequence * cfg.k_heads * cfg.h_dim * item / tensor
    return {
        "weights": parts * weights,
        "gradients": parts * scattered + summed,
        "activations": parts * stream * (10 * cfg.layers + 3),
        "keys and values": parts * keys * 4 * cfg.layers,
    }
