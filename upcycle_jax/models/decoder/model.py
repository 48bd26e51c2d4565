"""A decoder-only language model as `models.base` has it: its batches, losses, decoding, and the
steps of its forward pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import checks
from upcycle_jax.features import DecoderOnlyFeatures
from upcycle_jax.models import losses, shared
from upcycle_jax.models.base import Stack
from upcycle_jax.models.decoder import decoding, layerwise
from upcycle_jax.models.decoder.config import STACK, DecoderConfig
from upcycle_jax.models.decoder.network import LanguageModel
from upcycle_jax.models.generation import Decoded, DecodingAlgorithm, DecodingCache, EndIds
from upcycle_jax.models.layerwise import Step
from upcycle_jax.models.stacked import StackedModel
from upcycle_jax.types import Array, Batch, PyTree


class DecoderModel(StackedModel[DecoderConfig]):
    """A decoder-only language model and its loss.

    Attributes:
      config: shape and numerics.
      module: the linen network, a `LanguageModel`.
      features: what its batches hold.
      label_smoothing: see `losses.token_losses`.
      z_loss: factor of log(Z)^2 of the output logits.
      loss_normalizing_factor: what the summed token losses are divided by: a number,
        'NUM_REAL_TARGET_TOKENS' (the weights of the target tokens in the whole batch), or None for
        the plain sum.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        features: DecoderOnlyFeatures | None = None,
        label_smoothing: checks.BelowOne = 0.0,
        z_loss: checks.NotNegative = 0.0,
        loss_normalizing_factor: shared.LossNormalizer = "NUM_REAL_TARGET_TOKENS",
    ):
        super().__init__(config, loss_normalizing_factor)
        self.features = DecoderOnlyFeatures() if features is None else features
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "loss_normalizing_factor": self.loss_normalizing_factor,
        }

    @property
    def stacks(self) -> dict[str, Stack]:
        """The decoder."""
        config, sparse = self.config, self.config.sparse_layers
        moe = config.moe if sparse else None
        stack = Stack(
            name=STACK,
            num_layers=config.num_layers,
            sparse_layers=sparse,
            router=moe.router if moe is not None else None,
            causal=True,
            moe=moe,
            tokens="decoder_input_tokens",
        )
        return {STACK: stack}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids are below it."""
        return self.config.vocab_size

    def input_specs(
        self, batch_size: int, task_feature_lengths: Mapping[str, int], *, packed: bool = False
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """See `base.Model`; lengths are those of 'targets'."""
        return self.features.specs(batch_size, task_feature_lengths, packed=packed)

    def check_batch(self, batch: Batch) -> None:
        """Raises ValueError if the model cannot be run on such a batch: packed rows may not pass
        every router.
        """
        router = self.stacks[STACK].router
        reason = router.not_packable_because if router is not None else None
        if reason:
            raise ValueError(f"{type(router).__name__} cannot route packed rows: {reason}.")

    def token_logits(
        self,
        params: PyTree,
        tokens: Array,
        segment_ids: Array | None = None,
        positions: Array | None = None,
    ) -> jax.Array:
        """Float32 logits `[batch, length, vocab]` of the token after each of int32 `tokens`
        `[batch, length]`, in evaluation mode; see `network.LanguageModel`.
        """
        logits = self.module.apply({"params": params}, tokens, segment_ids, positions)
        assert isinstance(logits, jax.Array)
        return logits

    def predict_batch(
        self,
        params: PyTree,
        batch: Batch,
        *,
        decoder: DecodingAlgorithm,
        keys: jax.Array | None = None,
        eos_id: EndIds = 1,
        max_length: int | None = None,
    ) -> jax.Array:
        """The best continuation of each prompt, int32 `[batch, max_length]`: EOS is its last token,
        0 follows. A prompt is BOS and the tokens before the first that the loss counts, such as
        those of 'inputs'.

        MoE layers route as `DecoderMoeConfig.inference_routing` says: by default neither the rest
        of the batch nor padding changes what is predicted for a prompt.

        Args:
          params: parameters, nested.
          batch: model features, not packed.
          decoder: how sequences are searched, e.g. `inference.decoding.Greedy()`.
          keys: `[batch]` random keys for a decoder that draws.
          eos_id: the vocabulary's end of sequence, or all tokens that end one.
          max_length: tokens to produce at most: the length of 'targets'. The rest of a row is the
            room for inputs, of which the last tokens are read where there are more. None: as many
            as a row has positions.

        Raises:
          ValueError: max_length is more than a row has positions.
        """
        return self.predict_batch_with_aux(
            params, batch, decoder=decoder, keys=keys, eos_id=eos_id, max_length=max_length
        ).tokens[:, 0]

    def predict_batch_with_aux(
        self,
        params: PyTree,
        batch: Batch,
        *,
        decoder: DecodingAlgorithm,
        keys: jax.Array | None = None,
        eos_id: EndIds = 1,
        max_length: int | None = None,
    ) -> Decoded:
        """As `predict_batch`, with all sequences that the decoder returns, and their scores."""
        length = np.shape(batch["decoder_target_tokens"])[1]
        if max_length is not None and not 1 <= max_length <= length:
            raise ValueError(
                f"max_length must be from 1 to {length}, the length of the batch's rows, in which"
                f" inputs and targets have room, got {max_length}"
            )
        # BOS comes before the inputs.
        width = length + 1 - (max_length or 0)
        prompts = decoding.prompts(batch, self.features.bos_id, width)
        max_length = max_length or length
        logits, cache = decoding.start(self.config, params, *prompts, max_length)

        def next_logits(
            tokens: jax.Array, index: jax.Array, cache: DecodingCache
        ) -> tuple[jax.Array, DecodingCache]:
            return self.decode_step(params, tokens, index, cache)

        return decoder.decode(
            next_logits, logits, cache, max_length=max_length, eos_id=eos_id, keys=keys
        )

    def score_batch(self, params: PyTree, batch: Batch) -> jax.Array:
        """Float32 `[batch]`: the log-probability of each row's targets, summed over its tokens
        (weighted by `decoder_loss_weights`). Routes as `predict_batch` does.
        """
        return decoding.score(self.config, params, batch)

    def start_decoding(
        self,
        params: PyTree,
        inputs: jax.Array,
        *,
        max_length: int,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, DecodingCache]:
        """Reads prompts `[batch, prompt length]` in one pass, as they are: nothing is put before
        them.

        Args:
          params: parameters, nested.
          inputs: int32 token ids.
          max_length: tokens to produce at most, for which the caches have room.
          lengths: int32 `[batch]`, tokens of each row, at least 1, which stand first in it; None:
            all are tokens.

        Returns:
          Float32 logits `[batch, vocab]` of the first token, and the caches.
        """
        return decoding.start(self.config, params, inputs, lengths, max_length)

    def decode_step(
        self, params: PyTree, tokens: jax.Array, index: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Decodes one more position; see `generation.NextLogits`."""
        return decoding.step(self.config, params, tokens, index, cache)

    def layer_steps(self) -> Sequence[Step]:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.steps(self.config)

    def row_bytes(self, batch: Batch) -> int:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.row_bytes(self.config, batch)

    def _network(self, config: DecoderConfig) -> LanguageModel:
        return LanguageModel(config)

    def _shapes(self) -> tuple[jax.Array]:
        return (jnp.ones((1, 1), jnp.int32),)

    def _arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("input_tokens", "segment_ids", "positions")
        return tuple(batch[f"decoder_{name}"] for name in names), {}

    def _weights(self, batch: Batch) -> jax.Array:
        return jnp.asarray(batch["decoder_loss_weights"], jnp.float32)

    def _losses(self, logits: jax.Array, batch: Batch) -> losses.TokenLosses:
        targets = jnp.asarray(batch["decoder_target_tokens"])
        return losses.token_losses(
            logits, targets, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
