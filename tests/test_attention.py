"""The attention kernels against each other: one function, however it is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax import attention, model
from flm_jax.data.config import DataConfig
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.kernels import plain, splash
from flm_jax.planning import stages
from flm_jax.recipe import Recipe, Run, Stage, resolve
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.step import StageProgram
from tests import small

B, T, WIDTH = 2, 256, 100.0


def inputs(heads, kv_heads, head_dim=128, sliding_window=None):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, head_dim)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    segments = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.02, axis=1), jnp.int32)
    time = jnp.arange(T)[None]
    return (q, k, v), attention.Seen(plain.attention_mask(time, time, segments, segments, sliding_window), segments)


def value_and_gradients(kernel, tensors, seen):
    weights = jnp.cos(jnp.arange(T, dtype=jnp.float32))[None, :, None, None]

    def value(q, k, v):
        return jnp.sum(kernel(q, k, v, seen) * weights)

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))(*tensors)


# The kernel for TPUs, interpreted; blocks of 128 and more, as on the real one.
def SPLASH(q, k, v, seen, **given):
    return splash.attend(q, k, v, seen.segments_BT, width=WIDTH, interpret=True, **given)


def PLAIN(q, k, v, seen):
    return plain.attend(q, k, v, seen.mask_BTS, width=WIDTH)


@pytest.mark.battery
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi head", "grouped queries"])
@pytest.mark.parametrize(
    "mesh", [None, MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=["one device", "rows, positions and heads split"]
)
def test_splash_is_the_plain_kernel_with_its_gradients(kv_heads, mesh):
    tensors, seen = inputs(4, kv_heads)
    expected = value_and_gradients(PLAIN, tensors, seen)
    if mesh is None:
        found = value_and_gradients(SPLASH, tensors, seen)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = value_and_gradients(SPLASH, tensors, seen)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))


def test_splash_sees_no_further_than_a_sliding_window():
    tensors, seen = inputs(4, 2, sliding_window=70)
    expected = value_and_gradients(PLAIN, tensors, seen)
    found = value_and_gradients(functools.partial(SPLASH, sliding_window=70), tensors, seen)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))


def test_auto_is_the_plain_kernel_where_there_is_no_tpu():
    tensors, (mask, segments, _) = inputs(2, 2, head_dim=8)
    for length in (T, 100):  # which splash cannot cut up
        seen = attention.Seen(mask[:, :length, :length], segments[:, :length])
        # Under jit, every platform's kernel is traced.
        attend = jax.jit(attention.attend, static_argnums=(4, 5))
        auto, alone = (attend(*(t[:, :length] for t in tensors), seen, WIDTH, kernel) for kernel in ("auto", "plain"))
        np.testing.assert_array_equal(auto, alone)


def test_a_window_that_the_kernel_cannot_cut_up_is_refused_with_one_that_it_can():
    tensors, seen = inputs(2, 2)
    with (
        jax.set_mesh(make_mesh(MeshConfig(sequence=4, data=2))),
        pytest.raises(ValueError, match="64 of the window's 256 positions.*multiple of 512, or attention='plain'"),
    ):
        attention.attend(*tensors, seen, WIDTH, "splash")


def test_the_model_tells_its_kernel_of_its_sliding_window(monkeypatch):
    """Splash makes a mask of its own: what the model passes is all that it knows. Its width holds the multiplier."""
    seen = {}

    def stand_in(q, k, v, segments, **given):
        seen.update(given)
        return q

    monkeypatch.setattr(splash, "attend", stand_in)
    cfg = small.config(sliding_window=5, attention="splash", attention_mult=2.0)
    jax.eval_shape(lambda params: model.apply(cfg, params, small.tokens()), small.params(cfg))
    assert seen == {"width": 2.0, "sliding_window": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(attention="splash"), "Stage 'one': attention='splash': it needs TPUs, .* 'cpu'; use attention='auto'"),
        (
            dict(attention="cudnn", compute_dtype="bfloat16", head_dim=16),
            "Stage 'one': attention='cudnn': it needs NVID",
        ),
    ],
)
def test_a_kernel_that_the_devices_lack_is_refused_before_a_run_begins(changes, message):
    stage = Stage("one", small.config(**changes), 1, 8)
    with pytest.raises(ValueError, match=message):
        StageProgram(resolve(Recipe((stage,)))[0], make_mesh(MeshConfig()), 1).check_trains(64)


@pytest.mark.parametrize("kv_heads", [8, 4])
def test_scores_of_split_windows_are_not_copied_whole_to_every_device(kv_heads, capfd):
    cfg = small.config(layers=2, embed=32, heads=8, kv_heads=kv_heads, head_dim=8, mlp=64, vocab=264)
    recipe = Recipe((Stage("one", cfg, 1, 8),), DataConfig(vocabulary=Bytes(), context=64))
    run = Run(mesh=MeshConfig(data=1, fsdp=2, sequence=2, tensor=2))
    (record,) = stages.stages(recipe, run, jax.devices(), None, "cpu", only=("train step",))
    sent = sum(c["sent_bytes"] for c in record["programs"]["train step"]["collectives"].values())
    assert sent < 2.3 * sum(record["least_sent_bytes"].values())
    # What XLA's partitioner says where it knows no better way.
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
