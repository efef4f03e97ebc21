"""What differs between two checkpoints: arrays, settings, lineage, shapes."""

import numpy as np
import pytest

from flm_jax.checkpoint_care import difference, differences
from flm_jax.checkpoint_care.differences import compare_arrays
from tests import care
from tests.care import SECOND, program
from tests.checkpoints import numpy_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A work directory, to read."""
    return care.write(tmp_path_factory.mktemp("care") / "run")


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
