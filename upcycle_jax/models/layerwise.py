"""A model's forward pass in steps, each with parameters of its own: how a model is run that is
larger than memory.

Whoever runs the steps reads the parameters of one at a time and carries the state from one to the
next. The experts of an MoE layer are left out of its step: the step decides which tokens go to
which experts (`MoeCall.dispatcher`), the caller puts them through the experts, a few at a time
(`expert_outputs`), and runs the step again with what came back.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar, cast, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from upcycle_jax.models.base import Model
from upcycle_jax.moe import roles
from upcycle_jax.moe.dispatch import Dispatcher
from upcycle_jax.moe.layer import MoeLayer
from upcycle_jax.moe.router_logits import RouterLogits
from upcycle_jax.types import Batch, PyTree

State = dict[str, Any]
"""What goes from step to step. Before the first it is the batch; after it, it holds the residual
stream `x [batch, length, d]` and `valid`, bool `[batch, length]`, of the stack that is being run,
and what else the model's own steps need.
"""

Out = TypeVar("Out")


@flax.struct.dataclass
class MoeCall:
    """What went through one MoE layer.

    Attributes:
      x: its input `[batch, length, d]`.
      valid: bool `[batch, length]`, real tokens.
      y: its output `[batch, length, d]`.
      gates: float32 `[batch, length]`, each token's combine weights, summed.
      router_logits: float32 `[G, S, columns]`.
      tokens: the input in groups, `[G, S, d]`.
      dispatcher: of every group, with a leading G.
    """

    x: jax.Array
    valid: jax.Array
    y: jax.Array
    gates: jax.Array
    router_logits: jax.Array
    tokens: jax.Array
    dispatcher: Dispatcher


class Program(Protocol):
    """The computation of a step. Hashable: equal programs are compiled once."""

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, MoeCall | None]:
        """The state after the step, and what went through its MoE layer if it has one.

        Args:
          params: those that `Step.params` names, float32, nested; experts are left out.
          state: before the step.
          expert_outputs: what the experts of its MoE layer give, float32 `[G, S, d]`; None: zeros.
        """


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a forward pass.

    Attributes:
      name: of a layer its path, e.g. 'encoder/layers_1'; else what it does, in words.
      is_layer: it adds to the residual stream, which can be compared with another model's.
      params: subtrees (or leaves) of the model's parameters that it needs, by path -> their place
        in what `program` takes.
      program: see `Program`.
      experts: path of the subtree of its experts' parameters; '' without experts.
      moe: the MoE layer, unbound.
    """

    name: str
    is_layer: bool
    params: Mapping[str, str]
    program: Program
    experts: str = ""
    moe: MoeLayer | None = None

    def place(self, path: str) -> str | None:
        """Where a parameter of the model is in what `program` takes; None where it is not in it."""
        for subtree, place in self.params.items():
            if path == subtree or path.startswith(f"{subtree}/"):
                return place + path[len(subtree) :]
        return None


def in_place(paths: Iterable[str]) -> dict[str, str]:
    """`Step.params` of parameters that the program takes where the model has them."""
    return {path: path for path in paths}


