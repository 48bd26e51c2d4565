"""What is predicted for a sequence depends on that sequence alone; cached decoding computes what
the full forward pass does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.models.generation import DecodingCache
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import ExpertsChoose, TokensChoose
from upcycle_jax.partitioning import Partitioner

LENGTHS = (5, 8, 3, 1, 8, 2, 7)
# A capacity factor far below 1: grouped routing drops many tokens. That independent routing does
# not is seen here, too.
TIGHT = {"eval_expert_capacity_factor": 0.5, "min_expert_capacity": 1}
MODELS = {
    "dense": {},
    "paper": {"num_experts": 4, "eval_expert_capacity_factor": 2.0},
    "tight": TIGHT,
    "many experts": {"num_experts": 16, **TIGHT},
    "renormalised": {
        "encoder_router": ExpertsChoose(renormalize=True),
        "decoder_router": TokensChoose(renormalize=True),
        **TIGHT,
    },
    "top-1 everywhere": {
        "encoder_router": TokensChoose(1),
        "decoder_router": TokensChoose(1),
        **TIGHT,
    },
}


def rows(batch, index):
    return {name: value[index] for name, value in batch.items()}


def padded(batch, inputs, targets):
    width = {"encoder": inputs, "decoder": targets}
    return {
        name: jnp.pad(value, ((0, 0), (0, width[name.split("_")[0]] - value.shape[1])))
        for name, value in batch.items()
    }


@functools.cache
def inference_logits(model):
    """Logits with teacher forcing, routed as in scoring: float32 `[batch, length, vocab]`. Compiled
    once for all tests of equal models.
    """
    return jax.jit(EncoderDecoderModel(model.config.for_inference).logits)


def step_by_step(model, params, batch):
    """The same logits from cached decoding, the given inputs in place of chosen tokens."""
    length = batch["decoder_input_tokens"].shape[1]

    @jax.jit
    def run(params, batch):
        logits, cache = model.start_decoding(
            params, batch["encoder_input_tokens"], max_length=length
        )

        def step(cache: DecodingCache, at):
            logits, cache = model.decode_step(
                params, batch["decoder_input_tokens"][:, at], at, cache
            )
            return cache, logits

        _, rest = jax.lax.scan(step, cache, jnp.arange(1, length))
        return jnp.concatenate([logits[:, None], jnp.moveaxis(rest, 0, 1)], axis=1)

    return run(params, batch)


# Routing that is less tight, or weighs the same choices otherwise, is independent where this is.
SLACK = [pytest.param(name, marks=pytest.mark.slow) for name in ("paper", "renormalised")]


@pytest.mark.parametrize("name", ["tight", "top-1 everywhere", *SLACK])
def test_alone_in_a_batch_and_padded(name, make_model, make_params, make_batch):
    """What a row is alone with much padding, it is with others and with little."""
    model = make_model(**MODELS[name])
    params, batch = make_params(model), make_batch(LENGTHS)
    logits = inference_logits(model)
    together, longer = logits(params, batch), padded(batch, 24, 13)
    for i, length in enumerate(LENGTHS):
        alone = logits(params, rows(longer, slice(i, i + 1)))
        np.testing.assert_allclose(alone[0, :length], together[i, :length], atol=1e-5)


def sums_of_log_probabilities(logits, batch):
    """Of each row's targets, in NumPy."""
    logits, targets = np.asarray(logits), np.asarray(batch["decoder_target_tokens"])
    logits = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return (chosen * np.asarray(batch["decoder_loss_weights"])).sum(axis=-1)


def test_scores_are_sums_of_log_probabilities_and_independent(make_model, make_params, make_batch):
    model = make_model(**TIGHT)
    params, batch = make_params(model), make_batch(LENGTHS)
    score = jax.jit(model.score_batch)
    scores = score(params, batch)
    want = sums_of_log_probabilities(inference_logits(model)(params, batch), batch)
    np.testing.assert_allclose(scores, want, atol=2e-5)
    np.testing.assert_allclose(score(params, rows(batch, slice(2, 3)))[0], scores[2], atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "tight", "many experts"])
def test_cached_decoding_equals_the_full_forward_pass(name, make_model, make_params, make_batch):
    model = make_model(**MODELS[name])
    params = make_params(model)
    batch = make_batch(LENGTHS)
    # The full pass takes every target position for real; the inputs keep their padding.
    batch["decoder_target_tokens"] = jnp.maximum(batch["decoder_target_tokens"], 1)
    np.testing.assert_allclose(
        step_by_step(model, params, batch), inference_logits(model)(params, batch), atol=1e-5
    )


