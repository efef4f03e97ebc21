"""Models of the Llama family in and out, against `transformers`, which computes them with none of our code."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from flm_jax import train as training
from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, blocks, manifest
from flm_jax.checkpoint_growth import grow_checkpoint, verify_checkpoints
from flm_jax.config import ModelConfig, RopeScaling
from flm_jax.convert import exporting, families, importing
from flm_jax.convert.exporting import export_model
from flm_jax.convert.importing import import_model
from flm_jax.convert.layout import parts
from flm_jax.convert.tensors import SINGLE, open_shards, save
from flm_jax.data.train_vocabulary import Pretrained
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.generate import generate
from flm_jax.growth import Growth, Lineage, grow, grown_config
from flm_jax.growth.plan import changed
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.sharding import MeshConfig, make_mesh
from flm_jax.source_checkpoint import CheckpointMeta, model_of, read_source
from tests import hub, small

pytestmark = pytest.mark.integration

VOCAB = 97
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MODELS = {
    "Llama": ("Llama", {}),
    "Llama, every key head its own": ("Llama", dict(num_key_value_heads=4)),
    "Llama, tied": ("Llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "Llama, wide heads": ("Llama", dict(head_dim=16)),
    "Llama 3.1": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "Mistral": ("Mistral", dict(sliding_window=None)),
    "Mistral, sliding window": ("Mistral", dict(sliding_window=7, tie_word_embeddings=True)),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, tied": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "Qwen2, sliding window": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "Qwen3": ("Qwen3", dict(head_dim=16)),
    "Qwen3, tied, scaled": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "Qwen3, sliding window": (
        "Qwen3",
        dict(head_dim=16, use_sliding_window=True, sliding_window=9, max_window_layers=0),
    ),
}


def theirs(family, fields, dtype="float32"):
    """A model with random weights, norms and biases among them."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **fields})
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if value.ndim == 1:
                value.copy_(torch.rand_like(value) + (0.5 if "norm" in name else -0.5))
    return made


def logits_of(made, tokens):
    with torch.no_grad():
        return made(torch.tensor(tokens)).logits.to(torch.float32).numpy()


