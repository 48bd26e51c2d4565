"""Scores of targets, with the logits of a few positions at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.models import scoring
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.models.t5.config import T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel

VOCAB, ROWS = 48, 3


# What comes before the logits does not matter: one dense layer.
def language_model(**settings):
    return DecoderModel(
        DecoderConfig(
            vocab_size=VOCAB, emb_dim=16, num_layers=1, num_heads=2, head_dim=8, mlp_dim=32,
            **settings
        )
    )  # fmt: skip


def encoder_decoder(**settings):
    return EncoderDecoderModel(
        T5Config(
            vocab_size=VOCAB, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
            head_dim=8, mlp_dim=32, dropout_rate=0.0, **settings
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [
        language_model(),
        language_model(logits_via_embedding=True, logits_softcap=3.0),
        encoder_decoder(),
        encoder_decoder(logits_via_embedding=True),
    ],
    ids=["decoder", "decoder_tied", "t5", "t5_tied"],
)
@pytest.mark.usefixtures("drawn_parameters")
def test_parts_of_the_logits_give_the_same_scores(model, monkeypatch):
    examples = [
        {"inputs": list(range(3, 3 + n)), "targets": list(range(5, 5 + 2 * n))} for n in (2, 3, 5)
    ]
    batch = model.features.pad(examples, {"inputs": 6, "targets": 11}, ROWS)
    params = jax.jit(model.init_params)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 1.5, params)
    whole = jax.jit(model.score_batch)(params, batch)
    # Rows of 17 or 11 positions, 4 at a time: neither is a multiple.
    monkeypatch.setattr(scoring, "MOST_LOGITS", 4 * ROWS * VOCAB)
    parts = jax.jit(lambda params, batch: model.score_batch(params, batch))(params, batch)
    np.testing.assert_allclose(parts, whole, atol=1e-5, rtol=1e-5)
    assert len(set(np.asarray(whole))) == ROWS and np.all(np.asarray(whole) < -1)


def test_scores_of_a_large_vocabulary_hold_few_logits(monkeypatch):
    rows, length, width, vocab = 2, 64, 8, 4096
    kernel = jnp.ones((width, vocab))

    def score(x, targets):
        return scoring.summed_log_probabilities(
            lambda x: x @ kernel, (x,), targets, jnp.ones((rows, length)), vocab_size=vocab
        )

    given = jnp.zeros((rows, length, width)), jnp.zeros((rows, length), jnp.int32)

    def held(score):
        return jax.jit(score).lower(*given).compile().memory_analysis().temp_size_in_bytes

    everything = held(lambda *given: score(*given))
    assert everything >= 4 * rows * length * vocab  # 2 MiB
    monkeypatch.setattr(scoring, "MOST_LOGITS", 4 * rows * vocab)
    # 4 positions at a time are a sixteenth, beside a few values of the same shape.
    assert held(lambda *given: score(*given)) <= everything / 4
    # Of every row one position at least: each has the probability 1 / V.
    monkeypatch.setattr(scoring, "MOST_LOGITS", 1)
    np.testing.assert_allclose(score(*given), -length * np.log(vocab), rtol=1e-5)
