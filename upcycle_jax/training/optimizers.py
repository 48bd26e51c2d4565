"""Adafactor (T5X's update) and AdamW, computed by optax, with their state in the form in which T5X
stores it.

The state of a parameter is a dictionary of slots (`v_row`, `mu`, ...). Slots that a parameter does
not use are zeros of shape (1,), as in T5X: the tree held during training is the tree in the
checkpoint, and T5X restores it.

An expert kernel is E matrices, not one tensor of rank 3. Every statistic that an optimizer takes
over a whole parameter (row and column means, the RMS of the update, the RMS of the parameter) is
therefore taken over one expert: the leading `expert` axis is a batch axis. T5X says so by its
factor rule `expert: BATCH`; here the update of one leaf is vmapped over that axis.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from upcycle_jax import axes, checks, trees
from upcycle_jax.state_tree import UNUSED_SHAPE
from upcycle_jax.training.parameter_groups import LeafSettings, ParameterGroup, settings_of
from upcycle_jax.training.run_start import StepOrStart, counted_from
from upcycle_jax.trees import LeafSpec, Role
from upcycle_jax.types import PyTree

Slots = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimizerUpdate:
    """What one update returns: nested trees with the paths of the parameters."""

    params: PyTree
    param_states: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """One update rule applied to every parameter on its own; subclasses write it for a single
    matrix, vector or scalar.

    Attributes:
      step_offset: the step that counts as step 0 for the second moments. After upcycling with a
        fresh optimizer state and a step that is kept, set it to the step of the dense checkpoint
        (and leave it there for the rest of the run): the averages then start anew, as at the
        beginning of training. 'start' does so by itself: it is the step at which the state started
        afresh, which checkpoints record, and 0 for a state that is carried on from a checkpoint
        that does not say it. With 0 they continue with the slow averaging of that late step (T5X's
        default); then the first updates divide by averages that are nearly zero, and update
        clipping is what bounds them.
      expert_gradient_scale: factor on the gradients of expert kernels, or None for no factor. T5X's
        MoeTrainer multiplies by the number of expert partitions; with global-view jit sharded
        gradients already equal the ones of a single device, so here it is only a hyper-parameter.
        The second moments of a run hold its square: to go on with a state that T5X's MoeTrainer
        wrote, set it to the number of expert partitions of that run (docs/t5x.md).
    """

    step_offset: StepOrStart = 0
    expert_gradient_scale: checks.NotNegative | None = None

    def __post_init__(self) -> None:
        checks.check_fields(self)

    @property
    @abc.abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Names of the slots that every parameter has in the state."""

    @abc.abstractmethod
    def slot_specs(self, spec: LeafSpec) -> dict[str, LeafSpec]:
        """Specs of the slots that one parameter (one expert's slice of it) uses; the others are
        (1,) zeros.
        """

    @abc.abstractmethod
    def update(
        self,
        param: jax.Array,
        grad: jax.Array,
        slots: Slots,
        *,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        """The new parameter and the new slots of one parameter (one expert's slice of it); `grad`
        is float32.
        """

    @property
    def forms(self) -> "tuple[Optimizer, ...]":
        """This optimizer with each form that the state may have: more than one where the setting
        leaves that to the checkpoint that a run starts from; the first where there is none.
        """
        return (self,)

    def started_at(self, step: int) -> Self:
        """This optimizer with a state that started at a step, which an offset of 'start' then
        is.
        """
        return dataclasses.replace(self, step_offset=counted_from(self.step_offset, step))

    @abc.abstractmethod
    def with_weight_decay(self, value: float) -> "Optimizer":
        """This optimizer with another weight decay."""

    def for_expert(self, spec: LeafSpec) -> "Optimizer":
        """The optimizer of one expert's slice of a kernel, `spec`."""
        return self

    def state_specs(
        self, param_specs: Mapping[str, LeafSpec], groups: Sequence[ParameterGroup] = ()
    ) -> dict[str, LeafSpec]:
        """Specs of the optimizer state, `{path/slot: spec}`, with logical axes. Parameters that
        the groups never train use no slot.
        """
        out = {}
        for path, spec in param_specs.items():
            lifted = is_expert(spec)
            one_of = _slice_spec(spec) if lifted else spec
            used = (self.for_expert(one_of) if lifted else self).slot_specs(one_of)
            if settings_of(path, spec, groups).is_always_frozen:
                used = {}
            for slot in self.slots:
                if slot not in used:
                    out[f"{path}/{slot}"] = LeafSpec(UNUSED_SHAPE, np.dtype(np.float32))
                elif lifted:
                    one = used[slot]
                    out[f"{path}/{slot}"] = LeafSpec(
                        spec.shape[:1] + one.shape, one.dtype, spec.axes[:1] + one.axes
                    )
                else:
                    out[f"{path}/{slot}"] = used[slot]
        return dict(sorted(out.items()))

    def init(
        self, param_specs: Mapping[str, LeafSpec], groups: Sequence[ParameterGroup] = ()
    ) -> PyTree:
        """A fresh state, all zeros, nested; under jit nothing but the result is allocated."""
        return trees.unflatten(
            {
                path: jnp.zeros(spec.shape, spec.dtype)
                for path, spec in self.state_specs(param_specs, groups).items()
            }
        )

    def apply(
        self,
        params: PyTree,
        grads: PyTree,
        param_states: PyTree,
        *,
        param_specs: Mapping[str, LeafSpec],
        step: jax.Array,
        learning_rate: jax.Array | float,
        groups: Sequence[ParameterGroup] = (),
    ) -> OptimizerUpdate:
        """Updates every parameter once, but those that are frozen.

        Args:
          params: nested parameters.
          grads: nested gradients, any float dtype; the update is computed in float32.
          param_states: nested state as from `init` with the same groups.
          param_specs: flat specs of `params`; their logical axes say which parameters are expert
            kernels.
          step: number of updates done before this one, int32 scalar (0 for the first).
          learning_rate: of this step.
          groups: parameters for which something is different.
        """
        flat_grads, flat_states = trees.flatten(grads), trees.flatten(param_states)
        learning_rate = jnp.asarray(learning_rate, jnp.float32)
        new_params, new_states = {}, {}
        for path, param in trees.flatten(params).items():
            slots = {slot: flat_states[f"{path}/{slot}"] for slot in self.slots}
            new_params[path], new_slots = self._apply_with_settings(
                settings_of(path, param_specs[path], groups),
                param_specs[path],
                param,
                flat_grads[path],
                slots,
                step,
                learning_rate,
            )
            new_states.update({f"{path}/{slot}": value for slot, value in new_slots.items()})
        return OptimizerUpdate(
            params=trees.unflatten(new_params), param_states=trees.unflatten(new_states)
        )

    def _apply_with_settings(
        self,
        settings: LeafSettings,
        spec: LeafSpec,
        param: jax.Array,
        grad: jax.Array,
        slots: Slots,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        if settings.is_always_frozen:
            return param, slots
        decay = settings.weight_decay
        optimizer = self if decay is None else self.with_weight_decay(decay)
        if settings.learning_rate_factor != 1.0:
            learning_rate = learning_rate * settings.learning_rate_factor
        after = optimizer._apply_leaf(spec, param, grad, slots, step, learning_rate)
        held: tuple[jax.Array, Slots] = settings.held((param, slots), after, step)
        return held

    def _apply_leaf(
        self,
        spec: LeafSpec,
        param: jax.Array,
        grad: jax.Array,
        slots: Slots,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        grad = grad.astype(jnp.float32)
        if not is_expert(spec):
            used = self.slot_specs(spec)
            new_param, new_used = self.update(
                param, grad, {s: slots[s] for s in used}, step=step, learning_rate=learning_rate
            )
        else:
            if self.expert_gradient_scale is not None:
                grad = grad * self.expert_gradient_scale
            optimizer = self.for_expert(_slice_spec(spec))
            used = optimizer.slot_specs(_slice_spec(spec))

            def update_one_expert(
                param: jax.Array, grad: jax.Array, one_slots: Slots
            ) -> tuple[jax.Array, Slots]:
                return optimizer.update(
                    param, grad, one_slots, step=step, learning_rate=learning_rate
                )

            new_param, new_used = jax.vmap(update_one_expert)(
                param, grad, {s: slots[s] for s in used}
            )
        return new_param.astype(param.dtype), {
            **{s: jnp.zeros(UNUSED_SHAPE, jnp.float32) for s in self.slots},
            **new_used,
        }


def root_mean_squares(x: jax.Array, at_least: float) -> jax.Array:
    """The RMS of all elements, or `at_least`: `optax.safe_root_mean_squares` to the same bits,
    without the copy of the array that defines its gradient where the RMS is zero.
    """
    return jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(x))), at_least)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor with T5X's defaults: no momentum, factored second moments, clipped and
    parameter-scaled updates.

    With t = step - step_offset + 1 the averages decay by 1 - t^-decay_rate (so the first update
    after `step_offset` forgets what was there), the update is clipped to RMS `clipping_threshold`
    and multiplied by the learning rate and by max(RMS(parameter), epsilon2).

    A matrix is factored over its two dimensions where both have at least `min_dim_size_to_factor`
    elements: `v_row` is indexed by the smaller dimension, `v_col` by the larger one. T5X does so
    too, but for expert kernels, which it factors at every size and with `v_row` over `embed`. The
    two agree when min_dim_size_to_factor <= d_model < expert width, as in every T5 1.1 size;
    where they do not, `expert_factoring` decides. Updates of factored kernels are the same in
    both.

    Attributes:
      expert_factoring: the form of the second moments of expert kernels. 'by_size': as for any
        matrix. 't5x': as T5X keeps them. None: as the checkpoint that a run restores has them
        (`training.expert_slots`), else 'by_size'. Set 't5x' for a small model, or for experts
        narrower than d_model, whose state T5X is to go on with.
      multiply_by_parameter_scale: make the learning rate relative to the size of each parameter.
      beta1: decay of an average over updates (`m`), or None for none.
      weight_decay_rate: each step multiplies parameters by one minus this, or None.
    """

    factored: bool = True
    multiply_by_parameter_scale: bool = True
    beta1: checks.BelowOne | None = None
    decay_rate: checks.Share = 0.8
    clipping_threshold: checks.Positive | None = 1.0
    weight_decay_rate: checks.NotNegative | None = None
    min_dim_size_to_factor: int = 128
    epsilon1: checks.NotNegative = 1e-30
    epsilon2: checks.NotNegative = 1e-3
    expert_factoring: Literal["by_size", "t5x"] | None = None

    @property
    def forms(self) -> tuple[Optimizer, ...]:
        if self.expert_factoring is not None or not self.factored:
            return (self,)
        return tuple(
            dataclasses.replace(self, expert_factoring=form) for form in ("by_size", "t5x")
        )

    def for_expert(self, spec: LeafSpec) -> Optimizer:
        if self.expert_factoring != "t5x" or not self.factored or len(spec.shape) != 2:
            return self
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rows_are_larger = spec.axes[_factored_dims(spec.shape)[1]] == axes.EMBED
        return _FactoredAsT5x(
            **settings | {"min_dim_size_to_factor": 0, "expert_factoring": None},
            rows_are_larger=rows_are_larger,
        )

    def with_weight_decay(self, value: float) -> "Adafactor":
        return dataclasses.replace(self, weight_decay_rate=value)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("m", "v", "v_col", "v_row")

    def slot_specs(self, spec: LeafSpec) -> dict[str, LeafSpec]:
        used = factored_slot_specs(spec, self.min_dim_size_to_factor if self.factored else None)
        if self.beta1 is not None:
            used["m"] = LeafSpec(spec.shape, np.dtype(np.float32), spec.axes)
        return used

    def update(
        self,
        param: jax.Array,
        grad: jax.Array,
        slots: Slots,
        *,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        unused = jnp.zeros(UNUSED_SHAPE, jnp.float32)
        second_moments = optax.scale_by_factored_rms(
            factored=self.factored,
            decay_rate=self.decay_rate,
            step_offset=counted_from(self.step_offset, None),
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            epsilon=self.epsilon1,
        )
        state = optax.FactoredState(
            count=step, **{slot: slots.get(slot, unused) for slot in ("v_row", "v_col", "v")}
        )
        param32 = param.astype(jnp.float32)
        change, state = second_moments.update(grad, state, param32)
        new_slots: Slots = {
            slot: getattr(state, slot) for slot in ("v_row", "v_col", "v") if slot in slots
        }
        if self.clipping_threshold is not None:
            change = _stateless(optax.clip_by_block_rms(self.clipping_threshold), change, param32)
        change = change * learning_rate
        if self.multiply_by_parameter_scale:
            change = change * root_mean_squares(param32, self.epsilon2)
        if self.beta1 is not None:
            average = optax.ema(self.beta1, debias=False)
            change, ema = average.update(change, optax.EmaState(count=step, ema=slots["m"]))
            new_slots["m"] = ema.ema
        if self.weight_decay_rate is not None:
            param32 = param32 * (1.0 - self.weight_decay_rate)
        return param32 - change, new_slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FactoredAsT5x(Adafactor):
    """Adafactor of one expert's matrix as T5X keeps it: factored whatever its size, with `v_row`
    over `embed`.

    Attributes:
      rows_are_larger: `embed` is what Adafactor calls the larger dimension, so that the two slots
        change names.
    """

    rows_are_larger: bool

    def slot_specs(self, spec: LeafSpec) -> dict[str, LeafSpec]:
        return self._renamed(super().slot_specs(spec))

    def update(
        self,
        param: jax.Array,
        grad: jax.Array,
        slots: Slots,
        *,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        param, new_slots = super().update(
            param, grad, self._renamed(slots), step=step, learning_rate=learning_rate
        )
        return param, self._renamed(new_slots)

    def _renamed(self, slots: dict[str, Any]) -> dict[str, Any]:
        if not self.rows_are_larger:
            return slots
        return {**slots, "v_row": slots["v_col"], "v_col": slots["v_row"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay: parameter -= learning_rate * (adam + weight_decay *
    parameter).

    Bias correction counts from `step_offset`, so a state that starts afresh at a late step needs
    `step_offset` at that step.

    Attributes:
      b1: decay of the gradient average (`mu`).
      b2: decay of the squared-gradient average (`nu`).
      eps: added to the root of the second moment.
      weight_decay: per unit of learning rate, of every parameter, norms and embeddings too, but
        those of which a `ParameterGroup` says otherwise.
    """

    b1: checks.BelowOne = 0.9
    b2: checks.BelowOne = 0.999
    eps: checks.NotNegative = 1e-8
    weight_decay: checks.NotNegative = 0.0

    def with_weight_decay(self, value: float) -> "AdamW":
        return dataclasses.replace(self, weight_decay=value)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("mu", "nu")

    def slot_specs(self, spec: LeafSpec) -> dict[str, LeafSpec]:
        return {slot: LeafSpec(spec.shape, np.dtype(np.float32), spec.axes) for slot in self.slots}

    def update(
        self,
        param: jax.Array,
        grad: jax.Array,
        slots: Slots,
        *,
        step: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        state = optax.ScaleByAdamState(
            count=step - counted_from(self.step_offset, None), mu=slots["mu"], nu=slots["nu"]
        )
        change, state = adam.update(grad, state)
        param32 = param.astype(jnp.float32)
        change = _stateless(optax.add_decayed_weights(self.weight_decay), change, param32)
        return param32 - learning_rate * change, {"mu": state.mu, "nu": state.nu}


def is_expert(spec: LeafSpec) -> bool:
    """Whether a parameter is an expert kernel, `[E, ...]`."""
    return spec.role is Role.EXPERT


def _slice_spec(spec: LeafSpec) -> LeafSpec:
    return LeafSpec(spec.shape[1:], spec.dtype, spec.axes[1:])


def factored_slot_specs(spec: LeafSpec, min_dim_size: int | None) -> dict[str, LeafSpec]:
    """Specs of the second moments of a parameter: `v_row` and `v_col` where its two largest
    dimensions have at least `min_dim_size` elements, else, and for None, `v`.

    optax's choice, restated because a spec tree must be known before any array exists; a test keeps
    the two together.
    """
    if min_dim_size is not None and len(spec.shape) >= 2:
        small, large = _factored_dims(spec.shape)
        if spec.shape[small] >= min_dim_size:
            return {"v_row": _without(spec, large), "v_col": _without(spec, small)}
    return {"v": LeafSpec(spec.shape, np.dtype(np.float32), spec.axes)}


def _factored_dims(shape: tuple[int, ...]) -> tuple[int, int]:
    """The second largest and the largest dimension; of equal ones the earlier counts as
    smaller.
    """
    order = np.argsort(shape)
    return int(order[-2]), int(order[-1])


def _without(spec: LeafSpec, dim: int) -> LeafSpec:
    """The float32 spec without one dimension."""
    keep = [i for i in range(len(spec.shape)) if i != dim]
    return LeafSpec(
        tuple(spec.shape[i] for i in keep), np.dtype(np.float32), tuple(spec.axes[i] for i in keep)
    )


def _stateless(
    transformation: optax.GradientTransformation, change: jax.Array, param: jax.Array
) -> jax.Array:
    update: jax.Array = transformation.update(change, transformation.init(param), param)[0]
    return update
