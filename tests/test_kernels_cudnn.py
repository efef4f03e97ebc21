"""cuDNN's attention: what is asked of it, its text for GPUs, and the same numbers as the plain kernel.

On a GPU the kernels run. Elsewhere a stand-in, which reads operands and configuration as XLA does, takes their place.
"""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from flm_jax import attention, loss
from flm_jax.kernels import cudnn, cudnn_check, plain
from flm_jax.sharding import MESH_AXES, MeshConfig, make_mesh
from tests import small

T = 256
on_gpu = pytest.mark.skipif(cudnn.device() is None, reason="needs an NVIDIA GPU")
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the stand-in runs on CPUs")
HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)], ids=["multi head", "grouped queries"])
FORMS = pytest.mark.parametrize("form", cudnn_check.FORMS)
WINDOWS = pytest.mark.parametrize("window", [None, 70], ids=["", "sliding window"])


def gpus(**sizes):
    """A mesh of GPUs that need not be there, to trace and lower for."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), abstract_device=device)


def lowered(function, *arguments, mesh=None):
    """The program's text for GPUs."""
    with jax.sharding.use_abstract_mesh(mesh or gpus()):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """The cuDNN calls of a program's text: (name, configuration, types of operands)."""
    found = []
    for line in text.splitlines():
        if match := re.search(r'@__cudnn\$(\w+)\(.*backend_config = "(.*?)", .*\} : \((.*)\) -> ', line):
            config = json.loads(match[2].replace(r"\22", '"'))["cudnn_fmha_backend_config"]
            found.append((match[1], config, re.findall(r"tensor<(.*?)>", match[3])))
    return found


def stand_in(name, results, *, legacy_backend_config, **_):
    """What XLA and cuDNN make of a custom call, by plain operations."""
    config = json.loads(legacy_backend_config)["cudnn_fmha_backend_config"]
    M, window = config["max_seg_per_batch"], config["sliding_window_length"]

    def documents(lengths, starts, tokens, stride):
        """The document of every token; places are in elements, and the lengths agree with them."""
        first = starts.reshape(-1)[: lengths.size] // stride
        document = jnp.searchsorted(first, jnp.arange(tokens), side="right") - 1
        inside = jnp.arange(tokens) < first[document] + lengths.reshape(-1)[document]
        return jnp.where(inside, document, -1)

    def call(*operands):
        q, k, v, *rest = operands
        (B, Q, N, H), K = q.shape, k.shape[2]
        logs = do = bias = None
        if name.endswith("Backward"):
            logs, do, *rest = rest
            assert logs.shape == (B * M, N, Q)
        if "Bias" in name:
            bias, *rest = rest
        if do is not None:
            _, *rest = rest
        if config["mask_type"] == "PADDING_CAUSAL":
            lengths, kv_lengths, starts, kv_starts = rest
            of_q, of_k = documents(lengths, starts, B * Q, N * H), documents(kv_lengths, kv_starts, B * Q, K * H)
        else:
            assert config["mask_type"] == "CAUSAL" and not rest
            of_q = of_k = jnp.repeat(jnp.arange(B), Q)
        at = jnp.arange(B * Q)[None]
        mask = plain.attention_mask(at, at, of_q[None], of_k[None], window or None)
        if bias is not None:
            allowed = jnp.zeros((B, Q, B, Q), bool)
            for row in range(B):
                allowed = allowed.at[row, :, row].set(bias[row, 0] == 0)
            mask &= allowed.reshape(1, B * Q, B * Q)
        flat = [x.reshape(1, B * Q, -1, H) for x in (q, k, v)]
        forward = lambda *x: plain.attend(*x, mask, width=config["fmha_scale"] ** -2)  # noqa: E731
        o, transpose = jax.vjp(forward, *flat)
        found = [o] if do is None else transpose(do.reshape(1, B * Q, N, H))
        found = [jnp.swapaxes(x.reshape(B, Q, -1, H), 1, 2) for x in found]
        if do is None and len(results) == 3:
            found.append(jnp.zeros((B * M, N, Q)))
        found.append(jnp.zeros((0,), jnp.uint8))
        assert [x.shape for x in found] == [x.shape for x in results]
        return [x.astype(like.dtype) for x, like in zip(found, results, strict=True)]

    return call


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(jax.ffi, "ffi_call", stand_in)


@on_gpu
@FORMS
@HEADS
@WINDOWS
@pytest.mark.parametrize(("head_dim", "fewest"), [(64, 1), (128, 4)])
def test_on_a_gpu_it_is_the_plain_kernel_with_its_gradients(form, heads, kv_heads, window, head_dim, fewest):
    tensors, segments = cudnn_check.inputs(jnp.bfloat16, head_dim, heads, kv_heads, length=1024, fewest=fewest)
    found = cudnn_check.differences(form, tensors, segments, window)
    assert max(found.values()) < cudnn_check.TOLERANCE, found


