"""Online and offline give the same bits; offline streams, resumes, and leaves the source alone."""

import hashlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest

from upcycle_jax import surgery
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.moe import roles
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.surgery import online, recipe_json
from upcycle_jax.surgery.leaf_values import RowValues, regions_of
from upcycle_jax.trees import LeafSpec

MESHES = {"1x1": (1, 1), "8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}


def partitioner(name):
    experts, model = MESHES[name]
    if name == "1x1":
        return Partitioner(devices=(jax.devices()[0],))
    return Partitioner(num_expert_partitions=experts, num_model_partitions=model)


def save(path, arrays, step=1000):
    specs = roles.inferred(
        {name: LeafSpec(array.shape, array.dtype) for name, array in arrays.items()}
    )
    writer = create_checkpoint(path, specs, step=step, metadata={})
    for name, array in arrays.items():
        if name != "state/step":
            writer.write(name, None, array)
    writer.finalize()
    return open_checkpoint(path)


def values_of(plan, reader):
    """Every leaf, made region by region on the host."""
    out = {}
    for row in plan.rows:
        leaf = np.zeros(row.spec.shape, row.spec.dtype)
        values = RowValues(row, reader, plan.recipe.seed)
        for region in regions_of(row, 200):
            leaf[region] = values.region(region)
        out[row.target] = leaf
    return out


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


INITS = {
    "copy": surgery.CopyExperts(),
    "noise": surgery.NoisyCopies(0.1, relative=True),
    "fresh": surgery.FreshExperts(),
    "partial": surgery.PartialCopies((1, 5)),
    "drop": surgery.DropUpcycling(0.5, shuffle=True),
    "groups": surgery.VirtualGroups(granularity=2, top_k=2),
    "qwen": surgery.QwenExperts(),
}


# How leaves lie on a mesh is the same for all recipes: copies see every one in every run.
TWO_MESHES = ("1x1", "4x2")


@pytest.mark.parametrize(
    ("init", "meshes"),
    [
        *((init, tuple(MESHES) if init == "copy" else TWO_MESHES) for init in INITS),
        *(
            pytest.param(init, tuple(MESHES), marks=pytest.mark.slow)
            for init in INITS
            if init != "copy"
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else value,
)
def test_online_equals_offline_on_every_mesh(small, tmp_path, init, meshes):
    narrow = INITS[init].keeps_shape is False
    target = small.tree(f=16, sparse=(1,), experts=8, width=8 if narrow else 16)
    source = save(tmp_path / "dense", small.filled(small.tree(f=16)))
    recipe = surgery.Recipe(
        expert_init=INITS[init], seed=3, optimizer_state="dense_only" if narrow else "tiled"
    )
    plan = surgery.make_plan(source.specs(), target, recipe)
    surgery.apply_offline(plan, source, tmp_path / "sparse")
    written = open_checkpoint(tmp_path / "sparse")
    on_disk = {name: written.read(name) for name in written.specs()}
    assert on_disk.keys() == target.keys()
    for name in meshes:
        shardings = partitioner(name).shardings(target)
        made = surgery.apply_online(plan, source, shardings)
        assert_same_bits(made, on_disk)
        assert all(
            made[path].sharding.is_equivalent_to(shardings[path], made[path].ndim) for path in made
        )


@hypothesis.settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    mesh=st.sampled_from(sorted(MESHES)),
    seed=st.integers(0, 2**31 - 1),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    data=st.data(),
)
def test_online_equals_region_by_region(small, mesh, seed, dtype, data):
    """Whatever the seed, the dtype of either side and the way of cutting."""
    init = data.draw(
        st.sampled_from([surgery.CopyExperts(), surgery.NoisyCopies(), surgery.DropUpcycling()])
    )
    source = small.dense(seed % 97, f=16, dtype=dtype, optimizer=None)
    target = small.tree(
        f=16,
        sparse=(0,),
        experts=8,
        dtype=data.draw(st.sampled_from([np.float32, ml_dtypes.bfloat16])),
        optimizer=None,
    )
    plan = surgery.make_plan(source.specs(), target, surgery.Recipe(expert_init=init, seed=seed))
    assert_same_bits(
        surgery.apply_online(plan, source, partitioner(mesh).shardings(target)),
        values_of(plan, source),
    )


def test_parents_depth_and_merge_online_and_offline(small, tmp_path):
    dense, sparse = small.tree(f=16), small.tree(f=16, sparse=(1,), experts=8)
    parents = surgery.join(
        [save(tmp_path / f"dense{n}", small.filled(dense, seed=n)) for n in range(2)]
    )
    cases = {
        "parents": (parents, sparse, surgery.Recipe(expert_init=surgery.ParentExperts((0, 1) * 4))),
        "depth": (
            parents.readers[0],
            small.tree(f=16, layers=4),
            surgery.Recipe(depth=surgery.DepthTile(), optimizer_state="tiled"),
        ),
        "merge": (save(tmp_path / "sparse0", small.filled(sparse)), dense, surgery.MergeRecipe()),
        "pick": (
            open_checkpoint(tmp_path / "sparse0"),
            dense,
            surgery.MergeRecipe(how="expert", expert=3),
        ),
    }
    for name, (source, target, recipe) in cases.items():
        plan = surgery.make_plan(source.specs(), target, recipe)
        surgery.apply_offline(plan, source, tmp_path / name)
        written = open_checkpoint(tmp_path / name)
        for mesh in ("1x1", "4x2"):
            assert_same_bits(
                surgery.apply_online(plan, source, partitioner(mesh).shardings(target)),
                {path: written.read(path) for path in written.specs()},
            )
        assert surgery.prove(plan, source, written).ok


def test_copy_then_merge_is_the_identity(small, tmp_path):
    dense, sparse = small.tree(), small.tree(sparse=(0, 1), experts=5)
    source = save(tmp_path / "dense", small.filled(dense))
    surgery.apply_offline(surgery.make_plan(source.specs(), sparse), source, tmp_path / "sparse")
    upcycled = open_checkpoint(tmp_path / "sparse")
    for recipe in (surgery.MergeRecipe(), surgery.MergeRecipe(how="expert", expert=4)):
        plan = surgery.make_plan(upcycled.specs(), dense, recipe)
        merged = values_of(plan, upcycled)
        for name in merged:
            if name.startswith("target/"):
                assert merged[name].tobytes() == source.read(name).tobytes(), name


def test_permuting_experts_with_their_router_columns_commutes_with_merging(small):
    sparse = small.Reader(small.filled(small.tree(sparse=(1,), experts=4)))
    order = [2, 0, 3, 1]
    permuted = {
        name: (
            array[order]
            if "/expert/" in name and array.shape != (1,)
            else array[:, order]
            if "/router/" in name and array.ndim == 2
            else array
        )
        for name, array in sparse.arrays.items()
    }
    plan = surgery.make_plan(sparse.specs(), small.tree(), surgery.MergeRecipe())
    one, other = values_of(plan, sparse), values_of(plan, small.Reader(permuted))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_a_dense_leaf_is_read_once_and_no_program_holds_all_experts(small):
    source = small.dense(f=16)
    target = small.tree(f=16, sparse=(1,), experts=8)
    plan = surgery.make_plan(source.specs(), target, surgery.Recipe(optimizer_state="tiled"))
    mesh = partitioner("8x1")
    surgery.apply_online(plan, source, mesh.shardings(target))
    assert (
        len(source.reads)
        == len(set(source.reads))
        == len({name for row in plan.rows for name in row.sources})
    )
    row = plan.row("target/encoder/layers_1/mlp/expert/wi_0/kernel")
    sharding = mesh.sharding(row.spec)
    program = online.movement(row.operation, row.spec.shape, row.spec.dtype, sharding)
    dense = jax.ShapeDtypeStruct(
        (8, 16), np.float32, sharding=online.source_sharding(row, row.source_specs[0], sharding)
    )
    text = program.lower([dense]).compile().as_text()
    assert "f32[1,8,16]" in text
    assert "f32[8,8,16]" not in text


def test_missing_sharding(small):
    plan = surgery.make_plan(small.tree(), small.tree(sparse=(1,)))
    with pytest.raises(ValueError, match="have no sharding, e.g. state/"):
        surgery.apply_online(plan, small.dense(), {})


def digest(folder):
    total = hashlib.sha256()
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.is_file():
            total.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    return total.hexdigest()


@pytest.mark.parametrize("materialize", [False, True])
def test_source_is_not_touched_and_shared_files_stay_out_of_reach(small, tmp_path, materialize):
    source = save(tmp_path / "dense", small.filled(small.tree(d=64, f=256)))
    before = digest(tmp_path / "dense")
    target = small.tree(d=64, f=256, sparse=(1,), experts=4)
    plan = surgery.make_plan(source.specs(), target, surgery.Recipe(optimizer_state="tiled"))
    surgery.apply_offline(plan, source, tmp_path / "sparse", materialize=materialize)
    assert digest(tmp_path / "dense") == before
    links = [
        path
        for path in (tmp_path / "sparse").rglob("*")
        if path.is_file() and path.stat().st_nlink > 1
    ]
    assert bool(links) != materialize
    assert surgery.prove(plan, source, open_checkpoint(tmp_path / "sparse")).ok
    # The result does not need the source any more.
    for path in sorted((tmp_path / "dense").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    again = open_checkpoint(tmp_path / "sparse")
    assert all(again.read(name).shape == spec.shape for name, spec in again.specs().items())


def test_an_existing_output_and_a_foreign_partial_are_refused(small, tmp_path):
    source = small.dense()
    plan = surgery.make_plan(source.specs(), small.tree(sparse=(1,)))
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists already"):
        surgery.apply_offline(plan, source, tmp_path / "taken")
    with pytest.raises(ValueError, match="less than 16 MiB"):
        surgery.apply_offline(plan, source, tmp_path / "out", max_memory=1000)


class Interrupted(Exception):
    pass


def test_an_interrupted_conversion_goes_on_where_it_stopped(small, tmp_path):
    arrays = small.filled(small.tree())
    target = small.tree(sparse=(1,), experts=4)
    recipe = surgery.Recipe(expert_init=surgery.DropUpcycling(), optimizer_state="tiled")

    class Failing(small.Reader):
        allowed = len(arrays) + 25  # Every leaf is read once before anything is written.

        def read(self, name, index=None):
            if len(self.reads) >= self.allowed:
                raise Interrupted
            return super().read(name, index)

    plan = surgery.make_plan(small.Reader(arrays).specs(), target, recipe)
    with pytest.raises(Interrupted):
        surgery.apply_offline(plan, Failing(arrays), tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()
    second = small.Reader(arrays)
    surgery.apply_offline(plan, second, tmp_path / "sparse")
    # But for those checksums, sources of what was on disk are not read again.
    whole = small.Reader(arrays)
    surgery.apply_offline(plan, whole, tmp_path / "whole")
    assert len(second.reads) < len(whole.reads)
    one, other = open_checkpoint(tmp_path / "sparse"), open_checkpoint(tmp_path / "whole")
    assert_same_bits(
        {n: one.read(n) for n in one.specs()}, {n: other.read(n) for n in other.specs()}
    )


CHILD = """
import sys, pathlib
from upcycle_jax import surgery
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.moe import roles
from upcycle_jax.surgery import recipe_json
from upcycle_jax.trees import LeafSpec
import json
folder = pathlib.Path(sys.argv[1])
described = json.loads((folder / "target.json").read_text())
leaves = described.items()
target = {name: LeafSpec(tuple(shape), dtype, tuple(axes)) for name, (shape, dtype, axes) in leaves}
target = roles.inferred(target)
source = open_checkpoint(folder / "dense")
recipe = recipe_json.from_json(json.loads((folder / "recipe.json").read_text()))
plan = surgery.make_plan(source.specs(), target, recipe)
print("ready", flush=True)
surgery.apply_offline(plan, source, folder / sys.argv[2], max_memory=int(sys.argv[3]))
"""


def child(folder, name, *, max_memory=1 << 30, prefix=()):
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", CHILD, str(folder), name, str(max_memory)],
        env=environment,
        stdout=subprocess.PIPE,
    )


def write_job(folder, target, recipe):
    described = {name: (spec.shape, spec.dtype.name, spec.axes) for name, spec in target.items()}
    (folder / "target.json").write_text(json.dumps(described))
    (folder / "recipe.json").write_text(json.dumps(recipe_json.to_json(recipe)))


@pytest.mark.slow
def test_kill_at_random_moments_then_the_same_command_gives_the_same_bits(small, tmp_path):
    options = {"d": 256, "f": 512, "layers": 4}
    source = save(tmp_path / "dense", small.filled(small.tree(**options)))
    target = small.tree(**options, sparse=(1, 3), experts=8)
    recipe = surgery.Recipe(expert_init=surgery.NoisyCopies(), optimizer_state="tiled")
    write_job(tmp_path, target, recipe)
    plan = surgery.make_plan(source.specs(), target, recipe)
    surgery.apply_offline(plan, source, tmp_path / "reference")
    killed = 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        process = child(tmp_path, "sparse")
        process.stdout.readline()
        time.sleep(float(rng.uniform(0.02, 0.8)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "sparse").exists():
            break
        killed += 1
    if not (tmp_path / "sparse").exists():
        assert child(tmp_path, "sparse").wait() == 0
    assert killed
    one, other = open_checkpoint(tmp_path / "sparse"), open_checkpoint(tmp_path / "reference")
    assert_same_bits(
        {n: one.read(n) for n in one.specs()}, {n: other.read(n) for n in other.specs()}
    )
    assert surgery.prove(plan, source, one).ok


@pytest.mark.slow
def test_memory_bound_holds_for_a_result_several_times_larger(small, tmp_path):
    """256 MiB of arrays at a time for a result of 1.5 GiB; the process may have what its libraries
    take besides.
    """
    options = {"d": 1024, "f": 4096, "layers": 2, "optimizer": None}
    save(tmp_path / "dense", small.filled(small.tree(**options)))
    target = small.tree(**options, sparse=(0, 1), experts=16)
    assert sum(spec.nbytes for spec in target.values()) > 1.5 * 2**30
    write_job(tmp_path, target, surgery.Recipe(expert_init=surgery.DropUpcycling()))
    process = child(tmp_path, "sparse", max_memory=256 << 20)
    process.stdout.readline()
    status = pathlib.Path(f"/proc/{process.pid}/status")
    peak = base = None
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            peak = int(lines["VmHWM"].split()[0]) << 10
            base = base or peak
        time.sleep(0.2)
    assert process.returncode == 0
    assert peak - base < 512 << 20, f"{(peak - base) / 2**20:.0f} MiB above {base / 2**20:.0f}"


TWO_PROCESSES = """
import sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import json, pathlib
from upcycle_jax import surgery
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.moe import roles
from upcycle_jax.surgery import recipe_json
from upcycle_jax.trees import LeafSpec
folder = pathlib.Path(folder)
described = json.loads((folder / "target.json").read_text())
leaves = described.items()
target = {name: LeafSpec(tuple(shape), dtype, tuple(axes)) for name, (shape, dtype, axes) in leaves}
target = roles.inferred(target)
source, written = open_checkpoint(folder / "dense"), open_checkpoint(folder / "sparse")
recipe = recipe_json.from_json(json.loads((folder / "recipe.json").read_text()))
plan = surgery.make_plan(source.specs(), target, recipe)
partitioner = Partitioner(num_expert_partitions=4, num_model_partitions=2)
for name, leaf in surgery.apply_online(plan, source, partitioner.shardings(target)).items():
    whole = written.read(name)
    for shard in leaf.addressable_shards:
        want = np.ascontiguousarray(whole[shard.index])
        assert np.asarray(shard.data).tobytes() == want.tobytes(), name
print("fine", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("init", ["copy", "drop"])
def test_two_processes_make_the_same_bits(small, tmp_path, init):
    source = save(tmp_path / "dense", small.filled(small.tree(f=16)))
    target = small.tree(f=16, sparse=(1,), experts=8)
    recipe = surgery.Recipe(expert_init=INITS[init], optimizer_state="tiled")
    write_job(tmp_path, target, recipe)
    surgery.apply_offline(
        surgery.make_plan(source.specs(), target, recipe), source, tmp_path / "sparse"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = pathlib.Path(__file__).resolve().parents[2]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
    }
    commands = [
        [sys.executable, "-c", TWO_PROCESSES, str(port), str(index), str(tmp_path)]
        for index in range(2)
    ]
    processes = [
        subprocess.Popen(
            c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for c in commands
    ]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert output.strip().endswith("fine"), errors[-3000:]
