"""The model API: what training, evaluation, surgery and inference call.

Metrics, and what each is a mean over (`M` below stands for the weight `aux_scale`, so that
microbatches add up to the batch):

  loss: the optimised objective (M); in evaluation its value per target token.
  cross_ent_loss, z_loss, accuracy: per target token (weighted by `decoder_loss_weights`).
  target_tokens: the count of target tokens (M).
  experts/auxiliary_loss, experts/router_z_loss: with their factors, as they enter the loss (M).
  experts/fraction_tokens_left_behind, experts/expert_usage, experts/router_confidence: averaged
  over MoE layers (M), as T5X does. experts/<layer>/load: `[E]`, share of the processed tokens that
  each expert took. experts/<layer>/router_probability: `[E]`, mean router probability of each
  expert over tokens. experts/<layer>/entropy: of the router probabilities, in nats, per token.
  experts/<layer>/dropped: share of the placements asked for that were not granted: token choices
  beyond capacity under
    tokens choose, tokens without any expert under experts choose.
  experts/<layer>/dead: share of the experts that received no real token of the batch. Of train
  steps and evaluation batches. experts/<layer>/chosen: `[E]`, as load, but before any drop. Where a
  bias balances the router.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax import checks, trees
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.layers.attention import FIXED_CACHE, GROWING_CACHE, DecodingStep
from upcycle_jax.models import expert_metrics, losses
from upcycle_jax.models.base import Stack
from upcycle_jax.models.expert_metrics import scaled_mean
from upcycle_jax.models.generation import Decoded, DecodingAlgorithm, DecodingCache
from upcycle_jax.models.layerwise import Step
from upcycle_jax.models.metrics import Mean, Metrics
from upcycle_jax.models.t5 import layerwise
from upcycle_jax.models.t5.config import STACKS, T5Config
from upcycle_jax.models.t5.network import RESIDUALS, Transformer
from upcycle_jax.moe import roles
from upcycle_jax.moe.report import REPORTS, MoeReport
from upcycle_jax.types import Batch, PyTree

BOS_ID, EOS_ID = 0, 1
"""T5's first decoder input, which is padding's id, and the token that ends a sequence in its
vocabularies.
"""

NON_FINITE_LOGITS = "non_finite_router_logits/"
"""Before a layer ('encoder/layers_1'): the metric of `loss_fn` that counts router logits that are
NaN or infinite, for train steps.
"""

LossNormalizer = float | Literal["NUM_REAL_TARGET_TOKENS"] | None


class EncoderDecoderModel:
    """A T5 1.1 encoder-decoder and its loss.

    Attributes:
      config: shape and numerics.
      module: the linen module, a `Transformer`.
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
        loss_normalizing_factor: LossNormalizer = None,
    ):
        if (
            isinstance(loss_normalizing_factor, str)
            and loss_normalizing_factor != "NUM_REAL_TARGET_TOKENS"
        ):
            raise ValueError(
                "loss_normalizing_factor must be None, a number or 'NUM_REAL_TARGET_TOKENS', got"
                f" {loss_normalizing_factor!r}"
            )
        self.config = config
        self.module = Transformer(config)
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.loss_normalizing_factor = loss_normalizing_factor

    def param_specs(self) -> dict[str, trees.LeafSpec]:
        """Shape, dtype, logical axes, role and dense twin of every parameter, by path without
        `target/`. Allocates nothing.
        """
        boxed = jax.eval_shape(self._init_boxed, jax.random.key(0))
        specs = {}
        for path, leaf in trees.flatten(boxed).items():
            value, names = (
                (leaf.value, leaf.names)
                if isinstance(leaf, nn.LogicallyPartitioned)
                else (leaf, ())
            )
            specs[path] = trees.LeafSpec(value.shape, value.dtype, names)
        layers = (layer for stack in self.stacks.values() for layer in stack.moe_layers)
        return roles.marked(specs, (f"{layer}/mlp" for layer in layers))

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

    @property
    def balance_rates(self) -> dict[str, float]:
        """How far the selection bias of each MoE layer that has one moves after a step, by layer
        ('encoder/layers_1').
        """
        return {
            layer: stack.balance_rate
            for stack in self.stacks.values()
            for layer in stack.moe_layers
            if stack.balance_rate is not None
        }

    def init_params(self, rng: jax.Array) -> PyTree:
        """Fresh parameters as nested dicts; a pure function that may be jitted with output
        shardings.
        """
        return nn.meta.unbox(self._init_boxed(rng))

    def _init_boxed(self, rng: jax.Array) -> PyTree:
        tokens = jnp.ones((1, 1), jnp.int32)
        return self.module.init({"params": rng}, tokens, tokens, tokens)["params"]

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

    def loss_denominator(self, batch: Batch) -> jax.Array:
        """What token losses are divided by: a float32 scalar.

        Computed over the whole batch, before it is split into microbatches, so that splitting does
        not change the loss.
        """
        if self.loss_normalizing_factor is None:
            return jnp.float32(1.0)
        if self.loss_normalizing_factor == "NUM_REAL_TARGET_TOKENS":
            return jnp.maximum(jnp.sum(_loss_weights(batch)), 1.0)
        return jnp.float32(self.loss_normalizing_factor)

    def loss_fn(
        self,
        params: PyTree,
        batch: Batch,
        dropout_rng: jax.Array | None,
        *,
        denominator: jax.Array,
        aux_scale: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, Metrics]:
        """Training loss of a batch or of one microbatch of it: (cross entropy + z-loss) /
        denominator + aux_scale * auxiliary losses.

        The auxiliary losses are aux_loss_factor * the load-balancing loss and
        router_z_loss_factor * the router z-loss, each averaged over all MoE layers of both stacks;
        experts-choose layers report a load-balancing loss of 0 and are part of that mean, as in
        T5X.

        Args:
          params: parameters, nested.
          batch: model features.
          dropout_rng: key of dropout and router jitter; None for neither.
          denominator: `loss_denominator` of the whole batch.
          aux_scale: the microbatch's share of the batch (1 / number of microbatches), so that
            losses of microbatches add up.
        """
        logits, reports = self._forward(params, batch, train=True, dropout_rng=dropout_rng)
        tokens, weights = self._token_losses(logits, batch), _loss_weights(batch)
        token_loss = jnp.sum((tokens.cross_entropy + tokens.z_loss) * weights) / denominator
        auxiliary = self._auxiliary_losses(reports)
        loss = token_loss + aux_scale * sum(auxiliary.values())
        metrics = _token_metrics(tokens, weights, aux_scale)
        metrics["loss"] = scaled_mean(loss / aux_scale, aux_scale)
        metrics |= {name: scaled_mean(value, aux_scale) for name, value in auxiliary.items()}
        metrics |= {
            f"{NON_FINITE_LOGITS}{layer}": Mean(report.non_finite, jnp.float32(aux_scale))
            for layer, report in reports.items()
        }
        return loss, metrics | expert_metrics.of_reports(self.stacks, reports, aux_scale)

    def eval_fn(self, params: PyTree, batch: Batch) -> Metrics:
        """Metrics of a batch without dropout, with evaluation capacity. `loss` is per target token,
        auxiliary losses included.
        """
        logits, reports = self._forward(params, batch, train=False)
        tokens, weights = self._token_losses(logits, batch), _loss_weights(batch)
        num_tokens = jnp.sum(weights)
        auxiliary = self._auxiliary_losses(reports)
        metrics = _token_metrics(tokens, weights, 1.0)
        summed = jnp.sum((tokens.cross_entropy + tokens.z_loss) * weights)
        metrics["loss"] = Mean(
            total=summed + sum(auxiliary.values()) * num_tokens, weight=num_tokens
        )
        metrics |= {name: scaled_mean(value, 1.0) for name, value in auxiliary.items()}
        metrics |= expert_metrics.of_reports(self.stacks, reports, 1.0)
        return metrics | expert_metrics.dead_experts(metrics)

    def logits(
        self,
        params: PyTree,
        batch: Batch,
        *,
        train: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits `[batch, target length, vocab]` with teacher forcing."""
        return self._forward(params, batch, train=train, dropout_rng=dropout_rng)[0]

    def predict_batch(
        self,
        params: PyTree,
        batch: Batch,
        *,
        decoder: DecodingAlgorithm,
        keys: jax.Array | None = None,
        eos_id: int = EOS_ID,
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
          eos_id: the vocabulary's end of sequence.
        """
        return self.predict_batch_with_aux(
            params, batch, decoder=decoder, keys=keys, eos_id=eos_id
        ).tokens[:, 0]

    def predict_batch_with_aux(
        self,
        params: PyTree,
        batch: Batch,
        *,
        decoder: DecodingAlgorithm,
        keys: jax.Array | None = None,
        eos_id: int = EOS_ID,
    ) -> Decoded:
        """As `predict_batch`, with all sequences that the decoder returns, and their scores."""
        max_length = batch["decoder_input_tokens"].shape[1]
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
        logits: Any = self._inference_module.apply(
            {"params": params},
            *(
                jnp.asarray(batch[name])
                for name in (
                    "encoder_input_tokens",
                    "decoder_input_tokens",
                    "decoder_target_tokens",
                )
            ),
        )
        targets = jnp.asarray(batch["decoder_target_tokens"])
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum((chosen - jax.nn.logsumexp(logits, axis=-1)) * _loss_weights(batch), axis=-1)

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
        encoded = jnp.zeros(
            (*cache.encoder_valid.shape, self.config.emb_dim), self.config.activation_dtype
        )
        variables = {"params": params, GROWING_CACHE: cache.growing, FIXED_CACHE: cache.fixed}
        return self._step(
            variables, encoded, cache.encoder_valid, tokens, DecodingStep(index, key.shape[1])
        )

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
        return logits, DecodingCache(
            growing=caches[GROWING_CACHE], fixed=caches[FIXED_CACHE], encoder_valid=encoder_valid
        )

    @property
    def _inference_module(self) -> Transformer:
        return Transformer(self.config.for_inference)

    def layer_outputs(self, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The residual stream `[batch, length, d]` after every layer, 'encoder/layers_0' first, in
        evaluation mode.
        """
        _, variables = self._apply(
            params, batch, train=False, dropout_rng=None, mutable=[RESIDUALS]
        )
        outputs = variables[RESIDUALS]
        return {
            f"{stack}/layers_{i}": outputs[stack][f"layers_{i}"]["output"]
            for stack in STACKS
            for i in range(self.config.num_layers(stack))
        }

    def check_batch(self, batch: Batch) -> None:
        """Raises ValueError if the model cannot be run on such a batch: packed rows may not pass
        every router.
        """
        for stack in STACKS:
            if (
                f"{stack}_segment_ids" in batch
                and self.config.moe is not None
                and self.config.sparse_layers(stack)
            ):
                router = self.config.moe.router(stack)
                if reason := router.not_packable_because:
                    raise ValueError(f"{type(router).__name__} cannot route packed rows: {reason}.")

    def layer_steps(self) -> Sequence[Step]:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.steps(self.config)

    def row_bytes(self, batch: Batch) -> int:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.row_bytes(self.config, batch)

    def _apply(
        self,
        params: PyTree,
        batch: Batch,
        *,
        train: bool,
        dropout_rng: jax.Array | None,
        mutable: list[str],
    ) -> tuple[Any, Any]:
        module, rngs = self.module, None
        self.check_batch(batch)
        if train and dropout_rng is not None:
            dropout_key, jitter_key = jax.random.split(dropout_rng)
            rngs = {"dropout": dropout_key, "jitter": jitter_key}
        elif train:
            module = Transformer(self.config.without_dropout)
        return module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            train=train,
            rngs=rngs,
            mutable=mutable,
        )

    def _forward(
        self, params: PyTree, batch: Batch, *, train: bool, dropout_rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, MoeReport]]:
        """Logits, and the report of every MoE layer by layer ('encoder/layers_1'), in order."""
        logits, variables = self._apply(
            params, batch, train=train, dropout_rng=dropout_rng, mutable=[REPORTS]
        )
        reports = {
            f"{stack}/layers_{i}": variables[REPORTS][stack][f"layers_{i}"]["mlp"]["report"]
            for stack in STACKS
            for i in self.config.sparse_layers(stack)
        }
        return logits, reports

    def _token_losses(self, logits: jax.Array, batch: Batch) -> losses.TokenLosses:
        targets = jnp.asarray(batch["decoder_target_tokens"])
        return losses.token_losses(
            logits, targets, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )

    def _auxiliary_losses(self, reports: Mapping[str, MoeReport]) -> dict[str, jax.Array]:
        if not reports:
            return {}
        moe = self.config.moe
        assert moe is not None
        return {
            "experts/auxiliary_loss": (
                moe.aux_loss_factor
                * expert_metrics.layer_mean(r.auxiliary_loss for r in reports.values())
            ),
            "experts/router_z_loss": (
                moe.router_z_loss_factor
                * expert_metrics.layer_mean(r.router_z_loss for r in reports.values())
            ),
        }


def _loss_weights(batch: Batch) -> jax.Array:
    """Float32 `[batch, length]`; without the feature, every real target token counts 1."""
    weights = batch.get("decoder_loss_weights")
    return jnp.asarray(
        batch["decoder_target_tokens"] > 0 if weights is None else weights, jnp.float32
    )


def _token_metrics(
    tokens: losses.TokenLosses, weights: jax.Array, aux_scale: jax.Array | float
) -> Metrics:
    num_tokens = jnp.sum(weights)
    return {
        "cross_ent_loss": Mean(total=jnp.sum(tokens.cross_entropy * weights), weight=num_tokens),
        "z_loss": Mean(total=jnp.sum(tokens.z_loss * weights), weight=num_tokens),
        "accuracy": Mean(total=jnp.sum(tokens.correct * weights), weight=num_tokens),
        "target_tokens": Mean(total=num_tokens, weight=jnp.float32(aux_scale)),
    }
