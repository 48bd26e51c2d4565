"""What a model costs: parameters, FLOPs and memory. Every number that the project prints about cost
comes from here.

FLOPs are those of matrix products, 2 * m * k * n each, in the forward pass; a training step is
three forward passes (one forward, two backward). Norms, softmaxes, activations and the optimizer
are left out; so are gathers and scatters of MoE layers, which move data: `step_cost` adds them, and
what a mesh repeats.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from upcycle_jax import axes, trees
from upcycle_jax.models.t5.config import StackName, T5Config
from upcycle_jax.moe import all_to_all
from upcycle_jax.moe.policy import layer_sizes
from upcycle_jax.partitioning import Partitioner

TRAIN_FORWARDS = 3
"""Forward passes that a training step costs."""


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
      total: all of them.
      experts: those of experts.
      routers: those of routers.
      active: those that a token meets on average: all but the experts that do not process it. Under
        experts choose that is the capacity factor of experts per token, under tokens choose K.
    """

    total: int
    experts: int
    routers: int
    active: int


def is_expert(leaf: trees.LeafSpec) -> bool:
    """Whether a parameter belongs to experts."""
    return axes.EXPERT in leaf.axes


def count_parameters(
    config: T5Config, specs: Mapping[str, trees.LeafSpec], *, train: bool = True
) -> ParameterCounts:
    """Counts the parameters of a model.

    Args:
      config: the model.
      specs: its `param_specs()`.
      train: active experts at the training capacity factor, or at that of evaluation.
    """
    total = sum(leaf.size for leaf in specs.values())
    experts = {path: leaf for path, leaf in specs.items() if is_expert(leaf)}
    routers = sum(leaf.size for leaf in specs.values() if leaf.role is trees.Role.ROUTER)
    inactive = 0.0
    for path, leaf in experts.items():
        assert config.moe is not None
        stack: StackName = "encoder" if path.startswith("encoder/") else "decoder"
        active = config.moe.router(stack).active_experts(config.moe.capacity_factor(train=train))
        inactive += leaf.size * (1.0 - min(active / config.moe.num_experts, 1.0))
    return ParameterCounts(
        total=total,
        experts=sum(leaf.size for leaf in experts.values()),
        routers=routers,
        active=total - round(inactive),
    )


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the matrix products of one forward pass over a batch.

    Attributes:
      attention: projections, logits and weighted sums of all attention.
      position_bias: relative position biases, a product of their table with one-hot rows.
      mlp: dense MLPs, and the shared experts of MoE layers, which every token passes.
      experts: experts, every slot counted, whether a token sits in it or not.
      routers: router logits.
      logits: the output projection.
    """

    attention: int
    position_bias: int
    mlp: int
    experts: int
    routers: int
    logits: int

    @property
    def total(self) -> int:
        """Their sum."""
        return (
            self.attention
            + self.position_bias
            + self.mlp
            + self.experts
            + self.routers
            + self.logits
        )

    @property
    def train_step(self) -> int:
        """FLOPs of a training step on the same batch: products with one-hot rows have one gradient,
        all others two.
        """
        return TRAIN_FORWARDS * self.total - self.position_bias


def forward_flops(
    config: T5Config,
    *,
    batch_size: int,
    inputs_length: int,
    targets_length: int,
    train: bool = True,
) -> ForwardFlops:
    """FLOPs of one forward pass with teacher forcing.

    Args:
      config: the model.
      batch_size: rows.
      inputs_length: length of encoder rows; padding costs as much as tokens.
      targets_length: length of decoder rows.
      train: training capacity of experts, or that of evaluation.

    Raises:
      ValueError: the token count does not divide into routing groups.
    """
    tokens = {"encoder": batch_size * inputs_length, "decoder": batch_size * targets_length}
    lengths = {"encoder": inputs_length, "decoder": targets_length}
    width = config.num_heads * config.head_dim
    projection = 2 * config.emb_dim * width
    attention = position_bias = mlp = experts = routers = 0
    stacks: tuple[StackName, ...] = ("encoder", "decoder")
    for stack in stacks:
        layers, sparse = config.num_layers(stack), len(config.sparse_layers(stack))
        attention += layers * tokens[stack] * (4 * projection + 4 * width * lengths[stack])
        position_bias += (
            2 * config.num_heads * config.relative_attention_num_buckets * lengths[stack] ** 2
        )
        mlp += (layers - sparse) * tokens[stack] * mlp_flops_per_token(config, config.mlp_dim)
        if sparse:
            assert config.moe is not None
            slots = expert_slots(
                config, stack, batch_size=batch_size, length=lengths[stack], train=train
            )
            experts += sparse * slots * mlp_flops_per_token(config, config.expert_mlp_dim)
            mlp += (
                sparse * tokens[stack] * mlp_flops_per_token(config, config.mlp_dim_beside_experts)
            )
            routers += (
                sparse
                * tokens[stack]
                * config.moe.router(stack).flops_per_token(config.emb_dim, config.moe.num_experts)
            )
    decoder_layers = config.num_decoder_layers
    attention += decoder_layers * (
        2 * projection * (tokens["decoder"] + tokens["encoder"])
        + 4 * width * tokens["decoder"] * inputs_length
    )
    logits = 2 * tokens["decoder"] * config.emb_dim * config.vocab_size
    return ForwardFlops(
        attention=attention,
        position_bias=position_bias,
        mlp=mlp,
        experts=experts,
        routers=routers,
        logits=logits,
    )


def mlp_flops_per_token(config: T5Config, hidden: int) -> int:
    """FLOPs of one MLP of that hidden size for one token."""
    return 2 * config.emb_dim * hidden * (len(config.mlp_activations) + 1)


def expert_slots(
    config: T5Config, stack: StackName, *, batch_size: int, length: int, train: bool = True
) -> int:
    """Vectors that the experts of one MoE layer compute for a batch: slots, G * E * C, or the
    choices of a dropless router.

    Raises:
      ValueError: the token count does not divide into routing groups.
    """
    moe = config.moe
    assert moe is not None
    return layer_sizes(moe, moe.router(stack), batch_size, length, train=train).rows


def exchange_bytes(
    config: T5Config,
    partitioner: Partitioner,
    *,
    batch_size: int,
    inputs_length: int,
    targets_length: int,
    train: bool = True,
) -> int:
    """Bytes that all-to-alls hand over on each device in a training step. 0 where experts are not
    divided.

    Every slot of every MoE layer goes to its expert and comes back, in the activations' dtype, and
    so do the gradients; where the backward pass computes layers again, both happen once more. What
    dropless routers send follows the load, which shapes do not tell: counted is an even one
    (`exchange_follows_load`), tokens and gradients in the activations' dtype, sums of expert
    outputs and theirs in float32. With `MoeConfig.dispatch` 'gather' or 'one_hot' slots are added
    as a batch needs them, and nothing is counted. The part that stays on its own device (1 / expert
    partitions) is included, as it is in XLA's shapes.

    Raises:
      ValueError: the token count does not divide into routing groups.
    """
    devices = partitioner.num_expert_partitions
    if config.moe is None or devices == 1:
        return 0
    itemsize = {"float32": 4, "bfloat16": 2}[config.dtype]
    vector = config.emb_dim * itemsize
    forwards = 1 if config.remat_policy == "none" else 2
    nbytes = 0
    lengths: tuple[tuple[StackName, int], ...] = (
        ("encoder", inputs_length),
        ("decoder", targets_length),
    )
    for stack, length in lengths:
        layers = len(config.sparse_layers(stack))
        if not layers:
            continue
        router = config.moe.router(stack)
        if not router.has_room_for_all:
            slots = expert_slots(config, stack, batch_size=batch_size, length=length, train=train)
            nbytes += layers * 2 * (forwards + 1) * slots * vector // partitioner.num_data_shards
        elif config.moe.dispatch not in ("gather", "one_hot"):
            choices = round(router.active_experts(config.moe.capacity_factor(train=train)))
            here = math.ceil(batch_size * length / partitioner.num_data_shards)
            sent = all_to_all.slots_at_even_load(here, num_choices=choices, num_devices=devices)
            # Weights are float32, experts int32. What comes back is not needed twice: it is only
            # added up.
            there, sums, gradients = vector + 8 * choices, 4 * config.emb_dim, vector + 4 * choices
            nbytes += layers * sent * (forwards * there + 2 * sums + gradients)
    return nbytes


def exchange_follows_load(config: T5Config) -> bool:
    """Whether what MoE layers exchange depends on how tokens choose, so that `exchange_bytes` is
    that of an even load.
    """
    moe = config.moe
    stacks: tuple[StackName, ...] = ("encoder", "decoder")
    return moe is not None and any(
        config.sparse_layers(stack) and moe.router(stack).has_room_for_all for stack in stacks
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a set of arrays.

    Attributes:
      total: all arrays, once.
      per_device: what one device of the mesh holds.
    """

    total: int
    per_device: int


def memory(specs: Mapping[str, trees.LeafSpec], partitioner: Partitioner) -> Memory:
    """Bytes of parameters, or of optimizer state, in total and on each device of a mesh.

    Args:
      specs: arrays with their logical axes.
      partitioner: mesh and rules.

    Raises:
      ValueError: an array cannot be divided over the mesh; the message names it.
    """
    per_device = 0
    for path, sharding in partitioner.shardings(specs).items():
        shard = sharding.shard_shape(specs[path].shape)
        per_device += int(np.prod(shard, dtype=np.int64)) * specs[path].dtype.itemsize
    return Memory(total=sum(leaf.nbytes for leaf in specs.values()), per_device=per_device)
