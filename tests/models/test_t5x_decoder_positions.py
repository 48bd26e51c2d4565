"""T5X mode in a decoder: which positions are zeroed, and so which are routed, against a forward
pass in NumPy that follows Flaxformer's rules.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.layers import masks
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import TokensChoose

HEADS, E, CAPACITY, GROUPS = 2, 2, 5, 2


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        # Three targets, shifted: the last of them is an input of the first padded position.
        ([0, 5, 6, 1, 0, 0], [1, 1, 1, 1, 0, 0]),
        ([0, 5, 6, 7, 8, 9], [1, 1, 1, 1, 1, 1]),
        ([0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]),
        # Two packed examples: every input of the second is a shifted target of its own.
        ([0, 3, 9, 0, 4, 8, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]),
    ],
)
def test_kept_positions_by_hand(tokens, kept):
    got = masks.t5x_decoder_positions(jnp.array([tokens]))
    np.testing.assert_array_equal(got[0], np.array(kept, bool))


def norm(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale["scale"]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gated_mlp(x, wi_0, wi_1, wo):
    return (gelu(x @ wi_0) * (x @ wi_1)) @ wo


def attention(p, queries, keys, allowed, bias=0.0):
    """`allowed [batch, queries, keys]`. Beside -1e10 a float32 has no room for scores: a query
    without any allowed key attends to all of them alike.
    """
    q, k, v = (
        (x @ p[name]["kernel"]).reshape(*x.shape[:2], HEADS, -1)
        for name, x in (("query", queries), ("key", keys), ("value", keys))
    )
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) + bias
    allowed = allowed[:, None]
    scores = np.where(allowed, scores, -np.inf)
    scores = np.where(allowed.any(axis=-1, keepdims=True), scores, 0.0)
    out = np.einsum("bhqk,bkhd->bqhd", softmax(scores), v)
    return out.reshape(*out.shape[:2], -1) @ p["out"]["kernel"]


def position_bias(table, length, *, bidirectional):
    """Distances below 8 have a bucket each; keys after the query have the upper half of the
    buckets, or bucket 0 where they are never attended to.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    ahead = 16 - distance if bidirectional else 0
    return table[:, np.where(distance >= 0, distance, ahead)]


def experts(p, x):
    """Top-2 tokens choose in groups of two rows: all first choices before any second one."""
    groups = x.reshape(GROUPS, -1, x.shape[-1])
    wi_0, wi_1, wo = (p["expert"][name]["kernel"] for name in ("wi_0", "wi_1", "wo"))
    out = np.zeros_like(groups)
    for tokens, result in zip(groups, out, strict=True):
        gates = softmax(tokens @ p["router"]["router_weights"]["w"]["kernel"])
        choices = np.argsort(-gates, axis=-1, kind="stable")[:, :2]
        used = np.zeros(E, int)
        for k in range(2):
            for t, e in enumerate(choices[:, k]):
                if used[e] < CAPACITY:
                    result[t] += gates[t, e] * gated_mlp(tokens[t], wi_0[e], wi_1[e], wo[e])
                used[e] += 1
    return out.reshape(x.shape)


def forward(params, batch, kept):
    """Logits of one encoder layer and one decoder layer with experts and a dense MLP after them;
    `kept [batch, length]`.
    """
    inputs, shifted, targets = (
        np.asarray(batch[f"{name}_tokens"])
        for name in ("encoder_input", "decoder_input", "decoder_target")
    )
    table, real = params["token_embedder"]["embedding"], inputs > 0
    zeroed, keep = real[..., None], kept[..., None]
    encoder, decoder = params["encoder"], params["decoder"]
    p, x = encoder["layers_0"], table[inputs]
    bias = position_bias(encoder["relpos_bias"]["rel_embedding"], x.shape[1], bidirectional=True)
    y = norm(x, p["pre_attention_layer_norm"]) * zeroed
    x = x + attention(p["attention"], y, y, real[:, :, None] & real[:, None], bias)
    y = norm(x, p["pre_mlp_layer_norm"]) * zeroed
    x = x + gated_mlp(y, *(p["mlp"][name]["kernel"] for name in ("wi_0", "wi_1", "wo")))
    encoded = norm(x, encoder["encoder_norm"]) * zeroed

    p, x, is_target = decoder["layers_0"], table[shifted], targets > 0
    causal = np.tri(x.shape[1], dtype=bool)
    bias = position_bias(decoder["relpos_bias"]["rel_embedding"], x.shape[1], bidirectional=False)
    y = norm(x, p["pre_self_attention_layer_norm"]) * keep
    allowed = is_target[:, :, None] & is_target[:, None] & causal
    x = x + attention(p["self_attention"], y, y, allowed, bias)
    y = norm(x, p["pre_cross_attention_layer_norm"]) * keep
    allowed = is_target[:, :, None] & real[:, None]
    x = x + attention(p["encoder_decoder_attention"], y, encoded, allowed)
    x = x + experts(p["mlp"], norm(x, p["pre_mlp_layer_norm"]) * keep)
    extra = (p["extra_mlp"][name]["kernel"] for name in ("wi_0", "wi_1", "wo"))
    x = x + gated_mlp(norm(x, p["pre_extra_mlp_layer_norm"]) * keep, *extra)
    return norm(x, decoder["decoder_norm"]) * keep @ decoder["logits_dense"]["kernel"]


def test_the_first_padded_position_is_routed_and_takes_a_slot(single, make_params, make_batch):
    # 4 rows of 8 targets, 2 experts: 2 groups of 16 tokens, 5 slots (0.65 * 16 / 2 = 5.2).
    config = single(
        num_experts=E,
        num_encoder_sparse_layers=0,
        encoder_sparse_layout="MIXED",
        decoder_router=TokensChoose(),
        eval_expert_capacity_factor=0.65,
        min_expert_capacity=1,
        extra_mlp=True,
        t5x_mode=True,
    )
    model = EncoderDecoderModel(config)
    params, batch = make_params(model), make_batch(inputs=6, targets=8, lengths=[3, 7, 2, 5])
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    flaxformers = real | (np.asarray(batch["decoder_input_tokens"]) > 0)
    assert (flaxformers.sum(axis=1) == real.sum(axis=1) + 1).all()

    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    want, by_target = (forward(exact, batch, kept) for kept in (flaxformers, real))
    got = np.asarray(jax.jit(model.logits)(params, batch))
    np.testing.assert_allclose(got[flaxformers], want[flaxformers], atol=1e-4)
    # It is not a detail: real tokens lose their places to it.
    assert np.abs(want - by_target)[real].max() > 0.1

    # Outside T5X mode states are zeroed where there is no target.
    ours = dataclasses.replace(config, moe=dataclasses.replace(config.moe, t5x_mode=False))
    got = np.asarray(jax.jit(EncoderDecoderModel(ours).logits)(params, batch))
    assert not got[~real].any()
