"""Losses that keep routing healthy, for ONE group.

Axis legend: G groups, S tokens per group, E experts, C capacity (slots per expert and group), K
experts per token.
"""

import jax
import jax.numpy as jnp


def load_balancing_loss(
    probabilities: jax.Array, choices: jax.Array, *, counted: jax.Array, count: jax.Array
) -> jax.Array:
    """The auxiliary loss of Switch Transformer (equations 4 to 6), for K choices, in Flaxformer's
    scale.

    loss = E^2 * mean over experts e of f_e * p_e, where f_e is the fraction of tokens that have e
    among their K choices (before any drop) and p_e the mean router probability of e. With perfect
    balance f_e = K/E and p_e = 1/E, so the loss is K.

    Args:
      probabilities: float32 `[S, E]`, softmax over all experts.
      choices: int32 `[S, K]`.
      counted: float32 `[S]`, 1 for tokens that count and 0 for those that do not.
      count: float32 scalar, the number of tokens that the means run over. A group without any gives
        0.
    """
    num_experts = probabilities.shape[-1]
    chosen = (
        jnp.zeros(probabilities.shape, jnp.float32)
        .at[jnp.arange(choices.shape[0])[:, None], choices]
        .set(1.0)
    )
    scale = 1.0 / jnp.maximum(count, 1.0)
    fraction = jnp.einsum("se,s->e", chosen, counted) * scale
    probability = jnp.einsum("se,s->e", probabilities, counted) * scale
    return num_experts**2 * jnp.mean(fraction * probability)


def joint_load_balancing_loss(
    chosen: jax.Array, probability: jax.Array, tokens: jax.Array
) -> jax.Array:
    """The auxiliary loss of transformers' MoE models (`load_balancing_loss_func` of Mixtral's),
    which takes the tokens of all layers together before it multiplies.

    loss = E * sum over experts e of f_e * p_e, with f_e the choices of e and p_e its router
    probabilities, both of all layers, per token and layer. With perfect balance it is K. Experts of
    one number are one expert to it: opposite imbalances of two layers cancel.

    Args:
      chosen: float32 `[E]`, choices of each expert before any drop, summed over layers.
      probability: float32 `[E]`, router probabilities, summed over tokens and layers.
      tokens: float32 scalar, tokens of all layers. Without any the loss is 0.
    """
    scale = 1.0 / jnp.maximum(tokens, 1.0)
    return chosen.size * jnp.sum((chosen * scale) * (probability * scale))


def importance_loss(logits: jax.Array, *, counted: jax.Array) -> jax.Array:
    """The importance loss of V-MoE (arXiv 2106.05974, appendix A; from Shazeer et al., arXiv
    1701.06538): the squared coefficient of variation, over experts, of the router probabilities
    summed over tokens. 0 where all experts matter alike.

    Args:
      logits: float32 `[S, E]`, without noise.
      counted: float32 `[S]`, 1 for tokens that count and 0 for those that do not. A group without
        any gives 0.
    """
    return _squared_variation(jnp.einsum("se,s->e", jax.nn.softmax(logits, axis=-1), counted))


def load_loss(
    logits: jax.Array,
    noisy_logits: jax.Array,
    *,
    selected: int,
    noise_std: float,
    counted: jax.Array,
) -> jax.Array:
    """The load loss of V-MoE (arXiv 2106.05974, appendix A): the squared coefficient of variation,
    over experts, of the probability that a token chooses an expert, were its noise drawn anew,
    summed over tokens.

    An expert is chosen where its noisy logit reaches the token's K-th largest noisy logit t: that
    has the probability Phi((logit - t) / noise_std).

    Args:
      logits: float32 `[S, E]`, without noise.
      noisy_logits: float32 `[S, E]`, with the noise that the tokens chose under.
      selected: K.
      noise_std: standard deviation of the noise.
      counted: float32 `[S]`, 1 for tokens that count and 0 for those that do not. A group without
        any gives 0.
    """
    threshold = jax.lax.top_k(noisy_logits, selected)[0][:, -1:]  # [S, 1]
    probability = jax.scipy.stats.norm.cdf((logits - threshold) / noise_std)  # [S, E]
    return _squared_variation(jnp.einsum("se,s->e", probability, counted))


def _squared_variation(values: jax.Array) -> jax.Array:
    """(standard deviation / mean)^2 of float32 `[E]`; 0 where all are 0."""
    mean = jnp.mean(values)
    return jnp.where(mean > 0, jnp.var(values) / jnp.square(jnp.where(mean > 0, mean, 1.0)), 0.0)


def router_z_loss(logits: jax.Array, *, counted: jax.Array, count: jax.Array) -> jax.Array:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, equation 5): keeps router logits small.

    Args:
      logits: float32 `[S, E]`.
      counted: float32 `[S]`, 1 for tokens that count and 0 for those that do not.
      count: float32 scalar, the number of tokens that the mean runs over. A group without any gives
        0.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(jnp.square(log_z) * counted) / jnp.maximum(count, 1.0)
