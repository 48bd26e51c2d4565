"""What the backward pass of a program keeps of the forward pass, from the trace alone.

Differentiation says which arrays that are. Compilers of accelerators compute cheap elementwise
results again rather than keep them: where a model does not say itself what is computed again, what
remains of it are results of matrix products. Compilers for CPUs keep what differentiation keeps,
but for sums and products that follow from one array that is kept, as 1 - t^2 does from t.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jax.extend import core

from upcycle_jax.costs import flops
from upcycle_jax.costs.loss_program import Counted, LossProgram
from upcycle_jax.partitioning import Partitioner

_SIMPLE = frozenset(["add", "integer_pow", "mul", "neg", "square", "sub"])
"""Primitives whose results XLA for CPUs rather computes twice than keeps."""


def kept_bytes(
    program: LossProgram,
    counted: Counted,
    partitioner: Partitioner,
    *,
    elementwise: bool,
    in_layer: int = 0,
    tile: tuple[int, int] | None = None,
) -> int:
    """Bytes on one device that the backward pass finds, and the most that it computes again at
    once; parameters and the batch are left out.

    Args:
      program: the model's.
      counted: the same on the partitioner's mesh.
      partitioner: the mesh.
      elementwise: whether results of elementwise operations are kept, as on CPUs.
      in_layer: what the trace does not show of the layers that are computed again, or of all.
      tile: what arrays are padded to, see `Accelerator.tile`.
    """
    in_order = any("remat" in equation.primitive.name for equation in program.backward.eqns)
    if program.recomputes and not in_order and not elementwise:  # layers in a loop
        return _peak_of_products(program, counted, partitioner, in_layer, tile)
    mesh = dict(partitioner.mesh.shape)
    kept = _kept(program) if elementwise or in_order else _kept_products(program)
    again = counted.backward.recomputed_bytes
    if not elementwise:
        again = counted.backward.recomputed_product_bytes
    return (
        in_layer + again + sum(flops.device_bytes(var, counted.known, mesh, tile) for var in kept)
    )


def _peak_of_products(
    program: LossProgram,
    counted: Counted,
    partitioner: Partitioner,
    in_layer: int,
    tile: tuple[int, int] | None,
) -> int:
    """What the backward pass of a program that says what is computed again holds at its peak, where
    compilers compute elementwise results again: what the forward pass left and is still needed,
    and results of products, in the layer that is computed again or outside of it.

    Logits are gone when layers are computed again. A gradient that is summed over devices takes
    room twice.
    """
    mesh = dict(partitioner.mesh.shape)
    of_batch = _following(program, program.forward.invars[len(program.params) :])
    sizes = {
        var: flops.device_bytes(var, counted.known, mesh, tile)
        for var in _kept(program)
        if var in of_batch
    }
    made_from: dict[core.Var, set[core.Var]] = {}  # what the forward pass left, by views of it
    for saved, var in zip(program.saved, program.backward.invars, strict=False):
        made_from[var] = sizes.keys() & set(_sources(program, [saved], _is_view))
    last: dict[core.Var, int] = {}
    for i, equation in enumerate(program.backward.eqns):
        operands = [var for var in equation.invars if isinstance(var, core.Var)]
        origins: set[core.Var] = set().union(*(made_from.get(var, set()) for var in operands))
        if flops.multiplies(equation):
            last |= dict.fromkeys(origins, i)
        else:  # computed where a product reads it
            made_from |= dict.fromkeys(equation.outvars, origins)
    copies = 2 if partitioner.mesh.size > 1 else 1
    peak = 0
    for i, equation in enumerate(program.backward.eqns):
        now = sum(size for var, size in sizes.items() if last.get(var, -1) >= i)
        if flops.recomputes(equation):
            now += counted.backward.held_bytes + in_layer
        elif flops.multiplies(equation):
            results = [
                flops.device_bytes(var, counted.backward_known, mesh, tile)
                for var in equation.outvars
            ]
            now += copies * sum(results)
        peak = max(peak, now)
    return peak


def _kept(program: LossProgram) -> list[core.Var]:
    """What the forward pass leaves, without views, repetitions and constants."""
    found = _sources(program, program.saved, _is_view)
    varying = _following(program, program.forward.invars)
    left = dict.fromkeys(var for var in found if var in varying)
    kept: dict[core.Var, None] = {}
    for var in left:
        origin = _origin(program, var, left.keys())
        if origin is None:
            kept[var] = None
        elif (centred := _centred(program, origin)) is not None:
            kept[centred] = None
    return list(kept)


def _origin(program: LossProgram, var: core.Var, kept: Collection[core.Var]) -> core.Var | None:
    """The array that is kept, and as large, of which alone sums and products make this one."""
    made_of: set[core.Var] = set()
    seen, pending = {var}, [var]
    while pending:
        one = pending.pop()
        equation = program.made_by.get(one)
        simple = equation is not None and (equation.primitive.name in _SIMPLE or _is_view(equation))
        if equation is None or not simple or (one in kept and one is not var):
            made_of.add(one)
            continue
        before = {x for x in equation.invars if isinstance(x, core.Var)} - seen
        seen |= before
        pending.extend(before)
    if len(made_of) != 1 or made_of <= {var}:
        return None
    (origin,) = made_of
    same = flops.array_of(origin).size == flops.array_of(var).size
    return origin if same and origin in kept else None


def _centred(program: LossProgram, var: core.Var) -> core.Var | None:
    """What an array of differences from the mean of each row is made of: where something that
    follows from the differences is computed again, so are they.
    """
    equation = program.made_by[var]
    if equation.primitive.name != "sub":
        return None
    array, mean = equation.invars
    if not isinstance(array, core.Var) or mean not in program.made_by:
        return None
    sizes = [flops.array_of(x).size for x in (array, mean, var)]
    return array if sizes[0] == sizes[2] > sizes[1] else None


def _kept_products(program: LossProgram) -> list[core.Var]:
    """Matrix products and moves by index from which all that the forward pass leaves can be
    computed; what follows from parameters alone is left out.
    """
    found = _sources(
        program,
        program.saved,
        lambda equation: not (flops.multiplies(equation) or flops.moves_by_index(equation)),
    )
    of_batch = _following(program, program.forward.invars[len(program.params) :])
    return [var for var in found if var in of_batch]


def _following(program: LossProgram, inputs: Sequence[core.Var]) -> set[core.Var]:
    """Inputs of the forward pass, and all that depends on them."""
    found = set(inputs)
    for equation in program.forward.eqns:
        if any(isinstance(var, core.Var) and var in found for var in equation.invars):
            found.update(equation.outvars)
    return found


def _is_view(equation: core.JaxprEqn) -> bool:
    return equation.primitive.name in flops.VIEWS


def _sources(
    program: LossProgram, wanted: Sequence[Any], is_cheap: Callable[[core.JaxprEqn], bool]
) -> Iterator[core.Var]:
    """Results of the forward pass from which cheap equations make the wanted ones."""
    pending, seen = list(wanted), set()
    while pending:
        var = pending.pop()
        if isinstance(var, core.Literal) or var not in program.made_by or var in seen:
            continue
        seen.add(var)
        if is_cheap(program.made_by[var]):
            pending.extend(program.made_by[var].invars)
        else:
            yield var
