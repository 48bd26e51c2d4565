"""A vision transformer as `models.base` has it: parameters, loss, metrics, logits."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import checks
from upcycle_jax.features.images import ImageFeatures
from upcycle_jax.layers import mlp_reference
from upcycle_jax.models import losses, shared
from upcycle_jax.models.base import Stack
from upcycle_jax.models.layerwise import Step
from upcycle_jax.models.metrics import Metrics
from upcycle_jax.models.vit import layerwise
from upcycle_jax.models.vit.config import STACK, VitConfig
from upcycle_jax.models.vit.network import RESIDUALS, VisionTransformer
from upcycle_jax.moe.layer_stats import LAYER_STATS, LayerStats
from upcycle_jax.trees import LeafSpec
from upcycle_jax.types import Batch, PyTree

Loss = Literal["softmax", "sigmoid"]


class VitModel:
    """A vision transformer and its loss.

    Attributes:
      config: shape and numerics.
      module: the linen module, a `VisionTransformer`.
      features: what its batches hold.
      loss: 'softmax' cross entropy of the one class of an image, or 'sigmoid' cross entropy summed
        over all classes, of which it has one (JFT-300M's images have several; see
        `losses.sigmoid_losses`).
      label_smoothing: see `losses.token_losses`; of the softmax loss.
      loss_normalizing_factor: what the summed losses are divided by: a number,
        'NUM_REAL_TARGET_TOKENS' (the images of the whole batch), or None for the plain sum.
    """

    def __init__(
        self,
        config: VitConfig,
        *,
        loss: Loss = "softmax",
        label_smoothing: checks.BelowOne = 0.0,
        loss_normalizing_factor: shared.LossNormalizer = "NUM_REAL_TARGET_TOKENS",
    ):
        shared.check_normalizer(loss_normalizing_factor)
        self.config = config
        self.module = VisionTransformer(config)
        self.features = ImageFeatures(config.image_size, config.channels, config.num_classes)
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.loss_normalizing_factor = loss_normalizing_factor

    @property
    def _identity(self) -> tuple[Any, ...]:
        """What decides its programs: models of equal settings share what is traced once."""
        return self.config, self.loss, self.label_smoothing, self.loss_normalizing_factor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VitModel) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def param_specs(self) -> dict[str, LeafSpec]:
        """See `base.Model`."""
        return dict(_param_specs(self.config))

    @property
    def stacks(self) -> dict[str, Stack]:
        """The encoder."""
        config, sparse = self.config, self.config.sparse_layers
        moe = config.moe if sparse else None
        stack = Stack(
            name=STACK,
            num_layers=config.num_layers,
            sparse_layers=sparse,
            router=moe.router if moe is not None else None,
            causal=False,
            moe=moe,
            tokens="images",
            positions=config.num_tokens,
        )
        return {STACK: stack}

    @property
    def vocab_size(self) -> None:
        """Images are no tokens."""
        return None

    @property
    def dense(self) -> "VitModel":
        """The dense model that this one is upcycled from, with the same loss."""
        return self._of(self.config.dense)

    def _of(self, config: VitConfig) -> "VitModel":
        """A model with these settings and the loss of this one."""
        return VitModel(
            config,
            loss=self.loss,
            label_smoothing=self.label_smoothing,
            loss_normalizing_factor=self.loss_normalizing_factor,
        )

    def init_params(self, rng: jax.Array) -> PyTree:
        """See `base.Model`."""
        return nn.meta.unbox(self._init_boxed(rng))

    def _init_boxed(self, rng: jax.Array) -> PyTree:
        size, channels = self.config.image_size, self.config.channels
        images = jnp.zeros((1, size, size, channels), jnp.float32)
        return self.module.init({"params": rng}, images)["params"]

    def input_specs(
        self, batch_size: int, task_feature_lengths: Mapping[str, int], *, packed: bool = False
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """See `base.Model`; the length of 'image' is its side."""
        return self.features.specs(batch_size, task_feature_lengths, packed=packed)

    def check_batch(self, batch: Batch) -> None:
        """Raises ValueError if images have another size than the model."""
        self.features.check_size(np.shape(batch["images"])[1])

    def loss_denominator(self, batch: Batch) -> jax.Array:
        """See `base.Model`."""
        return shared.loss_denominator(self.loss_normalizing_factor, _weights(batch))

    def loss_fn(
        self,
        params: PyTree,
        batch: Batch,
        dropout_rng: jax.Array | None,
        *,
        denominator: jax.Array,
        aux_scale: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, Metrics]:
        """See `base.Model` and `shared.training_loss`."""
        logits, reports = self._forward(params, batch, train=True, dropout_rng=dropout_rng)
        return shared.training_loss(
            self.stacks,
            self._losses(logits, batch),
            _weights(batch),
            reports,
            denominator=denominator,
            aux_scale=aux_scale,
        )

    def eval_fn(self, params: PyTree, batch: Batch) -> Metrics:
        """Metrics of a batch without dropout, with evaluation capacity: `accuracy` is the paper's
        precision at 1. `loss` is per image, auxiliary losses included.
        """
        logits, reports = self._forward(params, batch, train=False)
        tokens, weights = self._losses(logits, batch), _weights(batch)
        return shared.evaluation_metrics(self.stacks, tokens, weights, reports)

    def logits(
        self,
        params: PyTree,
        batch: Batch,
        *,
        train: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits `[batch, classes]`."""
        return self._forward(params, batch, train=train, dropout_rng=dropout_rng)[0]

    def pre_logits(self, params: PyTree, batch: Batch) -> jax.Array:
        """See `base.FeatureModel`."""
        features, _ = self._apply(
            params, batch, train=False, dropout_rng=None, mutable=[LAYER_STATS], method="pre_logits"
        )
        return features.astype(jnp.float32)

    def layer_outputs(self, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The residual stream `[batch, tokens, d]` after every block, 'encoder/layers_0' first, in
        evaluation mode.
        """
        _, variables = self._apply(
            params, batch, train=False, dropout_rng=None, mutable=[RESIDUALS]
        )
        outputs, stack = variables[RESIDUALS][STACK], self.stacks[STACK]
        return {stack.layer(i): outputs[f"layers_{i}"]["output"] for i in range(stack.num_layers)}

    def layer_steps(self) -> Sequence[Step]:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.steps(self.config)

    def row_bytes(self, batch: Batch) -> int:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.row_bytes(self.config)

    def in_float32(self, *, renormalised: bool = False) -> "VitModel":
        """See `LayerwiseModel.in_float32`."""
        return self._of(self.config.in_float32(renormalised=renormalised))

    def reference_mlp(
        self, x: np.ndarray, kernels: Mapping[str, np.ndarray], *, units: int | None = None
    ) -> np.ndarray:
        """See `LayerwiseModel.reference_mlp`."""
        return mlp_reference.mlp(x, kernels, self.config.mlp_activations, units=units)

    def _apply(
        self,
        params: PyTree,
        batch: Batch,
        *,
        train: bool,
        dropout_rng: jax.Array | None,
        mutable: list[str],
        method: str = "__call__",
    ) -> tuple[Any, Any]:
        module, rngs = self.module, None
        self.check_batch(batch)
        if train and dropout_rng is not None:
            dropout_key, jitter_key = jax.random.split(dropout_rng)
            rngs = {"dropout": dropout_key, "jitter": jitter_key}
        elif train:
            module = VisionTransformer(self.config.without_dropout)
        return module.apply(
            {"params": params},
            batch["images"],
            batch["weights"] > 0,
            train=train,
            rngs=rngs,
            mutable=mutable,
            method=method,
        )

    def _forward(
        self, params: PyTree, batch: Batch, *, train: bool, dropout_rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, LayerStats]]:
        """Logits, and the report of every MoE layer by layer ('encoder/layers_1'), in order."""
        logits, variables = self._apply(
            params, batch, train=train, dropout_rng=dropout_rng, mutable=[LAYER_STATS]
        )
        return logits, shared.moe_reports(variables, self.stacks)

    def _losses(self, logits: jax.Array, batch: Batch) -> losses.TokenLosses:
        labels = jnp.asarray(batch["labels"])
        if self.loss == "sigmoid":
            return losses.sigmoid_losses(logits, labels)
        return losses.token_losses(logits, labels, label_smoothing=self.label_smoothing)


@functools.lru_cache(maxsize=64)
def _param_specs(config: VitConfig) -> dict[str, LeafSpec]:
    """Traced once for a configuration: a run asks for its parameters many times."""
    model = VitModel(config)
    return shared.param_specs(jax.eval_shape(model._init_boxed, jax.random.key(0)), model.stacks)


def _weights(batch: Batch) -> jax.Array:
    """Float32 `[batch]`."""
    return jnp.asarray(batch["weights"], jnp.float32)