@on_cpu
@pytest.mark.battery
@FORMS
@HEADS
@WINDOWS
def test_what_is_asked_of_it_is_the_plain_kernel_with_its_gradients(form, heads, kv_heads, window, without_gpu):
    tensors, segments = cudnn_check.inputs(jnp.bfloat16, 16, heads, kv_heads)
    assert 2 * cudnn.capacities(T)[-1] >= cudnn.pack(segments).documents_1[0]
    found = cudnn_check.differences(form, tensors, segments, window)
    assert max(found.values()) < 0.02, found


@on_cpu
def test_more_documents_than_there_is_place_for_take_the_mask(without_gpu):
    tensors, _ = cudnn_check.inputs(jnp.bfloat16, 16, 4, 2)
    many = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None] // 3, (2, 1))
    assert cudnn.pack(many).documents_1[0] > 2 * cudnn.capacities(T)[-1]
    found = cudnn_check.differences("packed", tensors, many)
    assert max(found.values()) < 0.02, found


@on_cpu
@pytest.mark.parametrize("documents", [1, 2, 3, 5])
def test_a_batch_takes_the_fewest_places_that_hold_its_documents(documents, without_gpu, monkeypatch):
    assert [cudnn.capacities(n) for n in (64, 256, 1024, 4096)] == [(4,), (4,), (2, 8), (8, 32)]
    # The check of a GPU has a batch for both numbers of places.
    of_check = [cudnn_check.inputs(jnp.bfloat16, 16, 4, 2, 2, 1024, fewest)[1] for fewest in (1, 4)]
    assert [2 * 2 < cudnn.pack(segments).documents_1[0] <= 2 * 8 for segments in of_check] == [False, True]
    monkeypatch.setattr(cudnn, "capacities", lambda length: (1, 2, 4))
    tensors, _ = cudnn_check.inputs(jnp.bfloat16, 16, 4, 2)
    segments = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None] * documents // T, (2, 1))
    found = cudnn_check.differences("packed", tensors, segments)
    assert max(found.values()) < 0.02, found
    taken = []
    monkeypatch.setattr(cudnn, "_call", lambda form, *rest, **_: taken.append((form, rest[4].lengths_BM.shape[1])))
    with jax.disable_jit():
        cudnn._by_documents(cudnn.pack(segments), T, lambda form, packed: cudnn._call(form, 0, 0, 0, 0, packed))
    assert taken == [{1: ("packed", 1), 2: ("packed", 2), 3: ("packed", 4), 5: ("bias", 4)}[documents]]


