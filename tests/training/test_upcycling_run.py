"""Upcycling inside a run, on the real tiny model: once, visible at the first evaluation, the same
whatever the mesh.
"""

import json
import shutil
import types

import numpy as np
import pytest

from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import ExpertsChoose, TokensChoose
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.surgery import Recipe
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.train import Train

pytestmark = pytest.mark.usefixtures("drawn_parameters")
SHAPE = {
    "vocab_size": 24,
    "emb_dim": 8,
    "num_heads": 2,
    "head_dim": 4,
    "mlp_dim": 16,
    "mlp_activations": ("gelu", "linear"),
    "dropout_rate": 0.1,
}


def moe(**kwargs):
    settings = {
        "num_experts": 4,
        "encoder_router": ExpertsChoose(renormalize=True),
        "decoder_router": TokensChoose(num_selected_experts=2, renormalize=True),
        "group_size": 16,
        "train_expert_capacity_factor": 2.0,
        "eval_expert_capacity_factor": (
            4.0
        ),  # ample: every token gets its experts, so the upcycled function equals the dense one
    }
    return MoeConfig(**settings | kwargs)


def starter(bags, folder):
    """Runs in `folder`, by name."""

    class Sequences(bags.Dataset):
        def batch(self, k):
            batch = super().batch(k)
            inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
            inputs, targets = np.tile(inputs, (1, 2))[:, :8], np.tile(targets, (1, 2))[:, :8]
            shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
            return {
                "encoder_input_tokens": inputs,
                "decoder_input_tokens": shifted,
                "decoder_target_tokens": targets,
                "decoder_loss_weights": (targets > 0).astype(np.int32),
            }

    def run(
        name,
        *,
        sparse,
        steps,
        restore=None,
        partitioner=bags.one_device,
        group_size=16,
        dry_run=False,
        **kwargs,
    ):
        experts = (
            moe(group_size=group_size, num_encoder_sparse_layers=1, num_decoder_sparse_layers=1)
            if sparse
            else None
        )
        config = T5Config(**SHAPE, num_encoder_layers=1, num_decoder_layers=1, moe=experts)
        data = Sequences(batch_size=8, task_feature_lengths={"inputs": 8, "targets": 8})
        return Train(
            model=EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS"),
            model_dir=folder / name,
            train_dataset_cfg=data,
            train_eval_dataset_cfg=data,
            checkpoint_cfg=CheckpointConfig(restore=restore, save=SaveCheckpointConfig(period=2)),
            partitioner=partitioner,
            trainer=bags.trainer(),
            total_steps=steps,
            eval_steps=2,
            eval_period=4,
            stats_period=1,
            **kwargs,
        ).run(dry_run=dry_run)

    return run


@pytest.fixture
def start(bags, tmp_path):
    return starter(bags, tmp_path)


@pytest.fixture(scope="module")
def dense(bags, tmp_path_factory):
    """A MODEL_DIR of four steps of the dense model, to start from."""
    folder = tmp_path_factory.mktemp("runs")
    starter(bags, folder)("dense", sparse=False, steps=4)
    return folder / "dense"


@pytest.fixture(scope="module")
def sparse(bags, dense, tmp_path_factory):
    """A MODEL_DIR that was upcycled from `dense` and went on to step 8, on one device; and how it
    was restored, from a copy that is gone since.
    """
    folder = tmp_path_factory.mktemp("upcycled")
    source = shutil.copytree(dense, folder / "dense")
    restore = RestoreCheckpointConfig(path=str(source), recipe=Recipe())
    result = starter(bags, folder)("one", sparse=True, steps=8, restore=restore)
    assert result.start == "upcycle"
    shutil.rmtree(source)
    return types.SimpleNamespace(folder=folder / "one", restore=restore)


def rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {
            k: v for k, v in row.items() if k != "wall_time" and not k.startswith("timing/")
        }
        for row in rows
    }


def leaves(path):
    reader = open_checkpoint(path)
    return {name: reader.read(name) for name in reader.specs()}


