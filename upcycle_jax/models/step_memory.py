"""Memory of a training step on one device, from shapes: parameters, optimizer state, gradients, and
activations kept for the backward pass.

Activations are the arrays that differentiation keeps between the forward and the backward pass,
counted per layer as jax keeps them. What a compiler frees early, keeps twice or computes again by
its own choice is its own; tests compare the sum with XLA's `memory_analysis` on CPUs. Programs for
TPUs compute cheap elementwise results again: `planning.traced_memory` has what is left there.
"""

import dataclasses
from collections.abc import Mapping

from upcycle_jax import trees
from upcycle_jax.models import accounting
from upcycle_jax.models.step_cost import StepShape
from upcycle_jax.models.t5.config import StackName, T5Config
from upcycle_jax.partitioning import MODEL, Partitioner

ACTIVATION_RESIDUALS = {"gelu": 6, "gelu_exact": 3, "linear": 1, "relu": 2, "silu": 3}
"""Arrays of the hidden size that each gate of an MLP leaves for the backward pass; the product of
the gates is one more.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on one device.

    Attributes:
      parameters: float32 parameters.
      optimizer: optimizer slots.
      gradients: float32 gradients, and the second one of an embedding table that both stacks use.
      activations: what the backward pass finds.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def temporaries(self) -> int:
        """What a step needs beside its arguments. Activations go as gradients come, so the larger
        of the two is what counts.
        """
        return max(self.activations, self.gradients)

    @property
    def needed(self) -> int:
        """Parameters, optimizer state and temporaries."""
        return self.parameters + self.optimizer + self.temporaries


def step_memory(
    config: T5Config,
    shape: StepShape,
    *,
    partitioner: Partitioner,
    specs: Mapping[str, trees.LeafSpec],
    optimizer_specs: Mapping[str, trees.LeafSpec],
) -> StepMemory:
    """Memory of a step.

    Args:
      config: the model.
      shape: the batch.
      partitioner: the mesh.
      specs: the model's `param_specs()`.
      optimizer_specs: specs of the optimizer state.

    Raises:
      ValueError: an array does not divide over the mesh, or tokens do not divide into routing
        groups.
    """
    parameters = accounting.memory(specs, partitioner).per_device
    tables = {path: spec for path, spec in specs.items() if path.startswith("token_embedder/")}
    return StepMemory(
        parameters=parameters,
        optimizer=accounting.memory(optimizer_specs, partitioner).per_device,
        gradients=parameters * (2 if shape.num_microbatches > 1 else 1)
        + accounting.memory(tables, partitioner).per_device,
        activations=round(activation_bytes(config, shape, partitioner=partitioner)),
    )


def activation_bytes(config: T5Config, shape: StepShape, *, partitioner: Partitioner) -> float:
    """Bytes of activations that one device keeps for the backward pass of a microbatch.

    Under `remat_policy` 'full' that is the residual stream before every layer, and the insides of
    the one layer that is computed again; under 'minimal' also the results of projections and dense
    MLPs. Splits over model partitions are those of the arrays: heads, hidden units and the
    vocabulary are split, residual streams are not.
    """
    dtype = {"float32": 4, "bfloat16": 2}[config.dtype]
    model_shards = partitioner.mesh.shape[MODEL]
    total = largest = 0.0
    stacks: tuple[StackName, ...] = ("encoder", "decoder")
    for stack in stacks:
        tokens, sparse = shape.tokens(stack), config.sparse_layers(stack)
        for i in range(config.num_layers(stack)):
            layer = _layer(config, shape, stack, sparse=i in sparse)
            inside = (
                dtype * (layer.stream + layer.products / model_shards + layer.hidden / model_shards)
                + 4 * layer.weights / model_shards
            )
            largest = max(largest, inside)
            if config.remat_policy == "none":
                total += inside
            else:
                total += dtype * tokens * config.emb_dim
                total += (
                    dtype * layer.products / model_shards if config.remat_policy == "minimal" else 0
                )
        total += 4 * dtype * tokens * config.emb_dim  # the embedding and the final norm
        total += (
            4
            * config.relative_attention_num_buckets
            * shape.length(stack) ** 2
            * partitioner.num_data_shards
        )  # one-hot rows, on every device
    if config.remat_policy != "none":
        total += largest
    total += 4 * shape.tokens("decoder") * config.vocab_size / model_shards
    return total / partitioner.num_data_shards


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Elements that one layer keeps.

    Attributes:
      stream: arrays of the width of the residual stream: inputs of norms, their roots' products,
        what padding zeroed, residuals.
      products: results of projections and of dense MLPs' input kernels.
      hidden: what activations keep of hidden units, experts included.
      weights: attention probabilities, and their quotient's numerator, in float32.
    """

    stream: float
    products: float
    hidden: float
    weights: float


def _layer(config: T5Config, shape: StepShape, stack: StackName, *, sparse: bool) -> _Layer:
    tokens, length = shape.tokens(stack), shape.length(stack)
    width, heads = config.num_heads * config.head_dim, config.num_heads
    gates = config.mlp_activations
    per_unit = sum(ACTIVATION_RESIDUALS[name] for name in gates) + 1
    products, weights = 4.0 * tokens * width, 2.0 * heads * tokens * length
    stream = 8.0 * tokens * config.emb_dim
    if stack == "decoder":
        products += 2.0 * tokens * width + 2.0 * shape.tokens("encoder") * width
        weights += 2.0 * heads * tokens * shape.inputs_length
        stream += 4.0 * tokens * config.emb_dim
    if not sparse:
        kept = len(gates)  # results of the input kernels
        return _Layer(
            stream,
            products + kept * tokens * config.mlp_dim,
            (per_unit - kept) * tokens * config.mlp_dim,
            weights,
        )
    assert config.moe is not None
    rows = accounting.expert_slots(config, stack, batch_size=shape.rows, length=length)
    hidden = per_unit * (rows * config.expert_mlp_dim + tokens * config.mlp_dim_beside_experts)
    # Slots as dispatched and as they come back.
    return _Layer(stream + 2.0 * rows * config.emb_dim, products, hidden, weights)
