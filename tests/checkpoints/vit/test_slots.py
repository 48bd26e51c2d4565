"""Training states of big_vision and V-MoE, made by optax as those projects make them, against the
optimizer of this library on the same gradients.
"""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from tests.checkpoints.vit.forms import in_v_moe, scanned
from tests.checkpoints.vit.test_zarr_folder import write
from tests.models.vit.kinds import in_big_vision, random_params
from upcycle_jax import trees, upcycle
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.state_tree import PARAM_STATES, STEP
from upcycle_jax.training.big_vision_adafactor import BigVisionAdafactor

UPDATES = 3
POOL = {2: "mean", 4: "map"}


def small(heads, *, pool="mean", moe=None):
    """Matrices of 64 x 64 and 64 x 48, heads of 32 or 16."""
    return VitModel(
        VitConfig(
            num_classes=5,
            image_size=8,
            patch_size=4,
            emb_dim=64,
            num_layers=2,
            num_heads=heads,
            mlp_dim=48,
            pool=pool,
            moe=moe,
        )
    )


def adafactor(momentum_dtype, *, middle):
    """big_vision's `scale_by_adafactor`: with what stands for clipping between the two states."""
    rms = optax.scale_by_factored_rms(
        min_dim_size_to_factor=32,
        decay_rate=0.8,
        epsilon=1e-30,
        decay_rate_fn=lambda step, power: jnp.minimum(
            0.999, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -power
        ),
    )
    average = optax.ema(0.9, debias=False, accumulator_dtype=momentum_dtype)
    return optax.chain(rms, *middle, average)


def gradients(params):
    """Random ones of every update."""
    for number in range(UPDATES):
        yield {path: gradient(path, v.shape, number) for path, v in params.items()}


def gradient(path, shape, number):
    """The same for a path whatever else the model has."""
    random = np.random.default_rng([number, *path.encode()])
    return random.standard_normal(shape).astype(np.float32)


def state_after(transformation, params, renamed):
    """Parameters under a project's names, and its state after the updates.

    Args:
      transformation: the project's.
      params: by our paths.
      renamed: from our paths and shapes to the project's.
    """
    theirs = renamed(params)
    state, update = transformation.init(theirs), jax.jit(transformation.update)
    for grads in gradients(params):
        _, state = update(renamed(grads), state, theirs)
    return theirs, state


@functools.cache
def our_slots():
    """Our slots after the same updates, of every parameter that one of the models has. They know
    nothing of heads, nor of each other.
    """
    params = random_params(small(2, pool="map"))
    specs = {path: trees.LeafSpec(v.shape, v.dtype) for path, v in params.items()}
    optimizer = BigVisionAdafactor()
    ours = optimizer.init(specs)

    @jax.jit
    def step(grads, ours, number):
        return optimizer.apply(
            trees.unflatten(params),
            grads,
            ours,
            param_specs=specs,
            step=number,
            learning_rate=jnp.float32(0),
        ).param_states

    for number, grads in enumerate(gradients(params)):
        ours = step(trees.unflatten(grads), ours, jnp.int32(number))
    return {path: np.asarray(v) for path, v in trees.flatten(ours).items()}


