"""A T5 1.1 encoder-decoder as `models.base` has it: its batches, losses, decoding, and the steps of
its forward pass.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from upcycle_jax import checks
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.layers.attention import FIXED_CACHE, GROWING_CACHE, DecodingStep
from upcycle_jax.models import losses, scoring, shared
from upcycle_jax.models.base import Stack
from upcycle_jax.models.generation import Decoded, DecodingAlgorithm, DecodingCache, EndIds
from upcycle_jax.models.layerwise import Step
from upcycle_jax.models.stacked import StackedModel
from upcycle_jax.models.t5 import layerwise
from upcycle_jax.models.t5.config import STACKS, T5Config
from upcycle_jax.models.t5.network import Transformer
from upcycle_jax.types import Batch, PyTree

BOS_ID, EOS_ID = 0, 1
"""T5's first decoder input, which is padding's id, and the token that ends a sequence in its
vocabularies.
"""


class EncoderDecoderModel(StackedModel[T5Config]):
    """A T5 1.1 encoder-decoder and its loss.

    Attributes:
      config: shape and numerics.
      module: the linen network, a `Transformer`.
      features: what its batches hold.
      label_smoothing: see `losses.token_losses`.
      z_loss: factor of log(Z)^2 of the output logits.
      loss_normalizing_factor: what the summed token losses are divided by: a number,
        'NUM_REAL_TARGET_TOKENS' (the weights of the target tokens in the whole batch), or None for
        the plain sum, T5X's setting for dense T5 1.1.
    """

    features = EncoderDecoderFeatures()

    def __init__(
        self,
        config: T5Config,
        *,
        label_smoothing: checks.BelowOne = 0.0,
        z_loss: checks.NotNegative = 1e-4,
        loss_normalizing_factor: shared.LossNormalizer = None,
    ):
        super().__init__(config, loss_normalizing_factor)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "loss_normalizing_factor": self.loss_normalizing_factor,
        }

    @property
    def stacks(self) -> dict[str, Stack]:
        """The encoder and the decoder."""
        config, moe = self.config, self.config.moe
        return {
            name: Stack(
                name=name,
                num_layers=config.num_layers(name),
                sparse_layers=config.sparse_layers(name),
                router=moe.router(name) if moe and config.sparse_layers(name) else None,
                causal=name == "decoder",
                moe=moe if config.sparse_layers(name) else None,
                tokens=f"{name}_input_tokens",
            )
            for name in STACKS
        }

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids are below it."""
        return self.config.vocab_size

    def input_specs(
        self, batch_size: int, task_feature_lengths: Mapping[str, int], *, packed: bool = False
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch.

        Args:
          batch_size: rows.
          task_feature_lengths: lengths of 'inputs' and 'targets'.
          packed: several examples per row, with segment ids and positions.
        """
        return self.features.specs(batch_size, task_feature_lengths, packed=packed)

    def predict_batch(
        self,
        params: PyTree,
        batch: Batch,
        *,
        decoder: DecodingAlgorithm,
        keys: jax.Array | None = None,
        eos_id: EndIds = EOS_ID,
        max_length: int | None = None,
    ) -> jax.Array:
        """The best sequence of each input, int32 `[batch, target length]`: EOS is its last token, 0
        follows.

        Uses `encoder_input_tokens`, and of `decoder_input_tokens` the length. MoE layers route as
        `MoeConfig.inference_routing` says: by default neither the rest of the batch nor padding
        changes what is predicted for an input.

        Args:
          params: parameters, nested.
          batch: model features, not packed.
          decoder: how sequences are searched, e.g. `inference.decoding.Greedy()`.
          keys: `[batch]` random keys for a decoder that draws.
          eos_id: the vocabulary's end of sequence, or all tokens that end one.
          max_length: tokens to predict at most; None for the length of targets.
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
        eos_id: EndIds = EOS_ID,
        max_length: int | None = None,
    ) -> Decoded:
        """As `predict_batch`, with all sequences that the decoder returns, and their scores."""
        max_length = max_length or batch["decoder_input_tokens"].shape[1]
        logits, cache = self.start_decoding(
            params, jnp.asarray(batch["encoder_input_tokens"]), max_length=max_length
        )

        def next_logits(
            tokens: jax.Array, index: jax.Array, cache: DecodingCache
        ) -> tuple[jax.Array, DecodingCache]:
            return self.decode_step(params, tokens, index, cache)

        return decoder.decode(
            next_logits, logits, cache, max_length=max_length, eos_id=eos_id, keys=keys
        )

    def score_batch(self, params: PyTree, batch: Batch) -> jax.Array:
        """Float32 `[batch]`: the log-probability of each target, summed over its tokens (weighted
        by `decoder_loss_weights`).

        Routes as `predict_batch` does.
        """
        module, variables = self._inference_module, {"params": params}
        given: Any = module.apply(
            variables,
            *(
                jnp.asarray(batch[name])
                for name in (
                    "encoder_input_tokens",
                    "decoder_input_tokens",
                    "decoder_target_tokens",
                )
            ),
            method="stream",
        )
        return scoring.summed_log_probabilities(
            functools.partial(module.apply, variables, method="finish"),
            given,
            jnp.asarray(batch["decoder_target_tokens"]),
            self._weights(batch),
            vocab_size=self.config.vocab_size,
        )

    def start_decoding(
        self, params: PyTree, inputs: jax.Array, *, max_length: int
    ) -> tuple[jax.Array, DecodingCache]:
        """Encodes inputs `[batch, input length]` and decodes the first position.

        Args:
          params: parameters, nested.
          inputs: int32, 0 for padding.
          max_length: positions that the caches hold.

        Returns:
          Float32 logits `[batch, vocab]` of the first token, and the caches.
        """
        encoded: Any = self._inference_module.apply({"params": params}, inputs, method="encode")
        return self._step(
            {"params": params},
            encoded,
            inputs > 0,
            jnp.full(inputs.shape[0], BOS_ID, jnp.int32),
            DecodingStep(jnp.int32(0), max_length),
        )

    def decode_step(
        self, params: PyTree, tokens: jax.Array, index: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Decodes one more position; see `generation.NextLogits`."""
        key = jax.tree.leaves(cache.growing)[0]
        # Its values are in the cache already; the layers ask for the shape alone.
        attention, valid = cache.fixed["attention"], cache.fixed["valid"]
        encoded = jnp.zeros((*valid.shape, self.config.emb_dim), self.config.activation_dtype)
        variables = {"params": params, GROWING_CACHE: cache.growing, FIXED_CACHE: attention}
        return self._step(variables, encoded, valid, tokens, DecodingStep(index, key.shape[1]))

    def _step(
        self,
        variables: Mapping[str, PyTree],
        encoded: jax.Array,
        encoder_valid: jax.Array,
        tokens: jax.Array,
        step: DecodingStep,
    ) -> tuple[jax.Array, DecodingCache]:
        logits, caches = self._inference_module.apply(
            variables,
            encoded,
            encoder_valid,
            tokens,
            step,
            method="decode_step",
            mutable=[GROWING_CACHE, FIXED_CACHE],
        )
        fixed = {"attention": caches[FIXED_CACHE], "valid": encoder_valid}
        return logits, DecodingCache(growing=caches[GROWING_CACHE], fixed=fixed)

    @property
    def _inference_module(self) -> Transformer:
        return Transformer(self.config.for_inference)

    def check_batch(self, batch: Batch) -> None:
        """Raises ValueError if the model cannot be run on such a batch: packed rows may not pass
        every router.
        """
        for name, stack in self.stacks.items():
            router = stack.router
            reason = router.not_packable_because if router is not None else None
            if reason and f"{name}_segment_ids" in batch:
                raise ValueError(f"{type(router).__name__} cannot route packed rows: {reason}.")

    def layer_steps(self) -> Sequence[Step]:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.steps(self.config)

    def row_bytes(self, batch: Batch) -> int:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.row_bytes(self.config, batch)

    def _network(self, config: T5Config) -> Transformer:
        return Transformer(config)

    def _shapes(self) -> tuple[jax.Array, ...]:
        return (jnp.ones((1, 1), jnp.int32),) * 3

    def _arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
        segments = ("encoder_segment_ids", "decoder_segment_ids")
        return tuple(batch[name] for name in names), {name: batch.get(name) for name in segments}

    def _weights(self, batch: Batch) -> jax.Array:
        return shared.loss_weights(
            batch["decoder_target_tokens"], batch.get("decoder_loss_weights")
        )

    def _losses(self, logits: jax.Array, batch: Batch) -> losses.TokenLosses:
        targets = jnp.asarray(batch["decoder_target_tokens"])
        return losses.token_losses(
            logits, targets, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
