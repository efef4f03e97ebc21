"""Looking after checkpoints: what is listed, described, compared, deleted and copied, and what stays as it was."""

import filecmp
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from flm_jax.checkpoint import CheckpointError, DamagedError, NoCheckpointError, directory, manifest, verify
from flm_jax.checkpoint.blocks import open_leaves
from flm_jax.checkpoint.checksum import add, digest
from flm_jax.checkpoint.directory import take_lock
from flm_jax.checkpoint.verify import block_checksum
from flm_jax.checkpoint_care import copy_checkpoint, copying, describe, difference, differences, list_checkpoints, prune
from flm_jax.checkpoint_care.differences import compare_arrays
from flm_jax.source_checkpoint import CheckpointMeta, read_source, versions_here
from tests.checkpoints import flip, flip_value, numpy_state, renumbered
from tests.commands import run_here
from tests.golden_run import RUN as GOLDEN

STEPS = (0, 1, 2, 3, 4, 5, 6)
# Held-out losses of the second stage by step; at steps 3 and 5 nothing was measured.
LOSSES = {0: 5.3, 1: 5.2, 2: 5.1, 4: 4.9, 6: 5.0}
SECOND = "checkpoints/1_second"


def line(kind, stage, step, **values):
    about = {"kind": kind, "stage": stage, "stage_step": step, "step": step, "tokens": 0, "flops": 0, "time": 1.5e9}
    return json.dumps(about | values) + "\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A work directory with steps 4 of its first stage and 0 to 6 of its second; to read."""
    run = tmp_path_factory.mktemp("care") / "run"
    shutil.copytree(GOLDEN, run)
    for step in STEPS[2:]:
        renumbered(run / SECOND / "1", step)
    found = [line("start", "first", 0, devices=1), line("heldout", "first", 4, loss=5.4, bits_per_byte=7.0)]
    found += [line("heldout", "second", 4, loss=9.9)]  # a run that was rewound measured it again
    found += [line("heldout", "second", step, loss=loss) for step, loss in LOSSES.items()]
    (run / "metrics.jsonl").write_text("".join(found))
    return run


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(whole, tmp_path / "run")


def program(*words):
    """Runs the program in this process; returns its exit status."""
    flags = [word for word in words if word.startswith("--")]
    try:
        run_here("checkpoint", [*(f"--command={word}" for word in words if word not in flags), *flags])
    except SystemExit as stop:
        return stop.code
    return 0


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


# diff


@pytest.mark.parametrize("entries", [1 << 20, 20])
def test_arrays_are_compared_as_numpy_compares_them(two_steps, entries, monkeypatch):
    monkeypatch.setattr(differences, "_ENTRIES", entries)
    found = {one.path: one for one in compare_arrays(two_steps / "1", two_steps / "2")}
    for path in ("params/w", "params/b"):
        a, b = (numpy_state(step)["params"][path[-1]].astype("f8").ravel() for step in (1, 2))
        one = found[path]
        assert not one.equal and one.entries == np.sum(a != b)
        assert one.max_abs == np.max(np.abs(b - a))
        assert np.isclose(one.relative, np.linalg.norm(b - a) / np.linalg.norm(a), rtol=1e-12)
        assert np.isclose(one.cosine, a @ b / np.linalg.norm(a) / np.linalg.norm(b), rtol=1e-12)
    assert found["params/b"].a == "bfloat16[8]" and found["none"].equal
    same = compare_arrays(two_steps / "1", two_steps / "1", lambda _: pytest.fail("nothing is to be read"))
    assert all(one.equal for one in same) and len(same) == len(found) == 7


def test_settings_lineage_and_shapes_that_differ_are_named(whole, capsys):
    found = difference(whole / "checkpoints/0_first/4", whole / SECOND / "1")
    assert found.settings["model.embed"] == (8, 12) and found.settings["stage"] == ("first", "second")
    assert "model.vocab" not in found.settings
    assert [len(only) for only in found.lineage] == [0, 1] and found.lineage[1][0].startswith("grown by mask")
    shapes = {one.path: (one.a, one.b) for one in found.arrays if not one.compared}
    assert shapes["params/embedding"] == ("float32[264, 8]", "float32[264, 12]")
    assert program("diff", str(whole / SECOND / "1"), str(whole / SECOND / "2")) == 0
    assert "Equal: settings, lineage and 38 arrays, bit for bit." in capsys.readouterr().out


# prune


def test_what_is_kept_and_why(whole):
    def kept(**rules):
        found = prune(whole, **rules)
        return {fate.entry.step: fate.kept for fate in found.fates if fate.entry.stage == "1_second" and fate.kept}

    before = files_of(whole)
    assert kept(best=0) == {0: "first", 6: "last"}
    assert kept(every=3) == {0: "first, multiple of 3", 3: "multiple of 3", 6: "last, multiple of 3"}
    assert kept(best=2) == {0: "first", 4: "loss no. 1", 6: "last, loss no. 2"}
    assert set(kept(every=4, best=3)) == {0, 2, 4, 6}
    found = prune(whole, best=9)
    assert [fate.entry.step for fate in found.fates if not fate.kept] == [3, 5]
    assert any("measured at the step of 5 of its 7 checkpoints" in note for note in found.notes)
    assert files_of(whole) == before