def test_upcycling_happens_once_and_the_run_resumes_bit_for_bit(start, dense, sparse, tmp_path):
    restore, sparse = sparse.restore, sparse.folder
    shutil.copytree(sparse, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoint_8")  # as if it had been killed after step 7
    # Resuming must not even look at the dense checkpoint, which is gone.
    assert start("parts", sparse=True, steps=8, restore=restore).start == "resume"
    assert rows(sparse / "train") == rows(tmp_path / "parts" / "train")
    whole, parts = leaves(sparse / "checkpoint_8"), leaves(tmp_path / "parts" / "checkpoint_8")
    for name in whole:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
    # The schedule goes on at the dense step: base rate 1.0, warm-up of 4 steps done, so 1 /
    # sqrt(step before the update).
    rates = {step: row["learning_rate"] for step, row in rows(sparse / "train").items()}
    assert list(rates) == [5, 6, 7, 8]
    np.testing.assert_allclose(
        list(rates.values()), [1 / np.sqrt(step) for step in (4, 5, 6, 7)], rtol=1e-6
    )
    # Renormalised and with ample capacity, the restored model computes what the dense one did: no
    # initial drop.
    after, before = (rows(run / "training_eval" / "bags_a")[4] for run in (sparse, dense))
    np.testing.assert_allclose(after["cross_ent_loss"], before["cross_ent_loss"], rtol=1e-4)
    record = open_checkpoint(tmp_path / "parts" / "checkpoint_8").metadata()[
        "surgery"
    ]  # handed on over the resume
    assert record["source_step"] == 4 and record["recipe"]["type"] == "Recipe"
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    assert manifest["recipe"]["type"] == "Recipe" and manifest["start_step"] == 4
    assert manifest["converted_by"] == manifest["recipe"]
    assert (
        manifest["model"]["moe"]["encoder_router"]["type"] == "ExpertsChoose"
        and manifest["batch_size"] > 0
    )
    assert [entry["restored_from"]["start"] for entry in manifest["starts"]] == [
        "upcycle",
        "resume",
    ]


def test_upcycling_a_sparse_checkpoint_again_is_refused(start, dense, sparse, tmp_path):
    again = RestoreCheckpointConfig(path=str(sparse.folder), recipe=Recipe())
    with pytest.raises(ValueError, match=r"Mixture-of-Experts already"):
        start("twice", sparse=True, steps=9, restore=again)
    with pytest.raises(
        ValueError,
        match=r"dense and the model has experts: set RestoreCheckpointConfig.recipe = @Recipe\(\)",
    ):
        start(
            "forgotten",
            sparse=True,
            steps=6,
            restore=RestoreCheckpointConfig(path=str(dense)),
        )
    assert not (tmp_path / "twice").exists() and not (tmp_path / "forgotten").exists()


def test_dry_run_shows_the_plan(start, dense, tmp_path, capsys):
    restore = RestoreCheckpointConfig(path=str(dense), recipe=Recipe())
    start(
        "sparse",
        sparse=True,
        steps=6,
        restore=restore,
        dry_run=True,
        partitioner=Partitioner(num_expert_partitions=4),
    )
    out = capsys.readouterr().out
    assert (
        "upcycle " in out and "tile x4" in out and "expert 4" in out and "4 -> 6 (2 to do)" in out
    )
    assert not (tmp_path / "sparse").exists()


# A run of test_image_runs.py has the state tiled.
@pytest.mark.parametrize("policy", ["dense_only", pytest.param("tiled", marks=pytest.mark.slow)])
def test_optimizer_state_policies_reach_the_run(start, dense, policy):
    restore = RestoreCheckpointConfig(path=str(dense), recipe=Recipe(optimizer_state=policy))
    assert start("sparse", sparse=True, steps=5, restore=restore).step == 5


# Conversions on every mesh are in tests/surgery/test_apply.py, steps in test_train_step.py.
@pytest.mark.slow
def test_losses_of_an_upcycled_run_do_not_depend_on_the_mesh(start, dense, sparse, tmp_path):
    restore = RestoreCheckpointConfig(path=str(dense), recipe=Recipe())
    start(
        "eight",
        sparse=True,
        steps=7,
        restore=restore,
        partitioner=Partitioner(num_expert_partitions=4),
    )
    runs = sparse.folder, tmp_path / "eight"
    losses = [[rows(run / "train")[step]["loss"] for step in (5, 6, 7)] for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    evaluated = [rows(run / "training_eval" / "bags_b")[4]["loss"] for run in runs]
    np.testing.assert_allclose(*evaluated, rtol=1e-5)


def test_experts_that_do_not_divide_over_the_mesh(start, tmp_path):
    with pytest.raises(
        ValueError, match=r"axis 'expert' of size 4 .* not divisible by the 8 partitions"
    ):
        start("sparse", sparse=True, steps=4, partitioner=Partitioner(num_expert_partitions=8))
    assert not (tmp_path / "sparse").exists()


def test_groups_that_do_not_divide_the_tokens(start, tmp_path):
    with pytest.raises(ValueError, match=r"64 tokens do not divide into groups of GROUP_SIZE=24"):
        start("sparse", sparse=True, steps=4, group_size=24)
    assert not (tmp_path / "sparse").exists()
