"""`python -m upcycle_jax.few_shot`: a tiny model's checkpoints, and what is refused."""

import json

import jax
import numpy as np
import pytest

from tests.inference.test_few_shot import ridge_scores
from tests.models.vit.kinds import random_params
from upcycle_jax import few_shot as few_shot_command
from upcycle_jax import trees
from upcycle_jax.checkpoints.manager import CheckpointManager
from upcycle_jax.config import load
from upcycle_jax.data.images import ImageDataset
from upcycle_jax.inference import few_shot

MODEL = [
    "IMAGE_SIZE=8",
    "NUM_CLASSES=2",
    "VitConfig.channels=1",
    "VitConfig.patch_size=4",
    "VitConfig.emb_dim=8",
    "VitConfig.num_layers=2",
    "VitConfig.mlp_dim=16",
    "GROUP_SIZE=16",
]
FILES = ["models/vit_tiny_upcycled.gin", "runs/few_shot.gin"]
CLASSES, IMAGES = 3, 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a MODEL_DIR of two steps and an archive of images; the parameters of the last
    step, and the images with their labels: three classes, which are more than the head has.
    """
    folder = tmp_path_factory.mktemp("few_shot")
    model = load(FILES[:1], MODEL).macro("MODEL")
    manager = CheckpointManager(folder / "run")
    for step in (2, 5):
        params = trees.unflatten(
            {path: jax.numpy.asarray(v) for path, v in random_params(model, step).items()}
        )
        state = {"step": jax.numpy.int32(step), "param_states": {}}
        manager.save(step, {"target": params, "state": state}, dataset=None, metadata={})
    manager.wait()
    manager.close()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (CLASSES * IMAGES, 8, 8), dtype=np.uint8)
    labels = np.arange(CLASSES * IMAGES) % CLASSES
    arrays = {"held_out_images": images, "held_out_labels": labels}
    arrays |= {"validation_images": images[6:], "validation_labels": labels[6:]}
    np.savez(folder / "images.npz", **arrays)
    return folder, params, images, labels


def flags(folder, out, *bindings, files=FILES):
    given = [
        *MODEL,
        "MIXTURE_OR_TASK_NAME='mine'",
        f"IMAGE_ARRAYS='{folder / 'images.npz'}'",
        f"CHECKPOINT_PATH='{folder / 'run'}'",
        f"EVAL_OUTPUT_DIR='{out}'",
        "SHOTS=2",
        "VIEWS=1",
        "WARP=0.0",
        "BATCH_SIZE=8",
        *bindings,
    ]
    return [f"--gin_file={name}" for name in files] + [f"--gin.{one}" for one in given]


def test_all_checkpoints_of_a_run(run, tmp_path, capsys):
    folder, *_ = run
    command = flags(folder, tmp_path, "CHECKPOINT_STEPS='all'", "VIEWS=2", "WARP=1.0")
    assert few_shot_command.main(command) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["step"] for row in printed] == [2, 5]
    for row in printed:
        assert (row["classes"], row["shots"], row["evaluated_images"]) == (3, 2, 36 - 6)
        assert len(row["accuracies"]) == 5 and len(set(row["accuracies"])) > 1
        assert row["accuracy"] == pytest.approx(np.mean(row["accuracies"]))
        stored = tmp_path / "few_shot" / f"mine-held_out-2_shots-{row['step']}.json"
        assert json.loads(stored.read_text()) == row
    assert "few_shot.shots" in (tmp_path / "few_shot" / "config.gin").read_text()
    assert few_shot_command.main(command) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == printed


def test_features_are_those_below_the_head(run, tmp_path, capsys):
    """One batch of all images, three of which are a group of each device: what the command prints
    follows from the model's features.
    """
    folder, params, images, labels = run
    command = flags(folder, tmp_path, "BATCH_SIZE=24", "GROUP_SIZE=12", "NUM_SEEDS=2", "L2=1.0")
    assert few_shot_command.main(command) == 0
    row = json.loads(capsys.readouterr().out)
    order = np.random.default_rng(0).permutation(18)
    seen = (images[order, ..., None] / 127.5 - 1).astype(np.float32)
    batch = {
        "images": np.pad(seen, ((0, 6), (0, 0), (0, 0), (0, 0))),
        "labels": np.zeros(24, np.int32),
        "weights": (np.arange(24) < 18).astype(np.float32),
    }
    model = load(FILES[:1], [*MODEL, "GROUP_SIZE=12"]).macro("MODEL")
    pre_logits, logits = jax.jit(lambda p, b: (model.pre_logits(p, b), model.logits(p, b)))(
        params, batch
    )
    head = params["head"]
    np.testing.assert_allclose(pre_logits @ head["kernel"] + head["bias"], logits, atol=1e-5)
    features = np.empty((18, pre_logits.shape[1]), np.float32)
    features[order] = pre_logits[:18]
    wanted = [few_shot.accuracy(features, labels, shots=2, seed=s, l2=1.0) for s in (0, 1)]
    assert row["accuracies"] == pytest.approx(wanted)


def test_shots_of_another_split(run, tmp_path, capsys, monkeypatch):
    """Of 18 images 3 a seed are learnt from, and all 12 of the other split are classified: as NumPy
    does it, with the normal equations.
    """
    folder, params, images, labels = run
    read = []
    whole = ImageDataset.batch

    def batch(self, which, numbers, seed, rows):
        read.extend((self.config.split, place) for place in which.tolist())
        return whole(self, which, numbers, seed, rows)

    monkeypatch.setattr(ImageDataset, "batch", batch)
    given = ["SHOTS_SPLIT='held_out'", "EVAL_SPLIT='validation'", "SHOTS=1", "L2=1.0"]
    # With room for every token at every expert, features are of each image alone.
    room = ["EVAL_EXPERT_CAPACITY_FACTOR=8.0", "NUM_SEEDS=2", "RENORMALIZE=True"]
    command = flags(folder, tmp_path, *given, *room)
    assert few_shot_command.main([*command, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "1 shots of each of 3 classes, drawn from the split 'held_out', 12 other" in said
    assert few_shot_command.main(command) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["shots_split"], row["split"], row["evaluated_images"]) == (
        *("held_out", "validation", 12),
    )
    drawn = [np.flatnonzero(few_shot.draw(labels, 1, seed, others=labels)) for seed in (0, 1)]
    needed = sorted(set(np.concatenate(drawn).tolist()))
    assert sorted(place for split, place in read if split == "held_out") == needed
    assert sorted(place for split, place in read if split == "validation") == list(range(12))
    model = load(FILES[:1], [*MODEL, *room[::2]]).macro("MODEL")
    batch = {"labels": np.zeros(8, np.int32), "weights": np.ones(8, np.float32)}
    forward = jax.jit(model.pre_logits)
    seen = (images[..., None] / 127.5 - 1).astype(np.float32)
    parts = (seen[:8], seen[8:16], seen[10:])
    first, second, last = (forward(params, {**batch, "images": part}) for part in parts)
    features = np.concatenate([first, second, last[-2:]])
    wanted = []
    for places in drawn:
        scores = ridge_scores(
            features[places].astype(np.float64), labels[places], 3, features[6:], 1.0
        )
        wanted.append(np.mean(scores.argmax(1) == labels[6:]))
    assert row["accuracies"] == pytest.approx(wanted)


def test_a_dry_run_writes_nothing(run, tmp_path, capsys):
    folder, *_ = run
    assert few_shot_command.main([*flags(folder, tmp_path / "new"), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "(steps 5)" in said and "2 shots of each of 3 classes, 12 other images" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("bindings", "files", "said"),
    [
        (["SHOTS=7"], FILES, "class 0 has 6 images, 7 shots are asked for: lower SHOTS"),
        (["SHOTS=6"], FILES, "all 18 images are drawn as shots"),
        (["EVAL_SPLIT='train'"], FILES, "has no array train_images"),
        (["SHOTS_SPLIT='train'"], FILES, "has no array train_images"),
        (["SHOTS_SPLIT='held_out'"], FILES, "the split that is classified: leave it out"),
        (["VitConfig.emb_dim=16"], FILES, "is not a checkpoint of this model"),
        (["CHECKPOINT_STEPS=3"], FILES, "no checkpoint of step 3; it has 2, 5"),
        (["SHOTS=0"], FILES, "SHOTS"),
    ],
)
def test_what_is_refused(run, tmp_path, capsys, bindings, files, said):
    folder, *_ = run
    assert few_shot_command.main(flags(folder, tmp_path / "new", *bindings, files=files)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_model_without_images_is_refused(run, tmp_path, capsys):
    folder, *_ = run
    command = [
        "--gin_file=models/tiny_lm.gin",
        "--gin_file=runs/few_shot.gin",
        "--gin.IMAGE_SIZE=8",
        f"--gin.CHECKPOINT_PATH='{folder / 'run'}'",
        f"--gin.EVAL_OUTPUT_DIR='{tmp_path}'",
    ]
    assert few_shot_command.main(command) == 2
    assert "DecoderModel has no features of images" in capsys.readouterr().err
