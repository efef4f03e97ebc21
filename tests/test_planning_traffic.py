"""The fewest bytes that a layout must send: by hand, and no compiled program sends fewer."""

import jax
import pytest

from flm_jax.data.config import DataConfig
from flm_jax.data.train_vocabulary import Bytes
from flm_jax.planning import stages
from flm_jax.planning.traffic import least_sent
from flm_jax.recipe import Recipe, Run, Stage
from flm_jax.sharding import MeshConfig
from tests import small

MESH = dict(data=1, fsdp=1, sequence=1, tensor=1)
CFG = small.config(layers=3, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=64, vocab=264)


def test_one_device_sends_nothing():
    assert set(least_sent(CFG, 8, 16, MESH, 1).values()) == {0}


def test_each_axis_by_hand():
    gains = (2 * 3 + 1) * 32
    item, attention, mlp, tables = 4, 3 * (2 * 32 * 32 + 2 * 32 * 16), 3 * 3 * 32 * 64, 2 * 264 * 32
    matrices = attention + mlp
    found = least_sent(CFG, 8, 16, MESH | dict(fsdp=4), 2)
    assert found["weights"] == 2 * 0.75 * item * (2 * matrices + tables + 2 * 6 * 32 + 32)
    assert found["gradients"] == 2 * 0.75 * item * (matrices + tables + gains)
    assert found["activations"] == found["keys and values"] == 0
    found = least_sent(CFG, 8, 16, MESH | dict(tensor=2), 1)
    assert found["weights"] == found["gradients"] == 0
    assert found["activations"] == 0.5 * item * 8 * 16 * 32 * (10 * 3 + 3)
    found = least_sent(CFG, 8, 16, MESH | dict(sequence=2), 1)
    assert found["gradients"] == 2 * 0.5 * item * (matrices + tables + gains)
    assert found["gradients"] == least_sent(CFG, 8, 16, MESH | dict(sequence=2), 2)["gradients"]  # summed once
    assert found["keys and values"] == 0.5 * item * 8 * 16 * 2 * 8 * 4 * 3


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("axes", [dict(fsdp=8), dict(tensor=2, fsdp=4), dict(data=2, fsdp=2, sequence=2)], ids=str)
def test_a_compiled_step_sends_no_less(axes, parts):
    stage = Stage("one", CFG.replace(kv_heads=4), 1, 16, accumulate=parts)
    recipe = Recipe((stage,), DataConfig(vocabulary=Bytes(), context=32))
    run = Run(mesh=MeshConfig(**axes))
    (record,) = stages.stages(recipe, run, jax.devices(), None, "cpu", only=("train step",))
    sent = sum(c["sent_bytes"] for c in record["programs"]["train step"]["collectives"].values())
    least = sum(record["least_sent_bytes"].values())
    assert least <= sent
