"""Compiling for devices that are not there. CPU devices stand in for the slice, except where libtpu
is installed.
"""

import contextlib
import dataclasses
import importlib.util
import io
import math
import re
import subprocess
import sys

import jax
import pytest

from upcycle_jax import config, precompile
from upcycle_jax.config.search import shipped_files, shipped_folder
from upcycle_jax.config.stand_ins import STAND_INS
from upcycle_jax.costs.hardware import GIB
from upcycle_jax.planning import collectives, compilation, pod_report, topologies
from upcycle_jax.planning.collectives import Collective, Traffic
from upcycle_jax.planning.topologies import Chip, Topology

PODS = [name for name in shipped_files() if "/pods/" in name and not name.endswith("common.gin")]
TINY = [
    "--gin_file=models/t5_1_1_tiny_upcycled.gin",
    "--gin_file=runs/continue_pretrain.gin",
    "--gin.RECIPE=@Recipe()",
    "--gin.NUM_EXPERTS=8",
    "--gin.GROUP_SIZE=16",
    "--gin.BATCH_SIZE=16",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}",
]

HLO = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %exchange = bf16[4,8]{1,0:T(8,128)(2,1)} all-to-all(%x), channel_id=1, replica_groups=[4,8]<=[32], dimensions={0}
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
  ROOT %w2 = (s32[], bf16[4,8]) while(%w1), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"2"}}
}

%body.3 (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %block = f32[2,8] all-to-all(%x), channel_id=2, replica_groups=[4,8]<=[32], dimensions={0}
  ROOT %t2 = (s32[], bf16[4,8]) tuple(%i, %exchange)
}

