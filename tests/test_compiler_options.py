"""XLA's options of the train step, on the devices that they are for."""

import types

import jax
import numpy as np
import pytest

from flm_jax import compiler_options, costs
from flm_jax.sharding import MeshConfig, make_mesh
from tests import small

CFG = small.config()
SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"


def mesh_of(platform, kind, count=2):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return types.SimpleNamespace(devices=np.full(count, device), size=count)


GPUS = mesh_of("gpu", "NVIDIA H100 80GB HBM3")


def test_every_default_is_known_to_this_jaxlib():
    for name, value in compiler_options.overlap(CFG).items():
        assert compiler_options.known(name, value), name


def test_an_unknown_option_is_left_out(monkeypatch):
    assert not compiler_options.known("xla_gpu_made_up", True)
    monkeypatch.setattr(compiler_options, "overlap", lambda cfg: {"xla_gpu_made_up": True, SCHEDULER: True})
    assert compiler_options.for_step(GPUS, CFG) == {SCHEDULER: True}


def test_defaults_are_for_several_nvidia_gpus():
    assert compiler_options.for_step(GPUS, CFG) == compiler_options.overlap(CFG)
    for other in (mesh_of("gpu", "NVIDIA H100", 1), mesh_of("gpu", "AMD Instinct MI300X"), mesh_of("cpu", "cpu")):
        assert compiler_options.for_step(other, CFG) is None
    assert compiler_options.for_step(make_mesh(MeshConfig()), CFG, {"xla_tpu_scoped_vmem_limit_kib": "1"}) is None


def test_a_layer_is_combined():
    large = CFG.replace(embed=4096, mlp=16_384)
    layer = sum(like.size for path, like, _ in costs.leaves(large) if path.startswith("blocks/")) / large.layers * 4
    assert compiler_options.overlap(large)["xla_gpu_all_gather_combine_threshold_bytes"] == layer
    assert compiler_options.overlap(CFG)["xla_gpu_all_gather_combine_threshold_bytes"] == 32 * 2**20


def test_what_the_user_sets_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{SCHEDULER}=false --xla_gpu_all_reduce_combine_threshold_bytes=1")
    found = compiler_options.for_step(GPUS, CFG, {"xla_gpu_all_gather_combine_threshold_bytes": "2", "xla_tpu_x": "3"})
    assert SCHEDULER not in found and "xla_gpu_all_reduce_combine_threshold_bytes" not in found
    assert found["xla_gpu_all_gather_combine_threshold_bytes"] == "2" and "xla_tpu_x" not in found
    tpus = compiler_options.for_step(mesh_of("tpu", "TPU v5p"), CFG, {"xla_tpu_x": "3"})
    assert tpus == {"xla_tpu_x": "3"}


@pytest.mark.parametrize("value", ["true", "True", "false"])
def test_a_switch_may_be_written_as_in_xla_flags(value):
    given = compiler_options.for_step(GPUS, CFG, {SCHEDULER: value})[SCHEDULER]
    compiled = jax.jit(lambda x: x, compiler_options={SCHEDULER: given})
    assert compiled(1.0) == 1.0 and given == value.capitalize()