@on_cpu
@pytest.mark.battery
@pytest.mark.parametrize("kv_heads", [4, 1], ids=["heads split", "one key head, not split"])
def test_devices_attend_to_their_own_rows_and_heads(kv_heads, without_gpu):
    tensors, segments = cudnn_check.inputs(jnp.bfloat16, 16, 4, kv_heads, rows=4)
    # One device's row has more documents than it has place for; the others' fit.
    segments = segments.at[3].set(jnp.arange(T, dtype=jnp.int32) // 2)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert cudnn.pack(segments).documents_1.tolist() == [2, 3, 4, 128]
        found = cudnn_check.differences("packed", tensors, segments)
        assert max(found.values()) < 0.02, found


def test_places_of_documents():
    segments = jnp.asarray([[0] * 100 + [1] * 28 + [4] * 128, [7] * 256, [0] * 255 + [9]], jnp.int32)
    packed = cudnn.pack(segments)
    M = cudnn.capacities(256)[-1]
    assert packed.lengths_BM.reshape(-1).tolist() == [100, 28, 128, 256, 255, 1] + [0] * (3 * M - 6)
    assert packed.starts_BM1.reshape(-1).tolist() == [0, 100, 128, 256, 512, 767] + [768] * (3 * (M + 1) - 6)
    assert packed.documents_1.tolist() == [6]


def abstract(heads=4, kv_heads=2, head_dim=64, rows=2, dtype=jnp.bfloat16):
    like = [jax.ShapeDtypeStruct((rows, T, n, head_dim), dtype) for n in (heads, kv_heads, kv_heads)]
    return like, jax.ShapeDtypeStruct((rows, T), jnp.int32)


def gradients(form, window=None):
    def total(q, k, v, segments):
        packed = cudnn.pack(segments) if form == "packed" else None
        given = None if form == "causal" else segments
        o = cudnn.attend(q, k, v, given, packed, width=64.0, sliding_window=window)
        return jnp.sum(o.astype(jnp.float32))

    return jax.grad(total, argnums=(0, 1, 2))


def test_its_text_has_no_mask_where_cudnn_needs_none():
    like, segments = abstract()
    found = calls(lowered(gradients("causal", window=100), *like, segments))
    assert [name for name, *_ in found] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for _, config, operands in found:
        assert (config["mask_type"], config["sliding_window_length"], config["max_seg_per_batch"]) == ("CAUSAL", 100, 1)
        assert not [x for x in operands if f"{T}x{T}" in x]
        assert operands[:3] == ["2x256x4x64xbf16", "2x256x2x64xbf16", "2x256x2x64xbf16"]
    found = [call for call in calls(lowered(gradients("packed"), *like, segments)) if "Bias" not in call[0]]
    assert [name for name, *_ in found] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for _, config, operands in found:
        assert (config["mask_type"], config["max_seg_per_batch"]) == ("PADDING_CAUSAL", cudnn.capacities(T)[-1])
        assert not [x for x in operands if f"{T}x{T}" in x]
        assert operands[-4:] == ["2x4xi32", "2x4xi32", "2x5xi32", "2x5xi32"]


@FORMS
def test_its_configuration_is_that_of_jax(form, monkeypatch):
    """JAX's own wrapper, with its checks of the machine turned off, asks the same of the same names."""
    ours = jax._src.cudnn.fused_attention_stablehlo
    monkeypatch.setattr(ours, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(ours, "check_is_flash_attention", lambda *_, **__: None)
    like, segments = abstract()

    def total(q, k, v, segments):
        if form == "packed":
            M = cudnn.capacities(T)[-1]
            lengths, starts = (jnp.broadcast_to(segments[:, :1], (2, n)) for n in (M, M + 1))
            places = dict(q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts)
            how = dict(mask_type=ours.MaskType.PADDING_CAUSAL, scale=0.125)
            return jnp.sum(ours.dot_product_attention(q, k, v, **places, **how).astype(jnp.float32))
        mask = None if form == "causal" else (segments[:, :, None] == segments[:, None])[:, None]
        given = dict(mask=mask, is_causal=True, scale=0.125, implementation="cudnn")
        return jnp.sum(jax.nn.dot_product_attention(q, k, v, **given).astype(jnp.float32))

    one = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(one):
        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*like, segments)
        theirs = calls(text.lower(lowering_platforms=("cuda",)).as_text())
    mine = calls(lowered(gradients(form), *like, segments))
    mine = [call for call in mine if form != "packed" or "Bias" not in call[0]]
    assert len(mine) == len(theirs) == 2

    def said(config):
        """The configuration without empty and default values."""
        if isinstance(config, dict):
            config = {name: said(value) for name, value in config.items()}
            return {name: value for name, value in config.items() if value not in ([], {}, "0", 0, False)}
        return config

    for (name, config, operands), (its_name, its_config, its_operands) in zip(mine, theirs, strict=True):
        assert (name, operands, said(config)) == (its_name, its_operands, said(its_config))


@pytest.mark.parametrize("remat", ["none", "full", "mlp", "inner", "products"])
def test_a_training_step_on_gpus_has_the_kernel_and_keeps_what_it_needs(remat):
    """The model passes documents, width and window on; "inner" and "products" save what its backward pass reads."""
    changes = dict(attention="cudnn", compute_dtype="bfloat16", heads=4, kv_heads=2, head_dim=16, sliding_window=100)
    cfg = small.config(remat=remat, attention_mult=0.5, **changes)
    params = jax.eval_shape(lambda: small.params(cfg))
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, T), jnp.float32)

    def step(params, x, y, w, segments):
        return jax.grad(lambda p: loss.loss_sum(cfg, p, x, y, w, segments, None, 1))(params)

    found = calls(lowered(step, params, ids, ids, weights, ids))
    names = [name for name, *_ in found]
    assert names.count("fmhaSoftmaxBackward") == 1 and names.count("fmhaScaleBiasSoftmaxBackward") == 1
    assert names.count("fmhaSoftmax") == (1 if remat in ("none", "inner", "products") else 2)
    for _, config, _ in found:
        assert config["fmha_scale"] == pytest.approx(0.5 / 4)
        assert config["sliding_window_length"] == (100 if config["mask_type"] == "PADDING_CAUSAL" else 0)


