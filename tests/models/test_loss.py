"""The loss and its metrics: by hand, and what they may not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models import losses, metrics
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import TokensChoose

# Groups of 12 tokens: one row of encoder tokens each; so a group never spans microbatches.
MOE = {
    "num_experts": 4,
    "encoder_router": TokensChoose(num_selected_experts=1),
    "group_size": 12,
    "train_expert_capacity_factor": 1.0,
    "eval_expert_capacity_factor": 1.0,
    "min_expert_capacity": 1,
    "aux_loss_factor": 0.5,
    "router_z_loss_factor": 0.25,
}


def test_token_losses_by_hand():
    # Logits (log 3, 0) for target 0: Z = 4, cross entropy -log(3/4), z-loss 0.1 * (log 4)^2. For
    # target 1: -log(1/4), wrong.
    logits = jnp.log(jnp.array([[[3.0, 1.0], [3.0, 1.0]]]))
    out = losses.token_losses(logits, jnp.array([[0, 1]]), z_loss=0.1)
    np.testing.assert_allclose(out.cross_entropy, [[np.log(4 / 3), np.log(4)]], rtol=1e-6)
    np.testing.assert_allclose(out.z_loss, 0.1 * np.log(4) ** 2 * np.ones((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(out.correct, [[1.0, 0.0]])


def test_the_first_of_equal_logits_counts_as_the_prediction():
    # As argmax says: tokens 1 and 2 share the largest logit, so that 1 is predicted. A row with a
    # NaN predicts nothing.
    logits = jnp.array([[[0.0, 2.0, 2.0], [0.0, 2.0, 2.0], [jnp.nan, 1.0, 0.0]]])
    out = losses.token_losses(logits, jnp.array([[1, 2, 1]]))
    np.testing.assert_array_equal(out.correct, [[1.0, 0.0, 0.0]])


def test_label_smoothing_by_hand():
    # Three tokens, smoothing 0.2: targets (0.8, 0.1, 0.1). Logits equal to log of that: cross
    # entropy is its entropy, minus that: 0.
    smooth = np.array([0.8, 0.1, 0.1])
    out = losses.token_losses(
        jnp.log(jnp.asarray(smooth))[None, None], jnp.array([[0]]), label_smoothing=0.2
    )
    np.testing.assert_allclose(out.cross_entropy, 0.0, atol=1e-6)
    # Uniform logits: log 3 minus the entropy.
    out = losses.token_losses(jnp.zeros((1, 1, 3)), jnp.array([[0]]), label_smoothing=0.2)
    np.testing.assert_allclose(
        out.cross_entropy, np.log(3) + np.sum(smooth * np.log(smooth)), rtol=1e-5
    )


def test_mean_merges_by_weight():
    left = metrics.Mean(total=jnp.array([2.0, 4.0]), weight=jnp.float32(2))
    right = metrics.Mean(total=jnp.array([1.0, 5.0]), weight=jnp.float32(1))
    np.testing.assert_allclose(left.merge(right).compute(), [1.0, 3.0])
    assert metrics.Mean(total=jnp.float32(0), weight=jnp.float32(0)).compute() == 0.0


@pytest.mark.parametrize(
    ("factor", "expected"), [(None, 1.0), (10.0, 10.0), ("NUM_REAL_TARGET_TOKENS", 3.0 + 5.0)]
)
def test_loss_denominator(factor, expected, single, make_batch):
    model = EncoderDecoderModel(single(), loss_normalizing_factor=factor)
    assert model.loss_denominator(make_batch(batch_size=2, lengths=[3, 5])) == expected


def test_weights_default_to_real_target_tokens(single, make_batch):
    model = EncoderDecoderModel(single(), loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    batch = make_batch(batch_size=2, lengths=[3, 5])
    del batch["decoder_loss_weights"]
    assert model.loss_denominator(batch) == 8.0


def value_metrics_and_gradient(model, params, batch, num_microbatches):
    denominator = model.loss_denominator(batch)

    @jax.jit
    def one(params, part):
        def loss(p):
            return model.loss_fn(
                p, part, None, denominator=denominator, aux_scale=1 / num_microbatches
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    rows = len(batch["encoder_input_tokens"]) // num_microbatches
    total = collected = gradient = None
    for i in range(num_microbatches):
        part = {name: value[i * rows : (i + 1) * rows] for name, value in batch.items()}
        (value, found), grads = one(params, part)
        total = value if total is None else total + value
        collected = found if collected is None else metrics.merge(collected, found)
        gradient = grads if gradient is None else jax.tree.map(jnp.add, gradient, grads)
    return total, metrics.compute(collected), trees.flatten(gradient)


# In every run test_step_forms.py compares the values, metrics and gradients of train steps with and
# without microbatches. Without a factor the denominator is 1, however the batch is divided.
@pytest.mark.slow
@pytest.mark.parametrize("factor", ["NUM_REAL_TARGET_TOKENS", None])
def test_microbatches_change_nothing(factor, single, make_batch, make_params):
    model = EncoderDecoderModel(single(**MOE), loss_normalizing_factor=factor)
    params = make_params(model)
    # Very different numbers of real tokens per microbatch. 4 * 12 encoder and 4 * 6 decoder tokens.
    batch = make_batch(targets=6, lengths=[12, 2, 6, 1])
    loss, values, gradient = value_metrics_and_gradient(model, params, batch, 1)
    assert float(loss) == pytest.approx(float(values["loss"]))
    for parts in (2,):
        other_loss, other_values, other_gradient = value_metrics_and_gradient(
            model, params, batch, parts
        )
        np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
        for name in values:
            if name not in (
                "experts/fraction_tokens_left_behind",
                "experts/expert_usage",
                "experts/router_confidence",
            ):
                np.testing.assert_allclose(
                    other_values[name], values[name], rtol=1e-4, atol=1e-6, err_msg=name
                )
        for path in gradient:
            scale = np.abs(gradient[path]).max()
            np.testing.assert_allclose(
                other_gradient[path], gradient[path], atol=1e-5 * scale, err_msg=path
            )


def test_loss_is_the_sum_of_its_parts(single, make_batch, make_params):
    model = EncoderDecoderModel(single(**MOE), loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    params, batch = make_params(model), make_batch(lengths=[12, 2, 6, 1])
    config = dataclasses.replace(
        model.config, moe=dataclasses.replace(model.config.moe, group_size=16)
    )
    model = EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")

    @jax.jit
    def both(params, batch):
        denominator = model.loss_denominator(batch)
        return model.loss_fn(params, batch, None, denominator=denominator), model.eval_fn(
            params, batch
        )

    (loss, found), evaluated = both(params, batch)
    values = metrics.compute(found)
    parts = ("cross_ent_loss", "z_loss", "experts/auxiliary_loss", "experts/router_z_loss")
    assert all(values[name] > 0 for name in parts)
    np.testing.assert_allclose(sum(values[name] for name in parts), loss, rtol=1e-5)
    assert values["target_tokens"] == 8 + 2 + 6 + 1
    np.testing.assert_allclose(values["experts/encoder/layers_0/load"].sum(), 1.0, rtol=1e-6)
    assert 0 < values["experts/encoder/layers_0/entropy"] < np.log(4)
    # Evaluation of the same model: dropout is 0 and capacity the same here, and its loss is per
    # token, so all agree.
    evaluated = metrics.compute(evaluated)
    # What needs a whole batch is added by the train step (`dead`), and what stops a run is looked
    # at in training alone.
    layers = ("encoder/layers_0", "decoder/layers_0")
    assert set(evaluated) - set(values) == {f"experts/{layer}/dead" for layer in layers}
    assert set(values) - set(evaluated) == {f"non_finite_router_logits/{layer}" for layer in layers}
    for name in set(values) & set(evaluated):
        np.testing.assert_allclose(evaluated[name], values[name], rtol=1e-5, err_msg=name)


def test_auxiliary_losses_are_averaged_over_all_moe_layers(single, make_batch, make_params):
    # The encoder's experts-choose layer reports 0 and halves the decoder's loss.
    from upcycle_jax.moe.layer import LAYER_STATS

    model = EncoderDecoderModel(single(num_experts=4, aux_loss_factor=1.0))
    params, batch = make_params(model), make_batch()

    @jax.jit
    def both(params, batch):
        _, variables = model._apply(
            params, batch, train=False, dropout_rng=None, mutable=[LAYER_STATS]
        )
        return model.eval_fn(params, batch), variables

    found, variables = both(params, batch)
    values = metrics.compute(found)
    decoder = variables[LAYER_STATS]["decoder"]["layers_0"]["mlp"]["stats"]
    assert variables[LAYER_STATS]["encoder"]["layers_0"]["mlp"]["stats"].auxiliary_loss == 0
    np.testing.assert_allclose(
        values["experts/auxiliary_loss"], decoder.auxiliary_loss / 2, rtol=1e-6
    )


def test_dropout_needs_its_key_and_uses_it(single, make_batch, make_params):
    model = EncoderDecoderModel(single(model={"dropout_rate": 0.3}))
    params, batch = make_params(model), make_batch()
    loss = jax.jit(lambda rng: model.loss_fn(params, batch, rng, denominator=1.0)[0])
    assert loss(jax.random.key(0)) == loss(jax.random.key(0)) != loss(jax.random.key(1))
    without = jax.jit(lambda: model.loss_fn(params, batch, None, denominator=1.0)[0])()
    assert without != loss(jax.random.key(0))


def test_expert_dropout_is_its_own(single):
    assert single(model={"dropout_rate": 0.1}, num_experts=4).expert_dropout_rate == 0.1
    assert (
        single(
            model={"dropout_rate": 0.1}, num_experts=4, expert_dropout_rate=0.3
        ).expert_dropout_rate
        == 0.3
    )
    assert (
        single(
            model={"dropout_rate": 0.1}, num_experts=4, expert_dropout_rate=0.3
        ).without_dropout.expert_dropout_rate
        == 0.0
    )
