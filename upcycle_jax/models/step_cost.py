"""What a training step costs on its devices, from shapes: FLOPs as the model needs them and as
devices execute them, and bytes.

Model FLOPs are those of `accounting.forward_flops`, three passes of them: the figure that
utilisation (MFU) divides. Devices execute more: layers that the backward pass computes again,
elementwise operations (softmaxes, norms, activations, losses, the optimizer), and what every device
of a mesh repeats because it is not split: position biases and the update of replicated parameters.
That sum is what XLA's `cost_analysis` counts, and tests compare the two. Roots, exponentials and
the like are left out, as XLA leaves them out.
"""

import dataclasses
from collections.abc import Mapping

from upcycle_jax import trees
from upcycle_jax.models import accounting
from upcycle_jax.models.t5.config import StackName, T5Config
from upcycle_jax.partitioning import MODEL, Partitioner

ACTIVATION_OPERATIONS: dict[str, tuple[int, int]] = {
    "gelu": (9, 13),
    "gelu_exact": (64, 7),
    "linear": (0, 0),
    "relu": (1, 2),
    "silu": (1, 4),
}
"""Operations on one hidden unit, forward and backward, by activation. The tanh form of gelu: x^3 is
two, then 0.0447 x^3, + x, * 0.798, 1 + tanh, / 2, * x. The exact one: as XLA counts its error
function.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a training step works on.

    Attributes:
      batch_size: rows of a batch, over all devices.
      inputs_length: length of encoder rows.
      targets_length: length of decoder rows.
      num_microbatches: parts that the batch is processed in.
    """

    batch_size: int
    inputs_length: int
    targets_length: int
    num_microbatches: int = 1

    @property
    def rows(self) -> int:
        """Rows of a microbatch."""
        return self.batch_size // self.num_microbatches

    def length(self, stack: StackName) -> int:
        """Length of the encoder's or the decoder's rows."""
        return self.inputs_length if stack == "encoder" else self.targets_length

    def tokens(self, stack: StackName) -> int:
        """Tokens of a microbatch in the encoder or the decoder, padding included."""
        return self.rows * self.length(stack)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one training step.

    Attributes:
      model: matrix products of a forward and a backward pass, over all devices.
      recomputed: matrix products that the backward pass repeats under `remat_policy`, over all
        devices.
      device: everything that one device executes, elementwise operations and the optimizer
        included.
    """

    model: int
    recomputed: int
    device: float

    @property
    def hardware(self) -> int:
        """Matrix products that are executed, over all devices."""
        return self.model + self.recomputed


def step_flops(
    config: T5Config,
    shape: StepShape,
    *,
    partitioner: Partitioner,
    specs: Mapping[str, trees.LeafSpec],
    optimizer_operations: int,
) -> StepFlops:
    """FLOPs of one training step.

    Args:
      config: the model.
      shape: the batch.
      partitioner: the mesh.
      specs: the model's `param_specs()`.
      optimizer_operations: elementwise operations of an update for each parameter, see
        `Optimizer.operations_per_parameter`.

    Raises:
      ValueError: the token count does not divide into routing groups.
    """
    parts, data_shards = shape.num_microbatches, partitioner.num_data_shards
    model_shards = partitioner.mesh.shape[MODEL]
    forward = accounting.forward_flops(
        config,
        batch_size=shape.rows,
        inputs_length=shape.inputs_length,
        targets_length=shape.targets_length,
    )
    again = _recomputed(config, shape)
    # Routers are not split over model partitions; position biases are not split over the batch.
    split = (
        forward.train_step
        - _position_bias_step(forward)
        - accounting.TRAIN_FORWARDS * forward.routers
        + again.total
        - again.routers
    ) / (data_shards * model_shards)
    whole = (
        accounting.TRAIN_FORWARDS * forward.routers + again.routers
    ) / data_shards + _position_bias_step(forward) / model_shards
    elementwise = _elementwise(config, shape)
    work = (
        elementwise.wide / (data_shards * model_shards)
        + elementwise.narrow / data_shards
        + elementwise.replicated / model_shards
    )
    held = accounting.memory(specs, partitioner).per_device // 4
    accumulated = held if parts > 1 else 0  # gradients of a microbatch are added to those before
    return StepFlops(
        model=parts * forward.train_step,
        recomputed=parts * again.total,
        device=parts * (split + whole + work + accumulated) + held * optimizer_operations,
    )


def recomputed_flops(config: T5Config, shape: StepShape) -> int:
    """Matrix products that the backward pass of a step repeats under `remat_policy`, over all
    devices.
    """
    return shape.num_microbatches * _recomputed(config, shape).total


def exchange_bytes(config: T5Config, shape: StepShape, *, partitioner: Partitioner) -> int:
    """Bytes of all-to-alls on one device in a step: `accounting.exchange_bytes` of all
    microbatches.

    Raises:
      ValueError: the token count does not divide into routing groups.
    """
    part = accounting.exchange_bytes(
        config,
        partitioner,
        batch_size=shape.rows,
        inputs_length=shape.inputs_length,
        targets_length=shape.targets_length,
    )
    return part * shape.num_microbatches


def _position_bias_step(forward: accounting.ForwardFlops) -> int:
    """A forward pass and the gradient of the table; the one-hot factor has none."""
    return 2 * forward.position_bias


@dataclasses.dataclass(frozen=True)
class _Recomputed:
    total: int
    routers: int


def _recomputed(config: T5Config, shape: StepShape) -> _Recomputed:
    """Matrix products that `remat_policy` repeats in the backward pass of a microbatch.

    'minimal' keeps products without batch dimensions: attention's two products and the experts are
    repeated. 'full' repeats every product whose result a gradient needs, which the last one of a
    dense MLP is not: it only feeds the residual stream, which is kept.
    """
    if config.remat_policy == "none":
        return _Recomputed(0, 0)
    gates = len(config.mlp_activations)
    width = config.num_heads * config.head_dim
    projection = 2 * config.emb_dim * width
    products = projections = experts = dense = routers = 0
    stacks: tuple[StackName, ...] = ("encoder", "decoder")
    for stack in stacks:
        tokens, layers, sparse = (
            shape.tokens(stack),
            config.num_layers(stack),
            len(config.sparse_layers(stack)),
        )
        products += layers * tokens * 4 * width * shape.length(stack)
        projections += layers * tokens * 4 * projection
        dense += (layers - sparse) * tokens * accounting.mlp_flops_per_token(config, config.mlp_dim)
        if sparse:
            assert config.moe is not None
            rows = accounting.expert_slots(
                config, stack, batch_size=shape.rows, length=shape.length(stack)
            )
            experts += sparse * rows * accounting.mlp_flops_per_token(config, config.expert_mlp_dim)
            dense += (
                sparse
                * tokens
                * accounting.mlp_flops_per_token(config, config.mlp_dim_beside_experts)
            )
            routers += (
                sparse
                * tokens
                * config.moe.router(stack).flops_per_token(config.emb_dim, config.moe.num_experts)
            )
    across = config.num_decoder_layers
    products += across * shape.tokens("decoder") * 4 * width * shape.inputs_length
    projections += across * 2 * projection * (shape.tokens("decoder") + shape.tokens("encoder"))
    if config.remat_policy == "minimal":
        return _Recomputed(products + experts, 0)
    return _Recomputed(
        products + experts + projections + dense * gates // (gates + 1) + routers, routers
    )


@dataclasses.dataclass(frozen=True)
class _Elementwise:
    """Elementwise operations of a microbatch, forward and backward, by how they are split.

    Attributes:
      wide: over the batch and over model partitions: attention logits, hidden units, output logits.
      narrow: over the batch: residual streams.
      replicated: over model partitions alone: position biases.
    """

    wide: int
    narrow: int
    replicated: int


# Operations per element, forward and backward.
_SOFTMAX = (
    5,
    4,
)  # add the bias, subtract the maximum after finding it, sum, divide; backward: g y, its sum, g - sum, times y
_NORM = (
    5,
    10,
)  # square, sum, times root, times scale, padding to zero; backward: to scale (2), to x through both factors (7), padding
_RESIDUAL = 1, 1
_BIAS = 1, 2  # the position bias plus the mask; backward: summed over layers and rows
_LOSS = (
    4,
    4,
)  # maximum, subtract, sum, arg max; backward: the softmax times its factor, minus the target


def _elementwise(config: T5Config, shape: StepShape) -> _Elementwise:
    gates = config.mlp_activations
    forward, backward = (sum(ACTIVATION_OPERATIONS[name][i] for name in gates) for i in (0, 1))
    per_hidden = forward + backward + 3 * (len(gates) - 1)
    wide = narrow = replicated = 0
    again = 0 if config.remat_policy == "none" else 1
    softmax = _SOFTMAX[0] * (1 + again) + _SOFTMAX[1]
    stacks: tuple[StackName, ...] = ("encoder", "decoder")
    for stack in stacks:
        tokens, length, layers = shape.tokens(stack), shape.length(stack), config.num_layers(stack)
        sparse, sublayers = len(config.sparse_layers(stack)), 2 if stack == "encoder" else 3
        pairs = config.num_heads * tokens * length
        # Each layer's softmax; its gradient is also that of the bias, which all layers share.
        wide += layers * pairs * (softmax + 1) + pairs * sum(_BIAS)
        wide += (layers - sparse) * tokens * config.mlp_dim * (per_hidden + again * forward)
        if sparse:
            assert config.moe is not None
            rows = accounting.expert_slots(config, stack, batch_size=shape.rows, length=length)
            wide += sparse * rows * config.expert_mlp_dim * (per_hidden + again * forward)
            wide += sparse * tokens * config.mlp_dim_beside_experts * (per_hidden + again * forward)
            # Combine: times the weight and added up; backward: to the outputs and to the weights
            # (2), and dispatch's sum.
            narrow += sparse * rows * config.emb_dim * (2 * (1 + again) + 4)
            # Router probabilities and what is reported of them.
            narrow += sparse * tokens * config.moe.num_experts * (2 * sum(_SOFTMAX))
        norms = layers * sublayers + 1
        per_layer = (
            sum(_RESIDUAL) * sublayers + 2 + len(gates) - 1
        )  # query, key and value, and the gates, add up their gradients
        narrow += (
            tokens * config.emb_dim * (norms * (sum(_NORM) + again * _NORM[0]) + layers * per_layer)
        )
        replicated += config.num_heads * length**2
    across = (
        config.num_decoder_layers * config.num_heads * shape.tokens("decoder") * shape.inputs_length
    )
    wide += across * softmax
    narrow += config.num_decoder_layers * shape.tokens("encoder") * config.emb_dim * 2
    wide += shape.tokens("decoder") * config.vocab_size * sum(_LOSS)
    return _Elementwise(wide, narrow, replicated)
