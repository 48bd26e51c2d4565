"""The paper's runs of vision transformers: built, stepped at small size, and what they say."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from upcycle_jax.config import load, search
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.surgery import NormalRouter
from upcycle_jax.training.big_vision_adafactor import BigVisionAdafactor
from upcycle_jax.training.parameter_groups import settings_of
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train_state import from_state_dict, state_specs
from upcycle_jax.training.train_step import make_train_step
from upcycle_jax.training.trainer import Trainer

FOLDER = search.shipped_folder()
SIZES = ("b32", "b16", "l32", "l16")
SMALL = [
    "IMAGE_SIZE=32",
    "NUM_CLASSES=5",
    "VitConfig.patch_size=8",
    "VitConfig.emb_dim=16",
    "VitConfig.num_layers=1",
    "VitConfig.num_heads=2",
    "VitConfig.mlp_dim=24",
    "VitConfig.head_bias_init=0.0",
]
# The first of two layers is dense.
SPARSE = [*SMALL, "VitConfig.num_layers=2", "NUM_EXPERTS=2", "GROUP_SIZE=32"]
PAPER = "papers/sparse_upcycling"
KINDS = ("", "_upcycled", "_moe_from_scratch")
PAPERS = [f"{PAPER}/vit_{size}{kind}.gin" for size in SIZES for kind in KINDS]
GIVEN = ["MODEL_DIR='x'", "MIXTURE_OR_TASK_NAME='mine'", "IMAGE_ARRAYS='y.npz'"]
TRUNK = ("constant", "linear_warmup", "rsqrt_timescale")


def paper_run(name, *bindings, files=()):
    """The arguments that a paper file gives to `train`, and its bindings that nothing used."""
    start = ["INITIAL_CHECKPOINT_PATH='z'"] if files or "upcycled" in name else []
    loaded = load([name, *files], [*GIVEN, *start, *bindings])
    call = loaded.build("train").keywords
    unused = [line for line in loaded.unused() if line.startswith(str(FOLDER / PAPER))]
    return call, unused


@functools.cache
def loss_of_a_train_step(config, loss, optimizer, groups) -> float:
    """The loss of one train step of a small model with a paper's optimizer."""
    model = VitModel(config, loss=loss)
    rate = create_learning_rate_scheduler("constant", base_learning_rate=4e-4)
    trainer = Trainer(optimizer=optimizer, learning_rate_fn=rate, parameter_groups=groups)
    specs = state_specs(model, optimizer)
    state = {path: jnp.zeros(spec.shape, spec.dtype) for path, spec in specs.items()}
    with Partitioner(devices=(jax.devices()[0],)).activate():
        step = jax.jit(make_train_step(model, trainer, seed=0))
        batch = model.features.random(None, batch_size=4)
        after, output = step(from_state_dict(state), batch)
    assert int(after.step) == 1
    return float(output.loss)


@pytest.mark.parametrize("name", PAPERS)
def test_paper_files_build_and_step(name):
    sparse = "upcycled" in name or "moe" in name
    call, unused = paper_run(name, *(SPARSE if sparse else SMALL))
    assert unused == [] and (call["model"].config.moe is not None) == sparse
    trainer = call["trainer"]
    loss = loss_of_a_train_step(
        call["model"].config, call["model"].loss, trainer.optimizer, trainer.parameter_groups
    )
    # All parameters are zero: five classes of logits 0 in the sigmoid loss.
    assert loss == pytest.approx(5 * math.log(2), abs=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_pre_training_is_the_papers(size):
    """Appendix A.2: batches of 4096, 10k steps of warm-up to 4e-4, a timescale of 100k; 7 epochs
    and 7 more with patches of 32, 14 and 14 of 16; the state goes to experts.
    """
    dense, _ = paper_run(f"{PAPER}/vit_{size}.gin")
    sparse, _ = paper_run(f"{PAPER}/vit_{size}_upcycled.gin")
    epochs = 7 if size.endswith("32") else 14
    for call, half in ((dense, 1), (sparse, 2)):
        data = call["train_dataset_cfg"]
        assert (data.batch_size, data.crop, data.flip) == (4096, "inception", True)
        assert call["train_eval_dataset_cfg"].crop == "central"
        assert call["total_steps"] * 4096 == pytest.approx(half * epochs * 303e6, rel=1e-3)
        schedule, optimizer = call["trainer"].learning_rate_fn, call["trainer"].optimizer
        assert schedule.factors == TRUNK
        # 4e-4 / sqrt(1 + 300/100) = 2e-4.
        rates = [float(schedule(step)) for step in (0, 10_000, 310_000)]
        assert rates == pytest.approx([0, 4e-4, 2e-4], rel=1e-6)
        assert type(optimizer) is BigVisionAdafactor and optimizer.count_by == "leaf"
        assert call["model"].loss == "sigmoid"
        save = call["checkpoint_cfg"].save
        assert save.keep_period == 50_000 and 50_000 % save.period == 0
        specs = call["model"].param_specs()
        decays = {
            path: settings_of(path, spec, call["trainer"].parameter_groups).weight_decay
            for path, spec in specs.items()
        }
        assert decays.pop("head/kernel") == 3.0
        assert {path for path, decay in decays.items() if decay == 0.03} == {
            path for path in decays if path.endswith("/kernel")
        }
        assert {decay for decay in decays.values() if decay != 0.03} == {None}
    assert dense["checkpoint_cfg"].restore is None
    recipe = sparse["checkpoint_cfg"].restore.recipe
    assert (recipe.optimizer_state, recipe.step) == ("tiled", "keep")
    assert recipe.router_init == NormalRouter(0.02)


@pytest.mark.parametrize("size", SIZES)
def test_from_scratch_is_the_upcycled_model_for_as_many_epochs(size):
    upcycled, scratch = (
        paper_run(f"{PAPER}/vit_{size}{kind}.gin")[0] for kind in ("_upcycled", "_moe_from_scratch")
    )
    assert scratch["model"].config == upcycled["model"].config
    assert scratch["total_steps"] == upcycled["total_steps"]
    assert scratch["checkpoint_cfg"].restore is None


@pytest.mark.parametrize("name", PAPERS[:2])
def test_a_paper_run_branches_into_a_cool_down(name):
    call, _ = paper_run(name, "TRAIN_STEPS=570000", files=["runs/parts/cool_down.gin"])
    schedule, restore = call["trainer"].learning_rate_fn, call["checkpoint_cfg"].restore
    assert restore.recipe is None and restore.step == restore.optimizer_state == "keep"
    trunk = paper_run(name)[0]["trainer"].learning_rate_fn
    assert float(schedule(520_000)) == float(trunk(520_000)) > float(schedule(521_000))
    assert float(schedule(570_000)) == 0.0
