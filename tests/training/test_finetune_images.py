"""Fine-tuning of vision transformers at another resolution, with a head for other classes."""

import json

import numpy as np
import pytest

from upcycle_jax import train
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.config import load
from upcycle_jax.layers.position_grids import interpolate
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.moe.routing import ExpertsChoose
from upcycle_jax.state_tree import STEP, parameter_specs
from upcycle_jax.training.sgd import Sgd

SHAPE = {"patch_size": 4, "emb_dim": 8, "num_layers": 2, "num_heads": 2, "mlp_dim": 16}
MOE = VitMoeConfig(num_experts=2, group_size=4, router=ExpertsChoose(renormalize=True))


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (12, 16, 16), np.uint8), np.arange(12) % 3
    path = tmp_path_factory.mktemp("images") / "images.npz"
    splits = ("train", "validation")
    named = {f"{split}_images": images for split in splits}
    np.savez(path, **named, **{f"{split}_labels": labels for split in splits})
    return path


def pretrained(path, moe):
    """A checkpoint of parameters for images of 8 x 8 and five classes."""
    config = VitConfig(**SHAPE, image_size=8, num_classes=5, channels=1, moe=moe)
    specs = parameter_specs(VitModel(config).param_specs())
    writer = create_checkpoint(path, specs, step=700, metadata={})
    random = np.random.default_rng(1)
    for name, spec in specs.items():
        scale = spec.shape[-2] ** -0.5 if len(spec.shape) > 1 else 0.3
        writer.write(name, None, (scale * random.normal(size=spec.shape)).astype(np.float32))
    writer.finalize()
    return open_checkpoint(path)


@pytest.mark.parametrize("moe", [pytest.param(None, marks=pytest.mark.slow), MOE])
def test_a_run_at_twice_the_resolution(moe, arrays, tmp_path):
    source = pretrained(tmp_path / "checkpoint_700", moe)
    model = "vit_tiny" if moe is None else "vit_tiny_upcycled"
    given = {"IMAGE_SIZE": 16, "NUM_CLASSES": 3, "VitConfig.channels": 1}
    given |= {f"VitConfig.{name}": value for name, value in SHAPE.items()}
    given |= {} if moe is None else {"NUM_EXPERTS": 2, "GROUP_SIZE": 16}
    given |= {"BATCH_SIZE": 8, "STATS_PERIOD": 1, "SAVING_PERIOD": 1}
    given |= {"train.train_eval_dataset_cfg": None}
    given |= {"LEARNING_RATE": 0.1, "WARMUP_STEPS": 1, "TRAIN_STEPS": 3}
    flags = [
        f"--gin_file=models/{model}.gin",
        "--gin_file=runs/finetune_images.gin",
        *(f"--gin.{name}={value}" for name, value in given.items()),
        f"--gin.INITIAL_CHECKPOINT_PATH='{source.path}'",
        "--gin.MIXTURE_OR_TASK_NAME='mine'",
        f"--gin.IMAGE_ARRAYS='{arrays}'",
        f"--gin.MODEL_DIR='{tmp_path}/run'",
    ]
    assert train.main(flags) == 0
    lines = (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    rates = [line["learning_rate"] for line in map(json.loads, lines)]
    # One step of warm-up from 0, then half a cosine over two.
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.05], rtol=1e-5)
    # The first update has a rate of 0: what it leaves is what was restored.
    first, last = (open_checkpoint(tmp_path / "run" / f"checkpoint_{step}") for step in (1, 3))
    for name, spec in source.specs().items():
        if name == STEP:
            continue
        before = source.read(name)
        if "head/" in name:
            before = np.zeros((*spec.shape[:-1], 3))
        elif "pos_embedding" in name:
            before = interpolate(before, 4, "bilinear")
        np.testing.assert_allclose(first.read(name), before, atol=1e-6, err_msg=name)
    assert np.abs(last.read("target/head/kernel")).max() > 0


def test_settings_are_the_papers():
    """SGD with momentum 0.9, batches of 512, gradients clipped to 10, a cosine that starts with the
    run.
    """
    given = [
        "MODEL_DIR='x'",
        "INITIAL_CHECKPOINT_PATH='y'",
        "TRAIN_STEPS=5700",
        "RECIPE_STEP='keep'",
    ]
    files = ["models/vit_b16_upcycled.gin", "runs/finetune_images.gin"]
    loaded = load(files, [*given, "IMAGE_SIZE=384", "NUM_CLASSES=1000"])
    call = loaded.build("train").keywords
    trainer = call["trainer"]
    assert trainer.optimizer == Sgd(momentum=0.9) and trainer.max_gradient_norm == 10.0
    assert call["train_dataset_cfg"].batch_size == 512
    # 200 steps of warm-up from step 700, then 4800 of half a cosine: half of the peak after 2400.
    schedule = trainer.learning_rate_fn.started_at(700)
    rates = [float(schedule(step)) for step in (700, 800, 900, 3300, 5700)]
    np.testing.assert_allclose(rates, [0.0, 0.005, 0.01, 0.005, 0.0], atol=1e-8)
    assert call["model"].config.grid == 24
