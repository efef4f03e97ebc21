"""The checksum of a leaf: one bit changes it, the sharding does not, and those of its blocks add up."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flm_jax.checkpoint import checksum
from tests.checkpoints import checksum_in_numpy, mesh_of


def digest_of(x: Any) -> str:
    return checksum.digests({"x": checksum.of(jnp.asarray(x))})["x"]


DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "float16",
    "bfloat16",
    "float32",
    "int32",
    "uint32",
    "float64",
    "int64",
]
# Few shapes, as each is compiled: without dimensions, empty, and of one to three dimensions.
SHAPES = [(), (0, 3), (1,), (7,), (3, 5), (2, 3, 4)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.data())
def test_one_flipped_bit_changes_both_lanes(dtype, shape, data):
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    content = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    if dtype == "bool":
        content = bytearray(byte & 1 for byte in content)
    x = np.frombuffer(bytes(content), jnp.dtype(dtype)).reshape(shape)
    with jax.enable_x64(True):
        before = digest_of(x)
        assert before == checksum_in_numpy(x)
        if size:
            at = data.draw(st.integers(0, size - 1))
            content[at] ^= 1 << (0 if dtype == "bool" else data.draw(st.integers(0, 7)))
            after = digest_of(np.frombuffer(bytes(content), jnp.dtype(dtype)).reshape(shape))
            assert before[:8] != after[:8] and before[8:] != after[8:]


def test_signs_swaps_and_zeroed_blocks_change_the_checksum():
    x = np.random.default_rng(0).choice(np.float32([-1, 1]), 64).reshape(8, 8)
    seen = {digest_of(x)}
    changed = [x.copy() for _ in range(5)]
    changed[0][0, :2] *= -1  # two sign bits: a weighted sum with odd weights cannot see this
    changed[1][:] = -x
    changed[2][3:5] = 0
    changed[3][[0, 1]] = x[[1, 0]]
    changed[4][:] = x.T
    for other in changed:
        seen.add(digest_of(other))
    assert len(seen) == 6
    assert digest_of(np.float32(0)) != digest_of(np.float32(-0.0))
    nan = np.array([0x7FC00000, 0x7FC00001, 0x7F800001], "u4").view("f4")
    assert len({digest_of(value) for value in nan}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_checksum_does_not_depend_on_the_sharding(dtype):
    x = np.random.default_rng(1).integers(0, 2, (16, 8)).astype(jnp.dtype(dtype))
    shardings = [NamedSharding(mesh_of(8), spec) for spec in (P(), P("data"), P(None, "data"))]
    shardings += [NamedSharding(mesh_of(2, 4), spec) for spec in (P("data", "model"), P("model"), P(("data", "model")))]
    assert {digest_of(jax.device_put(x, sharding)) for sharding in shardings} == {checksum_in_numpy(x)}


@pytest.mark.integration
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_checksums_of_blocks_add_up(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(-99, 99, (3, 11, 10)), dtype)
    total = (0, 0)
    for layer in range(3):
        for start in range(0, 11, 4):
            rows = np.arange(start, min(start + 4, 11), dtype=np.uint32)
            block = x[layer : layer + 1, start : start + 4]
            total = checksum.add(total, checksum.of_block(block, (np.uint32([layer]), rows)))
    assert checksum.digest(total) == checksum.digests({"x": checksum.of(x)})["x"]
