"""Meshes and rules: how parameters are split over devices, and what does not fit."""

import jax
import pytest
from jax.sharding import PartitionSpec

from flm_jax import model, sharding
from flm_jax.config import tele_flm_1t
from flm_jax.signature import KINDS
from tests import small


def test_rules_cover_every_axis_and_an_uncovered_one_raises():
    for axis in KINDS:
        sharding.mesh_axes(axis)
    with pytest.raises(ValueError, match="No sharding rule covers axis 'experts'"):
        sharding.mesh_axes("experts")


def test_shardings_of_1t_on_a_pod():
    shapes, signatures = model.declared(tele_flm_1t())
    mesh = jax.sharding.AbstractMesh((1, 64, 1, 16), sharding.MESH_AXES)
    where = sharding.param_shardings(signatures, shapes, mesh)
    assert where["blocks"]["mlp"]["gate"].spec == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert where["blocks"]["mlp"]["gate"].shard_shape(shapes["blocks"]["mlp"]["gate"].shape) == (
        140,
        320,
        6144,
    )


def test_a_mesh_that_does_not_divide_an_axis_is_refused_with_sizes_that_work():
    shapes, signatures = model.declared(small.config(heads=6, head_dim=4))
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=4))
    with pytest.raises(ValueError, match=r"blocks/attention/.*axis '(kv_)?heads' of size 6.*tensor=4.*are 4 and 8"):
        sharding.param_shardings(signatures, shapes, mesh)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(tensor=3), "does not fit 8 devices.*nearest that works for tensor, now 3, is 2 and 4"),
        (dict(data=1, fsdp=64, tensor=4), "nearest that works for fsdp, now 64, is 2"),
        (dict(fsdp=64, tensor=16), "The axes other than fsdp need 16 devices, which does not divide 8"),
        (dict(data=-1, fsdp=-1), "at most one is -1"),
        (dict(data=0), "positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sharding.MeshConfig(**config))
