"""Models that were made by hand: links, absurd sizes, weights that are not finite, files out of place."""

import os
import shutil
import time

import ml_dtypes
import numpy as np
import pytest

from flm_jax.checkpoint import Checkpoints
from flm_jax.convert.exporting import export_model
from flm_jax.convert.importing import examine, import_model
from flm_jax.convert.pieces import check_finite
from flm_jax.convert.tensors import FormatError
from flm_jax.growth.lineage import Lineage
from flm_jax.source_checkpoint import CheckpointMeta, read_source
from tests import foreign, small


@pytest.fixture
def folder(tmp_path):
    return foreign.write(tmp_path / "in", tokenizer=False)


def test_a_directory_is_examined(folder):
    cfg, config, found, files = examine(folder)
    assert (cfg.layers, len(found), set(files)) == (2, 21, {"config.json"})


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "config.json", "model.safetensors"])
def test_a_link_that_leads_out_of_the_directory_is_refused(folder, tmp_path, name):
    outside = tmp_path / "private"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("{}")
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of its directory, to {outside}"):
        examine(folder)
    shutil.copy(outside, folder / "inside")
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    if name == "tokenizer.json":
        with pytest.raises(ValueError, match="not a tokenizer"):  # it is read, and found to be none
            examine(folder)
    else:
        examine(folder)


def test_a_dangling_link_is_refused(folder):
    (folder / "NOTICE").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="NOTICE"):
        examine(folder)


def test_a_cache_of_the_hub_is_read_through_its_links(tmp_path):
    """Every file of a snapshot is a link to ../../blobs, and the snapshot may itself be reached by a link."""
    made = foreign.write(tmp_path / "made", shard_bytes=6000, tokenizer=True)
    model = tmp_path / "models--me--tiny"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(made.iterdir())):
        path.rename(model / "blobs" / f"{number:040}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040}")
    (tmp_path / "link").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "link"):
        assert "tokenizer.json" in examine(source)[3]
    (model / "private").write_text("s")
    (snapshot / "LICENSE").symlink_to("../../private")
    with pytest.raises(FormatError, match="LICENSE is a link that leads out"):
        examine(snapshot)


def test_files_that_the_models_of_a_cache_share_are_read_and_nothing_else_beside_them(tmp_path):
    """The hub's cache may keep a blob in a store for all models, where its name is the sum of its content."""
    made = foreign.write(tmp_path / "made")
    snapshot, shared = tmp_path / "models--me--tiny" / "snapshots" / "0123abc", tmp_path / "blobs"
    for folder in (snapshot, snapshot.parents[1] / "blobs", shared / "ab"):
        folder.mkdir(parents=True)
    (made / "model.safetensors").rename(shared / "ab" / ("ab" * 32))
    (snapshot.parents[1] / "blobs" / "1").symlink_to("../../blobs/ab/" + "ab" * 32)
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    for path in made.iterdir():
        path.rename(snapshot / path.name)
    with pytest.raises(FormatError, match="model.safetensors is a link that leads out"):  # it is no such store yet
        examine(snapshot)
    (shared / ".huggingface-shared-blobs").write_text("1\n")
    assert "tokenizer.json" in examine(snapshot)[3]
    for place in ("ab/private", "ab" * 32):
        (shared / place).write_text("s")
        (snapshot / "LICENSE").unlink(missing_ok=True)
        (snapshot / "LICENSE").symlink_to(f"../../../blobs/{place}")
        with pytest.raises(FormatError, match="LICENSE is a link that leads out"):
            examine(snapshot)


