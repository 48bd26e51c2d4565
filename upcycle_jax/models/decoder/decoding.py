"""Cached decoding and scoring with a decoder-only language model.

The sequences of a batch end side by side: prompts of different lengths have padding before them,
and one index is the next position of all. What a sequence computes depends neither on that padding
nor on its neighbours.

Axis legend: B rows, S positions of the prompts, V vocabulary.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax.layers.attention import GROWING_CACHE
from upcycle_jax.layers.causal_attention import CachedStep, NextPosition, Prefill
from upcycle_jax.models import scoring
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.models.decoder.network import LanguageModel
from upcycle_jax.models.generation import DecodingCache
from upcycle_jax.types import Batch, PyTree


@flax.struct.dataclass
class Prompts:
    """Where the sequences of a cache begin and end.

    Attributes:
      starts: int32 `[B]`, index of each prompt's first token.
      width: S, which is the index of the first token that is produced.
      room: positions of a row.
    """

    starts: jax.Array
    width: int = flax.struct.field(pytree_node=False)
    room: int = flax.struct.field(pytree_node=False)


def prompts(batch: Batch, bos_id: int, width: int) -> tuple[jax.Array, jax.Array]:
    """The prompt of each row: BOS and the tokens before the first that the loss counts.

    Args:
      batch: features of `DecoderOnlyFeatures`, not packed.
      bos_id: what stands first.
      width: S; of longer prompts the last tokens.

    Returns:
      Int32 `[B, S]`, prompts from the first column on, and int32 `[B]`, their lengths, at least 1.
    """
    tokens = jnp.asarray(batch["decoder_target_tokens"])
    real = jnp.asarray(batch["decoder_segment_ids"]) > 0
    learnt = jnp.asarray(batch["decoder_loss_weights"]) > 0
    given = jnp.sum(real & (jnp.cumsum(learnt, axis=1) == 0), axis=1)  # tokens without BOS
    tokens = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=bos_id)
    lengths = jnp.minimum(given + 1, width).astype(jnp.int32)
    columns = (given + 1 - lengths)[:, None] + jnp.arange(width)
    columns = jnp.minimum(columns, tokens.shape[1] - 1)
    return jnp.take_along_axis(tokens, columns, axis=1), lengths


def start(
    config: DecoderConfig,
    params: PyTree,
    inputs: jax.Array,
    lengths: jax.Array | None,
    max_length: int,
) -> tuple[jax.Array, DecodingCache]:
    """Reads all prompts in one pass.

    Args:
      config: of the model.
      params: parameters, nested.
      inputs: int32 `[B, S]`.
      lengths: int32 `[B]`, tokens of each row, which stand first; None: all.
      max_length: tokens that can be produced.

    Returns:
      Float32 logits `[B, V]` of the first token, and the cache.
    """
    rows, width = inputs.shape
    starts = jnp.zeros(rows, jnp.int32)
    if lengths is not None:
        starts = (width - jnp.asarray(lengths)).astype(jnp.int32)
        # To the ends of their rows.
        columns = jnp.maximum(jnp.arange(width) - starts[:, None], 0)
        inputs = jnp.take_along_axis(inputs, columns, axis=1)
    # The last token that is produced is not read.
    room = width + max_length - 1
    made = Prompts(starts, width, room)
    return _apply(config, {"params": params}, "prefill", made, inputs, starts, Prefill(room))


def step(
    config: DecoderConfig,
    params: PyTree,
    tokens: jax.Array,
    index: jax.Array,
    cache: DecodingCache,
) -> tuple[jax.Array, DecodingCache]:
    """Decodes one more position; see `generation.NextLogits`."""
    made: Prompts = cache.fixed
    place = NextPosition(made.width + index - 1, made.starts, made.room)
    variables = {"params": params, GROWING_CACHE: cache.growing}
    return _apply(config, variables, "decode_step", made, tokens, place)


def _apply(
    config: DecoderConfig,
    variables: PyTree,
    method: str,
    made: Prompts,
    *arguments: jax.Array | CachedStep,
) -> tuple[jax.Array, DecodingCache]:
    module = LanguageModel(config.for_inference)
    logits, caches = module.apply(variables, *arguments, method=method, mutable=[GROWING_CACHE])
    assert isinstance(logits, jax.Array)
    return logits, DecodingCache(growing=caches[GROWING_CACHE], fixed=made)


def score(config: DecoderConfig, params: PyTree, batch: Batch) -> jax.Array:
    """Float32 `[B]`: see `base.Generative.score_batch`."""
    names = ("decoder_input_tokens", "decoder_segment_ids", "decoder_positions")
    inputs = (jnp.asarray(batch[name]) for name in names)
    module, variables = LanguageModel(config.for_inference), {"params": params}
    stream: Any = module.apply(variables, *inputs, method="stream")
    return scoring.summed_log_probabilities(
        functools.partial(module.apply, variables, method="finish"),
        (stream,),
        jnp.asarray(batch["decoder_target_tokens"]),
        jnp.asarray(batch["decoder_loss_weights"], jnp.float32),
        vocab_size=config.vocab_size,
    )
