"""Models given back to `transformers`: as they came, grown, trained, and our own; and what is not written out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from flm_jax import train as training
from flm_jax.checkpoint import DamagedError, manifest
from flm_jax.checkpoint_growth import grow_checkpoint, verify_checkpoints
from flm_jax.convert import exporting
from flm_jax.convert.exporting import export_model
from flm_jax.convert.importing import import_model
from flm_jax.convert.tensors import open_shards
from flm_jax.data.train_vocabulary import Pretrained
from flm_jax.data.vocabulary import ByteVocabulary
from flm_jax.growth import Growth, grow, grown_config
from flm_jax.growth.plan import changed
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Stage
from flm_jax.source_checkpoint import model_of, read_source
from tests import hub, small
from tests.growing import relative
from tests.hub import MODELS, TOKENS, VOCAB, edit, keep, loaded, logits_of, our_logits, read, theirs
from tests.runs import RUN, recipe_of

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_in_comes_out_bit_for_bit(name, imported, tmp_path):
    reference, base = imported(name)
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


GROWN = {
    "Llama": dict(embed=60, layers=4, heads=6, mlp=100),
    "Llama, tied": dict(embed=60, layers=5, heads=6, mlp=100),
    "Llama 3.1": dict(embed=60, head_dim=20),
    "Mistral, sliding window": dict(embed=50, layers=4, heads=8),
    "Qwen2, tied": dict(embed=60, head_dim=16, heads=6, layers=4),
    "Qwen3": dict(embed=60, heads=6, layers=4),
    "Qwen3, tied, scaled": dict(embed=72, mlp=90),
    "Granite": dict(embed=60, layers=5, heads=6, head_dim=16),
    "Granite, tied": dict(embed=72, layers=4, mlp=90),
}


@pytest.mark.parametrize("method", ["zero", "copy"])
@pytest.mark.parametrize("name", GROWN)
def test_a_grown_model_computes_the_same_elsewhere_too(name, method, imported, tmp_path):
    """Kept widths are folded: transformers knows none."""
    reference, base = imported(name)
    changes = dict(GROWN[name])
    if method == "copy":
        changes.pop("head_dim", None)
    plan = Growth("zero", methods=dict.fromkeys(["embed", "heads", "kv_heads", "mlp"], method))
    cfg, params = read(base / "checkpoint")
    new = grown_config(cfg, changed(cfg, changes, plan), plan)
    grown = jax.jit(lambda p: grow(p, cfg, new, plan, jax.random.key(1)))(params)
    granite = name == "Granite"  # the tied one is written as a Llama
    export_model(keep(tmp_path, new, grown), tmp_path / "out", "GraniteForCausalLM" if granite else None)
    again = loaded(tmp_path / "out")
    assert relative(logits_of(reference, TOKENS), logits_of(again, TOKENS)) < 1e-5
    kept = ("embedding_multiplier", "residual_multiplier", "logits_scaling") if granite else ()
    assert [getattr(again.config, field) for field in kept] == [getattr(reference.config, field) for field in kept]
    assert sum(value.numel() for value in again.parameters()) > sum(value.numel() for value in reference.parameters())


def test_a_converted_checkpoint_grows_by_the_launchers_way_in_memory_and_streamed(imported, tmp_path):
    reference, base = imported("Qwen2, tied")
    digests = []
    for streamed in (False, True):
        grow_checkpoint(
            base / "checkpoint", tmp_path / f"{streamed}", GROWN["Qwen2, tied"], Growth(), streamed=streamed
        )
        source = read_source(tmp_path / f"{streamed}")
        assert not source.trained
        assert source.files == read_source(base / "checkpoint").files
        digests.append(source.digest)
    assert digests[0] == digests[1]
    assert verify_checkpoints(base / "checkpoint", tmp_path / "True")["holds"]
    export_model(tmp_path / "True", tmp_path / "out")
    assert relative(logits_of(reference, TOKENS), logits_of(loaded(tmp_path / "out"), TOKENS)) < 1e-5


def test_while_masks_rise_nothing_is_written_out(imported, tmp_path):
    _, base = imported("Qwen3")
    plan = Growth("zero", methods={"head_dim": "mask"}, ramp_steps=4)
    cfg = read(base / "checkpoint")[0]
    new = grown_config(cfg, changed(cfg, dict(head_dim=20), plan), plan)
    source = read_source(keep(tmp_path, new, small.params(new), before=cfg, growth=plan))
    assert source.meta.ramp_steps == 4
    with pytest.raises(ValueError, match="masks rise over 4 steps: take a later checkpoint"):
        export_model(source.directory, tmp_path / "out")


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
        (dict(residual_mult=0.4, base_layers=3, attention_mult=0.6, head_width=6.0), "Llama"),
    ],
    ids=[
        "plain",
        "tied",
        "kept widths",
        "a width that heads do not divide",
        "biases",
        "norms of queries and keys",
        "multipliers in blocks",
    ],
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


def test_as_granite_all_multipliers_stay_and_as_llama_none(imported, tmp_path):
    workdir = ours(tmp_path, residual_mult=0.4, base_layers=3, attention_mult=0.6, head_width=6.0)
    found = export_model(workdir, tmp_path / "out", architecture="GraniteForCausalLM")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    said = [config[f"{name}_multiplier"] for name in ("embedding", "residual", "attention")]
    assert said == pytest.approx([3.0, 0.4 * 3 / 2, 0.6 / 6**0.5])
    assert config["logits_scaling"] == pytest.approx(24 / 16 / 0.5)
    assert found["folded"] == 0
    assert relative(our_logits(workdir, TOKENS), logits_of(loaded(tmp_path / "out"), TOKENS)) < 1e-5
    reference, base = imported("Granite")
    found = export_model(base / "checkpoint", tmp_path / "llama", architecture="LlamaForCausalLM")
    assert found["folded"] == 5  # the embedding, the head; queries, out, down
    again = loaded(tmp_path / "llama")
    assert not [name for name in vars(again.config) if "multiplier" in name or name == "logits_scaling"]
    assert relative(logits_of(reference, TOKENS), logits_of(again, TOKENS)) < 1e-5


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


def test_matrices_are_written_in_any_number_of_pieces(imported, tmp_path, monkeypatch):
    _, base = imported("Qwen2")
    monkeypatch.setattr(exporting, "READ_BYTES", 900)
    # One chunk a parameter, as a run or a growth in memory leaves it, and the chunks of an import.
    cfg, params = read(base / "checkpoint")
    for number, source in enumerate((base / "checkpoint", keep(tmp_path, cfg, params))):
        export_model(source, tmp_path / f"{number}", architecture="Qwen2ForCausalLM")
        before, after = open_shards(base / "in"), open_shards(tmp_path / f"{number}")
        assert all(value.read().tobytes() == after[name].read().tobytes() for name, value in before.items())


def test_what_a_configuration_said_before_does_not_contradict_what_it_says_now(imported, tmp_path):
    _, base = imported("Qwen3, sliding window")
    folder = edit(base, tmp_path, dtype="float16", rope_parameters=dict(rope_type="default", rope_theta=5e5))
    import_model(folder, tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"dtype", "rope_parameters", "layer_types", "auto_map"} & config.keys()
    assert (config["rope_theta"], config["torch_dtype"], config["sliding_window"]) == (5e5, "float32", 9)


def test_an_architecture_that_lacks_or_wants_something_is_refused(imported, tmp_path):
    for name, asked, message in (
        ("Llama", "Qwen2ForCausalLM", "Qwen2ForCausalLM cannot hold a model with qkv_bias=False"),
        ("Qwen3", "LlamaForCausalLM", "LlamaForCausalLM cannot hold a model with qk_norm=True"),
        ("Llama", "GPT2LMHeadModel", "'GPT2LMHeadModel' is not known; use one of Llama"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(imported(name)[1] / "checkpoint", tmp_path / "out", architecture=asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hashed", [True, False], ids=["small files", "large files"])
def test_a_checkpoint_whose_bits_have_changed_is_not_written_out(hashed, imported, tmp_path, monkeypatch):
    """Large files have no checksum of their own: the values have."""
    _, base = imported("Llama")
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
    result = training.train(recipe_of(tokenised, *stages, start=start), RUN, tmp_path / "run")
    assert result["growths"][0]["max_rel_logit_diff"] < 1e-5
    assert (tmp_path / "run" / "loss.png").is_file()
    source = read_source(tmp_path / "run")
    assert source.trained
    assert source.files == read_source(start).files
    # Trained on other tokens, its ids would mean other texts to the tokenizer that it came with.
    assert sorted(source.files_with(ByteVocabulary())) == ["config.json", "vocabulary.json"]
    export_model(tmp_path / "run", tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert relative(our_logits(tmp_path / "run", TOKENS), logits_of(again, TOKENS)) < 1e-5
    assert relative(logits_of(reference, TOKENS), logits_of(again, TOKENS)) > 1e-3
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("the small model")["input_ids"]) == "the small model"
