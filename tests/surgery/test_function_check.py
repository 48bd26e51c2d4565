"""The function check predicts the right verdict, measures it, and names the layer that is wrong."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from upcycle_jax import state_tree, surgery, trees
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.models import registry
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.from_specs import from_specs
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe import roles
from upcycle_jax.moe.routing import ExpertsChoose, TokensChoose
from upcycle_jax.surgery import function_check as check
from upcycle_jax.surgery import lanes
from upcycle_jax.surgery.layer_weights import LayerWeights
from upcycle_jax.surgery.probe_batch import ProbeBatch

FEATURES = EncoderDecoderFeatures()
VOCAB = 64
CONFIG = T5Config(
    VOCAB,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=8,
    mlp_dim=32,
    dropout_rate=0.0,
)
TOKENS = ProbeBatch(FEATURES.random(VOCAB, length=8), FEATURES, "random")


def sparse_model(*, renormalize=False, capacity=2.0, order="before_top_k"):
    moe = MoeConfig(
        num_experts=4,
        encoder_router=ExpertsChoose(renormalize=renormalize),
        decoder_router=TokensChoose(renormalize=renormalize, softmax_order=order),
        eval_expert_capacity_factor=capacity,
    )
    return EncoderDecoderModel(dataclasses.replace(CONFIG, moe=moe))


@pytest.fixture(scope="module")
def dense(drawn_parameters):
    params = trees.flatten(EncoderDecoderModel(CONFIG).init_params(None))
    # Larger MLPs, so that what they do shows in the logits.
    arrays = {
        f"target/{path}": np.asarray(leaf) * (3 if "/mlp/" in path else 1)
        for path, leaf in params.items()
    }
    return arrays


class Reader:
    """Arrays as a checkpoint."""

    step = 0

    def __init__(self, arrays):
        self.arrays = arrays

    def specs(self):
        return roles.inferred(
            {name: trees.LeafSpec(a.shape, a.dtype) for name, a in self.arrays.items()}
        )

    def read(self, name, index=None):
        return self.arrays[name] if index is None else self.arrays[name][index]

    def read_sharded(self, name, sharding):
        return jax.device_put(self.arrays[name], sharding)


def upcycled(dense, model, recipe=None):
    source = Reader(dense)
    target = state_tree.parameter_specs(model.param_specs())
    plan = surgery.make_plan(source.specs(), target, recipe)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = surgery.apply_online(plan, source, dict.fromkeys(target, here))
    return types.SimpleNamespace(
        plan=plan, source=source, target=Reader({name: np.array(a) for name, a in made.items()})
    )


def run(conversion, model, **options):
    return check.check_function(
        conversion.plan, model, conversion.source, conversion.target, TOKENS, **options
    )


def test_renormalised_with_room_is_exact(dense):
    model = sparse_model(renormalize=True, capacity=4.0)
    outcome = run(upcycled(dense, model), model)
    assert outcome.prediction.verdict is check.Verdict.EXACT
    assert outcome.ok and outcome.logit_difference < 1e-4 * max(1, outcome.logit_scale)
    assert outcome.dense_loss == pytest.approx(outcome.sparse_loss, abs=1e-5)


@pytest.mark.parametrize(
    ("capacity", "words"),
    [
        (2.0, "slots for 16 tokens"),
        # Measured in `test_decoder_recipes`, too.
        pytest.param(4.0, "not renormalised", marks=pytest.mark.slow),
    ],
)
def test_paper_settings_are_scaled_layer_by_layer(dense, capacity, words):
    model = sparse_model(capacity=capacity)
    outcome = run(upcycled(dense, model), model)
    assert outcome.prediction.verdict is check.Verdict.SCALED
    assert words in outcome.prediction.reason
    assert outcome.ok, outcome.text()
    assert [layer.layer for layer in outcome.layers] == ["encoder/layers_1", "decoder/layers_1"]
    assert all(layer.difference < 1e-5 for layer in outcome.layers)
    # Top-2 of 4 nearly equal experts: about half of the probability; and the logits do differ.
    assert outcome.layers[1].gate_sum_mean == pytest.approx(0.5, abs=0.1)
    assert outcome.logit_difference > 1e-2
    assert "gate sum" in outcome.text() and outcome.json()["ok"]


def test_softmax_after_top_k_needs_no_renormalisation(dense):
    model = sparse_model(renormalize=True, capacity=4.0, order="after_top_k")
    plan = upcycled(dense, model).plan
    assert check.predict(plan, model, TOKENS.batch).verdict is check.Verdict.EXACT


@pytest.mark.parametrize(
    "model", [sparse_model(renormalize=True, capacity=4.0), sparse_model()], ids=["exact", "scaled"]
)
def test_a_changed_expert_is_found_in_its_layer(dense, model):
    conversion = upcycled(dense, model)
    conversion.target.arrays["target/decoder/layers_1/mlp/expert/wi_1/kernel"][:, 2, 3] += 0.5
    outcome = run(conversion, model)
    assert not outcome.ok
    assert outcome.first_divergence == "decoder/layers_1"
    assert "FAILED" in outcome.text() and "decoder/layers_1" in outcome.text()


def test_a_changed_attention_is_found_in_its_layer(dense):
    model = sparse_model()
    conversion = upcycled(dense, model)
    conversion.target.arrays["target/encoder/layers_0/attention/out/kernel"][0] += 1
    outcome = run(conversion, model)
    assert not outcome.ok and outcome.first_divergence == "encoder/layers_0"
    assert all(
        layer.ok for layer in outcome.layers
    )  # The MoE layers themselves do what they should.


@pytest.mark.parametrize("init", [surgery.NoisyCopies(0.1), surgery.DropUpcycling(0.5)])
def test_nothing_is_claimed_for_changed_experts(dense, init):
    model = sparse_model(renormalize=True, capacity=4.0)
    outcome = run(upcycled(dense, model, surgery.Recipe(expert_init=init)), model)
    assert outcome.prediction.verdict is check.Verdict.NOT_PRESERVED
    assert type(init).__name__ in outcome.prediction.reason
    assert outcome.ok and outcome.twin_difference is None and outcome.logit_difference > 1e-3


def test_shuffled_copies_are_still_exact(dense):
    model = sparse_model(renormalize=True, capacity=4.0)
    outcome = run(
        upcycled(
            dense, model, surgery.Recipe(expert_init=surgery.DropUpcycling(0.0, shuffle=True))
        ),
        model,
    )
    assert outcome.prediction.verdict is check.Verdict.EXACT and outcome.ok


def test_virtual_groups_select_whole_mlps_and_need_no_noise_to_break_ties(dense):
    """G = T = 4 shards of equal weight 1/4: the layer gives a quarter of the dense MLP, exactly,
    whichever group a token takes.
    """
    router = TokensChoose(num_selected_experts=4, renormalize=True)
    moe = MoeConfig(
        8,
        encoder_router=router,
        decoder_router=router,
        expert_mlp_dim=8,
        eval_expert_capacity_factor=8.0,
    )
    model = EncoderDecoderModel(dataclasses.replace(CONFIG, moe=moe))
    init = surgery.VirtualGroups(granularity=4, top_k=4, scale_weights=False)
    conversion = upcycled(
        dense, model, surgery.Recipe(expert_init=init, router_init=surgery.NormalRouter(repeat=4))
    )
    weights = LayerWeights(conversion.target, model.param_specs(), block_bytes=1)
    for layer, call in lanes.moe_calls(model, weights, TOKENS.batch):
        kernels = {
            f"{name}/kernel": dense[f"target/{layer}/mlp/{name}/kernel"]
            for name in ("wi_0", "wi_1", "wo")
        }
        want = model.reference_mlp(np.asarray(call.x), kernels)
        np.testing.assert_allclose(call.y * 4, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
        chosen = np.asarray(call.router_logits).argmax(axis=-1) // 4
        assert len(np.unique(chosen)) == 2  # Both groups are used.


def test_cross_entropy_of_a_hand_worked_case():
    # Two words: log(1 + e) - 1 for the likelier one, log(1 + e) for the other.
    found = check.cross_entropy(np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([1, 0]))
    np.testing.assert_allclose(found, [np.log(1 + np.e) - 1, np.log(1 + np.e)])


def test_router_weights_are_mean_probabilities(dense):
    model = sparse_model()
    conversion = upcycled(dense, model, surgery.Recipe(router_init=surgery.ZeroRouter()))
    weights = check.router_weights(model, conversion.target, TOKENS.batch)
    assert set(weights) == {"encoder/layers_1", "decoder/layers_1"}
    np.testing.assert_allclose(weights["encoder/layers_1"], [0.25] * 4, rtol=1e-6)


def test_shape_of_the_model_is_read_off_the_checkpoint(dense):
    specs = Reader(dense).specs()
    assert dataclasses.replace(from_specs(specs, {}), dropout_rate=0.0) == CONFIG
    sparse = registry.infer(specs, {}, MoeConfig(num_experts=4))
    assert sparse.config.sparse_layers("encoder") == CONFIG.__class__(
        **{**CONFIG.__dict__, "moe": MoeConfig(num_experts=4)}
    ).sparse_layers("encoder")
    with pytest.raises(ValueError, match="cannot be inferred: name a model file"):
        registry.infer({name: s for name, s in specs.items() if "embedding" not in name}, {})
