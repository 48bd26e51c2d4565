"""What models of linen stacks have in common, whatever their family: parameters, loss, metrics, the
residual streams of layers.
"""

import abc
import functools
from collections.abc import Mapping
from typing import Any, Generic, Protocol, Self, TypeVar

import flax.linen as nn
import jax
import numpy as np

from upcycle_jax.layers import mlp_reference
from upcycle_jax.models import losses, shared
from upcycle_jax.models.base import ModelConfig, Stack
from upcycle_jax.models.metrics import Metrics
from upcycle_jax.models.stacking import RESIDUALS, shapes_alone
from upcycle_jax.moe.layer_stats import LAYER_STATS, LayerStats
from upcycle_jax.trees import LeafSpec
from upcycle_jax.types import Batch, PyTree


class StackedConfig(ModelConfig, Protocol):
    """What `StackedModel` asks of a configuration besides."""

    @property
    def mlp_activations(self) -> tuple[str, ...]:
        """See `layers.mlp.MlpBlock`."""

    def in_float32(self, *, renormalised: bool) -> Self:
        """See `layerwise.LayerwiseModel.in_float32`."""


ConfigT = TypeVar("ConfigT", bound=StackedConfig)


class StackedModel(abc.ABC, Generic[ConfigT]):
    """The part of `base.Model` and `layerwise.LayerwiseModel` that follows from a linen network and
    the losses of its logits. Models of equal settings are equal, and share what is traced once.

    Attributes:
      config: shape and numerics.
      module: the linen network.
      loss_normalizing_factor: what summed losses are divided by, see `shared.LossNormalizer`.
    """

    def __init__(self, config: ConfigT, loss_normalizing_factor: shared.LossNormalizer):
        shared.check_normalizer(loss_normalizing_factor)
        self.config = config
        self.module = self._network(config)
        self.loss_normalizing_factor = loss_normalizing_factor

    @property
    @abc.abstractmethod
    def stacks(self) -> Mapping[str, Stack]:
        """See `base.Model`."""

    @abc.abstractmethod
    def check_batch(self, batch: Batch) -> None:
        """See `base.Model`."""

    @property
    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What it was made with besides its configuration, by the names of its arguments."""

    @abc.abstractmethod
    def _network(self, config: ConfigT) -> nn.Module:
        """The linen network of a configuration."""

    @abc.abstractmethod
    def _shapes(self) -> tuple[Any, ...]:
        """Arguments of the network for which it makes its parameters."""

    @abc.abstractmethod
    def _arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the network for a batch, by position and by name."""

    @abc.abstractmethod
    def _weights(self, batch: Batch) -> jax.Array:
        """Float32, how much each target counts."""

    @abc.abstractmethod
    def _losses(self, logits: jax.Array, batch: Batch) -> losses.TokenLosses:
        """Losses of the targets, of the shape of `_weights`."""

    def _identity(self) -> tuple[Any, ...]:
        return self.config, *self._settings.items()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StackedModel) or type(other) is not type(self):
            return False
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _of(self, config: ConfigT) -> Self:
        """A model with these settings and the loss of this one."""
        return type(self)(config, **self._settings)

    @property
    def dense(self) -> Self:
        """The dense model that this one is upcycled from, with the same loss."""
        return self._of(self.config.dense)

    def in_float32(self, *, renormalised: bool = False) -> Self:
        """See `layerwise.LayerwiseModel`."""
        return self._of(self.config.in_float32(renormalised=renormalised))

    def param_specs(self) -> dict[str, LeafSpec]:
        """See `base.Model`. Allocates nothing."""
        return dict(_param_specs(self))

    def init_params(self, rng: jax.Array) -> PyTree:
        """See `base.Model`."""
        return nn.meta.unbox(self.init_boxed(rng))

    def init_boxed(self, rng: jax.Array) -> PyTree:
        """As `init_params`, each parameter in a box that names its logical axes."""
        return self.module.init({"params": rng}, *self._shapes())["params"]

    def loss_denominator(self, batch: Batch) -> jax.Array:
        """See `base.Model`.

        Computed over the whole batch, before it is split into microbatches, so that splitting does
        not change the loss.
        """
        return shared.loss_denominator(self.loss_normalizing_factor, self._weights(batch))

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
            self._weights(batch),
            reports,
            denominator=denominator,
            aux_scale=aux_scale,
        )

    def eval_fn(self, params: PyTree, batch: Batch) -> Metrics:
        """Metrics of a batch without dropout, with evaluation capacity. `loss` is per target,
        auxiliary losses included.
        """
        logits, reports = self._forward(params, batch, train=False)
        targets, weights = self._losses(logits, batch), self._weights(batch)
        return shared.evaluation_metrics(self.stacks, targets, weights, reports)

    def logits(
        self,
        params: PyTree,
        batch: Batch,
        *,
        train: bool = False,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Float32 logits, of sequences `[batch, length, vocab]` with teacher forcing."""
        return self._forward(params, batch, train=train, dropout_rng=dropout_rng)[0]

    def layer_outputs(self, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """The residual stream `[batch, length, d]` after every layer by its path, in order and in
        evaluation mode.
        """
        _, variables = self._apply(
            params, batch, train=False, dropout_rng=None, mutable=[RESIDUALS]
        )
        outputs = variables[RESIDUALS]
        return {
            stack.layer(i): outputs[stack.name][stack.layer_name(i)]["output"]
            for stack in self.stacks.values()
            for i in range(stack.num_layers)
        }

    def reference_mlp(
        self, x: np.ndarray, kernels: Mapping[str, np.ndarray], *, units: int | None = None
    ) -> np.ndarray:
        """See `layerwise.LayerwiseModel`."""
        return mlp_reference.mlp(x, kernels, self.config.mlp_activations, units=units)

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
            module = self._network(self.config.without_dropout)
        arguments, named = self._arguments(batch)
        return module.apply(
            {"params": params}, *arguments, **named, train=train, rngs=rngs, mutable=mutable
        )

    def _forward(
        self, params: PyTree, batch: Batch, *, train: bool, dropout_rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, LayerStats]]:
        """Logits, and the report of every MoE layer by its path ('encoder/layers_1'), in order."""
        logits, variables = self._apply(
            params, batch, train=train, dropout_rng=dropout_rng, mutable=[LAYER_STATS]
        )
        return logits, shared.moe_reports(variables, self.stacks)


@functools.lru_cache(maxsize=64)
def _param_specs(model: StackedModel[Any]) -> dict[str, LeafSpec]:
    """Traced once for equal models: a run asks for its parameters many times."""

    def init(key: jax.Array) -> PyTree:
        return model.init_boxed(key)

    with shapes_alone():
        boxed = jax.eval_shape(init, jax.random.key(0))
    return shared.param_specs(boxed, model.stacks)
