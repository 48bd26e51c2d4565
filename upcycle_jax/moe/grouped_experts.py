"""Experts applied to tokens that are sorted by expert, on one device or on a mesh: no capacity, no
slots, nothing dropped.

On a mesh every device keeps the experts of its shard of the `expert` axis. All-to-alls along that
axis bring it each token that chose one of them, once, and take back one sum of outputs per token
(`moe.all_to_all`). As all tokens may choose one device's experts, memory is reserved for that case.
Work and what is sent follow the load.

Axis legend: N tokens, K experts per token, E experts, d and f sizes of an expert's matrices.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from upcycle_jax.layers.mlp import gated, input_kernel_names
from upcycle_jax.moe import all_to_all, batched_blocks, even_load, expert_runs, grouped_matmul
from upcycle_jax.partitioning import (
    DATA,
    EXPERT,
    MESH_AXES,
    MODEL,
    active_mesh_shape,
    active_platform,
)

_log = logging.getLogger(__name__)

Dispatch = Literal["auto", "sorted", "ragged_dot", "gather", "one_hot"]
DISPATCHES: tuple[Dispatch, ...] = ("auto", "sorted", "ragged_dot", "gather", "one_hot")

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`product(x, kernels, sizes)`, see `grouped_matmul.block_dot`."""


def resolve(dispatch: Dispatch) -> Dispatch:
    """What 'auto' means here: 'ragged_dot' where it is one grouped product, 'sorted' elsewhere. The
    decision is logged once.

    Raises:
      ValueError: 'ragged_dot' was asked for where it becomes one masked product per expert.
    """
    if even_load.is_active():
        return "ragged_dot"
    platform = active_platform()
    if dispatch == "auto":
        return _automatic(platform)
    if dispatch == "ragged_dot" and grouped_matmul.ragged_dot_is_masked(platform):
        raise ValueError(
            f"dispatch='ragged_dot' of MoE layers (DISPATCH): on this {platform}"
            " jax.lax.ragged_dot becomes one masked product over all rows per expert, as many times"
            " the work as there are experts. Set dispatch to 'auto' or 'sorted'"
        )
    return dispatch


@functools.cache
def _automatic(platform: str) -> Dispatch:
    masked = grouped_matmul.ragged_dot_is_masked(platform)
    chosen: Dispatch = "sorted" if masked else "ragged_dot"
    _log.info("dispatch='auto' of MoE layers: dropless routers use %r on %s", chosen, platform)
    return chosen


