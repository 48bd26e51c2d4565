"""The optimizer state of a vision transformer, upcycled: leaf for leaf against NumPy, on disk as
while a run restores it, and the first update after it.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from upcycle_jax import surgery, trees, upcycle
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.summary import summarize
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.moe.routing import ExpertsChoose
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.surgery.leaf_values import RowValues, regions_of
from upcycle_jax.training.big_vision_adafactor import BigVisionAdafactor
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train_state import from_state_dict, state_specs
from upcycle_jax.training.train_step import make_train_step
from upcycle_jax.training.trainer import Trainer
from upcycle_jax.trees import Role

# Matrices of the MLP are factored (32 and 48), biases, norms and the head are not.
SHAPE = {
    "num_classes": 5,
    "image_size": 8,
    "patch_size": 4,
    "emb_dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 48,
}
OPTIMIZER = BigVisionAdafactor()
TILED = surgery.Recipe(optimizer_state="tiled", router_init=surgery.ZeroRouter())
STEP = 20_000


def model(num_experts=0):
    """Dense, or with all experts taking all tokens of an image in the last block."""
    if not num_experts:
        return VitModel(VitConfig(**SHAPE))
    moe = VitMoeConfig(
        num_experts=num_experts,
        group_size=4,
        min_expert_capacity=1,
        train_expert_capacity_factor=float(num_experts),
        router=ExpertsChoose(renormalize=True),
    )
    return VitModel(VitConfig(**SHAPE, moe=moe))


@functools.cache
def dense_state():
    """A state as training leaves it: random parameters and averages, every count at STEP."""
    rng = np.random.default_rng(0)
    state = {}
    for path, spec in state_specs(model(), OPTIMIZER).items():
        if path == "state/step" or path.endswith("/count"):
            state[path] = np.full(spec.shape, STEP, np.int32)
        elif path.startswith("target/"):
            scale = spec.shape[-2] ** -0.5 if len(spec.shape) > 1 else 0.3
            state[path] = (scale * rng.normal(size=spec.shape)).astype(np.float32)
        elif path.endswith("/m"):
            state[path] = rng.normal(size=spec.shape).astype(ml_dtypes.bfloat16)
        else:  # second moments of gradients of about 0.01
            v = 1e-4 * rng.uniform(0.5, 1.5, spec.shape) * (spec.shape != (1,))
            state[path] = v.astype(np.float32)
    return state


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / f"checkpoint_{STEP}"
    writer = create_checkpoint(path, state_specs(model(), OPTIMIZER), step=STEP, metadata={})
    for name, array in dense_state().items():
        if name != "state/step":
            writer.write(name, None, array)
    writer.finalize()
    return open_checkpoint(path)


def made(plan, reader):
    """Every leaf of a plan, on the host."""
    out = {}
    for row in plan.rows:
        leaf = np.zeros(row.spec.shape, row.spec.dtype)
        values = RowValues(row, reader, plan.recipe.seed)
        for region in regions_of(row, 2**20):
            leaf[region] = values.region(region)
        out[row.target] = leaf
    return out


@pytest.mark.parametrize("num_experts", [8, 32, 64])
def test_every_expert_gets_the_slots_of_the_mlp(num_experts, dense_checkpoint):
    """Below, at and above the 32 from which dimensions are factored: slots are the dense leaf's,
    tiled. A router's start at zero, its count too.
    """
    specs = state_specs(model(num_experts), OPTIMIZER)
    plan = surgery.make_plan(dense_checkpoint.specs(), specs, TILED)
    got, dense = made(plan, dense_checkpoint), dense_state()
    assert got.keys() == specs.keys()
    tiled = fresh = 0
    for path, spec in specs.items():
        if spec.role is Role.EXPERT:
            want = np.broadcast_to(dense[spec.twin], (num_experts, *dense[spec.twin].shape))
            unused = path.startswith("state/") and spec.shape == (1,)
            want, tiled = (dense[spec.twin] if unused else want), tiled + 1
        elif spec.role is Role.ROUTER:
            want, fresh = np.zeros(spec.shape), fresh + 1
        else:
            want = dense[path]
        assert got[path].dtype == spec.dtype, path
        np.testing.assert_array_equal(got[path], want, err_msg=path)
    # Kernel and bias of wi and wo, and a router's kernel, each with its five slots.
    assert (tiled, fresh) == (4 * 6, 6)
    assert got["state/param_states/encoder/layers_1/mlp/expert/wi/bias/v"].shape == (
        num_experts,
        48,
    )


def test_the_state_on_disk_is_that_of_a_run_that_restores(dense_checkpoint, tmp_path):
    specs = state_specs(model(4), OPTIMIZER)
    plan = surgery.make_plan(dense_checkpoint.specs(), specs, TILED)
    output = tmp_path / f"checkpoint_{STEP}"
    surgery.apply_offline(plan, dense_checkpoint, output)
    partitioner = Partitioner(num_expert_partitions=4)
    online = surgery.apply_online(plan, dense_checkpoint, partitioner.shardings(specs))
    reader = open_checkpoint(output)
    assert not trees.diff(reader.specs(), specs, compare_dtype=True)
    for path in specs:
        np.testing.assert_array_equal(reader.read(path), np.asarray(online[path]), err_msg=path)


def one_step(num_experts, state, expert_gradient_scale=None, partitioner=None):
    """The state after a train step on four images."""
    net = model(num_experts)
    optimizer = BigVisionAdafactor(expert_gradient_scale=expert_gradient_scale)
    trainer = Trainer(
        optimizer=optimizer,
        learning_rate_fn=create_learning_rate_scheduler("constant", base_learning_rate=0.01),
    )
    rng = np.random.default_rng(1)
    batch = {
        "images": rng.normal(size=(4, 8, 8, 3)).astype(np.float32),
        "labels": np.array([0, 1, 2, 3], np.int32),
        "weights": np.ones(4, np.float32),
    }
    arrays = {path: jnp.asarray(value) for path, value in state.items()}
    partitioner = partitioner or Partitioner(devices=(jax.devices()[0],))
    with partitioner.activate():
        step = jax.jit(make_train_step(net, trainer, seed=0))
        after, output = step(from_state_dict(arrays), batch)
    return trees.flatten(after.state_dict()), output


@pytest.fixture(scope="module")
def upcycled(dense_checkpoint):
    """The plan for four experts, and the state after a step on one device, in which the gradients
    of experts are those of the MLP.
    """
    plan = surgery.make_plan(dense_checkpoint.specs(), state_specs(model(4), OPTIMIZER), TILED)
    return plan, one_step(4, made(plan, dense_checkpoint), expert_gradient_scale=4.0)


def test_the_first_update_is_the_dense_networks(upcycled):
    """Four copies that all see all tokens, each with a weight of 1/4: the gradient of an expert is
    a quarter of the MLP's, which expert_gradient_scale makes up for. Then experts, their slots and
    all else move as in the dense network.
    """
    plan, (got, output) = upcycled
    specs = plan.specs()
    want, dense_output = one_step(0, dense_state())
    np.testing.assert_allclose(output.loss, dense_output.loss, atol=1e-5)
    for path, spec in specs.items():
        if spec.role is Role.ROUTER:
            continue
        twin, mine = spec.twin or path, np.asarray(got[path], np.float32)
        theirs = np.broadcast_to(np.asarray(want[twin], np.float32), mine.shape)
        # A momentum on the border of two bfloat16 numbers may be rounded to either.
        atol = 0.02 if path.endswith("/m") else 1e-5
        np.testing.assert_allclose(mine, theirs, atol=atol, rtol=1e-4, err_msg=path)
        assert not path.startswith("target/") or (mine != dense_state()[twin]).any()
    # The weights of equal experts do not matter: a router's gradient is 0, or what rounding leaves
    # of it, of which Adafactor makes u of at most 1 and momentum a tenth.
    router = "encoder/layers_1/mlp/router/router_weights/w/kernel"
    assert np.abs(got[f"target/{router}"]).max() <= 0.001 + 1e-6
    assert got[f"state/param_states/{router}/count"] == 1
    assert got["state/param_states/encoder/layers_1/mlp/expert/wi/kernel/count"].tolist() == (
        [STEP + 1] * 4
    )


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(dense_checkpoint, upcycled):
    """Experts, their counts too, over four rows of the mesh, the batch over two."""
    plan, (want, _) = upcycled
    partitioner = Partitioner(num_expert_partitions=4)
    state = surgery.apply_online(plan, dense_checkpoint, partitioner.shardings(plan.specs()))
    got, _ = one_step(4, state, expert_gradient_scale=4.0, partitioner=partitioner)
    for path in plan.specs():
        atol = 0.02 if path.endswith("/m") else 1e-5
        np.testing.assert_allclose(
            np.asarray(got[path], np.float32),
            np.asarray(want[path], np.float32),
            atol=1e-3 if "router" in path and path.startswith("target/") else atol,
            rtol=1e-4,
            err_msg=path,
        )


def test_the_command_converts_and_proves_it(dense_checkpoint, tmp_path, capsys):
    names = {"emb_dim": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 48, "patch_size": 4}
    words = [
        "--gin_file=models/vit_tiny_upcycled.gin",
        "--gin_file=runs/upcycle.gin",
        "--gin_file=recipes/paper_vision_state.gin",
        *(f"--gin.VitConfig.{name}={value}" for name, value in names.items()),
        "--gin.IMAGE_SIZE=8",
        "--gin.NUM_CLASSES=5",
        "--gin.NUM_EXPERTS=2",
        "--gin.FUNCTION_CHECK='off'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{dense_checkpoint.path}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{tmp_path}/checkpoint_{STEP}'",
    ]
    assert upcycle.main(words) == 2
    assert "set OPTIMIZER to the source's" in capsys.readouterr().err
    assert upcycle.main([*words, "--gin.OPTIMIZER=@BigVisionAdafactor()"]) == 0
    assert "proof: PASSED" in capsys.readouterr().out
    found = open_checkpoint(tmp_path / f"checkpoint_{STEP}")
    assert summarize(found).optimizer == "Adafactor (big_vision)"
    slots = "state/param_states/encoder/layers_1/mlp"
    assert found.read(f"{slots}/expert/wo/bias/count").tolist() == [STEP, STEP]
    assert found.read(f"{slots}/router/router_weights/w/kernel/count") == 0
