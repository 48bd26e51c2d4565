"""A run that loops over its layers leaves checkpoints that a run without the loop goes on from, and
the other way round: with a router whose balancing bias moves from step to step, and must go on from
where the checkpoint has it.
"""

import json

import numpy as np
import pytest

from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import LossFreeTopK
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.train import Train

pytestmark = pytest.mark.usefixtures("drawn_parameters")
RATE = (
    2.0**-9
)  # far below the differences of scores, so that the same experts are too full for several steps
SHAPE = {
    "vocab_size": 24,
    "emb_dim": 8,
    "num_heads": 2,
    "head_dim": 4,
    "mlp_dim": 16,
    "dropout_rate": 0.0,  # a loop draws other masks
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,  # the encoder is what loops
}


@pytest.fixture
def start(bags, tmp_path):
    class Sequences(bags.Dataset):
        def batch(self, k):
            tokens = (
                np.random.default_rng((self.seed, k))
                .integers(1, 24, (2, self.batch_size, 8))
                .astype(np.int32)
            )
            shifted = np.pad(tokens[1][:, :-1], ((0, 0), (1, 0)))
            return {
                "encoder_input_tokens": tokens[0],
                "decoder_input_tokens": shifted,
                "decoder_target_tokens": tokens[1],
                "decoder_loss_weights": np.ones_like(shifted),
            }

    def run(name, *, scan, steps, remat="none", restore=None, evaluates=False):
        experts = MoeConfig(
            num_experts=4,
            group_size=16,
            encoder_router=LossFreeTopK(update_rate=RATE),
            encoder_sparse_layout=(0, 1),
            decoder_sparse_layout=(),
        )
        config = T5Config(**SHAPE, moe=experts, scan_layers=scan, remat_policy=remat)
        data = Sequences(batch_size=8, task_feature_lengths={"inputs": 8, "targets": 8})
        return Train(
            model=EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS"),
            model_dir=tmp_path / name,
            train_dataset_cfg=data,
            train_eval_dataset_cfg=data if evaluates else None,
            checkpoint_cfg=CheckpointConfig(restore=restore, save=SaveCheckpointConfig(period=2)),
            partitioner=bags.one_device,
            trainer=bags.trainer(),
            total_steps=steps,
            eval_steps=1,
            eval_period=2,
            stats_period=1,
        ).run()

    return run


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in lines}


def specs(path):
    return open_checkpoint(path).specs()


def biases(path):
    """The selection bias of the routers of both MoE layers, as T5X would name them."""
    reader = open_checkpoint(path)
    return np.stack([reader.read(f"target/encoder/layers_{i}/mlp/router/bias") for i in (0, 1)])


# A loop over layers computes what the layers do, and parameters are those of single layers, in
# tests/models/test_stacking.py.
@pytest.mark.slow
def test_runs_go_on_in_the_other_form(start, tmp_path):
    """Layer by layer to step 6; from its step 2 on with a loop to step 4, and back to step 6."""
    layers, mixed = tmp_path / "layers", tmp_path / "mixed"
    start("layers", scan=False, steps=6)
    restore = RestoreCheckpointConfig(path=str(layers / "checkpoint_2"))
    loop = {"scan": True, "remat": "minimal", "evaluates": True}
    assert start("mixed", steps=4, restore=restore, **loop).start == "continue"
    assert specs(mixed / "checkpoint_4") == specs(layers / "checkpoint_4")
    assert start("mixed", scan=False, steps=6).start == "resume"
    want, have = rows(layers / "train"), rows(mixed / "train")
    assert list(have) == [3, 4, 5, 6]
    for step, row in have.items():
        names = [name for name in row if not name.startswith(("timing/", "wall"))]
        assert set(names) == {
            name for name in want[step] if not name.startswith(("timing/", "wall"))
        }
        for name in names:
            np.testing.assert_allclose(
                row[name], want[step][name], rtol=1e-4, atol=1e-5, err_msg=f"step {step}: {name}"
            )
    # The bias went on by whole steps: it is restored, by a run of its own that continues as by one
    # that resumes, and no optimizer, weight decay or momentum has a part in it.
    early, middle, late = (biases(layers / f"checkpoint_{step}") for step in (2, 4, 6))
    assert early.shape == (2, 4) and early.any()
    assert (middle != early).any() and (late != middle).any()
    np.testing.assert_array_equal(late / RATE, np.round(late / RATE))
    assert max(np.abs(middle - early).max(), np.abs(late - middle).max()) <= 2 * RATE
    np.testing.assert_array_equal(biases(mixed / "checkpoint_4"), middle)
    np.testing.assert_array_equal(biases(mixed / "checkpoint_6"), late)
    # What is computed again is said where it is, and an evaluation says how alike experts are.
    first = rows(mixed / "train")[3]
    assert first["timing/hardware_flops_per_second"] > first["timing/model_flops_per_second"]
    assert "timing/mfu" not in first  # the peak of a CPU is nobody's to know
    evaluated = rows(next((mixed / "training_eval").iterdir()))
    assert all(-1 <= row["experts/encoder/layers_1/similarity"] <= 1 for row in evaluated.values())
