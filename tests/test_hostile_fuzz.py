"""Thousands of files changed at random, of every kind: each is read, or refused by one sentence of our own."""

import contextlib
import copy
import itertools
import json
import random
import shutil
import traceback
from pathlib import Path

import jax.numpy as jnp
import pytest

import flm_jax
from flm_jax.checkpoint import Checkpoints, manifest
from flm_jax.checkpoint_growth.journal import Journal
from flm_jax.checkpoint_growth.record import GrowthRecord
from flm_jax.cli.errors import EXPECTED
from flm_jax.convert import families, importing
from flm_jax.convert.exporting import _plain, _recorded
from flm_jax.convert.tensors import open_shards
from flm_jax.data.batches import pack_state, unpack_state
from flm_jax.data.config import DataConfig
from flm_jax.data.corpora import TextFolder
from flm_jax.data.rows import Jsonl
from flm_jax.data.source import recorded_data
from flm_jax.data.store import TokenStore
from flm_jax.data.store_record import render
from flm_jax.data.store_writer import StoreWriter
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.data.vocabulary import ByteVocabulary, TokenizerVocabulary
from flm_jax.evaluation.loaded import find_length
from flm_jax.files import sha256_json
from flm_jax.growth import Growth
from flm_jax.growth.lineage import Lineage
from flm_jax.optimizer import OptimizerConfig
from flm_jax.recipe import Recipe, Stage
from flm_jax.records import as_dict, check_identity
from flm_jax.records.foreign_json import parse_json
from flm_jax.report import _measured, read_history
from flm_jax.source_checkpoint import CheckpointMeta, read_source
from tests import foreign

HERE = str(Path(flm_jax.__file__).parent)
BYTES = [b"[" * 100_000, b'{"a":' * 100_000, b"", b"\xff", b"\0", b"null", b"9" * 5000, b"NaN", b'"\\ud800"']
VALUES = [None, True, False, 0, -1, 1, 3, 1.5, -0.0, 10**30, -(10**30), 10**400, 1e308, float("nan"), float("inf")]
VALUES += ["", "x", "1", "../x", "\0", "\ud800", [], {}, [[]], [{}], {"class": "Growth"}, {"class": []}, [0] * 99]


def nodes(value, found):
    """Every (container, key) of a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        nodes(value[key], found)
    return found


def changed(value, rng):
    """A copy of a JSON value with one or two places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2])):
        places = nodes(value, [])
        if not places:
            return rng.choice(VALUES)
        container, key = rng.choice(places)
        how = rng.random()
        if how < 0.65:
            container[key] = copy.deepcopy(rng.choice(VALUES))
        elif how < 0.75:
            del container[key]
        elif how < 0.8 and isinstance(container, dict):
            container[rng.choice(["", "x", "../x", "\0", "\ud800", "x" * 999])] = container.pop(key)
        elif how < 0.9:
            other, place = rng.choice(places)
            container[key] = copy.deepcopy(other[place])
        elif isinstance(container, dict):
            container["extra"] = rng.choice(VALUES)
        else:
            container.append(copy.deepcopy(rng.choice(VALUES)))
    return value


def damaged(raw, rng):
    """Bytes with one place changed, cut or filled."""
    at = rng.randrange(len(raw) + 1)
    how = rng.random()
    if how < 0.4 and at < len(raw):
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]
    if how < 0.6:
        return raw[:at]
    return raw[:at] + rng.choice(BYTES) + raw[at + rng.choice([0, 1, 7]) :]


