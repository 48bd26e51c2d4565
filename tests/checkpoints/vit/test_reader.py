"""Vision transformers under the names of each project that stores them."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.checkpoints.vit.forms import HEADS, in_v_moe, in_vit_jax, nested, scanned
from tests.models.vit.kinds import in_big_vision, model, random_params
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models import registry
from upcycle_jax.models.vit.config import VitMoeConfig
from upcycle_jax.state_tree import STEP, TARGET


@pytest.fixture
def written(tmp_path):
    """Writes an archive, and reads it."""

    def write(arrays):
        np.savez(tmp_path / "model.npz", **arrays)
        return open_checkpoint(tmp_path / "model.npz")

    return write


FORMS = {
    "big_vision": ("mean", lambda arrays: arrays),
    "map": ("map", lambda arrays: arrays),
    "prefix": ("mean", lambda arrays: {f"params/{name}": v for name, v in arrays.items()}),
    "training": (
        "class_token",
        lambda arrays: (
            {f"opt/target/{name}": v for name, v in in_vit_jax(arrays).items()}
            | {"opt/state/step": np.int32(3)}
        ),
    ),
    "siglip": (
        "map",
        lambda arrays: (
            {f"params/img/{name}": v for name, v in arrays.items()}
            | {"params/t": np.float32(1), "params/txt/head/bias": np.zeros(3)}
        ),
    ),
    "vit_jax": ("class_token", in_vit_jax),
    "v_moe": ("renormalised", in_v_moe),
    "scanned": ("mean", scanned),
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_read_under_every_name(form, written):
    kind, renamed = FORMS[form]
    params = random_params(model(kind))
    reader = written(renamed(in_big_vision(params, HEADS)))
    assert {name.removeprefix(TARGET) for name in reader.specs() if name != STEP} == set(params)
    for path, value in params.items():
        found = reader.read(TARGET + path)
        # The class token and its position are added: once more rounded.
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-6 * (path == "cls"))
        part = tuple(slice(0, max(1, size // 2)) for size in value.shape)
        np.testing.assert_array_equal(reader.read(TARGET + path, part), found[part])


def test_the_model_is_read_off_the_archive(written):
    one = model("class_token")
    params = random_params(one)
    reader = written(in_vit_jax(in_big_vision(params, HEADS)))
    sparse = registry.infer(reader.specs(), reader.model_settings(), VitMoeConfig(num_experts=4))
    assert sparse.config.dense == one.config and sparse.config.sparse_layers == (2, 3)
    read = {path: reader.read(TARGET + path) for path in params}
    batch = one.features.random(None, batch_size=1)
    apply = jax.jit(one.logits)
    np.testing.assert_allclose(
        apply(trees.unflatten(read), batch), apply(trees.unflatten(params), batch), atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"pre_logits/kernel": np.zeros(2)}, "pre_logits.*are not read"),
        (lambda a: a | {"other": np.zeros(2)}, "the array other has no place"),
        (lambda a: {"x": np.zeros(2)}, "holds no vision transformer"),
        (lambda a: a | {"pos_embedding": np.zeros((1, 8, 16))}, "8 positions: neither they nor"),
        (lambda a: {k: v for k, v in a.items() if "LayerNorm_1" not in k}, "a part of a model"),
        (
            lambda a: a | {"Transformer/encoderblock_0/LayerNorm_2/scale": np.zeros(16)},
            "are both target/encoder/layers_0/pre_mlp_layer_norm/scale",
        ),
        (lambda a: a | {"cls": np.array([{}], object)}, "pickled objects, which are never read"),
    ],
)
def test_archives_of_other_things_are_refused(change, message, written):
    arrays = in_big_vision(random_params(model("mean")), HEADS)
    with pytest.raises(ValueError, match=message):
        written(change(arrays))


def in_orbax(folder, tree):
    """As Orbax stores any tree."""
    ocp.PyTreeCheckpointer().save(folder, tree)


def in_early_orbax(folder, tree):
    """As its first versions did: the tree in one file, arrays in folders that it names."""
    import msgpack
    import tensorstore as ts

    folder.mkdir()
    flat = trees.flatten(tree)
    for name, value in flat.items():
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(folder / name.replace("/", "."))},
        }
        store = ts.open(spec, create=True, dtype=value.dtype, shape=value.shape).result()
        store.write(value).result()
    placeholders = {name: f"PLACEHOLDER://{name.replace('/', '.')}" for name in flat}
    (folder / "checkpoint").write_bytes(msgpack.packb(nested(placeholders)))


@pytest.mark.parametrize("store", [in_orbax, in_early_orbax])
def test_v_moe_s_orbax_trees_are_read(store, tmp_path):
    """A training state whose model has experts."""
    params = random_params(model("renormalised"))
    state = {f"params/{k}": v for k, v in in_v_moe(in_big_vision(params, HEADS)).items()}
    state |= {"opt_state/0/trace/head/bias": np.ones(7, np.float32)}
    state["step"] = np.asarray(11, np.int32)
    store(tmp_path / "ckpt_11", nested(state))
    reader = open_checkpoint(tmp_path / "ckpt_11")
    assert reader.step == 11
    assert {name.removeprefix(TARGET) for name in reader.specs() if name != STEP} == set(params)
    for path, value in params.items():
        np.testing.assert_array_equal(reader.read(TARGET + path), value)
