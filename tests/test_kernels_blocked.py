"""Attention in blocks of queries is the plain kernel, with its gradients, without ever making all scores at once."""

import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import attention, model
from flm_jax.kernels import blocked, plain
from flm_jax.sharding import MeshConfig, make_mesh
from tests import small

B, N, H, WIDTH = 2, 4, 8, 8.0


def inputs(length, kv_heads, sliding_window=None, documents=True, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    tensors = [jnp.asarray(rng.normal(size=(B, length, n, H)), dtype) for n in (N, kv_heads, kv_heads)]
    begins = rng.random((B, length)) < (0.02 if documents else 0)
    segments, time_1T = jnp.asarray(np.cumsum(begins, axis=1), jnp.int32), jnp.arange(length)[None]
    return tensors, plain.attention_mask(time_1T, time_1T, segments, segments, sliding_window)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(kernel, tensors, mask):
    def value(tensors):
        o = kernel.attend(*tensors, mask, width=WIDTH).astype(jnp.float32)
        return jnp.sum(o * jnp.cos(jnp.arange(o.shape[1], dtype=jnp.float32))[None, :, None, None])

    return jax.value_and_grad(value)(tensors)


def assert_equal(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [blocked.ROWS, 300], ids=["one block", "blocks and a part of one"])
def test_it_is_the_plain_kernel_with_its_gradients(length, kv_heads):
    tensors, mask = inputs(length, kv_heads)
    assert_equal(value_and_gradients(blocked, tensors, mask), value_and_gradients(plain, tensors, mask), 1e-5)


@pytest.mark.parametrize("sliding_window", [None, 70])
@pytest.mark.parametrize("documents", [True, False], ids=["documents", "one document"])
def test_it_sees_what_the_mask_says(documents, sliding_window):
    tensors, mask = inputs(260, 2, sliding_window, documents)
    mask = mask if documents else mask[:1]  # one mask for all rows
    assert_equal(value_and_gradients(blocked, tensors, mask), value_and_gradients(plain, tensors, mask), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_halves_it_is_as_close_to_float32_as_the_plain_kernel(dtype):
    tensors, mask = inputs(256, 2)
    exact = jax.tree.leaves(value_and_gradients(plain, tensors, mask))
    rounded = [x.astype(dtype) for x in tensors]

    def errors(kernel):
        found = jax.tree.leaves(value_and_gradients(kernel, rounded, mask))
        pairs = zip(found[1:], exact[1:], strict=True)
        return [float(jnp.linalg.norm(a.astype(jnp.float32) - b)) for a, b in pairs]

    for mine, reference in zip(errors(blocked), errors(plain), strict=True):
        assert mine < 1.5 * reference, (mine, reference)


def test_small_gradients_survive_float16():
    tensors, mask = inputs(256, 2)
    halves, (q, k, v) = [x.astype(jnp.float16) for x in tensors], tensors

    def dq(kernel, q, k, v, dtype):
        small_BTNH = jnp.full(q.shape, 1e-5, dtype) * jnp.cos(jnp.arange(256, dtype=dtype))[None, :, None, None]
        back = jax.vjp(lambda q: kernel.attend(q, k, v, mask, width=WIDTH), q)[1]
        return back(small_BTNH)[0].astype(jnp.float32)

    exact = dq(plain, q, k, v, jnp.float32)
    mine, reference = (float(jnp.linalg.norm(dq(x, *halves, jnp.float16) - exact)) for x in (blocked, plain))
    assert mine < 1.5 * reference


@pytest.mark.parametrize("length", [128, 129, 1000, 1024, 5000])
def test_blocks_cover_every_position_once(length):
    found = blocked.blocks(length)
    assert found[0][0] == 0 and found[-1][1] == length and len(found) <= blocked.MOST_BLOCKS
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(found))
    assert all(end - start >= blocked.ROWS for start, end in found[:-1])


def sizes(jaxpr):
    """The number of entries of every array that a program makes."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(out.aval.shape)) for out in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_forward_and_backward_make_no_array_of_all_scores():
    length = 1024
    tensors, _ = inputs(length, 4)
    # The mask is of all positions, but of one head.
    mask = jnp.tri(length, dtype=bool)[None]
    program = {k: jax.make_jaxpr(value_and_gradients, static_argnums=0)(k, tensors, mask) for k in (blocked, plain)}
    largest = {k: max(sizes(p.jaxpr)) for k, p in program.items()}
    assert largest[plain] == B * N * length**2
    assert largest[blocked] <= largest[plain] // blocked.MOST_BLOCKS


def test_the_model_takes_it_for_long_windows_that_are_whole_on_a_device(monkeypatch):
    taken = []
    whole = blocked.attend
    monkeypatch.setattr(blocked, "attend", lambda *xs, **given: taken.append(xs[0].shape[1]) or whole(*xs, **given))
    cfg = small.config(vocab=64)

    def trace(length):
        taken.clear()
        tokens = jnp.zeros((8, length), jnp.int32)
        jax.eval_shape(lambda params: model.apply(cfg, params, tokens), small.params(cfg))
        return set(taken)

    assert trace(2 * blocked.ROWS) == {2 * blocked.ROWS}
    assert trace(2 * blocked.ROWS - 1) == set()
    with jax.set_mesh(make_mesh(MeshConfig(sequence=2, fsdp=4))):
        assert trace(2 * blocked.ROWS) == set()
    with jax.set_mesh(make_mesh(MeshConfig(tensor=2, fsdp=4))):
        assert trace(2 * blocked.ROWS) == {2 * blocked.ROWS}
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert trace(2 * blocked.ROWS) == set()


def test_on_a_mesh_rows_and_heads_stay_where_they_are():
    """Neither the forward nor the backward pass moves queries, keys or values to another device."""
    tensors, mask = inputs(256, 4)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4))):
        split = jax.sharding.PartitionSpec("fsdp", None, "tensor", None)
        tensors = [jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), split)) for x in tensors]
        text = value_and_gradients.lower(blocked, tensors, mask).compile().as_text()
        expected = value_and_gradients(blocked, tensors, mask)
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text
    alone = jax.tree.map(lambda x: jax.device_put(np.asarray(x)), tensors)
    assert_equal(expected, value_and_gradients(blocked, alone, mask), 1e-5)


def test_attend_of_the_package_chooses_by_length():
    tensors, mask = inputs(256, 2)
    seen = attention.Seen(mask, jnp.zeros((B, 256), jnp.int32))
    found = attention.attend(*tensors, seen, WIDTH, "plain")
    np.testing.assert_array_equal(found, blocked.attend(*tensors, mask, width=WIDTH))
