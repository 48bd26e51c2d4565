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
