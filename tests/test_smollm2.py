"""A real model grown, by the commands that a user would run: `make test-smollm2`, some ten minutes."""

import pytest

from benchmarks import smollm2
from tests.environment import as_user


@pytest.mark.slow
def test_a_real_model_is_the_same_after_growing_here_and_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "ENVIRONMENT", as_user())
    found = smollm2.measure(tmp_path)
    assert not smollm2.faults(found)
    assert [growth["params"] for growth in found["grown"]] == [237_825_360] * len(smollm2.METHODS)
