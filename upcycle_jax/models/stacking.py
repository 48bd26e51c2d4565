"""How the layers of a stack are run: one after the other, or as a loop over a block of layers that
repeats; recomputed in the backward pass or not.

Parameters are always those of single layers (`layers_0`, `layers_1`, ...), in checkpoints and in
the train state. A scanned stack puts the parameters of the layers that a block repeats side by side
when a program runs, and loops over them: the program then holds one block instead of all layers,
and what is computed again in the backward pass stays inside the loop. What that costs: on each
device one more copy of those parameters while a step runs, one more of their gradients, and the
time to copy both; XLA also cannot move work from one layer into another.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle_jax.models import layer_names

RESIDUALS = "residuals"
"""The variable collection in which every layer leaves the residual stream after it (under the name
`output`).
"""

RematPolicy = Literal["none", "minimal", "full"]

REMAT_POLICIES: dict[str, Any] = {
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": None,
}
"""What the backward pass still finds in memory, for layers that it computes again: T5X's names and
meaning. 'minimal' keeps the results of matrix products that have no batch dimension, which are
projections, dense MLPs and router logits; attention's products and experts are computed again.
'full' keeps the residual stream between layers alone.
"""


def leave_residual(layer: nn.Module, x: jax.Array) -> None:
    """Leaves the residual stream after a layer in `RESIDUALS`, where that is asked for."""
    layer.sow(RESIDUALS, "output", x, reduce_fn=lambda _, new: new, init_fn=lambda: None)


_SHAPES_ALONE = contextvars.ContextVar("shapes_alone", default=False)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Within, initialisation runs one layer of each kind, whose parameters stand for those of all
    others of that kind, too. Their shapes are right and their values are not: for
    `jax.eval_shape` of a function that is traced nowhere else, which a deep model takes long for
    otherwise.
    """
    token = _SHAPES_ALONE.set(True)
    try:
        yield
    finally:
        _SHAPES_ALONE.reset(token)


LayerFactory = Callable[..., nn.Module]
"""Makes the layer of an index (its one argument); the keywords are those of `nn.Module` (`name`,
`parent`).
"""

LayerCall = Callable[[nn.Module, jax.Array], jax.Array]
"""Calls a layer on the residual stream; whatever else a layer takes is in its closure."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive layers of a stack: a block of layers that repeats, or a single layer.

    Attributes:
      start: index of its first layer.
      period: layers of the block.
      repeats: how often the block follows itself; 1 for a single layer.
    """

    start: int
    period: int
    repeats: int

    @property
    def layers(self) -> range:
        """Indices of its layers."""
        return range(self.start, self.start + self.period * self.repeats)


