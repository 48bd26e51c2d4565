"""The model interface: what training, evaluation, surgery, costs and inference see of a model.

A family of models implements `Model`; it implements `Generative` if it produces sequences, and
`layerwise.LayerwiseModel` if conversions are to compare its function with the dense model's. No
base class is needed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.features import FeatureConverter
from upcycle_jax.models import layer_names
from upcycle_jax.models.generation import Decoded, DecodingAlgorithm, DecodingCache, EndIds
from upcycle_jax.models.metrics import Metrics
from upcycle_jax.models.stacking import RematPolicy
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.policy import LayerSizes, RoutingPolicy, routing_policy
from upcycle_jax.moe.routing import Router
from upcycle_jax.trees import LeafSpec
from upcycle_jax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Stack:
    """A stack of layers of a model.

    Attributes:
      name: first part of the paths of its parameters, e.g. 'encoder'.
      num_layers: depth.
      sparse_layers: indices of its MoE layers, ascending.
      router: of its MoE layers; None without any.
      causal: whether a position sees only those before it.
      moe: settings of its MoE layers; None without any.
      tokens: the model feature whose length is the length of the stack, e.g.
        'encoder_input_tokens'; of a stack that takes no tokens, the feature with its inputs.
      positions: length of the stack where no feature has it, e.g. the patches of an image.
      called: what its layers are called in paths, one of `layer_names.CALLED`.
    """

    name: str
    num_layers: int
    sparse_layers: tuple[int, ...]
    router: Router | None
    causal: bool
    moe: MoeSettings | None
    tokens: str
    positions: int | None = None
    called: str = layer_names.LAYERS

    def layer_name(self, index: int) -> str:
        """Name of a layer within the stack, e.g. 'layers_1'."""
        return layer_names.name(index, self.called)

    def length(self, features: Mapping[str, Any]) -> int:
        """Its positions in one row of a batch; of arrays or of specs, by model feature."""
        return self.positions or int(np.shape(features[self.tokens])[1])

    def layer(self, index: int) -> str:
        """Path of a layer, e.g. 'encoder/layers_1'."""
        return layer_names.layer(self.name, index, self.called)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of all layers, in order."""
        return tuple(self.layer(i) for i in range(self.num_layers))

    @property
    def moe_layers(self) -> tuple[str, ...]:
        """Paths of the layers with experts, in order."""
        return tuple(self.layer(i) for i in self.sparse_layers)

    @property
    def policy(self) -> RoutingPolicy:
        """How its MoE layers group tokens, and which of them take part and count."""
        assert self.moe is not None and self.router is not None, "a stack without MoE layers"
        return routing_policy(self.moe, self.router)

    def layer_sizes(self, batch_size: int, length: int, *, train: bool) -> LayerSizes:
        """Groups and slots of one of its MoE layers, on rows of `length` positions.

        Raises:
          ValueError: the token count does not divide into groups.
        """
        return self.policy.sizes(batch_size, length, train=train)


def balance_rates(stacks: Mapping[str, Stack]) -> dict[str, float]:
    """How far the selection bias of each MoE layer that has one moves after a step, by layer
    ('encoder/layers_1').
    """
    return {
        layer: stack.router.balance_rate
        for stack in stacks.values()
        for layer in stack.moe_layers
        if stack.router is not None and stack.router.balance_rate is not None
    }


class ModelConfig(Protocol):
    """Shape and numerics of a model; a frozen dataclass."""

    @property
    def moe(self) -> MoeSettings | None:
        """The MoE layers, or None for a dense model."""

    @property
    def mlp_dim(self) -> int:
        """Hidden units of the MLPs of dense layers."""

    @property
    def dtype(self) -> str:
        """Name of the dtype of activations; parameters are float32."""

    @property
    def activation_dtype(self) -> jnp.dtype:
        """`dtype` as a dtype."""

    @property
    def remat_policy(self) -> RematPolicy:
        """What the backward pass computes again."""

    @property
    def dense(self) -> Self:
        """The same model without MoE layers: what it is upcycled from."""

    @property
    def for_inference(self) -> Self:
        """The same model as it predicts and scores."""

    @property
    def without_dropout(self) -> Self:
        """The same model with every dropout rate 0."""

    @property
    def unrolled(self) -> Self:
        """The same model run layer by layer, nothing computed twice."""

    @property
    def forward_settings(self) -> dict[str, Any]:
        """The settings that decide what a dense model computes and that the names and shapes of
        its parameters do not show.
        """


