"""How the load-balancing losses of other projects convert to ours (docs/training.md): their
formulas, written again, times what the table says.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle_jax.moe.losses import load_balancing_loss

TOKENS, EXPERTS, LAYERS = 32, 4, 3


@pytest.fixture(params=[1, 2], ids=["top-1", "top-2"])
def layers(request):
    """Probabilities `[L, S, E]` and choices `[L, S, K]` of layers, and our loss of each."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(LAYERS, TOKENS, EXPERTS))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    choices = np.argsort(-logits, axis=-1)[..., : request.param]
    ours = jax.vmap(
        lambda p, c: load_balancing_loss(p, c, counted=jnp.ones(TOKENS), count=jnp.float32(TOKENS))
    )(jnp.float32(probabilities), jnp.int32(choices))
    return probabilities, choices, np.asarray(ours)


def counts(choices):
    """Tokens that chose each expert, by layer `[L, E]`."""
    return (choices[..., None] == np.arange(EXPERTS)).sum((1, 2))


def test_megatron_and_megablocks(layers):
    """Both divide by K; Megatron-LM adds the layers' losses, MegaBlocks takes their mean."""
    probabilities, choices, ours = layers
    k = choices.shape[-1]
    products = (counts(choices) * probabilities.sum(1)).sum(-1)
    megatron = (products * EXPERTS / (k * TOKENS * TOKENS)).sum()
    np.testing.assert_allclose(megatron, ours.mean() * LAYERS / k, rtol=1e-5)
    scale = EXPERTS / (LAYERS * TOKENS * k)
    megablocks = scale * (counts(choices) * probabilities.mean(1)).sum()
    np.testing.assert_allclose(megablocks, ours.mean() / k, rtol=1e-5)


def test_hugging_face(layers):
    """Equal to ours for one layer; over layers it is the product of means, not the mean of
    products, and the two agree where layers are alike.
    """
    probabilities, choices, ours = layers

    def theirs(probabilities, choices):
        rows = probabilities.reshape(-1, EXPERTS)
        mask = choices.reshape(-1, choices.shape[-1])[..., None] == np.arange(EXPERTS)
        return EXPERTS * (mask.mean(0) * rows.mean(0)).sum()

    for layer in range(LAYERS):
        one = theirs(probabilities[layer : layer + 1], choices[layer : layer + 1])
        np.testing.assert_allclose(one, ours[layer], rtol=1e-5)
    alike = theirs(np.repeat(probabilities[:1], 2, 0), np.repeat(choices[:1], 2, 0))
    np.testing.assert_allclose(alike, ours[0], rtol=1e-5)
    assert not np.isclose(theirs(probabilities, choices), ours.mean(), rtol=1e-3)


def test_at_even_load_ours_is_k():
    """Each of 4 tokens chooses 2 of 4 experts, each expert twice: E * 4 * (2/4) * (1/4) = 2."""
    choices = jnp.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    loss = load_balancing_loss(
        jnp.full((4, 4), 0.25), choices, counted=jnp.ones(4), count=jnp.float32(4)
    )
    assert float(loss) == pytest.approx(2.0)
