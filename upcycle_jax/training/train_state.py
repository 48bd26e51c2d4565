"""The state of a run: step, parameters and optimizer state, in the tree that checkpoints hold."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax import state_tree, trees
from upcycle_jax.models.base import Model
from upcycle_jax.state_tree import STEP
from upcycle_jax.training.optimizers import Optimizer
from upcycle_jax.training.parameter_groups import ParameterGroup
from upcycle_jax.trees import LeafSpec
from upcycle_jax.types import PyTree


@flax.struct.dataclass
class TrainState:
    """Everything that a train step changes.

    Attributes:
      step: number of updates done, int32 scalar.
      params: nested parameters.
      param_states: nested optimizer slots: the paths of `params`, each followed by a slot name.
    """

    step: jax.Array
    params: PyTree
    param_states: PyTree

    def state_dict(self) -> dict[str, Any]:
        """The tree of a T5X checkpoint: `{'target': params, 'state': {'step', 'param_states'}}`."""
        return {
            "target": self.params,
            "state": {"step": self.step, "param_states": self.param_states},
        }


def from_state_dict(tree: Mapping[str, Any]) -> TrainState:
    """The inverse of `TrainState.state_dict`; also takes the flat form with full paths, and
    shardings or specs in place of arrays.
    """
    nested = trees.unflatten(tree) if STEP in tree else tree
    return TrainState(
        step=nested["state"]["step"],
        params=nested["target"],
        param_states=nested["state"]["param_states"],
    )


def state_specs(
    model: Model, optimizer: Optimizer, groups: Sequence[ParameterGroup] = ()
) -> dict[str, LeafSpec]:
    """Specs of the whole state by full path, with logical axes; nothing is allocated. Parameters
    that the groups never train have no optimizer state.
    """
    param_specs = model.param_specs()
    return state_tree.specs(param_specs, optimizer.state_specs(param_specs, groups))


def initial_state(
    model: Model,
    optimizer: Optimizer,
    *,
    seed: int,
    shardings: Mapping[str, jax.sharding.Sharding],
    groups: Sequence[ParameterGroup] = (),
) -> TrainState:
    """A state at step 0; see `initial_state_program`."""
    state: TrainState = initial_state_program(
        model, optimizer, seed=seed, shardings=shardings, groups=groups
    )()
    return state


def initial_state_program(
    model: Model,
    optimizer: Optimizer,
    *,
    seed: int,
    shardings: Mapping[str, jax.sharding.Sharding],
    groups: Sequence[ParameterGroup] = (),
) -> Any:
    """The jitted function without arguments that makes a state at step 0, each device computing
    only its own part; call or lower it inside `Partitioner.activate`.

    Args:
      model: makes the parameters.
      optimizer: its fresh slots.
      seed: of the parameters. Dropout draws from other folds of the same seed, see `train_step`.
      shardings: by full path.
      groups: those never trained have no optimizer state.
    """

    def init() -> TrainState:
        params = model.init_params(initialisation_key(seed))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            param_states=optimizer.init(model.param_specs(), groups),
        )

    return jax.jit(init, out_shardings=from_state_dict(shardings))


def initialisation_key(seed: int) -> jax.Array:
    """The key of a model's parameters: a fold that no step reaches."""
    return jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1))


def model_hash(param_specs: Mapping[str, LeafSpec]) -> str:
    """A digest of names, shapes and dtypes of the parameters: equal for models that can share a
    MODEL_DIR.
    """
    lines = "\n".join(f"{path} {spec}" for path, spec in sorted(param_specs.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