def check(read, content, what):
    """Calls `read`; whatever it raises must be an expected error that our own code raised, in one sentence.

    Returns:
      Whether it was read.
    """
    try:
        read(content)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = isinstance(error, EXPECTED) and last.filename.startswith(HERE) and str(error)
        if not ours:
            raise AssertionError(f"{what}: {content if isinstance(content, bytes) else json.dumps(content)}") from error
        return False
    return True


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A step of a model that grew twice, with the blobs of an imported one; its arrays are of no use."""
    base = foreign.CFG
    wide = Lineage(base).grown(base.replace(mlp=20), Growth("zero"))
    lineage = wide.grown(wide.cfg.replace(layers=3), Growth("mask", ramp_steps=4))
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 32, "eos_token_id": 1}
    history = {
        "evals": [{"stage": "s", "step": 0, "tokens": 0, "flops": 0.0, "loss": float("nan"), "bits_per_byte": 3.0}],
        "growths": [growth_record()],
        "skipped": [{"stage": "s", "step": 3}],
    }
    # As version 0.1.0 wrote it, without a vocabulary among the blobs.
    about = {"context": 16, "digest": "d", "store": "/nowhere", "vocabulary": ByteVocabulary().spec()}
    about["corpus"] = {"kind": "TextFolder", "path": "/nowhere", "pattern": "*", "heldout_percent": 5.0}
    meta = CheckpointMeta("s", lineage, 0, {"source_digest": "d"}, about, history, config).record()
    directory = tmp_path_factory.mktemp("fuzzed") / "0_s"
    with Checkpoints(directory) as checkpoints:
        blobs = {"config.json": json.dumps(config).encode(), "data": b"{}"}
        checkpoints.save(2, {"params": {"w": jnp.ones((304, 1))}}, meta=meta, blobs=blobs)
    return directory / "2"


def growth_record():
    lineage = Lineage(foreign.CFG).grown(foreign.CFG.replace(mlp=20), Growth("zero"))
    verification = {
        "preserving": True,
        "logits": {"max_abs": 1e-7, "max_rel": 1e-7},
        "hidden": {"max_rel_by_layer": [0.0, 0.0]},
        "eval_loss": {"before": 1.0, "after": 1.0},
    }
    fields = dict(source="0_a/1", source_digest="d", seed=0, distances=(0.5,))
    return GrowthRecord.of("s", lineage, verification, **fields).record()


def sign(content):
    """A manifest's bytes with the right sha256 of its own, as whoever makes one can give it."""
    return manifest._canonical({"content": content, "sha256": manifest._sha256(manifest._canonical(content))})


def test_manifests(step, tmp_path):
    shutil.copytree(step, tmp_path / "2")
    path = tmp_path / "2" / "manifest.json"
    raw = path.read_bytes()
    content = json.loads(raw)["content"]

    def read(changed):
        path.write_bytes(changed if isinstance(changed, bytes) else sign(changed))
        manifest.file_faults(path.parent, manifest.read_manifest(path.parent), contents=True)

    rng = random.Random(0)
    assert check(read, raw, "as it was") and check(read, content, "signed")
    assert sum(check(read, changed(content, rng), "manifest") for _ in range(300)) > 20
    assert not any(check(read, new, "manifest") for _ in range(100) if (new := damaged(raw, rng)) != raw)


def use(path, export):
    """What the programs do with a checkpoint's record, before and besides its arrays."""
    source = read_source(path)
    source.masks()
    find_length(source)
    source.unknown_vocabulary  # noqa: B018 - reads it, or says why it cannot
    with contextlib.suppress(LookupError):
        recorded_data(source.meta.data)
    read_history(source.meta.record())
    before = source.meta.converted or _recorded(source)
    families.architectures(before, "it")
    if export:
        family, _, cfg = _plain(source.cfg, None, before)
        families.config_json(cfg, family, "float32", source.context, before)


def test_records_of_checkpoints(step, tmp_path):
    shutil.copytree(step, tmp_path / "2")
    raw = (step / "meta.json").read_bytes()
    whole = json.loads((step / "manifest.json").read_text())["content"]

    def read(changed):
        changed = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        (tmp_path / "2" / "meta.json").write_bytes(changed)
        whole["files"]["meta.json"] = {"size": len(changed), "sha256": manifest._sha256(changed)}
        (tmp_path / "2" / "manifest.json").write_bytes(sign(whole))
        use(tmp_path / "2", export=next(numbers) % 8 == 0)  # it traces the model, which takes most of the time

    numbers = itertools.count()
    rng = random.Random(1)
    assert check(read, raw, "as it was")
    assert sum(check(read, changed(json.loads(raw), rng), "meta") for _ in range(1000)) > 50
    assert sum(check(read, damaged(raw, rng), "meta") for _ in range(200)) < 100


def test_records_of_growths():
    record = growth_record()
    flat = {
        "stage": "s",
        "plan": record["plan"],
        "source": "a",
        "source_digest": "d",
        "distances": [],
        "config_before": record["config_before"],
        "config_after": record["config_after"],
        "method": "zero",
        "preserving": True,
        "max_abs_logit_diff": 0.0,
        "max_rel_logit_diff": 0.0,
        "layer_diffs": [],
        "eval_loss_before": 1.0,
        "eval_loss_after": 1.0,
    }

    def read(changed):
        _measured(GrowthRecord.from_record(parse_json(json.dumps(changed), "it", finite=False)))

    rng = random.Random(2)
    for kind in (record, flat):
        assert check(read, kind, "as it was")
        assert sum(check(read, changed(kind, rng), "growth") for _ in range(400)) > 20


