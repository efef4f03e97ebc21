"""What Muon's orthogonalisation costs in a layout: FLOPs per step, and bytes while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.kernels.orthogonal import layer_groups
from flm_jax.sharding import mesh_axes


def orthogonalisation(cfg: ModelConfig, steps: int, mesh: Mapping[str, int]) -> dict[str, float]:
    """FLOPs and bytes of the orthogonalisation in one train step.

    Whole layers are divided among groups of devices; with fewer layers than groups, some groups compute nothing of use.
    Inside a group, rows or columns are split over `tensor`, and the small squares are not.

    Args:
      cfg: the model.
      steps: Newton-Schulz steps.
      mesh: devices per mesh axis.

    Returns:
      flops: of all devices, per step, without layers of padding.
      flops_per_device: on the device that has the most.
      bytes_per_device: of one parameter while it is orthogonalised, the largest: three arrays like its layers, and two
        squares of their shorter side.
    """
    item, groups = cfg.compute.itemsize, layer_groups(mesh)
    busiest, largest = 0.0, 0.0
    for _, _, sig in costs.leaves(cfg):
        if sig.is_matrix_like:
            a, b = sorted(sig.fans(cfg.sizes))
            layers = math.ceil((cfg.layers if sig.stacked else 1) / groups)
            inside = [axis for axis in sig.axes if "tensor" in mesh_axes(axis)]
            parts = mesh["tensor"] if any(cfg.sizes[axis] % mesh["tensor"] == 0 for axis in inside) else 1
            busiest += layers * steps * (4 * a**2 * b / parts + 2 * a**3)
            largest = max(largest, layers * item * (3 * a * b / parts + 2 * a**2))
    return {
        "flops": costs.orthogonalisation_flops(cfg, steps),
        "flops_per_device": busiest,
        "bytes_per_device": largest,
    }
