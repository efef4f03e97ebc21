"""Numbers by position: those of jax.random, and a block of them is what stands there in the whole."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry2x32_p
from jax.sharding import NamedSharding, PartitionSpec

from flm_jax import counter_rng
from flm_jax.counter_rng import truncated_normal
from flm_jax.sharding import MeshConfig, make_mesh

KEY = jax.random.key(11)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7), (2, 700, 17)], ids=str)
def test_they_are_those_of_jax_random(shape):
    assert jax.config.jax_threefry_partitionable
    expected = jax.jit(lambda key: jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32))(KEY)
    np.testing.assert_array_equal(jax.jit(lambda key: truncated_normal(key, 3.0, shape))(KEY), expected)
    np.testing.assert_array_equal(truncated_normal(jax.random.key_data(KEY), 3.0, shape), expected)


def test_a_block_is_what_stands_there_in_the_whole():
    whole = np.asarray(truncated_normal(KEY, 3.0, (3, 40, 33))).reshape(-1, 33)
    for start in (0, 1, 39, 80, 113):
        offset = np.array([0, start * 33], np.uint32)
        np.testing.assert_array_equal(truncated_normal(KEY, 3.0, (1, 7, 33), offset)[0], whole[start : start + 7])


@settings(max_examples=30)
@given(stride=st.integers(0, 2**64 - 1), index=st.integers(0, 2**32 - 1), offset=st.integers(0, 2**63))
def test_places_are_counted_in_64_bits(stride, index, offset):
    with jax.disable_jit():
        high, low = counter_rng._product(jnp.uint32([index]), stride)
        assert (int(high[0]) << 32) + int(low[0]) == index * stride % 2**64
        high, low = counter_rng._counters((2, 3), counter_rng._words(offset, 6))
    found = (np.asarray(high, np.uint64) << np.uint64(32)) + np.asarray(low, np.uint64)
    np.testing.assert_array_equal(found.ravel(), offset + np.arange(6, dtype=np.uint64))


def test_beyond_the_first_four_billion_numbers_no_other_ones_repeat():
    blocks = [truncated_normal(KEY, 3.0, (50,), offset) for offset in (0, 2**32, 2**33, 2**32 + 50, 2**40)]
    assert len(np.unique(np.concatenate(blocks))) > 245


def test_on_a_mesh_every_device_draws_its_own():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    places = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    program = jax.jit(lambda key: truncated_normal(key, 3.0, (64, 48)), out_shardings=places).lower(KEY).compile()
    assert not re.findall(r"all-gather|all-reduce|collective|all-to-all", program.as_text())
    np.testing.assert_array_equal(program(KEY), truncated_normal(KEY, 3.0, (64, 48)))


def test_the_cipher_is_that_of_jax_and_needs_no_memory_of_its_own():
    """The primitive of JAX is a loop on a CPU, which keeps its words between the rounds."""
    words = jax.random.bits(KEY, (4, 300, 70), jnp.uint32)
    expected = threefry2x32_p.bind(*words)
    for found, word in zip(counter_rng._threefry(*words), expected, strict=True):
        np.testing.assert_array_equal(found, word)
    found = jax.jit(lambda key: truncated_normal(key, 3.0, (300, 700))).lower(KEY).compile().memory_analysis()
    assert found.temp_size_in_bytes < found.output_size_in_bytes / 100


def test_other_generators_and_places_outside_are_refused():
    with pytest.raises(ValueError, match=r"by threefry keys, which are uint32\[2\], not uint32\[4\]"):
        truncated_normal(jax.random.key(0, impl="rbg"), 3.0, (2,))
    with pytest.raises(ValueError, match="a block of 6 numbers".capitalize()):
        truncated_normal(KEY, 3.0, (6,), 2**64 - 5)
