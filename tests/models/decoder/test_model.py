"""The model as training and surgery see it: parameters, loss, steps of the function check."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.decoder.kinds import KINDS, OTHERS, config, random_params
from upcycle_jax import trees
from upcycle_jax.models import layerwise
from upcycle_jax.models.base import Model
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.from_specs import from_specs
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.models.layerwise import LayerwiseModel
from upcycle_jax.moe.routing import ExpertsChoose
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import Role

# d, f, layers, heads, KV, head size, vocabulary, tied; and the count of Hugging Face's model.
COUNTS = {
    "SmolLM2-135M": ((576, 1536, 30, 9, 3, 64, 49152, True), {}, 134_515_008),
    "Llama-3-8B": ((4096, 14336, 32, 32, 8, 128, 128256, False), {}, 8_030_261_248),
    "Qwen2.5-0.5B": ((896, 4864, 24, 14, 2, 64, 151936, True), {"qkv_bias": True}, 494_032_768),
    "Qwen3-0.6B": ((1024, 3072, 28, 16, 8, 128, 151936, True), {"qk_norm": "head"}, 596_049_920),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    (d, f, layers, heads, kv, size, vocabulary, tied), switches, count = COUNTS[name]
    settings = DecoderConfig(
        vocab_size=vocabulary,
        emb_dim=d,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=size,
        mlp_dim=f,
        logits_via_embedding=tied,
        **switches,
    )
    specs = DecoderModel(settings).param_specs()
    assert sum(leaf.size for leaf in specs.values()) == count


def test_counts_of_mixtral_8x7b():
    settings = DecoderConfig(32000, 4096, 32, 32, 128, 14336, 8, moe=DecoderMoeConfig())
    specs = DecoderModel(settings).param_specs()
    assert sum(leaf.size for leaf in specs.values()) == 46_702_792_704


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_the_shape_is_read_off_specs_and_settings(kind):
    dense = config(kind).dense
    specs = {f"{TARGET}{path}": s for path, s in DecoderModel(dense).param_specs().items()}
    plain = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dense.forward_settings.items()
    }
    assert from_specs(specs, plain) == dense


def test_roles_and_twins():
    specs = DecoderModel(config("mixtral")).param_specs()
    kernel = specs["decoder/layers_2/mlp/expert/wi_0/kernel"]
    assert (kernel.role, kernel.twin) == (Role.EXPERT, "decoder/layers_2/mlp/wi_0/kernel")
    assert kernel.shape == (4, 16, 24)
    assert specs["decoder/layers_2/mlp/router/router_weights/w/kernel"].role == Role.ROUTER
    assert {s.role for p, s in specs.items() if "self_attention" in p} == {Role.DENSE}


def test_it_is_a_model_that_can_be_run_by_layers():
    model = DecoderModel(config("mixtral"))
    assert isinstance(model, LayerwiseModel)
    checked: Model = model
    assert list(checked.stacks) == ["decoder"]
    assert checked.stacks["decoder"].moe_layers == tuple(f"decoder/layers_{i}" for i in range(3))


def test_fresh_parameters_predict_nothing():
    model = DecoderModel(dataclasses.replace(config("llama"), num_layers=1))
    params = jax.jit(model.init_params)(jax.random.key(0))
    assert not trees.diff(model.param_specs(), trees.flatten(params), compare_dtype=True)
    metrics = jax.jit(model.eval_fn)(params, model.features.random(50, length=16))
    loss = metrics["cross_ent_loss"]
    assert float(loss.total / loss.weight) == pytest.approx(math.log(50), abs=1.0)


def test_the_loss_is_the_mean_over_weighted_targets():
    model = DecoderModel(config("llama"))
    params = trees.unflatten(random_params(model))
    batch = model.features.random(50, batch_size=2, length=16)
    # Instructions are read and not learnt: only the last four targets of the first row count.
    weights = np.zeros((2, 16), np.int32)
    weights[0, 12:] = 1
    batch["decoder_loss_weights"] = weights
    denominator = model.loss_denominator(batch)
    assert denominator == 4

    @jax.jit
    def both(params):
        loss, _ = model.loss_fn(params, batch, None, denominator=denominator)
        return loss, model.logits(params, batch)

    loss, logits = both(params)
    log_probabilities = jax.nn.log_softmax(logits[0, 12:])
    targets = batch["decoder_target_tokens"][0, 12:]
    expected = -np.mean([log_probabilities[i, target] for i, target in enumerate(targets)])
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["gemma3", "capacity", "gpt_neox", "olmo"])
def test_steps_give_what_the_whole_gives(kind):
    few = {} if config(kind).layer_types else {"num_layers": 1}  # one where all are alike
    model = DecoderModel(dataclasses.replace(config(kind), **few))
    flat = random_params(model)
    batch = model.features.random(50, batch_size=2, length=16)
    params = trees.unflatten(flat)
    whole = jax.jit(lambda p: (model.layer_outputs(p, batch), model.logits(p, batch)))(params)
    outputs, logits = whole
    state = {name: jnp.asarray(value) for name, value in batch.items()}
    for step in model.layer_steps():
        needed = {place: flat[path] for path in flat if (place := step.place(path)) is not None}
        experts = None
        if step.moe is not None:
            needed = {p: v for p, v in needed.items() if "/expert/" not in p}
            tokens, dispatcher = layerwise.route(step.program, trees.unflatten(needed), state)
            experts = jnp.zeros(tokens.shape, jnp.float32)
            for e in range(4):
                kernels = {
                    path.removeprefix(f"{step.experts}/"): value[e : e + 1]
                    for path, value in flat.items()
                    if path.startswith(f"{step.experts}/")
                }
                experts += layerwise.expert_outputs(
                    step.moe, trees.unflatten(kernels), tokens, dispatcher, e
                )
        state, _ = layerwise.run(step.program, trees.unflatten(needed), state, experts)
        if step.is_layer:
            np.testing.assert_allclose(state["x"], outputs[step.name], atol=1e-4, rtol=0)
    np.testing.assert_allclose(state["logits"], logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"layer_types": ("full",)}, "layer_types names 1 layers, num_layers is 3"),
        ({"layer_types": ("sliding",) * 3}, "need a sliding_window"),
        ({"no_rope_layers": (3,)}, r"no_rope_layers \[3\] are not among the layers 0 to 2"),
        ({"mlp_activations": ("swish",)}, "unknown MLP activations"),
        ({"norm": "batch"}, "norm must be"),
    ],
)
def test_settings_that_fit_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**vars(config("llama")), **changes})


def test_moe_settings_that_fit_no_language_model_are_refused():
    with pytest.raises(ValueError, match="ExpertsChoose cannot be the router of a language model"):
        DecoderMoeConfig(router=ExpertsChoose())
    with pytest.raises(ValueError, match="t5x_mode is for T5"):
        DecoderMoeConfig(t5x_mode=True)
    with pytest.raises(ValueError, match="extra_mlp is for T5"):
        DecoderMoeConfig(extra_mlp=True)
