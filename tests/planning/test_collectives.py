"""What a compiled program sends, by hand-written and by real programs."""

import jax

from upcycle_jax.planning import collectives, hlo
from upcycle_jax.planning.collectives import Collective, Traffic

HLO = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %exchange = bf16[4,8]{1,0:T(8,128)(2,1)} all-to-all(%x), channel_id=1, \
replica_groups=[4,8]<=[32], dimensions={0}
  ROOT %t = (s32[], bf16[4,8]) tuple(%i, %exchange)
}

%condition.1 (p: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.3 (p: f32[64]) -> f32[16] {
  %all = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %part = f32[16]{0} dynamic-slice(%all, %i), dynamic_slice_sizes={16}
}

%never (p: f32[1000]) -> f32[1000] {
  ROOT %unused = f32[1000]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

%body.2 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %w1 = (s32[], bf16[4,8]) while(%start), condition=%condition.1, body=%body.3
  ROOT %w2 = (s32[], bf16[4,8]) while(%w1), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"2"}}
}

%body.3 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %block = f32[2,8] all-to-all(%x), channel_id=2, replica_groups=[4,8]<=[32], dimensions={0}
  ROOT %t2 = (s32[], bf16[4,8]) tuple(%i, %exchange)
}

ENTRY %main (p: f32[10]) -> f32[10] {
  %layers = (s32[], bf16[4,8]) while(%start), condition=%condition.1, body=%body.2, \
backend_config={"known_trip_count":{"n":"3"}}
  %w = (s32[], bf16[4,8]) while(%start), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"6"},"x":1}
  %gather-start = (f32[10]{0}, f32[40]{0}) all-gather-start(%p), replica_groups=[8,4]<=[32], \
dimensions={0}
  %gather = f32[40]{0} all-gather-done(%gather-start)
  %two = (f32[10]{0}, f32[5]{0}) all-reduce(%p, %q), replica_groups={}, to_apply=%add
  %s = f32[16]{0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.3
  %m = f32[7]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a':(1)2,'c'}, \
dimensions={0}
  ROOT %send = f32[10]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    found = {(item.kind, item.shape): item for item in collectives.collectives(hlo.parse(HLO))}
    # Six trips of a loop, and two in each of three of another; 4 * 8 bfloat16.
    assert found["all-to-all", "bf16[4,8]"] == Collective(
        "all-to-all", "bf16[4,8]", nbytes=64, group_size=8, times=6 + 3 * 2
    )
    # A loop of unknown length, begun three times, counts one pass of each.
    assert found["all-to-all", "f32[2,8]"] == Collective(
        "all-to-all", "f32[2,8]", 64, group_size=8, times=3, open_ended=True
    )
    # The started gather names operand and result: the result counts. The -done is the same gather.
    assert found["all-gather", "f32[40]"] == Collective(
        "all-gather", "f32[40]", nbytes=160, group_size=4, times=1
    )
    # Two arrays in one reduction over all devices.
    assert found["all-reduce", "f32[10], f32[5]"] == Collective(
        "all-reduce", "f32[10], f32[5]", nbytes=60, group_size=0, times=1
    )
    # TPU's fused form; its operand is 64 floats.
    assert found["reduce-scatter", "f32[64]"] == Collective(
        "reduce-scatter", "f32[64]", nbytes=256, group_size=4, times=1
    )
    # Groups along two axes of a named mesh.
    assert found["all-gather", "f32[7]"].group_size == 6
    assert found["collective-permute", "f32[10]"].group_size == 2
    assert len(found) == 7  # a computation that nothing calls does not run


def test_traffic_is_summed_by_kind_and_group():
    found = [
        Collective("all-to-all", "a", 100, 8, 6),
        Collective("all-to-all", "b", 10, 8, 1),
        Collective("all-reduce", "c", 50, 0, 2),
    ]
    found.append(Collective("all-to-all", "d", 30, 8, 2, open_ended=True))
    rounds = Traffic("all-to-all", 8, 2, 60, open_ended=True)
    assert collectives.summary(found) == [
        Traffic("all-to-all", 8, 7, 610),
        Traffic("all-reduce", 0, 2, 100),
        rounds,
    ]


def test_collectives_of_a_real_program():
    """A reduction over eight devices, three times in a loop."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

    def local(x):
        return jax.lax.fori_loop(0, 3, lambda i, y: y + jax.lax.psum(y, "x"), x)

    program = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
        )
    )
    text = (
        program.lower(jax.ShapeDtypeStruct((8, 4), "float32", sharding=sharding))
        .compile()
        .as_text()
    )
    (item,) = collectives.collectives(hlo.parse(text))
    assert (item.kind, item.nbytes, item.group_size) == ("all-reduce", 16, 8)
    assert item.times == 3 or "known_trip_count" not in text