def test_a_dry_run_and_a_refused_one_delete_nothing(run, capsys):
    before = files_of(run)
    assert program("prune", str(run), "--every=3") == 0
    assert program("prune", str(run), "--every=3", "--dry_run") == 0
    said = capsys.readouterr().out
    assert (
        "Would delete 4 checkpoints, 897 kB; keeps 4 checkpoints, " in said and said.count("Nothing was deleted") == 2
    )
    for where in (run, run / SECOND):
        with take_lock(where):
            assert program("prune", str(run), "--every=3", "--yes") == 1
            assert f"error: {where} is being written by another run (process " in capsys.readouterr().err
        (where / ".lock").unlink()
    assert {name: files_of(run).get(name) for name in before} == before


def test_pruning_deletes_what_it_said_and_what_killed_runs_left(run, capsys):
    shutil.copytree(run / SECOND / "1", run / SECOND / "9.partial")
    (run / SECOND / "2/meta.json").unlink()
    wanted = {name: content for name, content in files_of(run).items() if "/4/" in str(name)}
    assert program("prune", str(run), "--best=1", "--yes") == 0
    said = capsys.readouterr().out
    assert "delete: unfinished" in said and "2 is damaged and stays" in said and said.endswith("Deleted.\n")
    left = sorted(path.name for path in (run / SECOND).iterdir() if path.is_dir())
    assert left == ["0", "2", "4", "6"]
    assert {name: content for name, content in files_of(run).items() if "/4/" in str(name)} == wanted
    assert not prune(run, best=1, delete=True).deleted  # the same once more


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_prune_that_is_killed_leaves_no_half_checkpoint_that_looks_whole(run, killed_at, monkeypatch):
    """Killed after it has deleted some checkpoints, and one file of the next."""
    deletions, rmtree = [], shutil.rmtree

    def killed(folder):
        deletions.append(folder)
        if len(deletions) <= killed_at:
            return rmtree(folder)
        next(path for path in sorted(Path(folder).rglob("*")) if path.is_file()).unlink()
        raise KeyboardInterrupt

    whole = {entry.step: files_of(entry.directory) for entry in list_checkpoints(run / SECOND).entries}
    with monkeypatch.context() as patch:
        patch.setattr(directory.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(run, every=6, delete=True)
    entries = list_checkpoints(run / SECOND).entries
    assert [entry.state for entry in entries].count("unfinished") == 1 and not any(
        e.state == "damaged" for e in entries
    )
    complete = [entry for entry in entries if entry.complete]
    assert len(complete) == 7 - killed_at - 1
    for entry in complete:
        assert files_of(entry.directory) == whole[entry.step]
    prune(run, every=6, delete=True)
    assert sorted(path.name for path in (run / SECOND).iterdir() if path.is_dir()) == ["0", "6"]


# copy


def test_a_copy_has_the_same_files_and_times(two_steps, tmp_path, capsys):
    target = tmp_path / "new/folder/2"
    assert program("copy", str(two_steps), str(target)) == 0
    assert f"{target}: 7 leaves and " in capsys.readouterr().out
    assert files_of(target) == files_of(two_steps / "2") and verify(target).ok
    for name in files_of(target):
        assert (target / name).stat().st_mtime == (two_steps / "2" / name).stat().st_mtime
    assert [path.name for path in target.parent.iterdir()] == ["2"]
    assert program("copy", str(two_steps / "1"), str(target)) == 1
    assert f"error: {target} exists already, and nothing is overwritten" in capsys.readouterr().err
    assert filecmp.cmp(target / "manifest.json", two_steps / "2/manifest.json", shallow=False)


def in_a_file(step):
    flip(next(path for path in sorted((step / "arrays").rglob("*")) if path.stat().st_size > 1000), random.Random(0))


@pytest.mark.parametrize("damage", [in_a_file, flip_value, lambda step: (step / "blobs/vocab.model").unlink()])
def test_a_damaged_checkpoint_is_not_copied(damaged, tmp_path, damage):
    damage(damaged / "2")
    with pytest.raises(DamagedError, match=f"{damaged}/2"):
        copy_checkpoint(damaged / "2", tmp_path / "new/copy")
    assert not (tmp_path / "new").exists()


def test_a_bit_that_changes_on_the_way_is_found(two_steps, tmp_path, monkeypatch):
    def badly(source, target, progress, copy=copying._copy):
        found = copy(source, target, progress)
        if source.stat().st_size > 2000 and source.parent.name == "d":
            flip(target, random.Random(0))
        return found

    monkeypatch.setattr(copying, "_copy", badly)
    with pytest.raises(DamagedError, match=r"d/\w+ is damaged.*seen in the copy"):
        copy_checkpoint(two_steps / "2", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be_are_refused(two_steps, tmp_path):
    source = two_steps / "2"
    for target, said in (
        (tmp_path / "3", f"this is step 2; give {tmp_path}/2, or a name that is no number"),
        (source / "arrays/copy", "lies inside the checkpoint"),
        (tmp_path / "a[1]", "cannot be read back from a path with"),
    ):
        with pytest.raises(CheckpointError) as error:
            copy_checkpoint(source, target)
        assert said in str(error.value)
    (tmp_path / "stage").mkdir()
    with take_lock(tmp_path / "stage"), pytest.raises(CheckpointError, match="is being written by another run"):
        copy_checkpoint(source, tmp_path / "stage/2")
    assert not (tmp_path / "stage/2").exists()


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


def test_rules_that_keep_nothing_sensible_are_refused(whole):
    for rules, said in (({"every": -2}, "--every=-2"), ({"best": -1}, "--best=-1"), ({}, "Say what to keep")):
        with pytest.raises(ValueError, match=said):
            prune(whole, **rules)
    with pytest.raises(NoCheckpointError, match="is no directory"):
        prune(whole / "nothing", every=1)