class Model(Protocol):
    """A model and its loss. Parameters are nested dicts of float32 arrays, batches are flat dicts
    of model features.
    """

    @property
    def config(self) -> ModelConfig:
        """Shape and numerics."""

    @property
    def features(self) -> FeatureConverter:
        """Makes its batches out of the examples of tasks."""

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """The stacks of layers by name, in the order in which a batch passes them."""

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids that the model has parameters for; None without tokens."""

    @property
    def dense(self) -> "Model":
        """The dense model that this one is upcycled from, with the same loss."""

    def param_specs(self) -> dict[str, LeafSpec]:
        """Shape, dtype, logical axes, role and dense twin of every parameter, by path. Allocates
        nothing.
        """

    def init_params(self, rng: jax.Array) -> PyTree:
        """Fresh parameters; a pure function that may be jitted with output shardings."""

    def input_specs(
        self, batch_size: int, task_feature_lengths: Mapping[str, int], *, packed: bool = False
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch.

        Args:
          batch_size: rows.
          task_feature_lengths: by task feature.
          packed: several examples per row.
        """

    def check_batch(self, batch: Batch) -> None:
        """Raises ValueError if the model cannot be run on such a batch."""

    def loss_denominator(self, batch: Batch) -> jax.Array:
        """What losses are divided by, a float32 scalar of the whole batch: splitting it into
        microbatches then does not change the loss.
        """

    def loss_fn(
        self,
        params: PyTree,
        batch: Batch,
        dropout_rng: jax.Array | None,
        *,
        denominator: jax.Array,
        aux_scale: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, Metrics]:
        """Training loss and metrics of a batch or of one microbatch of it.

        Args:
          params: parameters.
          batch: model features.
          dropout_rng: key of dropout and router jitter; None for neither.
          denominator: `loss_denominator` of the whole batch.
          aux_scale: the microbatch's share of the batch.
        """

    def eval_fn(self, params: PyTree, batch: Batch) -> Metrics:
        """Metrics of a batch without dropout, with evaluation capacity."""


@runtime_checkable
class Generative(Model, Protocol):
    """A model that produces sequences and scores them."""

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
        """The best sequence of each input, int32 `[batch, length]`: EOS is its last token, 0
        follows.

        Args:
          params: parameters.
          batch: model features, not packed.
          decoder: how sequences are searched.
          keys: `[batch]` random keys for a decoder that draws.
          eos_id: the token that ends a sequence, or all that do.
          max_length: tokens to produce at most: the length that targets have in the batch. None:
            what the batch's own length allows.
        """

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

    def score_batch(self, params: PyTree, batch: Batch) -> jax.Array:
        """Float32 `[batch]`: the log-probability of each target, summed over its tokens."""

    def start_decoding(
        self, params: PyTree, inputs: jax.Array, *, max_length: int
    ) -> tuple[jax.Array, DecodingCache]:
        """Float32 logits `[batch, vocab]` of the first token after int32 `[batch, input length]`,
        and caches with room for `max_length` positions.
        """

    def decode_step(
        self, params: PyTree, tokens: jax.Array, index: jax.Array, cache: DecodingCache
    ) -> tuple[jax.Array, DecodingCache]:
        """Decodes one more position; see `generation.NextLogits`."""


def stack_lengths(model: Model, task_feature_lengths: Mapping[str, int]) -> dict[str, int]:
    """Positions that each stack works on in one row of a batch, by stack."""
    features = model.features.specs(1, task_feature_lengths)
    return {name: stack.length(features) for name, stack in model.stacks.items()}


@dataclasses.dataclass(frozen=True)
class Family:
    """What has to be known of a family before there is a model of it; see `registry`.

    Attributes:
      name: in words, e.g. 'T5 encoder-decoder'.
      config: its `ModelConfig`, a frozen dataclass with a field `moe`.
      moe: its settings of MoE layers, a subclass of `MoeSettings`.
      build: makes the model of a configuration, with the usual loss.
      from_specs: given the specs of a checkpoint's leaves by full path, and the settings that it
        states, the configuration of the dense model; None where the leaves are another family's.
        Raises ValueError where they are damaged.
      settings: for every name of `ModelConfig.forward_settings`, whether a value out of a file is
        one.
      parts: further classes that the configuration is made of.
      states_model: every checkpoint of such a model states its whole configuration, MoE layers
        included, so that it can be written in formats that need to know it.
    """

    name: str
    config: type
    moe: type[MoeSettings]
    build: Callable[[Any], Model]
    from_specs: Callable[[Mapping[str, LeafSpec], Mapping[str, Any]], Any]
    settings: Mapping[str, Callable[[Any], bool]]
    parts: tuple[type, ...] = ()
    states_model: bool = False


@runtime_checkable
class FeatureModel(Model, Protocol):
    """A model with a head over one vector of features for each example."""

    def pre_logits(self, params: PyTree, batch: Batch) -> jax.Array:
        """Float32 `[batch, d]`: what the head sees, without dropout, with evaluation capacity."""
