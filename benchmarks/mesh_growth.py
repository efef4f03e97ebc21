"""Growth on a mesh: time compared with a floor, the time to read the old state and write the new one.

  python benchmarks/mesh_growth.py [--gigabytes=1] [--devices=8] [--json=FILE]

The floor is measured in the same run, on the same simulated devices, by a program that reads and writes as many bytes
as the growth and does nothing else. The two programs take turns, and the medians of paired ratios are printed. With
--devices=1, it is a growth in memory on one device.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.turns import Timings, turns
from flm_jax import costs
from flm_jax.config import ModelConfig
from flm_jax.growth import Growth
from flm_jax.recipe import Recipe, Stage, resolve
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.step import StageProgram, make_grower

_GIGABYTES = flags.DEFINE_float("gigabytes", 1.0, "Approximate size of the grown state, in GB.", lower_bound=0.01)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Number of rounds; the first is not counted.", lower_bound=2)
_DEVICES = flags.DEFINE_enum("devices", "8", ["1", "8"], "Number of simulated devices.")
_METHODS = flags.DEFINE_multi_string("method", None, "Operators to measure; by default zero, mask and copy.")
_JSON = flags.DEFINE_string("json", None, "Write the figures to this file.")
METHODS = ("zero", "mask", "copy")


def shapes(gigabytes: float) -> tuple[ModelConfig, ModelConfig]:
    """The source and the target: a target whose state has about `gigabytes` GB, a source half as deep, 4/5 as wide."""
    layers = max(round(gigabytes * 1e9 / 12 / 12 / 640**2 / 2) * 2, 2)
    large = ModelConfig(embed=640, layers=layers, heads=10, mlp=1920, vocab=4096, compute_dtype="float32")
    return large.replace(embed=512, layers=layers // 2, heads=8, kv_heads=8, mlp=1536), large


def main(argv: list[str]) -> None:
    """Measures each method."""
    del argv
    # JAX reads both when it first looks for devices.
    flag = f"--xla_force_host_platform_device_count={_DEVICES.value}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if _DEVICES.value == "8":
        os.environ.setdefault("NPROC", "32")
    small, large = shapes(_GIGABYTES.value)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2) if _DEVICES.value == "8" else MeshConfig())
    rows = []
    for method in _METHODS.value or METHODS:
        layers = {"layers": "zero" if method == "copy" else method}
        growth = Growth(method, methods=layers, ramp_steps=1 if method == "mask" else 0)
        first, second = Stage("first", small, 1, 8), Stage("second", large, 1, 8, growth=growth)
        before, after = resolve(Recipe((first, second)))
        old, new = StageProgram(before, mesh, 1), StageProgram(after, mesh, 1)
        with jax.set_mesh(mesh):
            state = jax.block_until_ready(old.initialiser()(jax.random.key(0)))
            timings = measured(state, new)
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((old.abstract_state, new.abstract_state)))
        ratio, floor = timings.ratio("growth", "floor"), timings.of("floor")
        rows.append({"method": method, "bytes": moved, "ratio": ratio, "floor": floor, "seconds": timings.record()})
        print(
            f"{method}: {costs.size(moved)} read and written; floor {floor.median:.2f} s, growth {ratio.text()} times "
            "it",
            flush=True,
        )
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


def measured(state: Any, new: StageProgram) -> Timings:
    """The seconds of the growth and of its floor, in turns."""
    grower = make_grower(new.stage.lineage, new.mesh)

    def reads_and_writes(tree: Any) -> Any:
        """A state of the grown shape that depends on every entry of the old state."""
        seen = sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(tree))
        return jax.tree.map(lambda like: jnp.full(like.shape, seen, like.dtype), new.abstract_state)

    floor, key = jax.jit(reads_and_writes, out_shardings=new.shardings), jax.random.key(1)
    calls = {
        "floor": lambda: jax.block_until_ready(floor(state)),
        "growth": lambda: jax.block_until_ready(grower(state, key)),
    }
    return turns(calls, _ROUNDS.value - 1)


if __name__ == "__main__":
    app.run(main)
