"""The paths of leaves, and what is said of a checkpoint whose leaves are not those of the model."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flm_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, leaf_paths
from tests.checkpoints import abstract_of, numpy_state

# Orbax leaves tasks behind when a read or a write fails, and Python complains when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_leaf_paths_names_fields_keys_and_indices():
    paths = list(leaf_paths(numpy_state(0)))
    assert paths == ["key", "mask.ramp", "none", "opt/0/count", "opt/0/mu/w", "params/b", "params/w"]
    for bad in ({"a/b": 1}, {"": 1}, 1):
        with pytest.raises(CheckpointError, match="non-empty keys"):
            leaf_paths(bad)


def layers(depth: int, width: int = 4, dtype: str = "f4") -> dict[str, Any]:
    return {"blocks": {"query": np.ones((depth, width), dtype), "norm": np.ones((depth, 2), dtype)}}


@pytest.mark.parametrize(
    ("asked", "texts"),
    [
        (layers(16), ["blocks/query", "float32[12, 4]", "float32[16, 4]", "blocks/norm", "2 leaves"]),
        (layers(12, 5), ["blocks/query", "float32[12, 4]", "float32[12, 5]", "1 leaf differs"]),
        (layers(12, 4, jnp.bfloat16), ["blocks/query", "float32[12, 4]", "bfloat16[12, 4]"]),
        ({"blocks": {"query": layers(12)["blocks"]["query"]}}, ["blocks/norm", "the model lacks it"]),
        ({**layers(12), "head": np.ones(3, "f4")}, ["head", "the checkpoint lacks it", "float32[3]"]),
        ({f"p{i}": np.ones(i + 1, "f4") for i in range(30)}, ["32 leaves", "and 22 more"]),
    ],
)
def test_another_shape_dtype_or_structure_is_refused(tmp_path, asked, texts):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, layers(12), meta={})
        for step in (None, 1):
            with pytest.raises(CheckpointError) as caught:
                checkpoints.restore(abstract_of(asked), step)
            assert not isinstance(caught.value, DamagedError)  # an older step would not fit either
            for text in texts:
                assert text in str(caught.value)
