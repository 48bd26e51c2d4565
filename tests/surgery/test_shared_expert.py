"""Upcycling into a model with a shared expert: where its weights come from, and that the proof and
the function check cover it.
"""

import types

import jax
import numpy as np
import pytest

from upcycle_jax import axes, state_tree, surgery
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe import roles
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.surgery import function_check as check
from upcycle_jax.surgery.operations import Copy, FirstUnits, Mean, Zeros
from upcycle_jax.surgery.parents import join
from upcycle_jax.surgery.probe_batch import ProbeBatch
from upcycle_jax.trees import LeafSpec

FEATURES = EncoderDecoderFeatures()
VOCAB = 64
LAYER = "target/encoder/layers_1/mlp"
NAMES = ("wi_0", "wi_1", "wo")


def sparse_tree(small, width, *, routed=None, optimizer="adafactor"):
    """The small sparse tree with a shared expert of a width in its sparse layer."""
    tree = small.tree(sparse=(1,), width=routed, optimizer=optimizer)
    parameters = {}
    for name in NAMES:
        shape, names = (
            ((small.D, width), (axes.EMBED, axes.MLP))
            if name != "wo"
            else ((width, small.D), (axes.MLP, axes.EMBED))
        )
        parameters[f"encoder/layers_1/mlp/shared_expert/{name}/kernel"] = LeafSpec(
            shape, np.float32, names
        )
    out = {**tree, **{f"target/{path}": spec for path, spec in parameters.items()}}
    if optimizer == "adafactor":
        for path, spec in parameters.items():
            shapes = {"m": (1,), "v": (1,), "v_row": spec.shape[:1], "v_col": spec.shape[1:]}
            out |= {
                f"state/param_states/{path}/{slot}": LeafSpec(shape, np.float32)
                for slot, shape in shapes.items()
            }
    return roles.inferred(out)


@pytest.mark.parametrize("width", [12, 6])
def test_it_is_the_dense_mlp_or_its_first_units_offline_and_online(small, tmp_path, width):
    """The dense MLP has 12 hidden units; the oracle is NumPy slicing."""
    source = small.dense()
    target = sparse_tree(small, width)
    plan = surgery.make_plan(source.specs(), target, surgery.Recipe(optimizer_state="tiled"))
    operation = plan.row(f"{LAYER}/shared_expert/wo/kernel").operation
    assert operation == (Copy() if width == 12 else FirstUnits(0, 6))
    surgery.apply_offline(plan, source, tmp_path / "sparse")
    written = open_checkpoint(tmp_path / "sparse")
    for name in NAMES:
        dense = source.arrays[f"{LAYER}/{name}/kernel"]
        expected = dense[:width] if name == "wo" else dense[:, :width]
        np.testing.assert_array_equal(
            written.read(f"{LAYER}/shared_expert/{name}/kernel"), expected
        )
    # Slots go with a whole matrix and start at zero with a part of one.
    for slot in ("v_row", "v_col"):
        path = f"state/param_states/encoder/layers_1/mlp/shared_expert/wi_0/kernel/{slot}"
        dense_slot = source.arrays[path.replace("shared_expert/", "")]
        np.testing.assert_array_equal(
            written.read(path), dense_slot if width == 12 else np.zeros(target[path].shape)
        )
        assert isinstance(plan.row(path).operation, Copy if width == 12 else Zeros)
    partitioner = Partitioner(num_expert_partitions=2, num_model_partitions=2)
    made = surgery.apply_online(plan, source, partitioner.shardings(target))
    assert all(
        np.asarray(leaf).tobytes() == written.read(path).tobytes() for path, leaf in made.items()
    )
    assert surgery.prove(plan, source, written).ok