@pytest.mark.parametrize("name", ["LICENSE", "config.json"])
def test_what_has_no_end_is_not_read(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*not a regular file"):
        examine(folder)


ABSURD = {
    "num_hidden_layers": (10**6, "describes 1,000,000 layers, but the files hold only 21 tensors"),
    "hidden_size": (10**6, "hidden_size is 1000000, but no tensor in the files is longer than 304"),
    "intermediate_size": (10**9, "intermediate_size is 1000000000, but no tensor in the files is longer than 304"),
    "vocab_size": (2**31 - 1, "vocab_size is 2147483647, but no tensor in the files is longer than 304"),
    "head_dim": (10**8, "describes a model of more than .* weights, but the files hold only"),
    "num_attention_heads": (2 * 10**8, "describes a model of more than .* weights, but the files hold only"),
}


@pytest.mark.parametrize("size", ["much", "absurd"])
@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_are_refused_at_once(folder, name, size):
    value, message = ABSURD[name] if size == "much" else (10**30, f"{name} is 10+; it must be a positive integer")
    foreign.change_json(folder / "config.json", **{name: value})
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        examine(folder)
    assert time.process_time() - began < 1


def test_layers_by_the_million_with_windows_in_some_are_refused_at_once(folder):
    changes = dict(architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=5)
    foreign.change_json(folder / "config.json", num_hidden_layers=2**31 - 1, max_window_layers=3, **changes)
    with pytest.raises(ValueError, match=r"different kinds of attention \(full_attention, sliding_attention\)"):
        examine(folder)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rope_scaling={**LLAMA3, "factor": float("nan")}), "holds the number NaN, and only finite numbers"),
        (dict(rope_theta=float("inf")), "holds the number Infinity"),
        (dict(rope_scaling={**LLAMA3, "factor": 10**400}), "factor is 10+; it must be a positive number"),
        (dict(rope_scaling={**LLAMA3, "factor": True}), "factor is True; it must be a positive number"),
        (dict(rope_theta=10**400), "rope_theta is 10+; it must be a positive number"),
        (dict(architectures=5), "architectures is 5; it must be: list"),
        (dict(architectures=[["LlamaForCausalLM"]]), "an entry of architectures is .*; it must be: text"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'; it must be: true or false"),
        (dict(max_position_embeddings="long"), "max_position_embeddings is 'long'; it must be a positive integer"),
        (dict(architectures=["MistralForCausalLM"], sliding_window=[5]), r"sliding_window is \[5\]; it must be"),
        (dict(architectures=["MistralForCausalLM"], sliding_window=5, layer_types=5), "layer_types is 5; it must be"),
    ],
)
def test_wrong_values_in_a_configuration_are_refused(folder, changes, message):
    foreign.change_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        examine(folder)


def test_a_number_that_is_too_large_for_a_float_is_refused(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 1e999'))
    with pytest.raises(ValueError, match="holds the number 1e999, and only finite numbers are allowed"):
        examine(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_found_in_every_dtype(dtype, bad):
    values = np.array([[0.0, -1.5, np.finfo(np.float16).max, 1e-6]] * 3).astype(dtype)
    check_finite(values, "w", "file")
    values[1, 2] = bad
    with pytest.raises(ValueError, match="file: w has weights that are NaN or infinite, 1 of 12"):
        check_finite(values, "w", "file")


def test_weights_that_are_not_finite_do_not_come_in(tmp_path):
    values = foreign.weights()
    values["model.layers.1.mlp.down_proj.weight"][3, 4] = np.nan
    folder = foreign.write(tmp_path / "in", values=values, tokenizer=False)
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.1\.mlp\.down_proj\.weight has weights"):
        import_model(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A checkpoint with blobs that have the names of what an export writes itself, and of a program."""
    directory = tmp_path_factory.mktemp("planted") / "0_planted"
    names = ("model.safetensors", "model.safetensors.index.json", "run.py", "data", "config.json", "LICENSE")
    params = small.params(foreign.CFG)
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[2].set(np.inf)
    with Checkpoints(directory, keep=2) as checkpoints:
        for step, values in ((0, small.params(foreign.CFG)), (1, params)):
            meta = CheckpointMeta("planted", Lineage(foreign.CFG)).record()
            state = {"step": np.zeros((), np.int32), "params": values}
            checkpoints.save(step, state, meta=meta, blobs=dict.fromkeys(names, b"{}"))
    return directory


def test_an_export_writes_its_own_files_and_those_of_a_model(planted, tmp_path):
    found = export_model(planted / "0", tmp_path / "out")
    names = ["LICENSE", "config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1000
    assert found["files"] == ["config.json", "LICENSE"]
    import_model(tmp_path / "out", tmp_path / "back")
    assert read_source(tmp_path / "back").cfg.sizes == foreign.CFG.sizes


def test_weights_that_are_not_finite_do_not_go_out(planted, tmp_path):
    with pytest.raises(ValueError, match=r"0_planted/1, params/final_norm/scale: model\.norm\.weight|final_norm"):
        export_model(planted / "1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="NaN or infinite"):
        export_model(planted / "1", tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())
