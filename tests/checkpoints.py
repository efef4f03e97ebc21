"""States of every dtype, saved a step at a time, and their checksum in NumPy: what the tests of checkpoints share."""

import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from flm_jax.checkpoint import Checkpoints, leaf_paths, manifest

LOGGER = "flm_jax.checkpoint"


class Moments(NamedTuple):
    count: Any
    mu: Any


def mesh_of(*shape: int) -> Mesh:
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def numpy_state(step: int) -> dict[str, Any]:
    """Every dtype that a train state holds, a pure function of the step."""
    rng = np.random.default_rng(step)
    return {
        "params": {
            "w": rng.normal(size=(16, 32)).astype("f4"),
            "b": rng.normal(size=(8,)).astype(jnp.bfloat16),
        },
        "opt": (Moments(np.array(step, "i4"), {"w": rng.normal(size=(16, 32)).astype("f4")}), ()),
        "mask.ramp": rng.random(5) < 0.5,
        "none": np.zeros((0, 3), "f4"),
        "key": rng.integers(0, 2**32, 2, dtype="u4"),
    }


def state_at(step: int) -> Any:
    return jax.tree.map(jnp.array, numpy_state(step))


def abstract_of(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def raw(x: Any) -> tuple:
    x = np.asarray(x)
    return x.shape, x.dtype.name, x.tobytes()


def assert_same(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert {k: raw(v) for k, v in leaf_paths(found).items()} == {k: raw(v) for k, v in leaf_paths(wanted).items()}


ABSTRACT = abstract_of(numpy_state(0))


def save(directory: Path, *steps: int, **options: Any) -> None:
    with Checkpoints(directory, keep=100) as checkpoints:
        for step in steps:
            checkpoints.save(
                step, state_at(step), meta={"step": step}, blobs={"vocab.model": bytes([step] * 9)}, **options
            )


def renumbered(step_dir: Path, step: int) -> Path:
    """A copy of a step, beside it, as another step."""
    copy = step_dir.with_name(str(step))
    shutil.copytree(step_dir, copy)
    saved = manifest.read_manifest(step_dir)
    (copy / "manifest.json").write_bytes(manifest.dump_manifest(manifest.Manifest(step, saved.leaves, saved.files)))
    return copy


def checksum_in_numpy(x: np.ndarray) -> str:
    """The checksum in NumPy, in 64-bit arithmetic reduced by hand, one word at a time."""

    def mix(h: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ (h >> shift)) * factor) % 2**32
        return h ^ (h >> 16)

    shape = x.shape or (1,)
    width = min(x.dtype.itemsize, 4)
    words = np.frombuffer(x.tobytes(), f"<u{width}").astype(int)
    inner = int(np.prod(shape[1:], dtype=int)) * (x.dtype.itemsize // width)
    first = second = 0
    for i, word in enumerate(words.tolist()):
        position = (mix(i // inner) + i % inner) % 2**32
        a = mix(word ^ (position * 0x9E3779B1) % 2**32)
        first, second = first + a, second + mix((a + position) % 2**32)
    return f"{first % 2**32:08x}{second % 2**32:08x}"


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_value(step_dir: Path) -> None:
    """Flips one bit of params/w and makes its file's sha256 right again, as if the file were a large one."""
    wanted = numpy_state(int(step_dir.name))["params"]["w"].tobytes()[:16]
    (path,) = (p for p in step_dir.rglob("*") if p.is_file() and wanted in p.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(wanted)] ^= 1
    path.write_bytes(content)
    saved = manifest.read_manifest(step_dir)
    files = {**saved.files, str(path.relative_to(step_dir)): manifest.describe_file(path)}
    (step_dir / "manifest.json").write_bytes(manifest.dump_manifest(manifest.Manifest(saved.step, saved.leaves, files)))
