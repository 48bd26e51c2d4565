"""Stochastic gradient descent with momentum, with which vision transformers are fine-tuned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from upcycle_jax import checks
from upcycle_jax.training.optimizers import Optimizer, Slots
from upcycle_jax.trees import LeafSpec

TRACE = "m"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sgd(Optimizer):
    """Gradient descent with momentum: m = momentum m + gradient, parameter -= learning_rate * (m +
    weight_decay * parameter).

    Attributes:
      momentum: decay of the sum over gradients (`m`); 0 for none.
      nesterov: step by momentum m + gradient of the new m.
      weight_decay: per unit of learning rate, of every parameter but those of which a
        `ParameterGroup` says otherwise.
    """

    momentum: checks.BelowOne = 0.9
    nesterov: bool = False
    weight_decay: checks.NotNegative = 0.0

    def with_weight_decay(self, value: float) -> "Sgd":
        return dataclasses.replace(self, weight_decay=value)

    @property
    def slots(self) -> tuple[str, ...]:
        return (TRACE,)

    def slot_specs(self, spec: LeafSpec) -> dict[str, LeafSpec]:
        return {TRACE: LeafSpec(spec.shape, np.dtype(np.float32), spec.axes)}

    def update(
        self,
        param: jax.Array,
        grad: jax.Array,
        slots: Slots,
        *,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        trace = optax.trace(decay=self.momentum, nesterov=self.nesterov)
        change, state = trace.update(grad, optax.TraceState(trace=slots[TRACE]))
        param32 = param.astype(jnp.float32)
        new_param: jax.Array = param32 - learning_rate * (change + self.weight_decay * param32)
        return new_param, {TRACE: state.trace}