def test_several_layers_and_bfloat16_decode_too(make_model, make_params, make_batch):
    model = make_model(
        model={"dtype": "bfloat16", "num_decoder_layers": 2}, decoder_sparse_layout=(1,), **TIGHT
    )
    batch = make_batch([8, 8])
    params = make_params(model)
    got, want = step_by_step(model, params, batch), inference_logits(model)(params, batch)
    assert got.dtype == jnp.float32
    assert np.median(np.abs(got - want)) < 0.05 * np.std(want)


def test_no_future_token_leaks(make_model, make_params, make_batch):
    model = make_model(**MODELS["many experts"])
    params, batch = make_params(model), make_batch([8, 8, 8])
    changed = dict(
        batch, decoder_input_tokens=batch["decoder_input_tokens"].at[:, 5:].add(1).clip(0, 47)
    )
    logits = inference_logits(model)
    before, after = logits(params, batch), logits(params, changed)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-6)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 1e-2


def test_grouped_routing_does_depend_on_the_batch(make_model, make_params, make_batch):
    # The control: what evaluation and T5X do. It also shows that the setting is read.
    model = make_model(inference_routing="grouped", **TIGHT)
    assert model.config.for_inference == model.config
    params, batch = make_params(model), make_batch(LENGTHS)
    score = jax.jit(model.score_batch)
    alone = score(params, rows(batch, slice(0, 1)))[0]
    assert abs(alone - score(params, batch)[0]) > 1e-3


def test_experts_choose_has_the_capacity_of_the_sequence(make_model, make_params, make_batch):
    # 12 real tokens, E = 4: capacity factor 2 gives round(2 * 12 / 4) = 6 slots, whatever the
    # padding. One group of the batch's 12 tokens has the same capacity, so evaluation in groups
    # agrees for a batch of one.
    model = make_model(
        min_expert_capacity=1, num_decoder_sparse_layers=0, decoder_sparse_layout="MIXED"
    )
    params, batch = make_params(model), make_batch([12], targets=12)
    want = jax.jit(model.logits)(params, batch)
    np.testing.assert_allclose(inference_logits(model)(params, batch), want, atol=1e-5)
    np.testing.assert_allclose(
        inference_logits(model)(params, padded(batch, 32, 12)), want, atol=1e-5
    )


def test_a_crowded_expert_drops_nothing(make_model, make_params, make_batch):
    # All router logits equal: ties go to expert 0, which 56 tokens then crowd; 4 times the even
    # share are 14 slots.
    model = make_model(num_experts=16, decoder_router=TokensChoose(num_selected_experts=1), **TIGHT)
    params = make_params(model)
    for layer in params["decoder"].values():
        if "router" in layer.get("mlp", {}):
            layer["mlp"]["router"] = jax.tree.map(jnp.zeros_like, layer["mlp"]["router"])
    batch = make_batch([8] * 7)
    together, one = (
        inference_logits(model)(params, batch),
        inference_logits(model)(params, rows(batch, slice(2, 3))),
    )
    np.testing.assert_allclose(one[0], together[2], atol=1e-5)


def test_eight_devices_compute_what_one_does(make_model, make_params, make_batch):
    model = make_model(num_experts=8, eval_expert_capacity_factor=2.0)
    params, batch = make_params(model), make_batch([5, 8, 3, 1, 8, 2, 7, 4])
    # As above: every target position is real, and of the first so many the score is taken.
    batch["decoder_target_tokens"] = jnp.maximum(batch["decoder_target_tokens"], 1)
    # That scores and steps are of these logits on one device, tests above say.
    logits = inference_logits(model)(params, batch)
    want = sums_of_log_probabilities(logits, batch)
    with Partitioner(num_expert_partitions=2, num_model_partitions=2).activate():
        np.testing.assert_allclose(jax.jit(model.score_batch)(params, batch), want, atol=1e-4)
        np.testing.assert_allclose(step_by_step(model, params, batch), logits, atol=1e-4)


def test_an_unknown_routing_is_refused(make_model):
    with pytest.raises(
        ValueError, match="inference_routing must be 'independent' or 'grouped', got 'alone'"
    ):
        make_model(inference_routing="alone")
