"""What the backward pass of a program keeps of the forward pass, from the trace alone.

Differentiation says which arrays that are. Compilers of accelerators compute cheap elementwise
results again rather than keep them: where a model does not say itself what is computed again, what
remains of it are results of matrix products. Compilers for CPUs keep what differentiation keeps,
but for sums and products that follow from one array that is kept, as 1 - t^2 does from t.
"""

from collections.abc import Callable, Iterator, Sequence
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


def peak_bytes(program: LossProgram, counted: Counted, partitioner: Partitioner) -> int:
    """Bytes on one device that the backward pass needs at once, where results of elementwise
    operations are kept: activations, which go as gradients come, and what is computed again.
    """
    mesh = dict(partitioner.mesh.shape)
    sizes = {var: flops.device_bytes(var, counted.known, mesh) for var in _kept(program)}
    holds: dict[core.Var, core.Var] = {}  # what a variable of the backward pass is a view of
    for saved, var in zip(program.saved, program.backward.invars, strict=False):
        holds[var] = next(_sources(program, [saved], _is_view), var)
    last: dict[core.Var, int] = {}
    for i, equation in enumerate(program.backward.eqns):
        operands = [var for var in equation.invars if isinstance(var, core.Var)]
        last |= {holds.get(var, var): i for var in operands}
        if _is_view(equation) and operands:
            holds[equation.outvars[0]] = holds.get(operands[0], operands[0])
    results = {holds.get(var, var) for var in program.backward.outvars if isinstance(var, core.Var)}
    now = peak = sum(sizes.values())
    for i, equation in enumerate(program.backward.eqns):
        made = [var for var in equation.outvars if var not in holds]
        sizes |= {var: flops.device_bytes(var, counted.backward_known, mesh) for var in made}
        gone = {holds.get(var, var) for var in equation.invars if isinstance(var, core.Var)}
        freed = sum(sizes.get(var, 0) for var in gone - results if last[var] == i)
        now += sum(sizes[var] for var in made)
        # Elementwise results take the place of operands that are not needed any more.
        peak = max(peak, now if flops.multiplies(equation) else now - freed)
        now -= freed
    return peak + counted.backward.recomputed_bytes


def _kept(program: LossProgram) -> list[core.Var]:
    """What the forward pass leaves, without views, repetitions and constants."""
    found = _sources(program, program.saved, _is_view)
    varying = _following(program, program.forward.invars)
    kept = [var for var in found if var in varying]
    among = set(kept)
    return [var for var in kept if not _follows_from_one(program, var, among)]


def _follows_from_one(program: LossProgram, var: core.Var, kept: set[core.Var]) -> bool:
    """Whether sums and products make an array of another one that is kept, as large as it is."""
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
    sizes = [flops.array_of(one).size for one in made_of]
    return made_of <= kept - {var} and sizes == [flops.array_of(var).size]


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