def layer_step(
    name: str, layer: nn.Module, given: tuple[str, ...], *, moe: MoeLayer | None
) -> Step:
    """The step of a layer.

    Args:
      name: its path, e.g. 'encoder/layers_1'.
      layer: unbound; its first argument is the residual stream.
      given: names in the state of its other arguments, in order.
      moe: its MoE layer, unbound, which is its `mlp`; None in a dense layer.
    """
    experts = "" if moe is None else f"{name}/mlp/{roles.EXPERT}"
    return Step(name, True, {name: "layer"}, _Layer(layer, given), experts=experts, moe=moe)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The program of `layer_step`."""

    layer: nn.Module
    given: tuple[str, ...]

    def __call__(
        self, params: PyTree, state: State, expert_outputs: jax.Array | None = None
    ) -> tuple[State, MoeCall | None]:
        variables, given = {"params": params["layer"]}, (state[name] for name in self.given)
        x, call = without_experts(
            lambda: self.layer.apply(variables, state["x"], *given, train=False), expert_outputs
        )
        return {**state, "x": x}, call


@runtime_checkable
class LayerwiseModel(Model, Protocol):
    """A model that says how to run it layer by layer, in evaluation mode, and what dense model it
    is compared with: what the function check needs.
    """

    def layer_steps(self) -> Sequence[Step]:
        """The steps in order. The last one puts `logits` into the state, and may be given `x` and
        `valid` of a few rows alone.
        """

    def row_bytes(self, batch: Batch) -> int:
        """Bytes of activations, about, that one row of such a batch takes while steps run."""

    @property
    def dense(self) -> Self:
        """The dense model that this one is upcycled from."""

    def in_float32(self, *, renormalised: bool = False) -> Self:
        """This model in float32.

        Args:
          renormalised: with combine weights that sum to 1, room for every token, and without a
            shared expert: where experts are copies, it then is the dense model.
        """

    def reference_mlp(
        self, x: np.ndarray, kernels: Mapping[str, np.ndarray], *, units: int | None = None
    ) -> np.ndarray:
        """The dense MLP in NumPy, float64, written apart from the model.

        Args:
          x: inputs `[..., d]`.
          kernels: of the MLP, by the paths below it ('wi_0/kernel').
          units: the first hidden units alone; None: all.
        """


@functools.partial(jax.jit, static_argnums=0)
def run(
    program: Program, params: PyTree, state: State, expert_outputs: jax.Array | None = None
) -> tuple[State, MoeCall | None]:
    """Runs a step."""
    return program(params, state, expert_outputs)


@functools.partial(jax.jit, static_argnums=0)
def route(program: Program, params: PyTree, state: State) -> tuple[jax.Array, Dispatcher]:
    """Tokens and dispatcher of a step's MoE layer (see `MoeCall`); nothing goes through experts."""
    _, call = program(params, state)
    assert call is not None
    return call.tokens, call.dispatcher


@functools.partial(jax.jit, static_argnums=0)
def expert_outputs(
    layer: MoeLayer,
    kernels: PyTree,
    tokens: jax.Array,
    dispatcher: Dispatcher,
    expert: jax.Array | int,
) -> jax.Array:
    """What one expert adds: float32 `[G, S, d]`.

    Args:
      layer: the MoE layer.
      kernels: parameters of the expert, with a leading axis of 1.
      tokens: see `route`.
      dispatcher: see `route`.
      expert: int32 scalar, which one it is.
    """
    part = jax.vmap(lambda one: one.part(expert, 1))(dispatcher)
    return _process(layer, kernels, tokens, part)


@functools.partial(jax.jit, static_argnums=0)
def copies_outputs(
    layer: MoeLayer, kernels: PyTree, tokens: jax.Array, dispatcher: Dispatcher, members: jax.Array
) -> jax.Array:
    """What several experts that are copies of one add, as `expert_outputs`; `members` is bool
    `[E]`.
    """
    merged = jax.vmap(lambda one: one.merged(members, tokens.shape[1]))(dispatcher)
    return _process(layer, kernels, tokens, merged)


def _process(
    layer: MoeLayer, kernels: PyTree, tokens: jax.Array, dispatcher: Dispatcher
) -> jax.Array:
    variables = {"params": {"expert": kernels}}
    outputs = layer.apply(variables, tokens, dispatcher, method="process")
    return cast(jax.Array, outputs)


def without_experts(
    call_layer: Callable[[], Out], outputs: jax.Array | None
) -> tuple[Out, MoeCall | None]:
    """Calls a layer whose experts are not there: `outputs` (zeros, if None) stand for what they
    give. Returns also what went through the MoE layer, None where there is none.
    """
    seen: dict[str, Any] = {}

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, method = context.module, context.method_name
        if isinstance(module, MoeLayer) and method == "process":
            tokens, dispatcher = args
            seen.update(tokens=tokens, dispatcher=dispatcher)
            return jnp.zeros(tokens.shape, jnp.float32) if outputs is None else outputs
        out = call(*args, **kwargs)
        if isinstance(module, RouterLogits) and method == "__call__":
            seen["router_logits"] = out
        elif isinstance(module, MoeLayer) and method == "__call__":
            x, valid, *_ = args
            seen.update(x=x, valid=valid, y=out, gates=_gates(module, seen["dispatcher"], x))
        return out

    with nn.intercept_methods(intercept):
        out = call_layer()
    return out, MoeCall(**seen) if seen else None


def _gates(layer: MoeLayer, dispatcher: Dispatcher, x: jax.Array) -> jax.Array:
    """Summed combine weights `[batch, length]` of the dispatchers of all groups."""
    rows, columns, _ = x.shape
    grouping = layer.policy.sizes(rows, columns, train=False).grouping
    sums = jax.vmap(lambda one: one.weight_per_token(grouping.group_size))(dispatcher)
    return grouping.join(sums, rows, columns)
