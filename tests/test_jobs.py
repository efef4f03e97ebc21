"""Blocks of a leaf: each grows to the bits that the leaf has when it is grown whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_jax.checkpoint import manifest
from flm_jax.checkpoint_growth.jobs import BlockProgram, grow_block
from flm_jax.growth import Growth, Lineage
from flm_jax.growth.grow import fresh, moment_maps, param_maps
from tests import small

pytestmark = pytest.mark.integration

OLD = small.config(heads=4, kv_heads=2, embed=16, mlp=24, head_dim=4)
SILENT = {"head_dim": "zero", "layers": "zero"}
KEY = jax.random.key(3)


def leaf_of(tree, name: str):
    found = {path: leaf for path, leaf in manifest.leaf_paths(tree).items() if path.endswith(name)}
    return next(iter(found.values()))


@settings(max_examples=6)
@given(data=st.data())
def test_any_block_of_any_leaf_is_that_of_the_whole(data):
    """One way, compiled for the whole leaf and for blocks: every operator that takes, scales, draws or adds."""
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    method = data.draw(st.sampled_from(["copy", "uneven", "noise", "net2net", "zero", "aki"]))
    old = OLD.replace(param_dtype=dtype, layers=3)
    growth = Growth(method, methods={**SILENT, "vocab": data.draw(st.sampled_from(["mean", "zero"]))})
    sizes = {axis: data.draw(st.integers(1, 20)) for axis in ("embed", "mlp", "vocab")}
    target = old.replace(layers=5, **{axis: old.sizes[axis] + more for axis, more in sizes.items()})
    lineage = Lineage(old).grown(target, growth)
    new = lineage.cfg
    moment = data.draw(st.booleans())
    ways = moment_maps(lineage, 2) if moment else param_maps(lineage)
    name = data.draw(st.sampled_from(["gate", "down", "query", "head", "embedding", "mlp_norm/scale"]))
    way, value = leaf_of(ways, name), leaf_of(small.params(old), name)
    std = new.std(way.signature)
    whole = jax.jit(lambda x: way.grow(x, functools.partial(fresh, way, KEY, way.shape, std), KEY))(value)
    stacked, dim, above = way.signature.stacked, way.row_dim, way.layers_above
    rows = data.draw(st.integers(1, way.shape[dim])) if way.splits else way.shape[dim]
    start = data.draw(st.integers(0, way.shape[dim] - rows))
    layer = data.draw(st.integers(0, way.shape[0] - 1)) if stacked else 0
    taken = value
    if stacked:
        below = way.sources(0)[0][layer]
        taken = jnp.stack([value[min(below + i, len(value) - 1)] for i in range(1 + above)])
    if way.splits:
        taken = jnp.take(taken, way.sources(dim)[0][start : start + rows], axis=dim)
    shape = (*(1,) * dim, rows, *way.shape[dim + 1 :])
    offset = (layer * way.shape[dim] * stacked + start) * int(np.prod(way.shape[dim + 1 :]))
    flat = taken.reshape(*taken.shape[: dim + 1], -1)
    entries = way.block(layer, slice(start, start + rows))
    block = grow_block(BlockProgram(way, std), shape, flat, entries, KEY, np.array([0, offset], np.uint32))
    expected = whole[layer : layer + 1, start : start + rows] if stacked else whole[start : start + rows]
    np.testing.assert_array_equal(np.asarray(block).reshape(shape), np.asarray(expected))
