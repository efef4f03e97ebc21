"""Generation through the cache: prompts of any length, alone, together and on a mesh."""

import contextlib

import jax
import numpy as np
import pytest

from flm_jax.generate import generate, stream
from flm_jax.sharding import MeshConfig, make_mesh
from tests import small


def test_greedy_generation_takes_the_likeliest_token_each_time():
    cfg = small.config(init_std_vector=1.0)
    params, prompt = small.params(cfg), small.tokens((2, 4))
    out = generate(cfg, params, prompt, 5, jax.random.key(0), temperature=0)
    rows = prompt
    for _ in range(5):
        rows = np.concatenate([rows, np.argmax(small.apply(cfg, params, rows)[:, -1:], -1).astype(np.int32)], axis=1)
    np.testing.assert_array_equal(out, rows[:, 4:])


@pytest.mark.battery
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one device", "mesh"])
def test_a_padded_prompt_is_continued_as_alone(mesh):
    cfg = small.config(init_std_vector=1.0, heads=4, kv_heads=2, vocab=64)
    params, lengths = small.params(cfg), (1, 3, 7, 9)
    prompts = [small.tokens((1, n), seed=n) for n in lengths]
    alone = [generate(cfg, params, prompt, 5, jax.random.key(0), temperature=0)[0] for prompt in prompts]
    padded, start = np.full((4, 9), 60, np.int32), np.array([9 - n for n in lengths], np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[9 - prompt.shape[1] :] = prompt
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        found = generate(cfg, params, padded, 5, jax.random.key(0), temperature=0, start_B=start)
    np.testing.assert_array_equal(found, alone)


def test_one_row_is_continued_on_a_mesh_as_without_one():
    """A single row, and a single position at a time, that a mesh cannot split stay whole."""
    cfg = small.config(init_std_vector=1.0, heads=4, vocab=64)
    params, prompt = small.params(cfg), small.tokens((1, 5))
    expected = generate(cfg, params, prompt, 4, jax.random.key(0), temperature=0)
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))):
        found = generate(cfg, params, prompt, 4, jax.random.key(0), temperature=0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.battery
@pytest.mark.parametrize(
    ("mesh", "temperature"), [(None, 0.0), (MeshConfig(fsdp=2, tensor=2), 0.8)], ids=["greedy", "sampled, on a mesh"]
)
def test_a_stream_yields_what_generate_returns(mesh, temperature):
    cfg, prompt, key = small.shape(), small.tokens((1, 7)), jax.random.key(3)
    params = small.params(cfg)
    with jax.set_mesh(make_mesh(mesh)) if mesh else jax.default_device(jax.devices()[0]):
        whole = np.asarray(generate(cfg, params, prompt, 10, key, temperature))[0]
        pieces = list(stream(cfg, params, prompt, 10, key, temperature, piece=4))
    assert [len(piece) for piece in pieces] == [1, 4, 4, 1]
    assert [token for piece in pieces for token in piece] == list(whole)


def test_a_stream_can_be_left_early():
    cfg = small.config()
    tokens = stream(cfg, small.params(cfg), small.tokens((1, 3)), 1000, jax.random.key(0), 0.0, piece=2)
    assert [len(next(tokens)) for _ in range(3)] == [1, 2, 2]
