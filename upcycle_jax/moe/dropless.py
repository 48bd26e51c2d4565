"""The experts of dropless routers: tokens sorted by expert, on one device or on a mesh.

On a mesh every device keeps the experts of its shard of the `expert` axis. All-to-alls along that
axis bring it the tokens that chose those, each once, and take back one sum of outputs per token
(`moe.exchange`). Without a capacity all tokens may go to one device: memory is reserved for that
case, while work and what is sent follow the load.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from upcycle_jax.layers.mlp import gated, input_kernel_names
from upcycle_jax.moe import exchange, grouped
from upcycle_jax.partitioning import (
    DATA,
    EXPERT,
    MESH_AXES,
    MODEL,
    active_mesh_shape,
    active_platform,
)

_log = logging.getLogger(__name__)

Dispatch = Literal["auto", "sorted", "ragged_dot", "gather"]
DISPATCHES: tuple[Dispatch, ...] = ("auto", "sorted", "ragged_dot", "gather")

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def resolve(dispatch: Dispatch) -> Dispatch:
    """What 'auto' means here: 'ragged_dot' where it is one grouped product, 'sorted' elsewhere. The
    decision is logged once.

    Raises:
      ValueError: 'ragged_dot' was asked for where it becomes one masked product per expert.
    """
    platform = active_platform()
    if dispatch == "auto":
        return _automatic(platform)
    if dispatch == "ragged_dot" and grouped.ragged_dot_is_masked(platform):
        raise ValueError(
            f"MoeConfig.dispatch='ragged_dot': on this {platform} jax.lax.ragged_dot becomes one"
            " masked product over all rows per expert, as many times the work as there are"
            " experts. Set MoeConfig.dispatch='auto' or 'sorted'"
        )
    return dispatch


@functools.cache
def _automatic(platform: str) -> Dispatch:
    chosen: Dispatch = "sorted" if grouped.ragged_dot_is_masked(platform) else "ragged_dot"
    _log.info("MoeConfig.dispatch='auto': dropless routers use %r on %s", chosen, platform)
    return chosen


def process(
    tokens: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    kernels: Mapping[str, jax.Array],
    *,
    activations: Sequence[str],
    dispatch: Dispatch,
    hidden_scale: jax.Array | None = None,
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
    """
    kernels = {name: kernel.astype(tokens.dtype) for name, kernel in kernels.items()}
    local = functools.partial(_local, activations=tuple(activations), dispatch=dispatch)
    shape = active_mesh_shape()
    shards = shape.get(DATA, 1) * shape.get(EXPERT, 1)
    if shards * shape.get(MODEL, 1) == 1:
        return local(tokens, expert, weight, kernels, hidden_scale)
    num_tokens, num_experts = tokens.shape[0], kernels["wo"].shape[0]
    missing = -num_tokens % shards
    tokens, weight = (jnp.pad(a, ((0, missing), (0, 0))) for a in (tokens, weight))
    expert = jnp.pad(expert, ((0, missing), (0, 0)), constant_values=num_experts)
    # Axes of one device divide nothing, and where specs name them no gradient is summed over them.
    single = tuple(axis for axis in MESH_AXES if shape[axis] == 1)
    rows = PartitionSpec(_first(DATA, EXPERT, *single))
    held = _first(EXPERT, *single)
    model = None if MODEL in single else MODEL
    kernel_specs = {
        name: PartitionSpec(held, model, None) if name == "wo" else PartitionSpec(held, None, model)
        for name in kernels
    }
    scale_specs = None if hidden_scale is None else PartitionSpec(held, model)
    sharded = jax.shard_map(
        functools.partial(_on_one_device, local=local, shape=shape),
        in_specs=(rows, rows, rows, kernel_specs, scale_specs),
        out_specs=rows,
        check_vma=False,
    )
    return sharded(tokens, expert, weight, kernels, hidden_scale)[:num_tokens]


def _first(*mesh_axes: str) -> tuple[str, ...]:
    """Without repetition, in order."""
    return tuple(dict.fromkeys(mesh_axes))


def _on_one_device(
    tokens: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    kernels: Mapping[str, jax.Array],
    hidden_scale: jax.Array | None,
    *,
    local: Callable[..., jax.Array],
    shape: Mapping[str, int],
) -> jax.Array:
    if shape[EXPERT] == 1:
        out = local(tokens, expert, weight, kernels, hidden_scale)
    else:
        num_local = kernels["wo"].shape[0]
        slots = exchange.assign(expert // num_local, num_devices=shape[EXPERT])
        arrived = exchange.send(exchange.Routed(tokens, expert, weight), slots)
        expert = arrived.expert - jax.lax.axis_index(EXPERT) * num_local
        here = (expert >= 0) & (expert < num_local)
        expert, weight = jnp.where(here, expert, num_local), jnp.where(here, arrived.weight, 0.0)
        out = exchange.sum_back(local(arrived.tokens, expert, weight, kernels, hidden_scale), slots)
    return jax.lax.psum(out, MODEL) if shape[MODEL] > 1 else out


def _local(
    tokens: jax.Array,
    expert: jax.Array,
    weight: jax.Array,
    kernels: Mapping[str, jax.Array],
    hidden_scale: jax.Array | None,
    *,
    activations: tuple[str, ...],
    dispatch: Dispatch,
) -> jax.Array:
    """As `process`, for the experts at hand."""
    num_experts = kernels["wo"].shape[0]
    product, alignment = (
        (grouped.ragged_dot, 1)
        if dispatch == "ragged_dot"
        else (grouped.block_dot, grouped.ALIGNMENT)
    )
    rows = grouped.sort_rows(expert, num_experts=num_experts, alignment=alignment)
    outputs = _mlp(
        grouped.to_rows(tokens, rows),
        kernels,
        rows,
        activations=activations,
        product=product,
        hidden_scale=hidden_scale,
    )
    return jnp.sum(
        grouped.to_choices(outputs, rows).astype(jnp.float32) * weight[..., None], axis=1
    )


def _mlp(
    x: jax.Array,
    kernels: Mapping[str, jax.Array],
    rows: grouped.SortedRows,
    *,
    activations: tuple[str, ...],
    product: Product,
    hidden_scale: jax.Array | None,
) -> jax.Array:
    """`MlpBlock` on rows `[R, d]`, each with its own expert's matrices."""
    products = [product(x, kernels[name], rows.sizes) for name in input_kernel_names(activations)]
    hidden = gated(products, activations)
    if hidden_scale is not None:
        hidden = hidden * hidden_scale.at[grouped.expert_of_row(rows)].get(
            mode="fill", fill_value=0
        ).astype(hidden.dtype)
    return product(hidden, kernels["wo"], rows.sizes)