def test_windows_of_one_document_are_known_before_the_program_runs():
    cfg = small.config(attention="cudnn", compute_dtype="bfloat16", head_dim=16)
    params = jax.eval_shape(lambda: small.params(cfg))
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    text = lowered(lambda params, ids: small.apply(cfg, params, ids), params, ids)
    assert [(name, config["mask_type"]) for name, config, _ in calls(text)] == [("fmhaSoftmax", "CAUSAL")]
    assert f"{T}x{T}" not in text


class Gpu:
    device_kind, platform = "NVIDIA H100", "gpu"

    def __init__(self, capability):
        self.compute_capability = capability


def chosen(monkeypatch, capability="9.0", agrees=True, documents=True, length=T, mesh=None, **changes):
    """The form that `attention="auto"` takes on a GPU."""
    right = agrees if callable(agrees) else lambda form, **_: agrees
    monkeypatch.setattr(cudnn, "device", lambda: Gpu(capability) if capability else None)
    monkeypatch.setattr(cudnn_check, "agrees", right)
    cfg = small.config(**{"attention": "auto", "compute_dtype": "bfloat16", "head_dim": 16, **changes})
    with jax.sharding.use_abstract_mesh(mesh or gpus()):
        return attention.cudnn_form(cfg, 2, length, documents)


def test_auto_chooses_by_platform_dtype_shape_and_what_agrees(monkeypatch):
    assert chosen(monkeypatch) == "packed"
    assert chosen(monkeypatch, documents=False) == "causal"
    assert chosen(monkeypatch, capability="8.0") == "bias"
    assert chosen(monkeypatch, agrees=lambda form, **_: form != "packed") == "bias"
    # On a machine that has no GPU, in float32, in odd lengths or widths, on split windows, and where it is wrong.
    assert chosen(monkeypatch, capability=None) is None
    assert chosen(monkeypatch, compute_dtype="float32") is None
    assert chosen(monkeypatch, length=100) is None
    assert chosen(monkeypatch, head_dim=12) is None
    assert chosen(monkeypatch, mesh=gpus(sequence=2)) is None
    assert chosen(monkeypatch, agrees=lambda form, **_: form == "packed") is None
    assert chosen(monkeypatch, attention="plain") is None
    monkeypatch.undo()
    assert attention.cudnn_form(small.config(attention="auto", compute_dtype="bfloat16"), 2, T, True) is None


def test_auto_is_cudnn_where_the_mesh_has_gpus_and_not_where_it_has_tpus(monkeypatch):
    chosen(monkeypatch)
    tpu = AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
    tpus = AbstractMesh((1,) * 4, MESH_AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=tpu)
    assert chosen(monkeypatch, mesh=tpus) is None


@on_cpu
@pytest.mark.parametrize(
    ("changes", "mesh", "message"),
    [
        ({"compute_dtype": "float32"}, gpus(), "bfloat16 or float16, not in float32"),
        ({"head_dim": 12}, gpus(), "multiples of 8 and at most 256 wide, not 12"),
        ({}, gpus(sequence=2), "MeshConfig.sequence splits them"),
        ({}, None, "needs NVIDIA GPUs, and the devices here are of the platform 'cpu'"),
    ],
)
def test_what_it_cannot_compute_is_refused(changes, mesh, message):
    cfg = small.config(**{"attention": "cudnn", "compute_dtype": "bfloat16", "head_dim": 16, **changes})
    with pytest.raises(ValueError, match=message):
        if mesh is None:
            attention.see(cfg, (2, T), None)
        else:
            with jax.sharding.use_abstract_mesh(mesh):
                attention.see(cfg, (2, T), None)


@on_cpu
def test_a_form_that_is_wrong_on_this_gpu_is_not_used(monkeypatch, without_gpu):
    monkeypatch.setattr(cudnn, "device", lambda: jax.devices("cpu")[0])
    heads = dict(dtype="bfloat16", head_dim=24, heads=2, kv_heads=1, windowed=False)

    @jax.jit
    def during_a_trace(x):
        assert cudnn_check.agrees("packed", **heads)  # computed, although a program is being traced
        return x

    during_a_trace(1.0)
    right = cudnn._pack
    monkeypatch.setattr(cudnn, "_pack", lambda s: right(s)._replace(lengths_BM=right(s).lengths_BM - 1))
    cudnn_check.agrees.cache_clear()
    with pytest.warns(UserWarning, match="not used in the form 'packed' for 2 heads .* differs .* by"):
        assert not cudnn_check.agrees("packed", **heads)

    def fails(*_, **__):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(jax.ffi, "ffi_call", fails)
    with pytest.warns(UserWarning, match="it failed: CUDNN_STATUS_NOT_SUPPORTED"):
        assert not cudnn_check.agrees("causal", **heads)
    cudnn_check.agrees.cache_clear()
