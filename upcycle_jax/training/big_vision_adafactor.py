"""The Adafactor of big_vision, with which vision transformers are trained ("Scaling Vision
Transformers", Zhai et al. 2021, arXiv 2106.04560, section 3.4): momentum in bfloat16, second
moments that never average over more than about a thousand steps, no scaling by the size of a
parameter.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from upcycle_jax import checks
from upcycle_jax.state_tree import UNUSED_SHAPE
from upcycle_jax.training.optimizers import Optimizer, Slots, factored_slot_specs
from upcycle_jax.training.run_start import counted_from
from upcycle_jax.trees import LeafSpec

COUNT, MOMENTUM = "count", "m"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigVisionAdafactor(Optimizer):
    """Adafactor as big_vision and V-MoE have it for vision transformers.

    With t the number of an update, counted from 1, and g the gradient:

        beta = min(max_decay, 1 - t^-decay_rate)
        v    = beta v + (1 - beta) (g^2 + epsilon)     by rows and columns where factored
        u    = g / sqrt(v)                             clipped to RMS clipping_threshold, if set
        m    = momentum m + (1 - momentum) u           not debiased, kept in `momentum_dtype`
        p    = p - learning_rate (m + weight_decay p)

    A parameter is factored over its two largest dimensions where both have at least
    `min_dim_size_to_factor` elements. An expert is factored as the dense MLP is that it comes from:
    the expert axis never is a factored dimension, so that the slots of the MLP, tiled, are those of
    its experts, with any number of experts. (In V-MoE, which factors the stacked kernel, biases
    `[E, f]` are factored from 32 experts on.)

    Attributes:
      count_by: what t counts. 'leaf': the updates that the slots of the parameter have seen, which
        are kept in its slot `count` (of every expert on its own). Slots that start afresh beside
        loaded ones, as a router's when a network is upcycled with its optimizer state, then average
        as at the beginning of training. 'step': the run's steps, as big_vision and V-MoE do: the
        update of a fresh parameter at a late step is up to seven times as large as those of the
        others, over about a hundred steps; set `clipping_threshold` to 1 to bound it.
      decay_rate: exponent of the decay.
      max_decay: upper bound of beta.
      epsilon: added to squared gradients.
      min_dim_size_to_factor: see above.
      clipping_threshold: upper bound of the RMS of a parameter's u (of one expert's), or None.
      momentum: decay of the average over updates.
      momentum_dtype: 'bfloat16' or 'float32', of its slot `m`. V-MoE has float32.
      weight_decay: per unit of learning rate, of every parameter but those of which a
        `ParameterGroup` says otherwise.
    """

    count_by: Literal["leaf", "step"] = "leaf"
    decay_rate: checks.Share = 0.8
    max_decay: checks.BelowOne = 0.999
    epsilon: checks.NotNegative = 1e-30
    min_dim_size_to_factor: checks.Size = 32
    clipping_threshold: checks.Positive | None = None
    momentum: checks.BelowOne = 0.9
    momentum_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    weight_decay: checks.NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count_by == "leaf" and self.step_offset != 0:
            raise ValueError(
                f"BigVisionAdafactor.step_offset is {self.step_offset!r}, and every parameter"
                " counts its own updates: leave it at 0, or set BigVisionAdafactor.count_by ="
                " 'step'"
            )

    def with_weight_decay(self, value: float) -> "BigVisionAdafactor":
        return dataclasses.replace(self, weight_decay=value)

    @property
    def slots(self) -> tuple[str, ...]:
        return (COUNT, MOMENTUM, "v", "v_col", "v_row")

    def slot_specs(self, spec: LeafSpec) -> dict[str, LeafSpec]:
        return {
            **factored_slot_specs(spec, self.min_dim_size_to_factor),
            MOMENTUM: LeafSpec(spec.shape, jnp.dtype(self.momentum_dtype), spec.axes),
            COUNT: LeafSpec((), np.dtype(np.int32)),
        }

    def update(
        self,
        param: jax.Array,
        grad: jax.Array,
        slots: Slots,
        *,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        count = slots[COUNT]
        done = count if self.count_by == "leaf" else step - counted_from(self.step_offset, None)
        param32 = param.astype(jnp.float32)
        second_moments = optax.scale_by_factored_rms(
            decay_rate=self.decay_rate,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            epsilon=self.epsilon,
            decay_rate_fn=self._beta,
        )
        unused = jnp.zeros(UNUSED_SHAPE, jnp.float32)
        state = optax.FactoredState(
            count=done, **{slot: slots.get(slot, unused) for slot in ("v_row", "v_col", "v")}
        )
        change, state = second_moments.update(grad, state, param32)
        if self.clipping_threshold is not None:
            clip = optax.clip_by_block_rms(self.clipping_threshold)
            change, _ = clip.update(change, clip.init(param32))
        # In float32, whatever the dtype of the slot: a product in bfloat16 would depend on what the
        # compiler fuses.
        before = slots[MOMENTUM].astype(jnp.float32)
        change = self.momentum * before + (1.0 - self.momentum) * change
        new_slots: Slots = {
            slot: getattr(state, slot) for slot in ("v_row", "v_col", "v") if slot in slots
        }
        new_slots[MOMENTUM] = change.astype(self.momentum_dtype)
        new_slots[COUNT] = optax.safe_increment(count)
        return param32 - learning_rate * (change + self.weight_decay * param32), new_slots

    def _beta(self, done: jax.typing.ArrayLike, exponent: jax.typing.ArrayLike) -> jax.Array:
        """The decay of second moments in the update after `done` others."""
        power = jnp.power(jnp.asarray(done, jnp.float32) + 1.0, -jnp.asarray(exponent))
        return jnp.minimum(self.max_decay, 1.0 - power)
