"""Compiling for devices that are not there. CPU devices stand in for the slice, except where libtpu
is installed.
"""

import importlib.util
import math
import subprocess
import sys

import jax
import pytest

from upcycle_jax import config, precompile
from upcycle_jax.config.search import shipped_files, shipped_folder
from upcycle_jax.config.stand_ins import stand_ins
from upcycle_jax.costs.hardware import GIB
from upcycle_jax.models.base import stack_lengths
from upcycle_jax.planning import topologies
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


def stand_in(patch):
    """Eight CPU devices stand in for whatever slice is asked for."""
    chip = Chip("v0", GIB, 1e12, 1e11, 1e10, "v0")
    patch.setattr(topologies, "prepare_environment", lambda: None)
    patch.setattr(topologies, "topology", lambda name: Topology(name, chip, tuple(jax.devices())))


@pytest.fixture
def on_cpu(monkeypatch):
    stand_in(monkeypatch)


def test_a_slice_must_be_named(on_cpu, capsys):
    assert precompile.main(TINY) == 2
    assert "which slice? Give --topology" in capsys.readouterr().err


def test_there_is_a_pod_configuration_for_every_model():
    sizes = {
        "sparse_upcycling": ("base", "large", "xl", "vit_b16", "vit_l16"),
        "language_models": ("llama_3_2_1b", "llama_3_8b", "qwen3_0_6b", "qwen3_8b"),
    }
    assert set(PODS) == {
        f"papers/{folder}/pods/{size}_{kind}.gin"
        for folder in sizes
        for size in sizes[folder]
        for kind in ("dense", "upcycled")
    }


@pytest.mark.parametrize("name", PODS)
def test_pod_configurations_build_and_divide_over_their_slice(name):
    loaded = config.load([name], stand_ins(config.load([name])))
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
        stacks = stack_lengths(run["model"], dataset.task_feature_lengths)
        tokens = [dataset.batch_size // devices * length for length in stacks.values()]
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
