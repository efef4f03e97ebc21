"""Checkpoints that were made by hand or damaged on purpose: nothing outside a step is read, nothing unknown is used."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import pytest

from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, manifest, verify
from flm_jax.growth.lineage import Lineage
from flm_jax.report import read_run
from flm_jax.source_checkpoint import CheckpointMeta, read_source
from tests import small

# Orbax leaves tasks behind when a read fails, and Python complains when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ABSTRACT = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
TOKENIZER = b"x" * (3 << 19)  # above the size up to which files of arrays have a sha256


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two steps of a weights-only checkpoint; its record is that of a model, its arrays are not."""
    directory = tmp_path_factory.mktemp("made") / "0_made"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            meta = CheckpointMeta("made", Lineage(small.config(embed=2, heads=1, head_dim=2, layers=1, mlp=2, vocab=3)))
            blobs = {"tokenizer.json": TOKENIZER, "data": b"7"}
            checkpoints.save(step, {"w": jnp.ones(3)}, meta=meta.record(), blobs=blobs)
    return directory


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "0_made")
    return tmp_path / "0_made"


def sign(step_dir, change):
    """Changes the content of a manifest, and gives it the right sha256 of its own, as whoever makes one can."""
    path = step_dir / "manifest.json"
    content = json.loads(path.read_text())["content"]
    change(content)
    canonical = manifest._canonical(content)
    path.write_bytes(manifest._canonical({"content": content, "sha256": manifest._sha256(canonical)}))


def rewrite(step_dir, name, content):
    """Writes a small file of a step, and its right size and sha256 into the manifest."""
    (step_dir / name).write_bytes(content)
    file = {"size": len(content), "sha256": manifest._sha256(content)}
    sign(step_dir, lambda whole: whole["files"].update({name: file}))


def refused_everywhere(directory, match):
    """Step 2 is refused by every reader and named by `verify`; who asks for none in particular gets step 1."""
    report = verify(directory / "2")
    assert report.problems
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(str(report))
    with Checkpoints(directory, read_only=True) as checkpoints:
        with pytest.raises(DamagedError, match=match):
            checkpoints.restore(ABSTRACT, 2)
        assert checkpoints.restore(ABSTRACT).step == 1
    with pytest.raises(CheckpointError, match=match):
        assert read_source(directory / "2").files


def test_what_was_saved_is_read(copy):
    assert verify(copy / "2").ok
    with Checkpoints(copy, read_only=True) as checkpoints:
        found = checkpoints.restore(ABSTRACT)
    assert (found.step, found.blobs) == (2, {"tokenizer.json": TOKENIZER, "data": b"7"})
    assert read_source(copy).files == {"tokenizer.json": TOKENIZER}


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "blobs/../../secret",
        "/etc/hostname",
        "blobs/./data",
        "blobs//data",
        "blobs/sub/data",
        "blobs/.hidden",
        "blobs/a\\b",
        "blobs/a\0b",
        "",
        "..",
    ],
)
def test_a_name_that_leads_out_of_the_step_is_refused(copy, name):
    (copy / "secret").write_bytes(b"s" * 5)
    sign(copy / "2", lambda content: content["files"].update({name: {"size": 5, "sha256": None}}))
    refused_everywhere(copy, "names must be those of files inside the step's directory")


def to_outside(path):
    (path.parents[2] / "outside").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(path.parents[2] / "outside")


def to_zeros(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def to_pipe(path):
    path.unlink()
    os.mkfifo(path)


def to_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["blobs/tokenizer.json", "meta.json", "manifest.json", "arrays/_METADATA"])
@pytest.mark.parametrize("other", [to_outside, to_zeros, to_pipe, to_folder])
def test_only_regular_files_are_read(copy, name, other):
    other(copy / "2" / name)
    refused_everywhere(copy, rf"{name.split('/')[-1]}.*(a symbolic link|not a regular file)")


def test_a_folder_that_is_a_link_is_refused(copy):
    (copy / "2" / "blobs").rename(copy.parent / "elsewhere")
    (copy / "2" / "blobs").symlink_to(copy.parent / "elsewhere")
    with pytest.raises(DamagedError, match="blobs is a link, or no folder"):
        _ = read_source(copy / "2").files
    assert not verify(copy / "2").ok


@pytest.mark.parametrize("name", ["tokenizer_config.json", ".DS_Store", "sub"])
def test_a_blob_that_was_not_saved_is_named_and_refused(copy, name):
    if name == "sub":
        (copy / "2" / "blobs" / name).mkdir()
    else:
        (copy / "2" / "blobs" / name).write_bytes(b"{}")
    refused_everywhere(copy, rf"blobs/{name} was not saved with the step")