def by_position(tree, name=""):
    """Leaves with the positions of tuples, and the keys of dictionaries, as names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from by_position(value, f"{name}/{key}")
    elif isinstance(tree, tuple):
        for place, value in enumerate(tree):
            yield from by_position(value, f"{name}/{place}")
    else:
        yield name.removeprefix("/"), np.asarray(tree)


def by_field(tree, name=""):
    """The same with the names of fields, as Flax writes state."""
    if hasattr(tree, "_fields"):
        tree = tree._asdict()
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from by_field(value, f"{name}/{key}")
    elif isinstance(tree, tuple):
        for place, value in enumerate(tree):
            yield from by_field(value, f"{name}/{place}")
    else:
        yield name.removeprefix("/"), np.asarray(tree)


@functools.cache
def big_vision(heads, *, scan=False):
    """Arrays of a training state as big_vision flattens it, and our slots. Of four heads it has
    attention pooling, with a probe and matrices of its own.
    """
    pool = POOL[heads]

    def renamed(values):
        arrays = in_big_vision(values, heads)
        return scanned(arrays) if scan else arrays

    params = random_params(small(heads, pool=pool))
    inner = adafactor(jnp.bfloat16, middle=[optax.identity()])
    chain = optax.chain(
        optax.identity(),
        optax.masked(inner, lambda tree: jax.tree.map(lambda _: True, tree)),
        optax.scale(1e-3),
        optax.scale_by_schedule(lambda step: 1.0),
        optax.scale(-1.0),
    )
    theirs, state = state_after(chain, params, renamed)
    arrays = {f"params/{name}": value for name, value in theirs.items()}
    arrays |= dict(by_position({"opt": state}))
    ours = {name: v for name, v in our_slots().items() if name.rpartition("/")[0] in params}
    return params, arrays, ours


def stored_as_npz(path, arrays):
    """bfloat16 as NumPy stores it."""
    np.savez(
        path,
        **{
            name: value.view("V2") if value.dtype == ml_dtypes.bfloat16 else value
            for name, value in arrays.items()
        },
    )
    return open_checkpoint(path)


def stored_average(arrays, params, path, heads):
    """The average of updates of a parameter, as it is stored."""
    (name,) = in_big_vision({path: params[path]}, heads)
    stored = arrays.get(f"opt/1/0/2/1/{name}")
    if stored is not None:
        return stored
    _, block, rest = name.split("/", 2)
    number = int(block.removeprefix("encoderblock_"))
    return arrays[f"opt/1/0/2/1/Transformer/encoderblock/{rest}"][number]


def check(reader, params, arrays, ours, heads):
    """Every slot of a checkpoint is what our optimizer came to."""
    specs = reader.specs()
    assert reader.step == UPDATES and STEP in specs
    found = {name.removeprefix(PARAM_STATES) for name in specs if name.startswith(PARAM_STATES)}
    assert found == set(ours)
    for name, wanted in ours.items():
        value = reader.read(PARAM_STATES + name)
        assert value.shape == wanted.shape == specs[PARAM_STATES + name].shape, name
        part = tuple(slice(size // 2, size) for size in value.shape)
        np.testing.assert_array_equal(reader.read(PARAM_STATES + name, part), value[part])
        if name.endswith("/m") and "attention" in name and "kernel" in name:
            # Of updates that are scaled by head there: what is stored, heads joined.
            stored = stored_average(arrays, params, name.removesuffix("/m"), heads)
            np.testing.assert_array_equal(value, stored.reshape(value.shape))
        elif name.endswith("/m"):
            # Rounded to bfloat16 at other places.
            np.testing.assert_allclose(
                value.astype(np.float32), wanted.astype(np.float32), atol=0.01, err_msg=name
            )
        else:
            np.testing.assert_allclose(value, wanted, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("heads", "scan"), [(2, False), (4, False), (2, True)])
def test_a_state_of_big_vision_is_what_our_optimizer_keeps(heads, scan, tmp_path):
    """Heads of 32 are factored by head, those of 16 not at all: rows and columns of our matrices
    are means of either.
    """
    params, arrays, ours = big_vision(heads, scan=scan)
    row = "opt/1/0/0/1/Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    if not scan:
        assert arrays[row].shape == ((2, 32) if heads == 2 else (1,))
    check(stored_as_npz(tmp_path / "state.npz", arrays), params, arrays, ours, heads)


def test_a_folder_of_big_vision_is_read_with_its_state(tmp_path):
    params, arrays, ours = big_vision(4)
    write(tmp_path / "checkpoint.bv-000000003", arrays)
    check(open_checkpoint(tmp_path / "checkpoint.bv-000000003"), params, arrays, ours, 4)


def test_a_state_of_v_moe_with_experts(tmp_path):
    """Experts count for themselves here; V-MoE's momentum is in float32."""
    moe = VitMoeConfig(num_experts=3, group_size=4, min_expert_capacity=1)
    params = random_params(small(2, moe=moe))
    model_specs = small(2, moe=moe).param_specs()
    chain = optax.chain(
        optax.identity(),
        optax.identity(),
        adafactor(jnp.float32, middle=[]),
        optax.identity(),
    )
    theirs, state = state_after(chain, params, lambda v: in_v_moe(in_big_vision(v, 2)))
    arrays = {f"params/{name}": value for name, value in theirs.items()}
    arrays |= dict(by_field({"opt_state": state})) | {"step": np.int32(UPDATES)}
    reader = stored_as_npz(tmp_path / "state.npz", arrays)
    optimizer = BigVisionAdafactor(momentum_dtype="float32")
    wanted = optimizer.state_specs(model_specs)
    found = {
        name.removeprefix(PARAM_STATES): spec
        for name, spec in reader.specs().items()
        if name.startswith(PARAM_STATES)
    }
    assert not trees.diff(wanted, found, compare_dtype=True)
    leaf = "encoder/layers_1/mlp/expert/wi/kernel"
    place = "Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"
    for slot, name in (("v_row", "v_row"), ("v_col", "v_col"), ("m", "ema")):
        number = 1 if slot == "m" else 0
        stored = arrays[f"opt_state/2/{number}/{name}/{place}"]
        # Of 64 x 48 the row, which lacks the larger axis, is of 48 there and here.
        np.testing.assert_array_equal(reader.read(f"{PARAM_STATES}{leaf}/{slot}"), stored)
    assert reader.read(f"{PARAM_STATES}{leaf}/count").tolist() == [UPDATES] * 3


