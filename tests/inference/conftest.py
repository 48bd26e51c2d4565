"""Tiny models and batches, as in tests/models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel

VOCAB = 48
CONFIG = T5Config(
    vocab_size=VOCAB,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=8,
    mlp_dim=32,
    dropout_rate=0.0,
)


@pytest.fixture(scope="session")
def make_model():
    """Makes models of one layer per stack, for compile time: dense without arguments, MoE layers (4
    experts) with some.
    """
    placed = {"num_experts": 4, "encoder_sparse_layout": (0,), "decoder_sparse_layout": (0,)}

    def make(*, model=None, **moe):
        config = dataclasses.replace(CONFIG, **(model or {}))
        return EncoderDecoderModel(
            dataclasses.replace(config, moe=MoeConfig(**(placed | moe))) if moe else config
        )

    return make


@pytest.fixture(scope="session")
def make_params():
    """Random parameters with router logits of std about 1; EOS (token 1) is made likelier by its
    logits kernel.
    """

    def make(model, seed=0, *, eos=0.0):
        random = np.random.default_rng(seed)
        params = {}
        for path, leaf in model.param_specs().items():
            if path.endswith("scale"):
                value = 1 + 0.1 * random.normal(size=leaf.shape)
            else:
                fan_in = 1 if path.endswith("embedding") else leaf.shape[-2]
                value = random.normal(size=leaf.shape) / np.sqrt(fan_in)
            params[path] = jnp.asarray(value, jnp.float32)
        kernel = params["decoder/logits_dense/kernel"]
        params["decoder/logits_dense/kernel"] = kernel.at[:, 1].multiply(1 + eos)
        return trees.unflatten(params)

    return make


@pytest.fixture(scope="session")
def make_batch():
    """Random tokens; row i has lengths[i] real ones on both sides."""

    def make(lengths, inputs=12, targets=8, *, seed=0):
        random = np.random.default_rng(seed)
        rows = len(lengths)
        encoder = random.integers(2, VOCAB, (rows, inputs)) * (
            np.arange(inputs) < np.asarray(lengths)[:, None]
        )
        decoder = random.integers(2, VOCAB, (rows, targets)) * (
            np.arange(targets) < np.asarray(lengths)[:, None]
        )
        return {
            "encoder_input_tokens": jnp.asarray(encoder, jnp.int32),
            "decoder_input_tokens": jnp.asarray(
                np.pad(decoder, ((0, 0), (1, 0)))[:, :-1], jnp.int32
            ),
            "decoder_target_tokens": jnp.asarray(decoder, jnp.int32),
            "decoder_loss_weights": jnp.asarray(decoder > 0, jnp.int32),
        }

    return make


@pytest.fixture(scope="session")
def keys():
    """One random key per row."""
    return lambda rows, seed=0: jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        jnp.arange(rows)
    )