def apply(
    tokens: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    kernels: Mapping[str, jax.Array],
    *,
    activations: Sequence[str],
    dispatch: Dispatch,
    hidden_scale: jax.Array | None = None,
    biases: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
    """For each token the weighted sum of the outputs of its experts: float32 `[N, d]`.

    Args:
      tokens: `[N, d]` in the dtype of the computation.
      expert: int32 `[N, K]`, in `[0, E]`; E marks a choice that is not made.
      weight: float32 `[N, K]`.
      kernels: `wi` or `wi_0, wi_1, ...` `[E, d, f]` and `wo` `[E, f, d]`, as `MlpBlock` names them.
      activations: one per input kernel.
      dispatch: 'sorted' or 'ragged_dot'.
      hidden_scale: `[E, f]`, factor on the hidden units of each expert (dropout); None for none.
      biases: `[E, f]`, and `[E, d]` of `wo`, by the names of kernels; None or empty for none.
    """
    kernels, biases = (
        {name: leaf.astype(tokens.dtype) for name, leaf in leaves.items()}
        for leaves in (kernels, biases or {})
    )
    local = functools.partial(_local, activations=tuple(activations), dispatch=dispatch)
    shape = active_mesh_shape()
    shards = shape.get(DATA, 1) * shape.get(EXPERT, 1)
    if shards * shape.get(MODEL, 1) == 1:
        return local(tokens, expert, weight, kernels, hidden_scale, biases)
    # Tokens are split over all data and expert shards. Padding makes their number divide: tokens
    # of zeros that make no choice.
    num_tokens, num_experts = tokens.shape[0], kernels["wo"].shape[0]
    missing = -num_tokens % shards
    tokens, weight = (jnp.pad(a, ((0, missing), (0, 0))) for a in (tokens, weight))
    expert = jnp.pad(expert, ((0, missing), (0, 0)), constant_values=num_experts)
    # Mesh axes of one device divide nothing. Specs name them all the same: no gradient is then
    # summed over them.
    single = tuple(axis for axis in MESH_AXES if shape[axis] == 1)
    rows = PartitionSpec(_distinct(DATA, EXPERT, *single))
    held = _distinct(EXPERT, *single)
    model = None if MODEL in single else MODEL
    kernel_specs = {
        name: PartitionSpec(held, model, None) if name == "wo" else PartitionSpec(held, None, model)
        for name in kernels
    }
    scale_specs = None if hidden_scale is None else PartitionSpec(held, model)
    bias_specs = {
        name: PartitionSpec(held, None) if name == "wo" else PartitionSpec(held, model)
        for name in biases
    }
    sharded = jax.shard_map(
        functools.partial(_on_one_device, local=local, shape=shape),
        in_specs=(rows, rows, rows, kernel_specs, scale_specs, bias_specs),
        out_specs=rows,
        check_vma=False,
    )
    return sharded(tokens, expert, weight, kernels, hidden_scale, biases)[:num_tokens]


def _distinct(*mesh_axes: str) -> tuple[str, ...]:
    """The axes in their order, each once."""
    return tuple(dict.fromkeys(mesh_axes))


def _on_one_device(
    tokens: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    kernels: Mapping[str, jax.Array],
    hidden_scale: jax.Array | None,
    biases: Mapping[str, jax.Array],
    *,
    local: Callable[..., jax.Array],
    shape: Mapping[str, int],
) -> jax.Array:
    """As `apply`, inside `jax.shard_map`: tokens, experts and hidden units of one device."""
    if biases and shape[MODEL] > 1:
        # Model shards add up: one of them adds the bias after the hidden units.
        first = jax.lax.axis_index(MODEL) == 0
        biases = {**biases, "wo": jnp.where(first, biases["wo"], 0)}
    if shape[EXPERT] == 1:
        out = local(tokens, expert, weight, kernels, hidden_scale, biases)
    else:
        # Device p of the expert axis has experts p * num_local to (p + 1) * num_local - 1.
        num_local = kernels["wo"].shape[0]
        slots = all_to_all.assign(expert // num_local, num_devices=shape[EXPERT])
        arrived = all_to_all.send(all_to_all.Routed(tokens, expert, weight), slots)
        # A token arrives with all of its choices. Those of other devices' experts are not made.
        expert = arrived.expert - jax.lax.axis_index(EXPERT) * num_local
        here = (expert >= 0) & (expert < num_local)
        expert, weight = jnp.where(here, expert, num_local), jnp.where(here, arrived.weight, 0.0)
        outputs = local(arrived.tokens, expert, weight, kernels, hidden_scale, biases)
        out = all_to_all.sum_back(outputs, slots)
    # Each model shard has a part of the hidden units, whose contributions add up.
    return jax.lax.psum(out, MODEL) if shape[MODEL] > 1 else out


def _local(
    tokens: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    kernels: Mapping[str, jax.Array],
    hidden_scale: jax.Array | None,
    biases: Mapping[str, jax.Array],
    *,
    activations: tuple[str, ...],
    dispatch: Dispatch,
) -> jax.Array:
    """As `apply`, on one device and for the experts that it has."""
    num_experts, *matrix = kernels["wo"].shape
    product: Product
    if dispatch == "ragged_dot":
        product, alignment = grouped_matmul.ragged_dot, 1
    elif batched_blocks.is_faster(math.prod(matrix)):
        alignment = batched_blocks.rows_per_block(expert.size, num_experts)
        product = functools.partial(batched_blocks.batched_dot, alignment)
    elif expert_runs.is_faster():
        step = expert_runs.rows_per_step(expert.size, num_experts)
        return expert_runs.apply(
            tokens,
            weight,
            kernels,
            grouped_matmul.sort_rows(expert, num_experts=num_experts, alignment=step),
            step=step,
            activations=activations,
            hidden_scale=hidden_scale,
            biases=biases,
        )
    else:
        product, alignment = grouped_matmul.block_dot, grouped_matmul.ALIGNMENT
    rows = grouped_matmul.sort_rows(expert, num_experts=num_experts, alignment=alignment)
    outputs = _mlp(
        grouped_matmul.to_rows(tokens, rows),
        kernels,
        biases,
        rows,
        activations=activations,
        product=product,
        hidden_scale=hidden_scale,
    )
    of_choices = grouped_matmul.to_choices(outputs, rows)  # [N, K, d]
    return jnp.sum(of_choices.astype(jnp.float32) * weight[..., None], axis=1)


def _mlp(
    x: jax.Array,
    kernels: Mapping[str, jax.Array],
    biases: Mapping[str, jax.Array],
    rows: grouped_matmul.SortedRows,
    *,
    activations: tuple[str, ...],
    product: Product,
    hidden_scale: jax.Array | None,
) -> jax.Array:
    """`MlpBlock` on rows `[R, d]`, each with its own expert's matrices and biases."""

    def of_rows(by_expert: jax.Array) -> jax.Array:
        at = by_expert.at[grouped_matmul.expert_of_row(rows)]
        return at.get(mode="fill", fill_value=0)  # [E, .] to [R, .]

    def biased(x: jax.Array, name: str) -> jax.Array:
        out = product(x, kernels[name], rows.sizes)
        return out + of_rows(biases[name]) if biases else out

    products = [biased(x, name) for name in input_kernel_names(activations)]
    hidden = gated(products, activations)  # [R, f]
    if hidden_scale is not None:
        hidden = hidden * of_rows(hidden_scale).astype(hidden.dtype)
    return biased(hidden, "wo")