def without_average(arrays):
    return {name: v for name, v in arrays.items() if not name.startswith("opt/1/0/2/")}


def of_adam(arrays):
    out = {name: v for name, v in arrays.items() if not name.startswith("opt/1/")}
    for name, value in arrays.items():
        if name.startswith("params/"):
            rest = name.removeprefix("params/")
            out |= {f"opt/1/0/1/{rest}": value, f"opt/1/0/2/{rest}": value}
    return out | {"opt/1/0/0": np.int32(3)}


def one_frozen(arrays):
    return {name: v for name, v in arrays.items() if name != "opt/1/0/0/3/head/bias"}


def misshapen(arrays):
    return arrays | {"opt/1/0/0/3/head/bias": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (without_average, "it is not that of big_vision's Adafactor with momentum"),
        (of_adam, "it is not that of big_vision's Adafactor with momentum"),
        (one_frozen, "it has no v of head/bias"),
        (misshapen, r"opt/1/0/0/3/head/bias has the shape \[4\]"),
    ],
)
def test_another_state_is_left_out_and_said(changed, why, tmp_path, caplog):
    params, arrays, _ = big_vision(4)
    reader = stored_as_npz(tmp_path / "state.npz", changed(arrays))
    assert not [name for name in reader.specs() if name.startswith(PARAM_STATES)]
    assert {name for name in reader.specs() if name != STEP} == {f"target/{p}" for p in params}

    assert re.search(f"which is not read, since {why}", caplog.text)


def test_experts_start_with_the_state_of_big_vision(tmp_path):
    """The whole way: a training state of big_vision, upcycled with its optimizer's state."""
    _, arrays, _ = big_vision(4)
    source = tmp_path / "checkpoint.bv-000000003"
    write(source, arrays)
    shape = {
        "IMAGE_SIZE": 8,
        "NUM_CLASSES": 5,
        "NUM_EXPERTS": 2,
        "GROUP_SIZE": 8,
        "VitConfig.patch_size": 4,
        "VitConfig.emb_dim": 64,
        "VitConfig.num_layers": 2,
        "VitConfig.num_heads": 4,
        "VitConfig.pool": "'map'",
        "VitConfig.mlp_dim": 48,
        "INITIAL_CHECKPOINT_PATH": f"'{source}'",
        "OUTPUT_CHECKPOINT_PATH": f"'{tmp_path / 'sparse' / 'checkpoint_3'}'",
        "OPTIMIZER": "@BigVisionAdafactor()",
    }
    files = ("models/vit_tiny_upcycled.gin", "runs/upcycle.gin", "recipes/paper_vision_state.gin")
    words = [f"--gin_file={name}" for name in files]
    assert upcycle.main([*words, *(f"--gin.{key}={value}" for key, value in shape.items())]) == 0
    reader = open_checkpoint(tmp_path / "sparse" / "checkpoint_3")
    assert reader.step == UPDATES
    for slot in ("v_row", "v_col", "m", "count"):
        found = reader.read(f"{PARAM_STATES}encoder/layers_1/mlp/expert/wi/kernel/{slot}")
        dense = open_checkpoint(source).read(f"{PARAM_STATES}encoder/layers_1/mlp/wi/kernel/{slot}")
        np.testing.assert_array_equal(found, np.stack([dense, dense]))
    router = "encoder/layers_1/mlp/router/router_weights/w/kernel"
    assert reader.read(f"{PARAM_STATES}{router}/count") == 0
