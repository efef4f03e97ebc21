"""The text of a compiled program: its loops, its kernels, and the bytes that its collectives send."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flm_jax.planning import hlo
from flm_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.integration

TEXT = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
}

%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[16,8] {
  %all-reduce.9 = bf16[64,8]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,4,8,12},{1,5,9,13}}, to_apply=%add
}

%piece (p: f32[4]) -> f32[16] {
  %all-gather.7 = f32[16]{0} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
}

%cond (s: (s32[], f32[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(10)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.1 = f32[16]{0} fusion(%x), kind=kLoop, calls=%piece, backend_config={"estimated_cycles":"100"}
  %fusion.2 = f32[16]{0} fusion(%x), kind=kLoop, calls=%piece, backend_config={"estimated_cycles":"100"}
  %fusion.3 = bf16[16,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel.4 = (f32[4]{0}) custom-call(%q), custom_call_target="tpu_custom_call", backend_config={"x": {
}}, metadata={op_name="k"}
  ROOT %t = (s32[], f32[4]) tuple(%i, %x)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]) while(%init), condition=%cond, body=%body
  %all-to-all.2 = f32[8,2]{1,0} all-to-all(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}
  %permute.3 = (f32[4], f32[4], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,2}}
}
"""


@pytest.mark.parametrize(
    ("line", "sent", "unread"),
    [
        ("%a = (f32[4]{0}, f32[4]{0}, f32[8]{0}) all-gather(%x, %y, %z), replica_groups={{0,1,2,3}}", 64 * 3 / 4, 0),
        ("%a = (f32[4]{0}, f32[4]{0}) all-to-all(%x, %y), replica_groups={{0,1}}", 32 / 2, 0),
        ("%a = (f32[4], f32[2]) all-reduce-start(%x, %y), replica_groups={{0,1}}", 24.0, 0),
        ("%a = ((f32[2], f32[1]), (f32[8], f32[4])) all-gather-start(%x, %y), replica_groups={{0,1,2,3}}", 36.0, 0),
        ("%a = f32[16]{0} all-gather(%x), replica_groups={}, dimensions={0}", 64 * 7 / 8, 0),
        ("%a = f8e4m3fn[16]{0} all-gather(%x), replica_groups={{0,1}}", 8.0, 0),
        ("%a = c64[16]{0} all-gather(%x), replica_groups={{0,1}}", 0.0, 1),
        ("%a = f32[16]{0} all-gather(%x), replica_groups=somehow", 0.0, 1),
    ],
)
def test_every_form_of_a_collective_is_read_or_counted_as_unread(line, sent, unread):
    found = hlo.read(f"HloModule m, num_partitions=8\n\nENTRY %main (x: f32[4]) -> f32[4] {{\n  {line}\n}}\n")
    assert sum(c.sent for c in found.collectives) == sent
    assert found.unread == unread


def test_a_programs_text_is_read_with_loops_and_cut_up_collectives():
    found = hlo.read(TEXT)
    assert found.cycles == 10 * 200
    assert found.kernels == {"kernel": 10}
    assert found.unread == 0
    gather, scatter, exchange, permute = found.collectives
    # Met in two fusions, by one channel: once, and beside other work.
    assert (gather.kind, gather.result, gather.group, gather.times) == ("all-gather", 64, (0, 4, 8, 12), 10)
    assert gather.overlapped
    assert not scatter.overlapped
    assert (scatter.kind, scatter.result, scatter.sent) == ("reduce-scatter", 1024, 1024 * 3 / 4)
    assert (exchange.kind, exchange.group, exchange.sent) == ("all-to-all", (0, 4), 32.0)
    assert (permute.kind, permute.result, permute.overlapped) == ("collective-permute", 16, True)


def test_collectives_of_a_real_program_are_counted():
    """A scanned product of split rows and a split inner dimension: one all-reduce a round, of a known size."""
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "tensor")))
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor", None)))

    def f(x, w):
        def body(x, _):
            return jax.lax.with_sharding_constraint(x @ w, x_where), None

        return jax.lax.scan(body, x, length=5)[0]

    x_where = PartitionSpec("data", "tensor")
    with jax.set_mesh(mesh):
        found = hlo.read(jax.jit(f).lower(x, w).compile().as_text())
    reduces = [c for c in found.collectives if c.kind in ("all-reduce", "reduce-scatter")]
    assert sum(c.times for c in reduces) == 5
    assert {(c.result, len(c.group)) for c in reduces} == {(4 * 64 * 4, 4)}


def test_collectives_of_a_shard_map_count_each_although_they_share_a_channel():
    line = "  %a.{} = f32[8]{{0}} all-reduce(%x), channel_id={}, replica_groups={{{{0,1}}}}, to_apply=%add\n"
    body = "".join(line.format(i, channel) for i, channel in enumerate((1, 1, 7, 7)))
    found = hlo.read(f"HloModule m, num_partitions=2\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}}}\n")
    assert [c.overlapped for c in found.collectives] == [False, False, True]


def test_a_psum_in_a_shard_map_has_the_shared_channel():
    mesh = make_mesh(MeshConfig(data=8))
    both = jax.shard_map(
        lambda x: (jax.lax.psum(x, "data"), jax.lax.psum(2 * x * x, "data")),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    lowered = jax.jit(both).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).as_text()
    assert lowered.count(f"channel_handle = #stablehlo.channel_handle<handle = {hlo._SHARED_CHANNEL},") == 2
