"""Pruning: what is kept, what is deleted, and what a killed prune leaves."""

import shutil
from pathlib import Path

import pytest

from flm_jax.checkpoint import NoCheckpointError, directory
from flm_jax.checkpoint.directory import take_lock
from flm_jax.checkpoint_care import list_checkpoints, prune
from tests import care
from tests.care import SECOND, files_of, program


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A work directory, to read."""
    return care.write(tmp_path_factory.mktemp("care") / "run")


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(whole, tmp_path / "run")


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


def test_rules_that_keep_nothing_sensible_are_refused(whole):
    for rules, said in (({"every": -2}, "--every=-2"), ({"best": -1}, "--best=-1"), ({}, "Say what to keep")):
        with pytest.raises(ValueError, match=said):
            prune(whole, **rules)
    with pytest.raises(NoCheckpointError, match="is no directory"):
        prune(whole / "nothing", every=1)