def test_configurations_and_tokenizers_of_other_programs(tmp_path):
    folder = foreign.write(tmp_path / "in", shard_bytes=6000)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')

    stored = open_shards(folder)
    numbers = itertools.count()

    def read_model(_):
        config = families.read_json(folder / "config.json")
        cfg = families.model_config(config, "config.json")
        importing._check_sizes(cfg, stored, folder)
        if next(numbers) % 8 == 0:  # the rest traces the model, which takes most of the time
            importing.examine(folder)

    def read_tokenizer(_):
        vocabulary = TokenizerVocabulary.from_directory(folder)
        assert vocabulary.decode(vocabulary.encode("It grows, été."))

    rng = random.Random(3)
    files = {
        "config.json": (read_model, 800),
        "model.safetensors.index.json": (lambda _: open_shards(folder), 200),
        "tokenizer.json": (read_tokenizer, 300),
        "tokenizer_config.json": (read_tokenizer, 150),
        "generation_config.json": (read_tokenizer, 100),
    }
    for name, (read, count) in files.items():
        raw = (folder / name).read_bytes()
        assert check(read, raw, name)
        for number in range(count):
            new = damaged(raw, rng) if number % 4 == 0 else json.dumps(changed(json.loads(raw), rng)).encode()
            (folder / name).write_bytes(new)
            check(read, new, name)
        (folder / name).write_bytes(raw)


def test_a_tokenizer_that_makes_its_library_panic(tmp_path):
    """What a failed assertion of the library raises is no Exception."""
    folder = foreign.write(tmp_path / "in")
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["continuing_subword_prefix"] = "longer than any token of the vocabulary"
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"tokenizer\.json makes the package tokenizers fail: range end index"):
        importing.examine(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.json makes the package tokenizers fail: range end index"):
        TokenizerVocabulary.from_directory(folder)


def test_lines_of_text(tmp_path):
    raw = json.dumps({"text": "a document", "meta": {"score": float("nan"), "tags": ["a", {"b": [1, 2]}]}}).encode()
    corpus = Jsonl(str(tmp_path))
    rng = random.Random(4)
    for number in range(500):
        new = damaged(raw, rng) if number % 2 else json.dumps(changed(json.loads(raw), rng)).encode()
        check(lambda line: corpus.parse(line, "file:1"), new, "line")


def test_stores_journals_positions_and_recipes(tmp_path):
    with StoreWriter(tmp_path / "store", ByteVocabulary(), "digest", {"kind": "x"}) as writer:
        for split in ("train", "heldout"):
            writer.append(split, jnp.arange(5, 50), 45)
        writer.close()
    store = tmp_path / "store" / "store.json"
    whole = json.loads(store.read_text())
    whole.pop("seal")

    def open_store(record):
        record = dict(record) if isinstance(record, dict) else {}
        store.write_bytes(render({**record, "seal": sha256_json(record)}))
        found = TokenStore.open(tmp_path / "store", verify=False)
        found.describe(), found.vocabulary, found.digest

    lines = [{"identity": "i"}, ["params/w", 0, 0, [1, 2], [3, 4]], ["params/w", 0, 8, [1, 2], [3, 4]]]

    def resume(changed):
        (tmp_path / "journal").write_text("".join(json.dumps(line) + "\n" for line in changed))
        journal = Journal(tmp_path / "journal")
        journal.resume("i")
        journal.close()
        assert all(len(read) == len(written) == 2 for read, written in journal.done.values())

    data = DataConfig(TextFolder("texts"), Bytes(), context=16)
    recipe = as_dict(Recipe((Stage("a", foreign.CFG, 2, 8, OptimizerConfig(1e-3)),), data))

    def check_recipe(changed):
        (tmp_path / "recipe.json").write_text(json.dumps(changed))
        check_identity(tmp_path, "recipe.json", recipe, "another recipe")

    position = pack_state({"kind": "store", "seed": 1}, position=3)

    def restore(changed):
        unpack_state(json.dumps(changed).encode(), {"kind": "store", "seed": 1})

    rng = random.Random(5)
    for read, content in (
        (open_store, whole),
        (resume, lines),
        (check_recipe, recipe),
        (restore, json.loads(position)),
    ):
        assert check(read, content, read.__name__)
        for _ in range(250):
            check(read, changed(content, rng), read.__name__)
