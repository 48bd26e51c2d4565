"""The experts of an MoE layer: the dense MLP E times, with weights of its own each time.

An `ExpertBank` holds their kernels as plain arrays, and applies them in one of three ways: on
slots, all experts at once; in a loop over experts; on tokens sorted by expert. A dispatcher
chooses the way.

Axis legend: G groups, S tokens per group, E experts, C slots per expert and group, K experts per
token, d and f sizes of an expert's matrices.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from upcycle_jax import axes
from upcycle_jax.layers import projection
from upcycle_jax.layers.mlp import MlpBlock, gated, input_kernel_names
from upcycle_jax.moe import grouped_experts, looped_experts
from upcycle_jax.moe.grouped_experts import Dispatch
from upcycle_jax.partitioning import constrain


def init_experts(expert: MlpBlock, *, num_experts: int, emb_dim: int, equal: bool = False) -> None:
    """Makes the parameters of E experts: those of `expert`, a bound module, with a leading E; all
    of them `equal`, or each with draws of its own.
    """
    lifted = nn.vmap(
        lambda expert, x: expert(x),
        in_axes=0,
        axis_size=num_experts,
        variable_axes={"params": 0},
        split_rngs={"params": not equal},
        metadata_params={nn.PARTITION_NAME: axes.EXPERT},
    )
    lifted(expert, jnp.zeros((num_experts, 1, 1, emb_dim), expert.dtype))


@flax.struct.dataclass
class ExpertBank:
    """All experts of a layer, or a part of them, and how they are applied.

    Attributes:
      kernels: as `MlpBlock` names them: `wi` or `wi_0, wi_1, ...` `[E, d, f]` and `wo` `[E, f, d]`.
      hidden_scale: float32 `[G, E, f]`, or `[1, E, f]` for all groups, factor on the hidden units
        (dropout); None for none.
      activations: one per input kernel, as in `MlpBlock`.
      dtype: dtype of the computation; inputs and kernels are cast to it.
      dispatch: see `MoeConfig.dispatch`; used by `grouped` alone.
      biases: float32, by the names of the kernels that they stand beside: `[E, f]`, and `[E, d]` of
        `wo`; empty for none.
    """

    kernels: Mapping[str, jax.Array]
    hidden_scale: jax.Array | None = None
    activations: tuple[str, ...] = flax.struct.field(pytree_node=False, default=("gelu", "linear"))
    dtype: Any = flax.struct.field(pytree_node=False, default=jnp.float32)
    dispatch: Dispatch = flax.struct.field(pytree_node=False, default="auto")
    biases: Mapping[str, jax.Array] = flax.struct.field(default_factory=dict)

    @property
    def looped_over(self) -> bool:
        """Whether `looped` is faster than `on_slots` where the program will run."""
        _, hidden, emb_dim = self.kernels["wo"].shape
        return looped_experts.is_faster(hidden * emb_dim)

    def on_slots(self, slots: jax.Array) -> jax.Array:
        """Outputs `[G, E, C, d]` of `[G, E, C, d]`: expert e on slots e, all experts at once."""
        # Before, groups are split over all data and expert shards. In between, groups are split
        # over data shards only, and experts over expert shards. The change from one to the other
        # and back becomes the two all-to-alls. Nothing else crosses devices.
        here = (axes.EXPERT_GROUP, None, None, axes.ACTIVATION_EMBED)
        there = (axes.EXPERT_REPLICA_GROUP, axes.ACTIVATION_EXPERT, None, axes.ACTIVATION_EMBED)
        slots = constrain(constrain(slots, here), there)
        # kernels [E, ., .], biases [E, .], slots [G, E, C, d] and scale [G, E, f], each without its
        # E in `_mlp`.
        scale_axis = None if self.hidden_scale is None else 1
        outputs = jax.vmap(self._mlp, in_axes=(0, 0, 1, scale_axis), out_axes=1)(
            self.kernels, self.biases, slots, self.hidden_scale
        )
        return constrain(constrain(outputs, there), here)

    def _mlp(
        self,
        kernels: Mapping[str, jax.Array],
        biases: Mapping[str, jax.Array],
        x: jax.Array,
        scale: jax.Array | None,
    ) -> jax.Array:
        """One expert, `[G, C, d]` to the same shape: what `MlpBlock` computes."""

        def product(x: jax.Array, name: str) -> jax.Array:
            out = projection.dot(x, jnp.asarray(kernels[name], self.dtype))
            return out + jnp.asarray(biases[name], self.dtype) if biases else out

        x = x.astype(self.dtype)
        products = [product(x, name) for name in input_kernel_names(self.activations)]
        hidden = constrain(
            gated(products, self.activations),
            (axes.EXPERT_REPLICA_GROUP, None, axes.ACTIVATION_EXPERT_MLP),
        )
        if scale is not None:
            hidden = hidden * scale[:, None].astype(hidden.dtype)
        return product(hidden, "wo")

    def looped(
        self, tokens: jax.Array, token_index: jax.Array, combine_weight: jax.Array
    ) -> jax.Array:
        """Sends tokens through the experts in a loop over these, and adds up what comes back:
        float32 `[G, S, d]`. Experts take tokens from where they are: no array of slots is made.

        Args:
          tokens: `[G, S, d]`.
          token_index: int32 `[G, E, C]`, the token in each slot; S marks an empty one.
          combine_weight: float32 `[G, E, C]`.
        """
        return looped_experts.apply(
            dict(self.kernels),
            tokens.astype(self.dtype),
            token_index,
            combine_weight,
            activations=self.activations,
            hidden_scale=self.hidden_scale,
            biases=dict(self.biases),
        )

    def grouped(self, tokens: jax.Array, expert: jax.Array, weight: jax.Array) -> jax.Array:
        """For each token the weighted sum of the outputs of the experts that it chose, by products
        of tokens that are sorted by expert: float32 `[N, d]`.

        Args:
          tokens: `[N, d]`.
          expert: int32 `[N, K]`, in `[0, E]`; E marks a choice that is not made.
          weight: float32 `[N, K]`.
        """
        return grouped_experts.apply(
            tokens.astype(self.dtype),
            expert,
            weight,
            self.kernels,
            activations=self.activations,
            dispatch=grouped_experts.resolve(self.dispatch),
            hidden_scale=None if self.hidden_scale is None else self.hidden_scale[0],
            biases=self.biases,
        )
