"""The drop at step 0 of a tiny vision transformer, computed from its checkpoint."""

import json

import jax
import numpy as np
import pytest

from tests.models.vit.kinds import random_params
from upcycle_jax import config, paper, trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.manager import CheckpointManager
from upcycle_jax.papers.initial_drop import Cell, Drops, InitialDrop, Measured, claims

MODEL = [
    "IMAGE_SIZE=8",
    "NUM_CLASSES=3",
    "VitConfig.channels=1",
    "VitConfig.patch_size=4",
    "VitConfig.emb_dim=8",
    "VitConfig.num_layers=2",
    "VitConfig.mlp_dim=16",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a dense checkpoint of random parameters and an archive of images."""
    folder = tmp_path_factory.mktemp("drop")
    model = config.load(["models/vit_tiny.gin"], MODEL).macro("MODEL")
    params = trees.unflatten(
        {path: jax.numpy.asarray(v) for path, v in random_params(model).items()}
    )
    manager = CheckpointManager(folder / "run")
    state = {"step": jax.numpy.int32(3), "param_states": {}}
    manager.save(3, {"target": params, "state": state}, dataset=None, metadata={})
    manager.wait()
    manager.close()
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("validation", "held_out"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (24, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(24) % 3
    np.savez(folder / "images.npz", **arrays)
    return folder, model, params


def flags(folder, *bindings):
    given = [
        *MODEL,
        f"IMAGE_ARRAYS='{folder / 'images.npz'}'",
        "MIXTURE_OR_TASK_NAME='mine'",
        "BATCH_SIZE=8",
        "EVAL_STEPS=2",
        "IMAGES_PER_GROUP=4",
        "EXPERTS=(4,)",
        "CAPACITY_FACTORS=(1.0,)",
        "WARP=0.0",
        *bindings,
    ]
    return [
        f"--checkpoint={folder / 'run'}",
        "--gin_file=models/vit_tiny.gin",
        "--gin_file=runs/initial_drop.gin",
        *(f"--gin.{one}" for one in given),
    ]


def test_figure15_with_room_for_all_is_the_dense_model(run, tmp_path, capsys):
    """E = C = 4 renormalised: loss and precision are the dense model's; C = 1 and plain weights
    are not.
    """
    folder, *_ = run
    words = ["figure15", *flags(folder), "--format=json", f"--output_dir={tmp_path}"]
    assert paper.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "figure15.json").read_text())
    assert (tmp_path / "figure15.png").read_bytes().startswith(b"\x89PNG")
    assert "| dense " in (tmp_path / "figure15.md").read_text()
    rows = found["at_step_0"]["rows"]
    assert found["at_step_0"]["images"] == 16
    dense, *others = rows
    assert dense["cell"] is None
    cells = [
        (row["cell"]["capacity_factor"], row["cell"]["renormalize"], row["cell"]["blocks"])
        for row in others
    ]
    # Two blocks: the last half is block 1. The first block alone and the last block alone follow.
    assert cells == [
        (1.0, True, [1]),
        (4.0, True, [1]),
        (1.0, False, [1]),
        (4.0, False, [1]),
        (1.0, True, [0]),
        (1.0, True, [1]),
    ]
    losses = [row["loss"] - dense["loss"] for row in others]
    # Plain weights of all experts are a whole softmax, which sums to 1 as well.
    for i in (1, 3):
        assert abs(losses[i]) < 1e-5 and others[i]["precision"] == dense["precision"]
    assert min(abs(losses[i]) for i in (0, 2, 4)) > 1e-4
    assert losses[0] == losses[5]  # one and the same model
    # A group of 16 tokens: C = 1 is 4 slots of each of 4 experts.
    assert [row["actual_capacity"] for row in others] == [1.0, 4.0, 1.0, 4.0, 1.0, 1.0]
    assert "equals the dense model" in found["at_step_0"]["claims"][0]


def test_figure13_compares_copies_with_random_experts(run, tmp_path, capsys):
    folder, *_ = run
    words = ["figure13", *flags(folder, "EXPERTS=(2,)"), f"--output_dir={tmp_path}", "--few_shot"]
    words += ["--gin.initial_drop.shots=2", "--gin.initial_drop.num_seeds=2"]
    words += ["--gin.initial_drop.views=1"]
    assert paper.main(words) == 0
    out = capsys.readouterr().out
    assert "29.70" in out and "At step 0" in out
    assert out.count("  random experts ") == 1 and out.count("  upcycled ") == 1
    dense, *others = json.loads((tmp_path / "figure13.json").read_text())["at_step_0"]["rows"]
    assert dense["cell"] is None and 0 <= dense["few_shot"] <= 100
    (upcycled,) = (row for row in others if abs(row["loss"] - dense["loss"]) < 1e-5)
    assert upcycled["few_shot"] == pytest.approx(dense["few_shot"])
    # Two experts and C = 2 are room for all: no drop.
    assert "C = E = 2) the upcycled model equals the dense model" in out


def test_logits_of_the_upcycled_model_are_the_dense_models(run):
    folder, model, params = run
    data = config.load(
        ["models/vit_tiny.gin", "runs/initial_drop.gin"], [*MODEL, "MIXTURE_OR_TASK_NAME='glyphs'"]
    ).macro("MODEL")
    assert data.config == model.config
    measure = InitialDrop(
        model=model,
        dataset_cfg=config.load(["models/vit_tiny.gin", "runs/initial_drop.gin"], MODEL)
        .build("initial_drop", checkpoint_path="x")
        .keywords["dataset_cfg"],
        checkpoint_path=folder / "run",
        images_per_group=2,
    )
    cell = Cell(4, 4.0, renormalize=True, blocks=(0, 1))
    sparse = measure.sparse_model(cell)
    upcycled = measure.upcycled(open_checkpoint(folder / "run"), sparse, cell)
    batch = model.features.random(None, batch_size=4)
    wanted = jax.jit(model.logits)(params, batch)
    np.testing.assert_allclose(jax.jit(sparse.logits)(upcycled, batch), wanted, atol=1e-5)


def test_a_broken_promise_is_told():
    """What must equal the dense model and does not: loss 1.5 against 1.4."""
    blocks = (1,)
    cell = Cell(4, 4.0, renormalize=True, blocks=blocks)
    dense, other = (Measured(c, None, loss, 50.0, None) for c, loss in ((None, 1.4), (cell, 1.5)))
    drops = Drops("figure15", "x", 8, (dense, other))
    assert drops.expected_equal == [other] and not drops.is_equal(other)
    assert "DIFFERS" in claims(drops)[0] and "1.0e-01" in claims(drops)[0]


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["IMAGES_PER_GROUP=3"], "BATCH_SIZE 8 does not divide into groups of 3 images"),
        (["VitConfig.emb_dim=16"], "is not a checkpoint of this model"),
        (["VitConfig.moe=@VitMoeConfig()"], "is measured from a dense vision transformer"),
        (["EXPERTS=()"], "name one value at least"),
    ],
)
def test_what_is_refused(run, bindings, message, capsys):
    folder, *_ = run
    assert paper.main(["figure15", *flags(folder, *bindings)]) == 2
    assert message in capsys.readouterr().err
