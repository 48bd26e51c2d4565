"""Losses of language models and of image classifiers."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TokenLosses:
    """Float32 `[batch, length]` each.

    Attributes:
      cross_entropy: in nats, against smoothed targets where smoothing is on; its minimum is 0.
      z_loss: z_loss factor * log(Z)^2.
      correct: 1 where the most probable token is the target.
    """

    cross_entropy: jax.Array
    z_loss: jax.Array
    correct: jax.Array


def token_losses(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> TokenLosses:
    """Cross entropy with label smoothing and z-loss, per token, as T5X computes them.

    Args:
      logits: float32 `[batch, length, vocab]`.
      targets: int32 `[batch, length]`.
      label_smoothing: probability mass that targets give, in equal parts, to all other tokens. The
        entropy of that target distribution is subtracted, so that a perfect prediction has loss 0.
      z_loss: factor of log(Z)^2, which keeps logits from drifting.
    """
    vocab_size = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    if label_smoothing:
        confidence, rest = 1.0 - label_smoothing, label_smoothing / (vocab_size - 1)
        expected = (confidence - rest) * target_logits + rest * jnp.sum(logits, axis=-1)
        entropy = -(
            confidence * jnp.log(confidence) + (vocab_size - 1) * rest * jnp.log(rest + 1e-20)
        )
        cross_entropy = log_z - expected - entropy
    else:
        cross_entropy = log_z - target_logits
    correct = (_most_probable(logits) == targets).astype(jnp.float32)
    return TokenLosses(
        cross_entropy=cross_entropy, z_loss=z_loss * jnp.square(log_z), correct=correct
    )


def sigmoid_losses(logits: jax.Array, labels: jax.Array) -> TokenLosses:
    """Binary cross entropy of every class, summed over classes (Ridnik et al., arXiv 2104.10972;
    V-MoE, arXiv 2106.05974), of images that have one class or several.

    Args:
      logits: float32 `[batch, classes]`.
      labels: int32 `[batch]`, or `[batch, L]`, distinct ones first and -1 after them.

    Returns:
      Float32 `[batch]` each; without a z-loss. `correct` is precision at 1: the most probable class
      is among the labels.
    """
    if labels.ndim == 2:
        given = labels >= 0
        found = jnp.take_along_axis(logits, jnp.maximum(labels, 0), axis=-1)  # [batch, L]
        own = jnp.sum(jnp.where(given, found, 0.0), axis=-1)
        best = _most_probable(logits)
        correct = jnp.any(given & (labels == best[:, None]), axis=-1).astype(jnp.float32)
        cross_entropy = jnp.sum(jax.nn.softplus(logits), axis=-1) - own
        return TokenLosses(cross_entropy, jnp.zeros_like(own), correct)
    # -log(1 - sigmoid(x)) = softplus(x); for the one class -log sigmoid(x) = softplus(x) - x.
    own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum(jax.nn.softplus(logits), axis=-1) - own
    correct = (_most_probable(logits) == labels).astype(jnp.float32)
    return TokenLosses(cross_entropy, jnp.zeros_like(own), correct)


def _most_probable(logits: jax.Array) -> jax.Array:
    """Index of the largest of the last axis, the first one where several are; its size where one is
    NaN. XLA for CPUs reduces argmax's pairs of value and index one by one; two plain reductions, of
    which the loss has the first, are faster (docs/benchmarks.md).
    """
    size = logits.shape[-1]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == largest, index, size), axis=-1)