def segments(kinds: Sequence[Any]) -> tuple[Segment, ...]:
    """Divides a stack into blocks that repeat and single layers, left to right, always taking the
    block that covers most layers.

    >>> segments([False, True, False, True])
    (Segment(start=0, period=2, repeats=2),)
    >>> segments([True, False, False, False])
    (Segment(start=0, period=1, repeats=1), Segment(start=1, period=1, repeats=3))

    Args:
      kinds: what kind each layer is of; layers of one kind have parameters of the same shapes.
    """
    out: list[Segment] = []
    start = 0
    while start < len(kinds):
        best = Segment(start, 1, 1)
        for period in range(1, (len(kinds) - start) // 2 + 1):
            repeats = 1
            while list(kinds[start + period * repeats : start + period * (repeats + 1)]) == list(
                kinds[start : start + period]
            ):
                repeats += 1
            if repeats > 1 and period * repeats > len(best.layers):
                best = Segment(start, period, repeats)
        out.append(best)
        start += len(best.layers)
    return tuple(out)


def run_layers(
    stack: nn.Module,
    make: LayerFactory,
    call: LayerCall,
    x: jax.Array,
    *,
    kinds: Sequence[Any],
    scan: bool = False,
    remat_policy: RematPolicy = "none",
    called: str = layer_names.LAYERS,
) -> jax.Array:
    """Runs all layers of a stack on the residual stream `[batch, length, d]`.

    Call it in the compact method of `stack`, whose submodules the layers are. Initialisation never
    scans. Every layer draws from random keys of its own in either form, but those of scanned layers
    are other ones: with dropout or router jitter, a scanned and an unscanned run of one seed differ
    as two seeds do.

    Args:
      stack: the module that the layers belong to.
      make: makes a layer.
      call: calls it.
      x: what the first layer takes.
      kinds: one entry per layer; layers of equal entries are interchangeable but for their
        parameters.
      scan: loop over the blocks that repeat.
      remat_policy: see `REMAT_POLICIES`.
      called: what layers are called, as the model's `Stack` says.
    """
    if not scan or stack.is_initializing():
        parts: tuple[Segment, ...] = tuple(Segment(i, 1, 1) for i in range(len(kinds)))
    else:
        parts = segments(kinds)
    same_shapes = stack.is_initializing() and _SHAPES_ALONE.get()
    for part in parts:
        if part.repeats > 1:
            x = _scanned(stack, make, call, x, part, remat_policy, called)
            continue
        name = layer_names.name(part.start, called)
        first = list(kinds).index(kinds[part.start])
        if same_shapes and first < part.start:
            like = stack.variables["params"][layer_names.name(first, called)]
            stack.put_variable("params", name, like)
            continue
        layer = make(part.start, name=name)
        if remat_policy == "none":
            x = call(layer, x)
        else:
            x = nn.remat(call, policy=REMAT_POLICIES[remat_policy])(layer, x)
    return x


def _scanned(
    stack: nn.Module,
    make: LayerFactory,
    call: LayerCall,
    x: jax.Array,
    part: Segment,
    remat_policy: RematPolicy,
    called: str,
) -> jax.Array:
    """A loop over the repeats of a block. What its layers leave in variable collections is put
    where single layers would have put it.

    Flax has a scan of its own, whose parameters are stacked in checkpoints, too. Here layers keep
    parameters of their own, so that this function takes their variables out of the stack's scope,
    stacks them by position in the block, scans over plain functions, and puts back what they left.
    For layers 1 to 6 as a block of two layers that repeats three times:

        position 0: layers 1, 3, 5 -> leaves [3, ...]      repeat 0: layers 1, 2
        position 1: layers 2, 4, 6 -> leaves [3, ...]      repeat 1: layers 3, 4, and so on
    """
    scope = stack.scope
    assert scope is not None
    variables = stack.variables
    collections = [
        name
        for name, content in variables.items()
        if any(layer_names.name(i, called) in content for i in part.layers)
    ]
    # [layers] keys of each kind ('dropout', 'jitter'), so that each repeat draws from its own.
    keys = {name: jax.random.split(stack.make_rng(name), len(part.layers)) for name in scope.rngs}

    def of_layer(i: int) -> Any:
        """Variables and random keys of one layer."""
        layer = layer_names.name(i, called)
        mine = {name: variables[name][layer] for name in collections if layer in variables[name]}
        return mine, {name: key[i - part.start] for name, key in keys.items()}

    def layer_at(position: int) -> Any:
        """The function of the layer at a position of the block: (x, what `of_layer` gives) to (x,
        what it leaves in collections).
        """
        # Not bound to the stack's scope: it gets its variables as arguments. Layers of one position
        # are interchangeable, so that the first one stands for all.
        layer = make(part.start + position, parent=None)

        def run(x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
            mine, rngs = given
            if not scope.mutable:
                return nn.apply(call, layer)(mine, x, rngs=rngs), {}
            return nn.apply(call, layer, mutable=scope.mutable)(mine, x, rngs=rngs)

        if remat_policy == "none":
            return run
        # Inside a loop the compiler cannot merge the two computations, so it need not be kept from
        # it.
        return jax.checkpoint(run, policy=REMAT_POLICIES[remat_policy], prevent_cse=False)

    block = [layer_at(position) for position in range(part.period)]

    def run_block(x: jax.Array, given: Sequence[Any]) -> tuple[jax.Array, Any]:
        """One repeat; `given` has an entry per position."""
        left = []
        for run, mine in zip(block, given, strict=True):
            x, updates = run(x, mine)
            left.append(updates)
        return x, left

    # By position: a tree of leaves [repeats, ...], over which the loop runs.
    stacked = [
        _stacked([of_layer(i) for i in part.layers[position :: part.period]])
        for position in range(part.period)
    ]
    x, left = jax.lax.scan(run_block, x, stacked)
    # `left` has leaves [repeats, ...] by position: each repeat's share goes to its own layer.
    for position, updates in enumerate(left):
        for repeat, i in enumerate(part.layers[position :: part.period]):
            for name, content in updates.items():
                stack.put_variable(
                    name,
                    layer_names.name(i, called),
                    jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], content),
                )
    return x


def _stacked(trees: Sequence[Any]) -> Any:
    """Equal trees as one tree, whose leaves have a leading axis over them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