ENTRY %main (p: f32[10]) -> f32[10] {
  %layers = (s32[], bf16[4,8]) while(%start), condition=%condition.1, body=%body.2, backend_config={"known_trip_count":{"n":"3"}}
  %w = (s32[], bf16[4,8]) while(%start), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"6"},"x":1}
  %gather-start = (f32[10]{0}, f32[40]{0}) all-gather-start(%p), replica_groups=[8,4]<=[32], dimensions={0}
  %gather = f32[40]{0} all-gather-done(%gather-start)
  %two = (f32[10]{0}, f32[5]{0}) all-reduce(%p, %q), replica_groups={}, to_apply=%add
  %s = f32[16]{0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.3
  %m = f32[7]{0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a':(1)2,'c'}, dimensions={0}
  ROOT %send = f32[10]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    found = {(item.kind, item.shape): item for item in collectives.collectives(HLO)}
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


def test_rounds_of_unknown_number_are_reported_as_such(compiled):
    report, rounds = compiled[0], Traffic("all-to-all", 4, 16, 3 * 2**20, open_ended=True)
    assert (
        "only the running program knows" not in report.text()
        and "at even load" not in report.text()
    )
    report = dataclasses.replace(report, step=dataclasses.replace(report.step, traffic=(rounds,)))
    line = (
        "all-to-all              16 x,    3.0 MiB per device, among groups of 4; per round of loops"
        " whose length only the running program"
    )
    assert line in report.text()
    assert (
        report.cells()[pod_report.COLUMNS.index("all-to-all / device / step")]
        == "3.0 MiB per round"
    )


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
    (item,) = collectives.collectives(text)
    assert (item.kind, item.nbytes, item.group_size) == ("all-reduce", 16, 8)
    assert item.times == 3 or "known_trip_count" not in text


@pytest.mark.parametrize(
    ("name", "message"),
    [("v5e", "is not GENERATION:SHAPE"), ("v9:2x2", "is not GENERATION:SHAPE with one of v2")],
)
def test_topologies_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        topologies.topology(name)


def test_without_libtpu_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'upcycle_jax\[precompile\]'"):
        topologies.topology("v5e:4x8")


def test_accelerator_types_count_chips_or_cores():
    assert topologies.CHIPS["v5e"].accelerator_type(256) == "v5litepod-256"
    assert (
        topologies.CHIPS["v5p"].accelerator_type(64) == "v5p-128"
    )  # two cores per chip, one device


def stand_in(patch):
    """Eight CPU devices stand in for whatever slice is asked for."""
    chip = Chip("v0", GIB, 1e12, "v0")
    patch.setattr(topologies, "prepare_environment", lambda: None)
    patch.setattr(topologies, "topology", lambda name: Topology(name, chip, tuple(jax.devices())))


@pytest.fixture
def on_cpu(monkeypatch):
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def compiled():
    """The report of a tiny model on a 2 x 4 mesh, through the command, and what the command printed
    and returned.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        stand_in(patch)
        reports, build = [], pod_report.build
        patch.setattr(pod_report, "build", lambda *args: reports.append(build(*args)) or reports[0])
        code = precompile.main([*TINY, "--topology=v0:2x4", "--gin.NUM_EXPERT_PARTITIONS=4"])
    return reports[0], printed.getvalue(), code


def with_memory(report, nbytes):
    chip = dataclasses.replace(report.topology.chip, memory_bytes=nbytes)
    return dataclasses.replace(report, topology=dataclasses.replace(report.topology, chip=chip))


def test_a_run_that_fits_says_what_it_needs_and_sends(compiled):
    report, text, code = compiled
    assert code == 0 and report.text() == text
    assert "mesh           data 2 x expert 4 x model 1" in text
    assert "train step: compiled in" in text and re.search(
        r"all-to-all +\d+ x, .* among groups of 4", text
    )
    # One program for wi_0 and wi_1, one for wo; both only place what is there.
    assert len(re.findall(r"upcycling restore of float32\[8,\d+,\d+\]: compiled", text)) == 2
    assert text.count("no collectives") == 2 and text.splitlines()[-1].startswith("FITS: ")


def test_a_run_that_does_not_fit_fails_and_names_what_to_change(
    compiled, on_cpu, monkeypatch, capsys
):
    monkeypatch.setattr(pod_report, "build", lambda *args: with_memory(compiled[0], 1000))
    code = precompile.main([*TINY, "--topology=v0:2x4"])
    text = capsys.readouterr().out
    assert code == 1 and "DOES NOT FIT" in text
    for change in (
        "NUM_EXPERT_PARTITIONS = 8:",
        "Partitioner.fsdp = True:",
        "NUM_MODEL_PARTITIONS = 2:",
        "a larger topology",
    ):
        assert change in text
    assert "state and gradients" in text and "instead of" in text


def test_a_row_of_the_table(compiled):
    head, rule, row = pod_report.markdown([compiled[0]]).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == len(pod_report.COLUMNS) + 1
    assert row.startswith("| continue_pretrain | ") and "data 2 x expert 4 x model 1" in row


def test_a_program_that_jax_cannot_read_is_reported_as_such(compiled):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError(
                "INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands but"
                " sees 3"
            )

    assert compilation._traffic(Unreadable()) is None
    report = dataclasses.replace(
        compiled[0], step=dataclasses.replace(compiled[0].step, traffic=None)
    )
    assert "collectives unknown" in report.text() and report.fits
    assert report.cells()[pod_report.COLUMNS.index("all-to-all / device / step")] == "unknown"


def test_what_the_compiler_says_it_lacks_is_read():
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
                "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
            )

    compiled = compilation._compiled("train step", Lowered)
    assert not compiled.fits and compiled.needed_bytes == int(20.5 * GIB)


def test_a_slice_must_be_named(on_cpu, capsys):
    assert precompile.main(TINY) == 2
    assert "which slice? Give --topology" in capsys.readouterr().err


def test_there_is_a_pod_configuration_for_every_model_of_the_paper():
    names = {name.rpartition("/")[2] for name in PODS}
    assert names == {
        f"{size}_{kind}.gin" for size in ("base", "large", "xl") for kind in ("dense", "upcycled")
    }


@pytest.mark.parametrize("name", PODS)
def test_pod_configurations_build_and_divide_over_their_slice(name):
    bindings = [f"{macro}={value!r}" for macro, value in STAND_INS.items()]
    loaded = config.load([name], bindings)
    run = loaded.build("train").keywords
    generation, _, shape = loaded.macro("TOPOLOGY").partition(":")
    devices = math.prod(map(int, shape.split("x")))
    partitioner, dataset = run["partitioner"], run["train_dataset_cfg"]
    assert generation in topologies.CHIPS
    assert devices % (partitioner.num_expert_partitions * partitioner.num_model_partitions) == 0
    assert dataset.batch_size % devices == 0
    moe = run["model"].config.moe
    assert (
        (moe is not None)
        == name.endswith("_upcycled.gin")
        == (run["checkpoint_cfg"].restore.recipe is not None)
    )
    if moe is not None:
        tokens = [
            dataset.batch_size // devices * length
            for length in dataset.task_feature_lengths.values()
        ]
        assert all(count % moe.group_size == 0 for count in tokens), (
            "groups lie whole on one device"
        )
    # The head of the file names the slice as Cloud TPU does.
    assert (
        topologies.CHIPS[generation].accelerator_type(devices)
        in (shipped_folder() / name).read_text()
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install 'upcycle_jax[precompile]'",
)
def test_tiny_compiles_for_a_real_slice():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "upcycle_jax.precompile",
            *TINY,
            "--topology=v5e:2x4",
            "--gin.NUM_EXPERT_PARTITIONS=4",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "v5litepod-8" in done.stdout and "all-to-all" in done.stdout and "FITS" in done.stdout
