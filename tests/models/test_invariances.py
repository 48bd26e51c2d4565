"""What the outputs may not depend on: padding, packing, later tokens, and the numbering of
experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models import metrics
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import TokensChoose


def pad_to(batch, inputs, targets):
    widths = {name: inputs if name.startswith("encoder") else targets for name in batch}
    return {
        name: jnp.pad(value, ((0, 0), (0, widths[name] - value.shape[1])))
        for name, value in batch.items()
    }


def test_padding_changes_neither_logits_nor_losses(single, make_batch, make_params):
    # Everything counts real tokens only, and with room for all of them nothing is dropped. The
    # top-1 encoder has a load-balancing loss.
    moe = {
        "num_experts": 4,
        "encoder_router": TokensChoose(num_selected_experts=1),
        "eval_expert_capacity_factor": 4.0,
        "router_z_loss_factor": 1.0,
        "aux_loss_factor": 1.0,
    }
    model = EncoderDecoderModel(single(**moe))
    params = make_params(model)
    batch = make_batch(inputs=10, targets=7, lengths=[7, 2, 6, 1])
    padded = pad_to(batch, 16, 12)
    both = jax.jit(lambda p, b: (model.logits(p, b), model.eval_fn(p, b)))
    (logits, plain), (padded_logits, longer) = both(params, batch), both(params, padded)
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    np.testing.assert_allclose(
        np.asarray(padded_logits)[:, :7][real], np.asarray(logits)[real], atol=1e-5
    )
    plain, longer = metrics.compute(plain), metrics.compute(longer)
    for name in plain:
        # The number of slots grows with the padded length, so their usage falls.
        if name != "experts/expert_usage":
            np.testing.assert_allclose(
                longer[name], plain[name], rtol=1e-5, atol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("ignore", [True, False])
def test_padding_takes_capacity_unless_ignored(ignore, single, make_batch, make_params):
    # 10 real tokens in 40 positions, capacity factor 1: 10 slots per expert. Ignoring padding, no
    # expert can overflow; otherwise the 30 zero vectors, whose logits tie, crowd into expert 0.
    moe = {
        "num_experts": 4,
        "encoder_router": TokensChoose(num_selected_experts=1),
        "eval_expert_capacity_factor": 1.0,
        "ignore_padding_tokens": ignore,
        "num_decoder_sparse_layers": 0,
        "decoder_sparse_layout": "MIXED",
    }
    model = EncoderDecoderModel(single(**moe))
    batch = make_batch(inputs=10, lengths=[1, 1, 1, 7])
    values = metrics.compute(jax.jit(model.eval_fn)(make_params(model), batch))
    if ignore:
        assert values["experts/encoder/layers_0/dropped"] == 0
    else:
        assert values["experts/encoder/layers_0/dropped"] > 0


ROOMY = {"num_experts": 4, "encoder_router": TokensChoose(), "eval_expert_capacity_factor": 4.0}
"""Experts have room for all tokens."""


@pytest.fixture(scope="module")
def roomy(tiny, make_params):
    """A model, its parameters, and its logits as a program, which several tests share."""
    layouts = {"encoder_sparse_layout": (0,), "decoder_sparse_layout": (0,)}
    config = tiny(model={"num_encoder_layers": 1, "num_decoder_layers": 1}, **ROOMY, **layouts)
    model = EncoderDecoderModel(config)
    return config, make_params(model), jax.jit(model.logits)


def test_packed_equals_unpacked(roomy, make_batch):
    # Two examples per row against one per row.
    _, params, logits = roomy
    batch = make_batch(batch_size=4, inputs=6, targets=5, lengths=[5, 3, 4, 2])
    lengths = {"encoder": 6, "decoder": 5}

    packed = {}
    for name, value in batch.items():
        packed[name] = value.reshape(2, -1)
    for stack, length in lengths.items():
        tokens = packed[f"{stack}_input_tokens" if stack == "encoder" else "decoder_target_tokens"]
        segments = jnp.repeat(jnp.array([[1, 2], [1, 2]]), length, axis=1)
        packed[f"{stack}_segment_ids"] = jnp.where(tokens > 0, segments, 0)
        packed[f"{stack}_positions"] = jnp.tile(jnp.arange(length), (2, 2))
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    want = np.asarray(logits(params, batch))[real]
    got = np.asarray(logits(params, packed)).reshape(4, 5, -1)[real]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_later_token_is_seen(roomy, make_batch):
    _, params, logits = roomy
    batch = make_batch()
    before = logits(params, batch)
    # Another token from position 5 on, as input of position 5.
    changed = dict(batch, decoder_input_tokens=batch["decoder_input_tokens"].at[:, 5:].set(1))
    after = logits(params, changed)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-6)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 1e-2


def test_experts_may_be_renumbered(single, make_batch, make_params):
    model = EncoderDecoderModel(
        single(num_experts=4, eval_expert_capacity_factor=0.5, min_expert_capacity=1)
    )
    params, batch = make_params(model), make_batch()
    order = np.array([2, 0, 3, 1])
    renumbered = {}
    for path, leaf in trees.flatten(params).items():
        if "/mlp/expert/" in path:
            renumbered[path] = leaf[order]
        elif "/router/" in path:
            renumbered[path] = leaf[:, order]
        else:
            renumbered[path] = leaf
    logits = jax.jit(model.logits)
    np.testing.assert_allclose(
        logits(trees.unflatten(renumbered), batch), logits(params, batch), atol=1e-5
    )


def test_regrouping_changes_nothing_when_nothing_is_dropped(roomy, single, make_batch):
    _, params, logits = roomy
    batch = make_batch()
    other = EncoderDecoderModel(single(**ROOMY, group_size=8))
    np.testing.assert_allclose(
        jax.jit(other.logits)(params, batch), logits(params, batch), atol=1e-5
    )


def test_tokens_that_do_not_divide_into_groups(single, make_batch, make_params):
    model = EncoderDecoderModel(single(num_experts=4, group_size=32))
    # 4 * 12 = 48 encoder tokens.
    with pytest.raises(ValueError, match="48 tokens .*GROUP_SIZE=32.* is 24"):
        jax.eval_shape(model.logits, make_params(model), make_batch())


def test_bfloat16_activations_keep_float32_logits_and_parameters(roomy, make_batch):
    config, params, logits = roomy
    model, batch = EncoderDecoderModel(dataclasses.replace(config, dtype="bfloat16")), make_batch()
    assert {leaf.dtype.name for leaf in model.param_specs().values()} == {"float32"}
    got, want = jax.jit(model.logits)(params, batch), logits(params, batch)
    assert got.dtype == jnp.float32
    assert {a.dtype.name for a in jax.eval_shape(model.layer_outputs, params, batch).values()} == {
        "bfloat16"
    }
    # Eight bits of mantissa through two layers. Tokens may be routed differently where
    # probabilities nearly tie, so the median.
    assert np.median(np.abs(got - want)) < 0.05 * want.std()
