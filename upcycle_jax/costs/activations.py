"""What the backward pass of a program keeps of the forward pass, from the trace alone.

Differentiation says which arrays that are. Compilers of accelerators compute cheap elementwise
results again rather than keep them: where a model does not say itself what is computed again, what
remains of it are results of matrix products. Compilers for CPUs keep what differentiation keeps.
"""

from collections.abc import Callable, Iterator

from jax.extend import core

from upcycle_jax.costs import flops
from upcycle_jax.costs.loss_program import Counted, LossProgram
from upcycle_jax.partitioning import Partitioner


def kept_bytes(
    program: LossProgram, counted: Counted, partitioner: Partitioner, *, elementwise: bool
) -> int:
    """Bytes on one device that the backward pass finds, and the most that it computes again at
    once; parameters and the batch are left out.

    Args:
      program: the model's.
      counted: the same on the partitioner's mesh.
      partitioner: the mesh.
      elementwise: whether results of elementwise operations are kept, as on CPUs.
    """
    mesh = dict(partitioner.mesh.shape)
    kept = _kept(program) if elementwise or program.recomputes else _kept_products(program)
    again = counted.backward.recomputed_bytes
    if not elementwise:
        again = counted.backward.recomputed_product_bytes
    return again + sum(flops.device_bytes(var, counted.known, mesh) for var in kept)


def _kept(program: LossProgram) -> list[core.Var]:
    """What the forward pass leaves, without views and repetitions."""
    return list(_sources(program, lambda equation: equation.primitive.name in flops.VIEWS))


def _kept_products(program: LossProgram) -> list[core.Var]:
    """Matrix products from which all that the forward pass leaves can be computed; what follows
    from parameters alone is left out.
    """
    found = _sources(program, lambda equation: not flops.multiplies(equation))
    of_batch = set(program.forward.invars[len(program.params) :])
    for equation in program.forward.eqns:
        if any(isinstance(var, core.Var) and var in of_batch for var in equation.invars):
            of_batch.update(equation.outvars)
    return [var for var in found if var in of_batch]


def _sources(program: LossProgram, is_cheap: Callable[[core.JaxprEqn], bool]) -> Iterator[core.Var]:
    """Results of the forward pass from which cheap equations make what it leaves."""
    made_by = {var: equation for equation in program.forward.eqns for var in equation.outvars}
    pending, seen = list(program.saved), set()
    while pending:
        var = pending.pop()
        if isinstance(var, core.Literal) or var not in made_by or var in seen:
            continue
        seen.add(var)
        if is_cheap(made_by[var]):
            pending.extend(made_by[var].invars)
        else:
            yield var
