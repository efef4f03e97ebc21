"""Copies of checkpoints: the same files, every byte compared, nothing overwritten."""

import filecmp
import random

import pytest

from flm_jax.checkpoint import CheckpointError, DamagedError, verify
from flm_jax.checkpoint.directory import take_lock
from flm_jax.checkpoint_care import copy_checkpoint, copying
from tests.care import files_of, program
from tests.checkpoints import flip, flip_value


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
