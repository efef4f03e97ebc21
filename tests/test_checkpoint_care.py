"""Looking after checkpoints: what is listed, described and verified, and what is refused."""

import json
import math
import os
import shutil

import numpy as np
import pytest

from flm_jax.checkpoint import manifest
from flm_jax.checkpoint.blocks import open_leaves
from flm_jax.checkpoint.checksum import add, digest
from flm_jax.checkpoint.directory import take_lock
from flm_jax.checkpoint.verify import block_checksum
from flm_jax.checkpoint_care import describe, list_checkpoints
from flm_jax.source_checkpoint import CheckpointMeta, read_source, versions_here
from tests import care
from tests.care import SECOND, STEPS, files_of, line, program
from tests.checkpoints import flip_value, numpy_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A work directory, to read."""
    return care.write(tmp_path_factory.mktemp("care") / "run")


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(whole, tmp_path / "run")


# list


def test_every_checkpoint_is_listed_with_its_loss_and_its_tokens(whole):
    found = list_checkpoints(whole)
    assert [(entry.stage, entry.step) for entry in found.entries] == [("0_first", 4), *(("1_second", s) for s in STEPS)]
    assert all(entry.complete for entry in found.entries) and found.writer is None and not found.notes
    assert [entry.tokens for entry in found.entries] == [512, *(512 + 128 * step for step in STEPS)]
    assert [entry.heldout.loss for entry in found.entries] == [5.4, 5.3, 5.2, 5.1, 5.1, 4.9, 4.9, 5.0]
    assert [entry.heldout.step for entry in found.entries] == [4, 0, 1, 2, 2, 4, 4, 6]
    first = found.entries[0]
    assert first.digest == manifest.read_manifest(first.directory).state_digest
    assert first.bytes == sum(len(content) for content in files_of(first.directory).values())
    stage = list_checkpoints(whole / SECOND)
    assert stage.entries == found.entries[1:]


def test_what_is_not_complete_is_listed_with_the_reason(run):
    stage = run / SECOND
    (stage / "2/meta.json").unlink()
    (stage / "3/manifest.json").write_bytes(b"{}")
    (stage / "7").mkdir()
    shutil.copytree(stage / "1", stage / "8.partial")
    (stage / "5").rename(stage / "5.damaged-1")
    (stage / "notes").mkdir()
    found = {entry.directory.name: entry for entry in list_checkpoints(run).entries if not entry.complete}
    said = {name: (entry.state, entry.fault) for name, entry in found.items()}
    assert sorted(said) == ["2", "3", "5.damaged-1", "7", "8.partial"]
    assert said["2"] == ("damaged", f"{stage}/2/meta.json cannot be read: No such file or directory")
    assert said["3"][0] == "damaged" and "manifest.json is damaged" in said["3"][1]
    assert said["5.damaged-1"][0] == "set aside" and said["7"] == ("damaged", "it is empty")
    assert said["8.partial"][0] == "unfinished" and found["8.partial"].bytes == found["5.damaged-1"].bytes > 200_000


def test_without_a_log_losses_are_those_of_the_newest_record(run):
    (run / "metrics.jsonl").unlink()
    assert [entry.heldout.loss for entry in list_checkpoints(run).entries][:2] == [5.26521110534668] * 2
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "recipe.json").write_text("[]")
    found = list_checkpoints(run)
    assert found.entries[0].heldout.loss == 5.26521110534668 and found.entries[0].tokens is None
    assert len(found.notes) == 2 and "line 1, lacks the field 'kind'" in found.notes[1]


def test_the_program_lists_also_while_a_run_writes(run, tmp_path, capsys):
    (run / "metrics.jsonl").write_text(line("heldout", "second", 5, loss=None))
    with take_lock(run):
        assert program("list", str(run), f"--json={tmp_path / 'found.json'}") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:4] == ["stage", "step", "tokens", "size"]
    assert said[8].split()[:5] == ["1_second", "6", "1.28", "k", "224.2"] and "nan at step 5" in said[8]
    assert said[9].startswith("8 complete checkpoints, ") and said[10].startswith(
        f"A run writes there: process {os.getpid()}"
    )
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["checkpoints"][7]["heldout"] == {"step": 5, "loss": None}


# show


def test_a_checkpoint_is_described(whole, capsys):
    found = describe(whole / SECOND / "1")
    assert (found.arrays["parameters"], found.arrays["moments"], found.arrays["others"]) == (43536, 2 * 43536, 8)
    assert (found.windows, found.heldout.step, found.skipped) == (40, 0, 0)
    assert math.isclose(found.passes, 40 * 16 / 2497)
    assert program("show", str(whole / SECOND / "1")) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "step 1 of stage 'second'",
        "3 layers x 12 wide, 4 heads of 4, MLP 20, vocabulary 264; 10.88 k parameters",
        "lineage 2 layers x 8 wide",
        "grown by mask, masks over 3 steps: 3 layers",
        "masks rise for 2 more steps",
        "40 windows read (640 tokens), 0.26 passes",
        "written by not recorded",
    ):
        assert part in said


def test_checkpoints_say_which_versions_wrote_them(whole):
    old = read_source(whole).meta
    assert not old.versions and "versions" not in old.record()
    new = CheckpointMeta(old.stage, old.lineage)
    assert new.versions == versions_here() and set(new.versions) == {"python", "flm_jax", "jax", "orbax-checkpoint"}
    assert CheckpointMeta.from_record(json.loads(json.dumps(new.record()))).versions == versions_here()


# verify


def test_blocks_of_any_size_add_up_to_the_checksum(whole):
    step = whole / "checkpoints/0_first/4"
    leaves = manifest.read_manifest(step).leaves
    for name, most in (("attention/query", 100), ("mlp/up", 1)):
        path = f"params/blocks/{name}"
        total = (0, 0)
        for lead, start, rows in open_leaves(step / "arrays", leaves)[path].blocks(most):
            total = add(total, np.asarray(block_checksum(lead, start, rows)))
        assert digest(total) == leaves[path].checksum


def test_a_changed_value_is_named_by_array_chunk_and_file(damaged, tmp_path, capsys):
    flip_value(damaged / "2")
    assert program("verify", str(damaged), f"--json={tmp_path / 'found.json'}") == 1
    said = capsys.readouterr().out
    assert f"{damaged}/1: 7 leaves" in said and "2 checkpoints verified, 1 damaged." in said
    (problem,) = json.loads((tmp_path / "found.json").read_text())[1]["problems"]
    start, _, where = problem.partition("; chunk 0.0 in ")
    assert start == f"{damaged}/2: the values of params/w have changed"
    file, _, place = where.partition(" at bytes ")
    first, last = (int(number.replace(",", "")) for number in place.split(" to "))
    held = (damaged / "2" / file).read_bytes()[first : last + 1]
    changed = np.frombuffer(held, "f4") != numpy_state(2)["params"]["w"].reshape(-1)
    assert changed.tolist() == [True] + [False] * 511


def test_what_is_no_whole_checkpoint_fails_verification(damaged, capsys):
    (damaged / "1/manifest.json").unlink()
    assert program("verify", str(damaged / "2"), str(damaged)) == 1
    assert "3 checkpoints verified, 1 damaged." in capsys.readouterr().out
    assert program("verify", str(damaged / "1")) == 1
    assert "looks like a step, but its manifest.json is missing" in capsys.readouterr().err


# what is refused


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "say what to do: list, show, verify, diff, prune, copy"),
        (
            ["lst", "x"],
            2,
            "there is no subcommand 'lst'; there are list, show, verify, diff, prune, copy; did you mean",
        ),
        (["diff", "x"], 2, "diff is given 1 path, and takes: diff A B"),
        (["list", "x", "--every=2"], 2, "--every belongs to prune"),
        (["show", "x", "--yes"], 2, "--yes belongs to prune"),
        (["prune", "x"], 2, "say what to keep besides the first and the last checkpoint of each stage"),
        (["prune", "x", "--every=2", "--yes", "--dry_run"], 2, "--yes deletes and --dry_run does not"),
        (
            ["list", "RUN/chekpoints"],
            1,
            "RUN/chekpoints is no directory; give a work directory or the directory of a stage; did you mean 'RUN/c",
        ),
        (["list", "RUN/checkpoints/0_first/4/arrays"], 1, "holds no checkpoint; give the work directory of a run"),
        (
            ["list", "RUN/checkpoints/0_first/4"],
            1,
            "RUN/checkpoints/0_first/4 is one checkpoint; give the work directory",
        ),
        (["show", "RUN/checkpoints/0_first/5"], 1, "RUN/checkpoints/0_first/5 is no directory; give a step"),
        (["verify", "RUN/checkpoints/0_first/4/blobs"], 1, "RUN/checkpoints/0_first/4/blobs holds no checkpoint"),
        (["diff", "RUN", "RUN/nothing"], 1, "RUN/nothing is no directory"),
        (["prune", "RUN/checkpoints/0_first", "--best=1"], 1, "RUN/checkpoints/0_first has no folder 'checkpoints'"),
        (["copy", "RUN", "gs://bucket/run"], 1, "gs://bucket/run lies in an object store"),
        (["list", "RUN", "--json=RUN"], 1, "--json=RUN is a directory; give the name of a file."),
    ],
)
def test_wrong_input_is_one_sentence(words, status, said, whole, capsys):
    assert program(*(word.replace("RUN", str(whole)) for word in words)) == status
    error = capsys.readouterr().err
    assert said.replace("RUN", str(whole)) in error
    assert len(error.splitlines()) == status  # status 2 also says where the flags are listed