def test_a_large_blob_has_a_checksum_of_its_own(copy):
    path = copy / "2" / "blobs" / "tokenizer.json"
    path.write_bytes(b"y" + TOKENIZER[1:])
    refused_everywhere(copy, "tokenizer.json is damaged: it does not match its sha256")


def test_a_blob_without_a_checksum_is_read_as_earlier_versions_wrote_it(copy):
    sign(copy / "2", lambda content: content["files"]["blobs/tokenizer.json"].update(sha256=None))
    assert read_source(copy).files == {"tokenizer.json": TOKENIZER}


@pytest.mark.parametrize(
    "what",
    [
        b"[" * 100_000,
        b'{"content": ' * 100_000,
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"content": {"format": 1}, "content": 0}',
        b'{"content": NaN, "sha256": 1e999}',
        b"9" * 5000,
        b"",
    ],
)
def test_a_manifest_of_nonsense_is_damage(copy, what):
    (copy / "2" / "manifest.json").write_bytes(what)
    refused_everywhere(copy, "manifest.json is damaged")


WRONG = {
    "no leaves": lambda c: c.pop("leaves"),
    "no files": lambda c: c.pop("files"),
    "no step": lambda c: c.pop("step"),
    "leaves are a list": lambda c: c.update(leaves=[]),
    "a leaf is a number": lambda c: c["leaves"].update(w=3),
    "no dtype": lambda c: c["leaves"]["w"].pop("dtype"),
    "no such dtype": lambda c: c["leaves"]["w"].update(dtype="float8_none"),
    "a size is text": lambda c: c["leaves"]["w"].update(shape=["3"]),
    "a size is true": lambda c: c["leaves"]["w"].update(shape=[True]),
    "a size is negative": lambda c: c["leaves"]["w"].update(shape=[-1]),
    "absurd": lambda c: c["leaves"]["w"].update(shape=[10**30]),
    "absurd and empty": lambda c: c["leaves"]["w"].update(shape=[0, 10**30]),
    "a file's size is text": lambda c: c["files"]["meta.json"].update(size="1"),
    "a file's size is negative": lambda c: c["files"]["meta.json"].update(size=-1),
    "a sha256 is a number": lambda c: c["files"]["meta.json"].update(sha256=1),
    "another step": lambda c: c.update(step="2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_with_wrong_fields_is_damage(copy, what):
    sign(copy / "2", WRONG[what])
    refused_everywhere(copy, "manifest.json")


def test_a_newer_format_is_said(copy):
    sign(copy / "2", lambda content: content.update(format=2))
    with pytest.raises(CheckpointError, match="has format 2, this program reads format 1"):
        read_source(copy / "2")


@pytest.mark.parametrize("what", [b"[" * 100_000 + b"]" * 100_000, b"[]", b"{", b"{} {}", b'{"a": 1, "a": 2}'])
def test_a_record_of_nonsense_is_damage_though_its_checksum_is_right(copy, what):
    rewrite(copy / "2", "meta.json", what)
    with Checkpoints(copy, read_only=True) as checkpoints:
        with pytest.raises(DamagedError, match=r"meta\.json"):
            checkpoints.restore(ABSTRACT, 2)
        assert checkpoints.restore(ABSTRACT).step == 1
    with pytest.raises(DamagedError, match=r"meta\.json"):
        read_source(copy / "2")


def test_a_record_may_hold_the_loss_of_a_run_that_diverged(copy):
    record = json.loads((copy / "2" / "meta.json").read_text()) | {"history": {"evals": [{"loss": float("nan")}]}}
    rewrite(copy / "2", "meta.json", json.dumps(record).encode())
    assert str(read_source(copy).meta.history) == "{'evals': [{'loss': nan}]}"


def test_nothing_is_interpreted_before_its_checksum(copy):
    """Every bit of a record that is not the one saved is named as damage, wherever it stands."""
    path = copy / "2" / "meta.json"
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), 7):
        content[at] ^= 4
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=r"meta\.json is damaged: it does not match its sha256"):
            read_source(copy)
        content[at] ^= 4


def test_a_run_does_not_resume_from_what_is_no_run(made):
    history = {"evals": [], "growths": [], "skipped": [{"stage": "made", "step": 1}]}
    assert read_run({"history": history}, {"data": b"7"}, made) == (history, b"7")
    for meta, blobs, message in (
        ({}, {"data": b""}, "0_made does not record a run: it lacks the field 'history'"),
        ({"history": []}, {"data": b""}, "the field 'history' is .*; it must be: object"),
        ({"history": history | {"skipped": [{}]}}, {"data": b""}, "entry 0 of its skipped lacks the field 'stage'"),
        ({"history": history | {"growths": [{}]}}, {"data": b""}, "the record of a growth lacks the field"),
        ({"history": history}, {}, "it has no position in the data"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_run(meta, blobs, made)
