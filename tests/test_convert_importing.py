"""Models of the Llama family taken in: they compute what `transformers` computes; what is not supported is refused."""

import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flm_jax.checkpoint import CheckpointError, blocks
from flm_jax.checkpoint_growth import grow_checkpoint
from flm_jax.config import RopeScaling
from flm_jax.convert import importing
from flm_jax.convert.exporting import export_model
from flm_jax.convert.importing import import_model
from flm_jax.convert.tensors import SINGLE, open_shards, save
from flm_jax.generation import decode
from flm_jax.growth import Growth
from flm_jax.source_checkpoint import model_of, read_source
from tests.growing import relative
from tests.hub import LLAMA3, MODELS, TOKENS, VOCAB, edit, loaded, logits_of, our_logits, read, theirs

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_theirs_and_so_is_the_continuation(name, imported):
    reference, base = imported(name)
    expected = logits_of(reference, TOKENS)
    assert relative(expected, our_logits(base / "checkpoint", TOKENS)) < 1e-5
    cfg, params = read(base / "checkpoint")
    prompt = TOKENS[:, :9]
    ours = np.asarray(decode.continued(cfg.for_comparison, params, jnp.asarray(prompt, jnp.int32), 20))
    # Each token is the likeliest by their logits, up to ties: two of a random model may differ by less than rounding.
    theirs = np.asarray(logits_of(reference, np.concatenate([prompt, ours], axis=1)))[:, 8:-1]
    chosen = np.take_along_axis(theirs, ours[..., None], axis=-1)
    np.testing.assert_allclose(chosen, theirs.max(axis=-1, keepdims=True), rtol=0, atol=1e-5 * np.abs(theirs).max())


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


def test_the_configuration_of_a_checkpoint_need_not_be_repeated(imported):
    _, base = imported("Llama 3.1")
    cfg = model_of(str(base / "checkpoint"), {"embed": 60, "heads": 8})
    assert (cfg.embed, cfg.heads, cfg.k_heads, cfg.h_dim) == (60, 8, 4, 16)
    assert cfg.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 16)
    with pytest.raises(ValueError, match="no field width; its fields are embed, layers"):
        model_of(str(base / "checkpoint"), {"width": 60})


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
def test_what_is_not_supported_is_refused_by_its_name(name, changes, message, imported, tmp_path):
    _, base = imported(name)
    with pytest.raises(ValueError, match=message):
        import_model(edit(base, tmp_path, **changes), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_tied_matrix_may_be_there_twice_if_it_is_the_same(imported, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, base = imported("Llama, tied")
    folder = edit(base, tmp_path)
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / SINGLE)
    import_model(folder, tmp_path / "checkpoint")
    assert read_source(tmp_path / "checkpoint").digest == read_source(base / "checkpoint").digest


def test_a_tied_matrix_that_differs_at_its_end_is_seen(imported, tmp_path, monkeypatch):
    from safetensors.numpy import load_file, save_file

    _, base = imported("Llama, tied")
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
def test_weights_of_other_kinds_are_refused(kind, dtype, message, imported, tmp_path):
    _, base = imported("Llama")
    folder = edit(base, tmp_path)
    tensors = {name: value.read() for name, value in open_shards(folder).items()}
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(jnp.dtype(kind))
    (folder / SINGLE).unlink()
    save(folder, tensors, lambda name, out: np.copyto(out, tensors[name]))
    with pytest.raises(ValueError, match=message):
        import_model(folder, tmp_path / "checkpoint", dtype)


def test_without_room_nothing_is_begun(imported, tmp_path, monkeypatch):
    _, base = imported("Llama")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="has room for 1e-06 GB, and .* GB are needed"):
        import_model(base / "in", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="has room for 1e-06 GB, and .* GB are needed"):
        export_model(base / "checkpoint", tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_a_disk_that_fails_half_way_leaves_no_checkpoint(imported, tmp_path, monkeypatch):
    _, base = imported("Llama")
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


def test_old_files_that_keep_frequencies_are_read(imported, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, base = imported("Llama")
    folder = edit(base, tmp_path)
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(3)}
    save_file({**load_file(folder / SINGLE), **extra}, folder / SINGLE)
    import_model(folder, tmp_path / "checkpoint")
    assert read_source(tmp_path / "checkpoint").digest == read_source(base / "checkpoint").digest


def tokenizer(size):
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))


def test_the_tokenizer_goes_along_and_must_fit(imported, tmp_path):
    reference, base = imported("Llama")
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
def test_damaged_files_leave_nothing(where, imported, tmp_path):
    _, base = imported("Llama")
    folder = edit(base, tmp_path)
    file = folder / (SINGLE if where != "config" else "config.json")
    data = file.read_bytes()
    damaged, message = {
        "config": (data[:-5], "config.json cannot be read"),
        "cut": (data[:-100], r"model.safetensors \([\d,]+ bytes\) is damaged, cut short or no safetensors file"),
        "header": ((10**6).to_bytes(8, "little") + data[8:], "is damaged, cut short or no safetensors file"),
    }[where]
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
        import_model(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_nothing_is_written_over(imported, tmp_path):
    _, base = imported("Llama")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="used is not empty; convert into a new directory"):
        import_model(base / "in", tmp_path / "used")
    with pytest.raises(ValueError, match="used is not empty; export into a new directory"):
        export_model(base / "checkpoint", tmp_path / "used")
    with pytest.raises(ValueError, match="checkpoint is not empty"):
        import_model(base / "in", base / "checkpoint")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine.txt"]


def test_an_import_that_was_killed_is_begun_again(imported, tmp_path):
    _, base = imported("Llama")
    left = tmp_path / "checkpoint" / "checkpoints" / "0_converted" / "0.partial" / "arrays"
    left.mkdir(parents=True)
    (left / "some").write_text("left")
    import_model(base / "in", tmp_path / "checkpoint")
    assert read_source(tmp_path / "checkpoint").digest == read_source(base / "checkpoint").digest
