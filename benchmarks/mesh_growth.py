"""Growth on a mesh: time compared with a floor, the time to read the old state and write the new one.

  python benchmarks/mesh_growth.py [--gigabytes=1]

The floor is measured in the same run, on the same simulated devices, by a program that reads and writes as many bytes
as the growth and does nothing else. The two programs alternate, and the medians of paired ratios are printed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("NPROC", "32")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.growth import Growth
from flm_jax.recipe import Recipe, Stage, resolve
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.step import StageProgram, make_grower

_GIGABYTES = flags.DEFINE_float("gigabytes", 1.0, "Approximate size of the grown state, in GB.", lower_bound=0.01)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Number of rounds; the first is not counted.", lower_bound=2)
METHODS = ("zero", "mask", "copy")


def shapes(gigabytes: float) -> tuple[ModelConfig, ModelConfig]:
    """The source and the target: a target whose state has about `gigabytes` GB, a source half as deep, 4/5 as wide."""
    layers = max(round(gigabytes * 1e9 / 12 / 12 / 640**2 / 2) * 2, 2)
    large = ModelConfig(embed=640, layers=layers, heads=10, mlp=1920, vocab=4096, compute_dtype="float32")
    return large.replace(embed=512, layers=layers // 2, heads=8, kv_heads=8, mlp=1536), large


def main(argv: list[str]) -> None:
    """Measures each method."""
    del argv
    small, large = shapes(_GIGABYTES.value)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    for method in METHODS:
        layers = {"layers": "zero" if method == "copy" else method}
        growth = Growth(method, methods=layers, ramp_steps=1 if method == "mask" else 0)
        first, second = Stage("first", small, 1, 8), Stage("second", large, 1, 8, growth=growth)
        before, after = resolve(Recipe((first, second)))
        old, new = StageProgram(before, mesh, 1), StageProgram(after, mesh, 1)
        with jax.set_mesh(mesh):
            state = jax.block_until_ready(old.initialiser()(jax.random.key(0)))
            ratios, floors = measured(state, new)
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((old.abstract_state, new.abstract_state)))
        ratio = np.median(ratios)
        print(
            f"{method}: {costs.size(moved)} read and written; floor {np.median(floors):.2f} s, growth {ratio:.2f} "
            f"times it (rounds {min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def measured(state: Any, new: StageProgram) -> tuple[list[float], list[float]]:
    """The ratio of growth time over floor time, and the floor's seconds, for each round."""
    grower = make_grower(new.stage.lineage, new.mesh)

    def reads_and_writes(tree: Any) -> Any:
        """A state of the grown shape that depends on every entry of the old state."""
        seen = sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(tree))
        return jax.tree.map(lambda like: jnp.full(like.shape, seen, like.dtype), new.abstract_state)

    floor = jax.jit(reads_and_writes, out_shardings=new.shardings)
    ratios, floors = [], []
    for number in range(_ROUNDS.value):
        start = time.perf_counter()
        jax.block_until_ready(floor(state))
        least = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(grower(state, jax.random.key(1)))
        if number:
            ratios.append((time.perf_counter() - start) / least)
            floors.append(least)
    return ratios, floors


if __name__ == "__main__":
    app.run(main)