def test_damage_to_it_is_found(small):
    source = small.dense()
    plan = surgery.make_plan(source.specs(), sparse_tree(small, 5))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {
        path: np.array(leaf)
        for path, leaf in surgery.apply_online(
            plan, source, dict.fromkeys(plan.specs(), here)
        ).items()
    }
    name = f"{LAYER}/shared_expert/wi_1/kernel"
    arrays[name][2, 4] += 1
    proof = surgery.prove(plan, source, small.Reader(arrays))
    assert [leaf.path for leaf in proof.leaves if not leaf.ok] == [name]


def test_what_does_not_fit_is_refused(small):
    with pytest.raises(
        ValueError,
        match=(
            r"shared expert of 20 hidden units cannot be cut from an MLP of 12: set"
            r" SHARED_EXPERT_MLP_DIM"
        ),
    ):
        surgery.make_plan(small.tree(), sparse_tree(small, 20))


@pytest.mark.parametrize("how", ["mean", "expert"])
def test_a_merged_layer_is_the_mean_beside_the_shared_expert(small, how, tmp_path):
    """`act(x [A B]) [C; D] = act(x A) C + act(x B) D`, whatever acts on each hidden unit: a dense
    MLP of 12 units is the sum of a merged one of 7 and of a shared expert of 5.
    """
    source = small.Reader(small.filled(sparse_tree(small, 5, routed=7)))
    recipe = surgery.MergeRecipe(how=how, expert=1 if how == "expert" else 0)
    source.specs = lambda: sparse_tree(small, 5, routed=7)
    plan = surgery.make_plan(source.specs(), small.tree(), recipe)
    surgery.apply_offline(plan, source, tmp_path / "dense")
    written = open_checkpoint(tmp_path / "dense")
    x = np.random.default_rng(0).normal(size=(3, small.D))

    def mlp(of_name):
        wi_0, wi_1, wo = (np.asarray(of_name(name), np.float64) for name in NAMES)
        return (np.tanh(x @ wi_0) * (x @ wi_1)) @ wo

    def routed(name):
        experts = source.arrays[f"{LAYER}/expert/{name}/kernel"]
        return experts[1] if how == "expert" else experts.mean(0)

    both = mlp(routed) + mlp(lambda name: source.arrays[f"{LAYER}/shared_expert/{name}/kernel"])
    np.testing.assert_allclose(
        mlp(lambda name: written.read(f"{LAYER}/{name}/kernel")), both, rtol=1e-5, atol=1e-5
    )
    assert surgery.prove(plan, source, written).ok
    damaged = {name: np.array(written.read(name)) for name in written.specs()}
    damaged[f"{LAYER}/wo/kernel"][9, 1] += 1  # of the shared expert's units
    proof = surgery.prove(plan, source, small.Reader(damaged))
    assert [leaf.path for leaf in proof.leaves if not leaf.ok] == [f"{LAYER}/wo/kernel"]


def test_what_cannot_be_merged_is_refused(small):
    with pytest.raises(
        ValueError, match=r"(?s)gives shape \[8, 19\].*set the dense model's hidden size"
    ):
        surgery.make_plan(sparse_tree(small, 7), small.tree(), surgery.MergeRecipe())
    gated = sparse_tree(small, 5, routed=7)
    gated[f"{LAYER}/shared_expert_gate/kernel"] = LeafSpec((small.D, 1), np.float32)
    with pytest.raises(ValueError, match="have gates .*each token has another weight for them"):
        surgery.make_plan(roles.inferred(gated), small.tree(), surgery.MergeRecipe())