def read(workdir):
    origin = read_source(workdir)
    mesh = make_mesh(None, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return origin.cfg, origin.restore(mesh).params


def our_logits(workdir, tokens):
    cfg, params = read(workdir)
    return np.asarray(small.apply(cfg.for_comparison, params, jnp.asarray(tokens, jnp.int32)))


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def relative(a, b):
    return np.abs(a - b).max() / np.abs(a).max()


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 40))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By name: the model, its directory, and the checkpoint that it becomes; each made once."""
    made = {}

    def one(name):
        if name not in made:
            family, fields = MODELS[name]
            base = tmp_path_factory.mktemp(family)
            reference = theirs(family, fields)
            reference.save_pretrained(base / "in")
            import_model(base / "in", base / "checkpoint", chunk_bytes=3000)
            made[name] = reference, base
        return made[name]

    return one


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_theirs_and_so_is_the_continuation(name, saved):
    reference, base = saved(name)
    expected = logits_of(reference, TOKENS)
    assert relative(expected, our_logits(base / "checkpoint", TOKENS)) < 1e-5
    cfg, params = read(base / "checkpoint")
    prompt = TOKENS[:, :9]
    given = dict(attention_mask=torch.ones(prompt.shape, dtype=torch.long), eos_token_id=None, pad_token_id=0)
    continued = reference.generate(torch.tensor(prompt), max_new_tokens=20, do_sample=False, **given)
    ours = generate(cfg.for_comparison, params, jnp.asarray(prompt, jnp.int32), 20, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(ours, continued[:, 9:].numpy())


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_in_comes_out_bit_for_bit(name, saved, tmp_path):
    reference, base = saved(name)
    found = export_model(base / "checkpoint", tmp_path / "out", shard_bytes=60_000)
    assert found["folded"] == 0
    before, after = open_shards(base / "in"), open_shards(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        assert (value.dtype, value.shape) == (after[tensor].dtype, after[tensor].shape)
        assert value.read().tobytes() == after[tensor].read().tobytes(), tensor
    again = loaded(tmp_path / "out")
    assert type(again) is type(reference)
    np.testing.assert_array_equal(logits_of(again, TOKENS), logits_of(reference, TOKENS))
    # And what decides nothing of the forward pass is as it was.
    for field in ("bos_token_id", "eos_token_id", "max_position_embeddings", "initializer_range"):
        assert getattr(again.config, field) == getattr(reference.config, field)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_stay_sixteen_bits_or_are_widened_and_narrowed_again(dtype, tmp_path):
    reference = theirs("Llama", {}, dtype)
    reference.save_pretrained(tmp_path / "in")
    for kept in (None, "float32"):
        found = import_model(tmp_path / "in", tmp_path / f"{kept}", dtype=kept)
        assert found["dtype"] == (kept or dtype)
        export_model(tmp_path / f"{kept}", tmp_path / f"{kept}_out", dtype=dtype)
        before, after = open_shards(tmp_path / "in"), open_shards(tmp_path / f"{kept}_out")
        assert all(value.read().tobytes() == after[name].read().tobytes() for name, value in before.items())
        again = loaded(tmp_path / f"{kept}_out")
        assert again.dtype == getattr(torch, dtype)
    # Weights of 16 bits, computed in 32.
    expected = logits_of(reference.to(torch.float32), TOKENS)
    assert relative(expected, our_logits(tmp_path / "None", TOKENS)) < 1e-5


GROWN = {
    "Llama": dict(embed=60, layers=4, heads=6, mlp=100),
    "Llama, tied": dict(embed=60, layers=5, heads=6, mlp=100),
    "Llama 3.1": dict(embed=60, head_dim=20),
    "Mistral, sliding window": dict(embed=50, layers=4, heads=8),
    "Qwen2, tied": dict(embed=60, head_dim=16, heads=6, layers=4),
    "Qwen3": dict(embed=60, heads=6, layers=4),
    "Qwen3, tied, scaled": dict(embed=72, mlp=90),
}


@pytest.mark.parametrize("method", ["zero", "copy"])
@pytest.mark.parametrize("name", GROWN)
def test_a_grown_model_computes_the_same_elsewhere_too(name, method, saved, tmp_path):
    """Kept widths are folded: transformers knows none."""
    reference, base = saved(name)
    changes = dict(GROWN[name])
    if method == "copy":
        changes.pop("head_dim", None)
    plan = Growth("zero", methods=dict.fromkeys(["embed", "heads", "kv_heads", "mlp"], method))
    cfg, params = read(base / "checkpoint")
    new = grown_config(cfg, changed(cfg, changes, plan), plan)
    grown = jax.jit(lambda p: grow(p, cfg, new, plan, jax.random.key(1)))(params)
    export_model(keep(tmp_path, new, grown), tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert relative(logits_of(reference, TOKENS), logits_of(again, TOKENS)) < 1e-5
    assert sum(value.numel() for value in again.parameters()) > sum(value.numel() for value in reference.parameters())


def test_a_converted_checkpoint_grows_by_the_launchers_way_in_memory_and_streamed(saved, tmp_path):
    reference, base = saved("Qwen2, tied")
    digests = []
    for streamed in (False, True):
        grow_checkpoint(
            base / "checkpoint", tmp_path / f"{streamed}", GROWN["Qwen2, tied"], Growth(), streamed=streamed
        )
        origin = read_source(tmp_path / f"{streamed}")
        assert not origin.trained
        assert origin.files == read_source(base / "checkpoint").files
        digests.append(origin.digest)
    assert digests[0] == digests[1]
    assert verify_checkpoints(base / "checkpoint", tmp_path / "True")["holds"]
    export_model(tmp_path / "True", tmp_path / "out")
    assert relative(logits_of(reference, TOKENS), logits_of(loaded(tmp_path / "out"), TOKENS)) < 1e-5


def test_while_masks_rise_nothing_is_written_out(saved, tmp_path):
    _, base = saved("Qwen3")
    plan = Growth("zero", methods={"head_dim": "mask"}, ramp_steps=4)
    cfg = read(base / "checkpoint")[0]
    new = grown_config(cfg, changed(cfg, dict(head_dim=20), plan), plan)
    origin = read_source(keep(tmp_path, new, small.params(new), before=cfg, growth=plan))
    assert origin.meta.ramp_steps == 4
    with pytest.raises(ValueError, match="masks rise over 4 steps: take a later checkpoint"):
        export_model(origin.directory, tmp_path / "out")


def keep(tmp_path, cfg, params, before=None, growth=None):
    """A checkpoint of weights, as a run or a growth leaves it."""
    lineage = Lineage(cfg) if before is None else Lineage(cfg, growth, Lineage(before))
    meta = CheckpointMeta("mine", lineage, data={"context": 128}).record()
    with Checkpoints(tmp_path / "mine" / "checkpoints" / "0_mine") as store:
        store.save(0, {"step": jnp.int32(0), "params": params}, meta=meta)
        store.wait()
    return tmp_path / "mine"


def ours(tmp_path, **fields):
    """A model of our own, multipliers and all."""
    cfg = small.config(vocab=VOCAB, input_mult=3.0, output_mult=0.5, **fields)
    return keep(tmp_path, cfg, small.params(cfg))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(), "Llama"),
        (dict(tied=True), "Llama"),
        (dict(norm_width=20.0, head_width=6.0), "Llama"),
        (dict(heads=5, kv_heads=5), "Mistral"),
        (dict(qkv_bias=True, tied=True), "Qwen2"),
        (dict(qk_norm=True, norm_width=20.0, head_width=6.0), "Qwen3"),
    ],
    ids=["plain", "tied", "kept widths", "a width that heads do not divide", "biases", "norms of queries and keys"],
)
def test_a_model_of_our_own_is_theirs_too(fields, expected, tmp_path):
    workdir = ours(tmp_path, **fields)
    found = export_model(workdir, tmp_path / "out")
    assert found["architecture"] == f"{expected}ForCausalLM"
    assert found["folded"]
    again = loaded(tmp_path / "out")
    assert relative(our_logits(workdir, TOKENS), logits_of(again, TOKENS)) < 1e-5
    assert again.config.max_position_embeddings == 128


def test_as_tele_flm_the_multipliers_stay_and_come_back(tmp_path):
    workdir = ours(tmp_path)
    found = export_model(workdir, tmp_path / "out", architecture="TeleFLMForCausalLM")
    assert found["folded"] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = {name: config[name] for name in ("use_mup", "input_mult", "output_mult", "mup_scale_factor")}
    assert said == {"use_mup": True, "input_mult": 3.0, "output_mult": 0.5, "mup_scale_factor": 1.5}
    import_model(tmp_path / "out", tmp_path / "again")
    np.testing.assert_array_equal(our_logits(workdir, TOKENS), our_logits(tmp_path / "again", TOKENS))
    # By Llama's forward pass between the two multipliers, which is what the released code computes.
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    inner = loaded(tmp_path / "out")
    with torch.no_grad():
        embedded = inner.model.embed_tokens(torch.tensor(TOKENS)) * 3.0
        logits = inner(inputs_embeds=embedded).logits * (0.5 / 1.5)
    assert relative(our_logits(workdir, TOKENS), logits.numpy()) < 1e-5


def test_the_published_multipliers_of_tele_flm():
    config = dict(
        architectures=["TeleFLMForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_teleflm.TeleFLM"},
        **(SHAPE | dict(hidden_size=20_480, num_attention_heads=160, num_key_value_heads=160)),
        use_mup=True,
        input_mult=1.0,
        output_mult=2.0,
        mup_scale_factor=80.0,
    )
    cfg = families.model_config(config, "config.json")
    assert (cfg.base_width, cfg.logits_mult) == (256, 0.025)
    assert families.model_config(config | dict(use_mup=False), "config.json").logits_mult == 1.0


def test_every_parameter_of_every_family_has_a_name_of_its_own():
    for family, fields in MODELS.values():
        config = getattr(transformers, f"{family}Config")(**{**SHAPE, **fields})
        cfg = families.model_config(
            {"architectures": [f"{family}ForCausalLM"], **json.loads(config.to_json_string())}, "config.json"
        )
        names = [part.name(lead) for part in parts(cfg) for lead in part.leads]
        with torch.device("meta"):
            made = transformers.AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(value.shape) for name, value in made.named_parameters()}
        assert len(names) == len(set(names))
        assert shapes == {part.name(lead): part.theirs for part in parts(cfg) for lead in part.leads}


def test_the_configuration_of_a_checkpoint_need_not_be_repeated(saved):
    _, base = saved("Llama 3.1")
    cfg = model_of(str(base / "checkpoint"), {"embed": 60, "heads": 8})
    assert (cfg.embed, cfg.heads, cfg.k_heads, cfg.h_dim) == (60, 8, 4, 16)
    assert cfg.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 16)
    with pytest.raises(ValueError, match="no width; its fields are embed, layers"):
        model_of(str(base / "checkpoint"), {"width": 60})


def edit(base, tmp_path, **changes):
    """A copy of a saved model whose config.json says something else."""
    shutil.copytree(base / "in", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "Llama",
            dict(architectures=["GPT2LMHeadModel"]),
            "names GPT2LMHeadModel as its architecture; supported are Llama",
        ),
        ("Llama", dict(architectures=["X"], auto_map={"a": "b"}), "Code that comes with a model .* is never run"),
        ("Llama", dict(architectures="absent"), "names nothing as its architecture"),
        ("Llama", dict(attention_bias=True), "attention_bias is True, which is not supported"),
        ("Llama", dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        ("Llama", dict(rope_parameters=dict(rope_theta="1e6")), "rope_theta is '1e6'; it must be a positive number"),
        ("Llama", dict(rms_norm_eps=-1.0), "rms_norm_eps is -1.0; it must be a positive number"),
        (
            "Llama",
            dict(rope_parameters=dict(rope_theta=5.0), rope_scaling=LLAMA3),
            "rope_parameters differ",
        ),
        ("Llama", dict(rope_scaling="linear"), "given as 'linear'; they must be one object of numbers"),
        ("Llama", dict(rope_parameters=dict(full_attention=LLAMA3)), "they must be one object of numbers"),
        (
            "Llama",
            dict(rope_parameters=dict(rope_theta=5.0, partial_rotary_factor=0.5)),
            "partial_rotary_factor is 0.5",
        ),
        ("Llama", dict(clip_qkv=8.0), "clip_qkv is 8.0, which is not supported; it must be absent"),
        ("Llama", dict(mlp_bias=True), "mlp_bias is True"),
        ("Llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
        ("Llama", dict(quantization_config={"quant_method": "gptq"}), "quantization_config is 'gptq'"),
        ("Llama", dict(hidden_size="absent"), "hidden_size is None; it must be a positive integer"),
        ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "scaled by 'yarn'; only 'llama3'"),
        ("Llama", dict(rope_parameters=dict(rope_type="llama3", factor=4.0)), "lacks low_freq_factor, high_freq"),
        ("Llama", dict(num_key_value_heads=3), "kv_heads=3 must divide heads=4"),
        (
            "Llama",
            dict(intermediate_size=96),
            r"down_proj.weight has shape \[48, 80\], but .* it must have \[48, 96\]",
        ),
        ("Llama", dict(vocab_size=98), r"embed_tokens.weight has shape \[97, 48\], but .* \[98, 48\] \(vocab -> embed"),
        ("Llama", dict(num_hidden_layers=4), "lacks 9 of the 39 tensors .*: model.layers.3"),
        ("Llama", dict(num_hidden_layers=2), "has 9 tensors that .* no place for: model.layers.2"),
        ("Llama", dict(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
        ("Qwen2", dict(architectures=["LlamaForCausalLM"]), "no place for: model.layers.0.self_attn.k_proj.bias"),
        (
            "Qwen2, sliding window",
            dict(max_window_layers=1, layer_types="absent"),
            r"layers have different kinds of attention \(full_attention, sliding_attention\)",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(name, changes, message, saved, tmp_path):
    _, base = saved(name)
    with pytest.raises(ValueError, match=message):
        import_model(edit(base, tmp_path, **changes), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_tied_matrix_may_be_there_twice_if_it_is_the_same(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, base = saved("Llama, tied")
    folder = edit(base, tmp_path)
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / SINGLE)
    import_model(folder, tmp_path / "checkpoint")
    assert read_source(tmp_path / "checkpoint").digest == read_source(base / "checkpoint").digest


def test_a_tied_matrix_that_differs_at_its_end_is_seen(saved, tmp_path, monkeypatch):
    from safetensors.numpy import load_file, save_file

    _, base = saved("Llama, tied")
    folder = edit(base, tmp_path)
    tensors = load_file(folder / SINGLE)
    other = tensors["model.embed_tokens.weight"].copy()
    other[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": other}, folder / SINGLE)
    monkeypatch.setattr(importing, "CHUNK_BYTES", 1000)
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
        import_model(folder, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("kind", "dtype", "message"),
    [
        (np.int8, "float32", "q_proj.weight is int8; only weights of 16 bits or more are read"),
        ("float8_e4m3fn", "float32", "q_proj.weight is float8_e4m3fn; only weights of 16 bits or more"),
        (np.float16, None, "more than one dtype.*29 of float32, 1 of float16.*with --dtype"),
        (np.float32, "float64", "dtype='float64': use one of float32, bfloat16, float16"),
    ],
)
def test_weights_of_other_kinds_are_refused(kind, dtype, message, saved, tmp_path):
    _, base = saved("Llama")
    folder = edit(base, tmp_path)
    tensors = {name: value.read() for name, value in open_shards(folder).items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(jnp.dtype(kind))
    (folder / SINGLE).unlink()
    save(folder, tensors, lambda name, out: np.copyto(out, tensors[name]))
    with pytest.raises(ValueError, match=message):
        import_model(folder, tmp_path / "checkpoint", dtype)


def test_without_room_nothing_is_begun(saved, tmp_path, monkeypatch):
    _, base = saved("Llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="has room for 1e-06 GB, and .* GB are needed"):
        import_model(base / "in", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="has room for 1e-06 GB, and .* GB are needed"):
        export_model(base / "checkpoint", tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_disk_that_fails_half_way_leaves_no_checkpoint(saved, tmp_path, monkeypatch):
    _, base = saved("Llama")
    real, calls = blocks.write_chunk, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device", "some/chunk")
        real(*arguments)

    monkeypatch.setattr(blocks, "write_chunk", failing)
    with pytest.raises(CheckpointError, match="some/chunk: No space left on device. Nothing was left"):
        import_model(base / "in", tmp_path / "checkpoint")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_what_is_folded_is_rounded_once(tmp_path):
    """A head of 16 bits is multiplied in 32, and then rounded."""
    cfg = small.config(vocab=VOCAB, output_mult=0.7, param_dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.params(cfg))
    export_model(keep(tmp_path, cfg, params), tmp_path / "out")
    head = np.asarray(params["head"]).astype(np.float32) * np.float32(cfg.logits_mult)
    found = open_shards(tmp_path / "out")["lm_head.weight"].read()
    np.testing.assert_array_equal(found, head.T.astype(found.dtype))
    assert found.dtype == jnp.bfloat16


def test_what_float16_cannot_hold_is_refused_by_name(tmp_path):
    cfg = small.config(vocab=VOCAB)
    params = small.params(cfg)
    params["blocks"]["mlp"]["up"] = params["blocks"]["mlp"]["up"].at[1, 3, 5].set(1e5)
    workdir = keep(tmp_path, cfg, params)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight has weights above 65504, the largest float16"):
        export_model(workdir, tmp_path / "out", dtype="float16")
    export_model(workdir, tmp_path / "out")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight has weights above 65504, the largest float16"):
        import_model(tmp_path / "out", tmp_path / "again", dtype="float16")
    assert not [path for path in (tmp_path / "again").rglob("*") if path.is_file() and path.name != ".lock"]


def test_matrices_are_written_in_any_number_of_pieces(saved, tmp_path, monkeypatch):
    _, base = saved("Qwen2")
    monkeypatch.setattr(exporting, "READ_BYTES", 900)
    # One chunk a parameter, as a run or a growth in memory leaves it, and the chunks of an import.
    cfg, params = read(base / "checkpoint")
    for number, source in enumerate((base / "checkpoint", keep(tmp_path, cfg, params))):
        export_model(source, tmp_path / f"{number}", architecture="Qwen2ForCausalLM")
        before, after = open_shards(base / "in"), open_shards(tmp_path / f"{number}")
        assert all(value.read().tobytes() == after[name].read().tobytes() for name, value in before.items())


def test_what_a_configuration_said_before_does_not_contradict_what_it_says_now(saved, tmp_path):
    _, base = saved("Qwen3, sliding window")
    folder = edit(base, tmp_path, dtype="float16", rope_parameters=dict(rope_type="default", rope_theta=5e5))
    import_model(folder, tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"dtype", "rope_parameters", "layer_types", "auto_map"} & config.keys()
    assert (config["rope_theta"], config["torch_dtype"], config["sliding_window"]) == (5e5, "float32", 9)


def test_an_architecture_that_lacks_or_wants_something_is_refused(saved, tmp_path):
    for name, asked, message in (
        ("Llama", "Qwen2ForCausalLM", "Qwen2ForCausalLM cannot hold a model with qkv_bias=False"),
        ("Qwen3", "LlamaForCausalLM", "LlamaForCausalLM cannot hold a model with qk_norm=True"),
        ("Llama", "GPT2LMHeadModel", "'GPT2LMHeadModel' is not known; use one of Llama"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(saved(name)[1] / "checkpoint", tmp_path / "out", architecture=asked)
    assert not (tmp_path / "out").exists()


def test_old_files_that_keep_frequencies_are_read(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, base = saved("Llama")
    folder = edit(base, tmp_path)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(3)}
    save_file({**load_file(folder / SINGLE), **extra}, folder / SINGLE)
    import_model(folder, tmp_path / "checkpoint")
    assert read_source(tmp_path / "checkpoint").digest == read_source(base / "checkpoint").digest


def tokenizer(size):
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))


def test_the_tokenizer_goes_along_and_must_fit(saved, tmp_path):
    reference, base = saved("Llama")
    folder = edit(base, tmp_path)
    tokenizer(VOCAB - 5).save(str(folder / "tokenizer.json"))
    (folder / "modeling_mine.py").write_text("raise SystemExit('never run')")
    import_model(folder, tmp_path / "checkpoint")
    grow_checkpoint(tmp_path / "checkpoint", tmp_path / "grown", dict(mlp=100), Growth(), streamed=True)
    export_model(tmp_path / "grown", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "modeling_mine.py").exists()
    tokenizer(VOCAB + 3).save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="has 100 tokens, but the model's embedding only 97 rows"):
        import_model(folder, tmp_path / "other")


@pytest.mark.parametrize("where", ["config", "cut", "header"])
def test_damaged_files_leave_nothing(where, saved, tmp_path):
    _, base = saved("Llama")
    folder = edit(base, tmp_path)
    file = folder / (SINGLE if where != "config" else "config.json")
    data = file.read_bytes()
    damaged, message = {
        "config": (data[:-5], "config.json cannot be read"),
        "cut": (data[:-100], r"model.safetensors \(\d+ bytes\) is damaged, cut short or no safetensors file"),
        "header": ((10**6).to_bytes(8, "little") + data[8:], "is damaged, cut short or no safetensors file"),
    }[where]
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
        import_model(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_nothing_is_written_over(saved, tmp_path):
    _, base = saved("Llama")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="used is not empty; convert into a new directory"):
        import_model(base / "in", tmp_path / "used")
    with pytest.raises(ValueError, match="used is not empty; export into a new directory"):
        export_model(base / "checkpoint", tmp_path / "used")
    with pytest.raises(ValueError, match="checkpoint is not empty"):
        import_model(base / "in", base / "checkpoint")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


def test_an_import_that_was_killed_is_begun_again(saved, tmp_path):
    _, base = saved("Llama")
    left = tmp_path / "checkpoint" / "checkpoints" / "0_converted" / "0.partial" / "arrays"
    left.mkdir(parents=True)
    (left / "some").write_text("left")
    import_model(base / "in", tmp_path / "checkpoint")
    assert read_source(tmp_path / "checkpoint").digest == read_source(base / "checkpoint").digest


@pytest.mark.parametrize("hashed", [True, False], ids=["small files", "large files"])
def test_a_checkpoint_whose_bits_have_changed_is_not_written_out(hashed, saved, tmp_path, monkeypatch):
    """Large files have no checksum of their own: the values have."""
    _, base = saved("Llama")
    if not hashed:
        monkeypatch.setattr(manifest, "HASHED_BYTES", 0)
    import_model(base / "in", tmp_path / "checkpoint", chunk_bytes=3000)
    arrays = tmp_path / "checkpoint" / "checkpoints" / "0_converted" / "0" / "arrays"
    chunk = max((path for path in arrays.glob("params.*/*") if path.name[0].isdigit()), key=lambda p: p.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedError, match="does not match its sha256" if hashed else "have changed"):
        export_model(tmp_path / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configurations_say_what_they_mean_when_fields_are_left_out():
    """Real files leave out what is their family's default."""
    base = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    read = lambda family, **more: families.model_config(  # noqa: E731
        {"architectures": [f"{family}ForCausalLM"], **base, **more}, "config.json"
    )
    assert (read("Llama").k_heads, read("Llama").h_dim, read("Llama").norm_eps) == (4, 12, 1e-6)
    assert read("Mistral").sliding_window == 4096
    assert read("Mistral", sliding_window=None).sliding_window is None
    assert read("Qwen3").h_dim == 128
    assert read("Qwen2", sliding_window=5, max_window_layers=0).sliding_window is None
    assert read("Qwen2", use_sliding_window=True, max_window_layers=0).sliding_window == 4096
    assert read("Qwen3", use_sliding_window=True, max_window_layers=None).sliding_window is None  # 28 layers see all
    assert read("Llama", rope_theta=5e5).rope_theta == 5e5
    assert read("Llama", rope_theta=10**10).rope_theta == 1e10
    assert read("Llama", rope_scaling=None, rope_parameters=dict(rope_theta=7.0)).rope_theta == 7.0
    scaled = read("Llama", rope_theta=9.0, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
    assert (scaled.rope_theta, scaled.rope_scaling.factor) == (9.0, 8.0)


def test_no_field_of_a_model_is_forgotten_on_the_way_out():
    """A field that is added to the model must be folded, written, or refused."""
    known = {"embed", "layers", "heads", "mlp", "vocab", "kv_heads", "head_dim", "tied", "norm_eps", "rope_theta"}
    known |= {"rope_scaling", "norm_width", "head_width", "base_width", *families.SPECIAL}  # what decides the function
    known |= {"init_std", "init_std_vector", "compute_dtype", "param_dtype", "remat", "attention", "scan_unroll"}
    assert known == {field.name for field in dataclasses.fields(ModelConfig)}


def test_training_goes_on_from_a_converted_model_and_its_result_is_theirs(data, tmp_path):
    """In, grown at the start of a run, trained, and out, its tokenizer with it."""
    reference = theirs("Qwen2", dict(vocab_size=304, tie_word_embeddings=True))
    reference.save_pretrained(tmp_path / "in")
    hub.write_tokenizer(tmp_path / "in")
    import_model(tmp_path / "in", tmp_path / "checkpoint")
    start = str(tmp_path / "checkpoint")
    adamw = OptimizerConfig(learning_rate=1e-2)
    larger = model_of(start, dict(embed=64, mlp=96, heads=8, compute_dtype="float32", output_mult=1.0))
    stages = (Stage("larger", larger, 3, 8, adamw, Growth("copy", optimizer="exact")),)
    tokenised = dataclasses.replace(data, vocabulary=Pretrained(start))
    recipe = Recipe(stages=stages, data=tokenised, eval_windows=8, eval_every=4, start=start)
    run = Run(mesh=MeshConfig(fsdp=2, tensor=2), checkpoint_every=2, log_every=1, sample_tokens=4)
    result = training.train(recipe, run, tmp_path / "run")
    assert result["growths"][0]["max_rel_logit_diff"] < 1e-5
    assert (tmp_path / "run" / "loss.png").is_file()
    origin = read_source(tmp_path / "run")
    assert origin.trained
    assert origin.files == read_source(start).files
    # Trained on other tokens, its ids would mean other texts to the tokenizer that it came with.
    assert origin.files_with(ByteVocabulary()) == {"config.json": origin.files["config.json"]}
    export_model(tmp_path / "run", tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert relative(our_logits(tmp_path / "run", TOKENS), logits_of(again, TOKENS)) < 1e-5
    assert relative(logits_of(reference, TOKENS), logits_of(again, TOKENS)) > 1e-3
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("the small model")["input_ids"]) == "the small model"
