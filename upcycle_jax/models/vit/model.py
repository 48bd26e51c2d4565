"""A vision transformer as `models.base` has it: its batches, its losses, the steps of its forward
pass.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import checks
from upcycle_jax.features.images import ImageFeatures
from upcycle_jax.models import losses, shared
from upcycle_jax.models.base import Stack
from upcycle_jax.models.layerwise import Step
from upcycle_jax.models.stacked import StackedModel
from upcycle_jax.models.vit import layerwise
from upcycle_jax.models.vit.config import STACK, VitConfig
from upcycle_jax.models.vit.network import VisionTransformer
from upcycle_jax.types import Batch, PyTree

Loss = Literal["softmax", "sigmoid"]


class VitModel(StackedModel[VitConfig]):
    """A vision transformer and its loss. `accuracy` of its metrics is the paper's precision at 1.

    Attributes:
      config: shape and numerics.
      module: the linen network, a `VisionTransformer`.
      features: what its batches hold.
      loss: 'softmax' cross entropy of the one class of an image, or 'sigmoid' cross entropy summed
        over all classes, of which it has one (JFT-300M's images have several; see
        `losses.sigmoid_losses`).
      label_smoothing: see `losses.token_losses`; of the softmax loss.
      labels_per_image: the most labels that an image has; more than one for the sigmoid loss alone.
        `accuracy` then counts images whose most probable class is among their labels.
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
        labels_per_image: checks.Size = 1,
    ):
        super().__init__(config, loss_normalizing_factor)
        if labels_per_image > 1 and loss != "sigmoid":
            raise ValueError(
                f"labels_per_image is {labels_per_image}: a softmax has one class of an image; set"
                " LOSS = 'sigmoid'"
            )
        self.features = ImageFeatures(
            config.image_size, config.channels, config.num_classes, labels_per_image
        )
        self.loss = loss
        self.label_smoothing = label_smoothing

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "label_smoothing": self.label_smoothing,
            "loss_normalizing_factor": self.loss_normalizing_factor,
            "labels_per_image": self.features.max_labels,
        }

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

    def input_specs(
        self, batch_size: int, task_feature_lengths: Mapping[str, int], *, packed: bool = False
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """See `base.Model`; the length of 'image' is its side."""
        return self.features.specs(batch_size, task_feature_lengths, packed=packed)

    def check_batch(self, batch: Batch) -> None:
        """Raises ValueError if images have another size than the model."""
        self.features.check_size(np.shape(batch["images"])[1])

    def pre_logits(self, params: PyTree, batch: Batch) -> jax.Array:
        """See `base.FeatureModel`."""
        features = self.module.apply(
            {"params": params}, *self._arguments(batch)[0], method="pre_logits"
        )
        assert isinstance(features, jax.Array)
        return features.astype(jnp.float32)

    def layer_steps(self) -> Sequence[Step]:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.steps(self.config)

    def row_bytes(self, batch: Batch) -> int:
        """See `layerwise.LayerwiseModel`."""
        return layerwise.row_bytes(self.config)

    def _network(self, config: VitConfig) -> VisionTransformer:
        return VisionTransformer(config)

    def _shapes(self) -> tuple[jax.Array]:
        size, channels, rows = self.config.image_size, self.config.channels, 1
        if self.config.moe is not None:
            # As few images as fill groups of a size that one image does not divide into.
            group, tokens = self.config.moe.group_size, self.config.num_tokens
            rows = 1 if tokens <= group else group // math.gcd(group, tokens)
        return (jnp.zeros((rows, size, size, channels), jnp.float32),)

    def _arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["images"], batch["weights"] > 0), {}

    def _weights(self, batch: Batch) -> jax.Array:
        return jnp.asarray(batch["weights"], jnp.float32)

    def _losses(self, logits: jax.Array, batch: Batch) -> losses.TokenLosses:
        labels = jnp.asarray(batch["labels"])
        if self.loss == "sigmoid":
            return losses.sigmoid_losses(logits, labels)
        return losses.token_losses(logits, labels, label_smoothing=self.label_smoothing)