def test_of_several_parents_one_is_the_shared_expert(small):
    """Nexus: the parent that the others were branched from; by default it is averaged as everything
    else is.
    """
    parents = [small.dense(seed, optimizer=None) for seed in range(3)]
    joined = join(parents)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def shared(init, width=12):
        plan = surgery.make_plan(
            joined.specs(),
            sparse_tree(small, width, optimizer=None),
            surgery.Recipe(expert_init=init),
        )
        name = f"{LAYER}/shared_expert/wo/kernel"
        made = surgery.apply_online(plan, joined, dict.fromkeys(plan.specs(), here))
        assert surgery.prove(
            plan, joined, small.Reader({path: np.array(leaf) for path, leaf in made.items()})
        ).ok
        return plan.row(name).operation, np.asarray(made[name])

    arrays = [parent.arrays[f"{LAYER}/wo/kernel"] for parent in parents]
    operation, values = shared(surgery.ParentExperts((1, 2, 1, 2)))
    assert operation == Mean()
    np.testing.assert_allclose(values, np.mean(arrays, axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        shared(surgery.ParentExperts((1, 2, 1, 2), shared=0))[1], arrays[0]
    )
    np.testing.assert_array_equal(
        shared(surgery.ParentExperts((0, 1, 1, 0), rest=2), width=4)[1], arrays[2][:4]
    )
    with pytest.raises(ValueError, match=r"set ParentExperts\.shared"):
        shared(surgery.ParentExperts((1, 2, 1, 2)), width=4)
    with pytest.raises(ValueError, match=r"names parents \[1, 2, 3\], there are 3"):
        shared(surgery.ParentExperts((1, 2, 1, 2), shared=3))


CONFIG = T5Config(
    VOCAB,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=8,
    mlp_dim=32,
    dropout_rate=0.0,
)


@pytest.fixture(scope="module")
def dense():
    rng = np.random.default_rng(0)
    specs = EncoderDecoderModel(CONFIG).param_specs()
    return {
        f"target/{path}": (
            rng.normal(size=spec.shape, scale=spec.shape[0] ** -0.5).astype(np.float32)
        )
        for path, spec in specs.items()
    }


def compared(small, dense, width, damage=None, *, gate=False):
    moe = MoeConfig(
        num_experts=4,
        encoder_sparse_layout=(0,),
        decoder_sparse_layout=(0,),
        shared_expert_mlp_dim=width,
        shared_expert_gate=gate,
    )
    model = EncoderDecoderModel(T5Config(**{**CONFIG.__dict__, "moe": moe}))
    source = small.Reader(dense)
    target = state_tree.parameter_specs(model.param_specs())
    plan = surgery.make_plan(source.specs(), target, surgery.Recipe(step="reset"))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {
        path: np.array(leaf)
        for path, leaf in surgery.apply_online(plan, source, dict.fromkeys(target, here)).items()
    }
    if damage:
        damage(arrays)
    tokens = ProbeBatch(FEATURES.random(VOCAB, length=8), FEATURES, "random")
    return types.SimpleNamespace(
        outcome=check.check_function(plan, model, source, small.Reader(arrays), tokens),
        arrays=arrays,
    )


# The first units behind a gate are in `test_decoder_recipes` as well.
@pytest.mark.parametrize(
    ("width", "gate"), [(32, False), pytest.param(8, True, marks=pytest.mark.slow)]
)
def test_the_function_check_covers_it(small, dense, width, gate):
    result = compared(small, dense, width, gate=gate)
    outcome, arrays = result.outcome, result.arrays
    gates = [leaf for path, leaf in arrays.items() if "shared_expert_gate" in path]
    assert len(gates) == 2 * gate and not np.any(gates)
    assert outcome.ok, outcome.text()
    assert outcome.prediction.verdict is check.Verdict.SCALED
    assert "a shared expert is added" in outcome.prediction.reason
    assert "dense MLP x gate sum + shared expert" in outcome.text()
    assert [layer.layer for layer in outcome.layers] == ["encoder/layers_0", "decoder/layers_0"]


def test_the_function_check_finds_a_shared_expert_that_is_not_the_dense_mlp(small, dense):
    def damage(arrays):
        arrays["target/decoder/layers_0/mlp/shared_expert/wo/kernel"][3] += 0.5

    outcome = compared(small, dense, 32, damage).outcome
    assert not outcome.ok and outcome.first_divergence == "decoder/layers_0"
