"""The program of a model's loss and of its gradient, traced from shapes: nothing is allocated,
compiled or computed, however large the model.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from upcycle_jax import trees
from upcycle_jax.costs import flops, splits
from upcycle_jax.costs.flops import Value, Work
from upcycle_jax.models.base import Model
from upcycle_jax.moe.even_load import even_load
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import LeafSpec
from upcycle_jax.types import Batch, PyTree

_CALLS = frozenset(["custom_jvp_call", "custom_vjp_call", "jit"])
"""Primitives that call a program as if it were written out."""


@dataclasses.dataclass(frozen=True)
class LossProgram:
    """A forward and a backward pass.

    Attributes:
      forward: parameters (sorted by path) and the batch (sorted by name) -> loss, metrics, and what
        the backward pass needs.
      backward: what the forward pass left, and the gradient of the loss -> gradients.
      num_results: how many results of `forward` are loss and metrics.
      params: specs of the parameters by path.
      batch: shapes of the features by name.
    """

    forward: core.Jaxpr
    backward: core.Jaxpr
    num_results: int
    params: Mapping[str, LeafSpec]
    batch: Mapping[str, jax.ShapeDtypeStruct]

    @property
    def saved(self) -> list[Any]:
        """What the forward pass leaves for the backward pass: results of `forward`."""
        return self.forward.outvars[self.num_results :]

    @functools.cached_property
    def made_by(self) -> dict[core.Var, core.JaxprEqn]:
        """The equation of the forward pass that makes each of its arrays."""
        return {var: equation for equation in self.forward.eqns for var in equation.outvars}

    @functools.cached_property
    def recomputes(self) -> bool:
        """Whether the model says what the backward pass computes again."""
        return any(map(flops.recomputes, self.backward.eqns))


@dataclasses.dataclass(frozen=True)
class Counted:
    """A loss program on a mesh.

    Attributes:
      forward: FLOPs of the forward pass.
      backward: FLOPs of the backward pass. Products that do not depend on the gradient of the loss
        are repeated there; all others are gradients.
      known: how the arrays of the forward pass are divided.
      backward_known: how those of the backward pass are.
    """

    forward: Work
    backward: Work
    known: Mapping[core.Var, Value]
    backward_known: Mapping[core.Var, Value]


def trace(
    model: Model, rows: int, lengths: Mapping[str, int], *, packed: bool = False
) -> LossProgram:
    """Traces a model on a batch of `rows` rows, without dropout, at an even load of its experts.

    Raises:
      ValueError: the model cannot be run on such a batch.
    """
    specs = dict(sorted(model.param_specs().items()))
    params = trees.unflatten(
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in specs.items()}
    )
    batch = dict(sorted(model.input_specs(rows, lengths, packed=packed).items()))

    def loss(params: PyTree, batch: Batch) -> Any:
        one = jnp.ones((), jnp.float32)
        return model.loss_fn(params, batch, None, denominator=one, aux_scale=1.0)

    def forward(params: PyTree, batch: Batch) -> Any:
        value, pull, metrics = jax.vjp(lambda params: loss(params, batch), params, has_aux=True)
        return (value, metrics), pull

    with even_load():
        traced, (results, pull) = jax.make_jaxpr(forward, return_shape=True)(params, batch)
        gradient = jax.ShapeDtypeStruct((), jnp.float32)
        backward = jax.make_jaxpr(lambda pull, gradient: pull(gradient))(pull, gradient)
    return LossProgram(
        _inlined(traced.jaxpr),
        _inlined(backward.jaxpr),
        len(jax.tree.leaves(results)),
        specs,
        batch,
    )


def _inlined(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The program with those that it calls (`jit`, custom derivatives) written out."""
    equations: list[core.JaxprEqn] = []

    def write(jaxpr: core.Jaxpr, operands: Sequence[Any]) -> list[Any]:
        """Adds a program's equations, and returns its results."""
        names = dict(zip(jaxpr.invars, operands, strict=True))

        def named(var: Any) -> Any:
            return var if isinstance(var, core.Literal) else names.get(var, var)

        for equation in jaxpr.eqns:
            given = [named(var) for var in equation.invars]
            called = flops.called(equation) if equation.primitive.name in _CALLS else None
            if called is not None and not called.constvars:
                results = write(called, given)
            else:
                results = [core.Var(var.aval) for var in equation.outvars]
                equations.append(equation.replace(invars=given, outvars=results))
            names.update(zip(equation.outvars, results, strict=True))
        return [named(var) for var in jaxpr.outvars]

    results = write(jaxpr, jaxpr.invars)
    return jaxpr.replace(eqns=equations, outvars=results)


def count(program: LossProgram, partitioner: Partitioner) -> Counted:
    """FLOPs of a program on the mesh of a partitioner."""
    mesh = dict(partitioner.mesh.shape)
    values = [
        Value(splits.of_spec(partitioner.spec(leaf.axes), len(leaf.shape)))
        for leaf in program.params.values()
    ] + [
        Value(splits.of_spec(partitioner.batch_sharding.spec, len(leaf.shape)))
        for leaf in program.batch.values()
    ]
    forward, known = flops.count(program.forward, values, mesh)
    saved = [flops.value_of(var, known) for var in program.saved]
    backward, backward_known = flops.count(
        program.backward, [*saved, Value((), is_gradient=True)], mesh
    )
    return Counted(forward, backward, known, backward_known)
