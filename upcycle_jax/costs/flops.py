"""FLOPs of a traced program (a jaxpr), over all devices of a mesh and on one of them.

Matrix products count 2 * m * k * n, but those with a vector of ones, which are sums; loops count
as often as they run. Of elementwise operations
and reductions, which only `Work.device` holds, one FLOP per element is counted, as XLA's
`cost_analysis` does: what moves or makes data is free, and so are roots, exponentials and the
like, which XLA counts apart. Single operations that XLA makes of several are counted as XLA says.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from upcycle_jax.costs import splits
from upcycle_jax.costs.splits import MeshShape, Split

_FREE = frozenset(
    [
        "bitcast_convert_type",
        "broadcast_in_dim",
        "cbrt",
        "concatenate",
        "copy",
        "copy_p",
        "cos",
        "device_put",
        "dynamic_slice",
        "dynamic_update_slice",
        "erf",
        "exp",
        "exp2",
        "expm1",
        "gather",
        "iota",
        "log",
        "log1p",
        "name",
        "optimization_barrier",
        "pad",
        "pow",
        "reshape",
        "rev",
        "rsqrt",
        "scatter",
        "sharding_constraint",
        "sin",
        "slice",
        "sort",
        "split",
        "sqrt",
        "squeeze",
        "stop_gradient",
        "tan",
        "tanh",
        "top_k",
        "transpose",
    ]
)
"""Primitives that move or make data, and those that XLA counts as transcendentals."""

VIEWS = frozenset(["broadcast_in_dim", "copy", "reshape", "squeeze"])
"""Primitives whose results are elements of their operands: they take no room of their own."""

_COMPOSED = frozenset(["argmax", "argmin", "erf_inv", "erfc", "integer_pow", "logistic"])
"""Primitives that XLA makes of several operations on each element."""

_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
"""Parameters of primitives that call a program once: `jit`, `checkpoint`, custom derivatives."""


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of an array of a program.

    Attributes:
      split: how it is divided over the mesh.
      is_gradient: whether it depends on the gradients that the program is given.
    """

    split: Split
    is_gradient: bool = False


@dataclasses.dataclass
class Work:
    """FLOPs of a program.

    Attributes:
      products: matrix products over all devices, of operands that do not depend on gradients.
      gradient_products: matrix products over all devices, of those that do.
      device: what one device executes, elementwise operations included.
      recomputed_bytes: bytes on one device that the part of a backward pass that computes most
        again computes at once: all that its gradients are made from.
      recomputed_product_bytes: of those the results of matrix products.
      held_bytes: bytes on one device that such a part holds at its peak where cheap results are
        computed again: results of matrix products, and what several products read.
    """

    products: int = 0
    gradient_products: int = 0
    device: float = 0.0
    recomputed_bytes: int = 0
    recomputed_product_bytes: int = 0
    held_bytes: int = 0

    def add(self, other: "Work", times: int = 1) -> None:
        """Adds another program that runs so many times."""
        self.products += times * other.products
        self.gradient_products += times * other.gradient_products
        self.device += times * other.device
        self.recomputed_bytes = max(self.recomputed_bytes, other.recomputed_bytes)
        self.recomputed_product_bytes = max(
            self.recomputed_product_bytes, other.recomputed_product_bytes
        )
        self.held_bytes = max(self.held_bytes, other.held_bytes)


def count(
    jaxpr: core.Jaxpr, values: Sequence[Value], mesh: MeshShape
) -> tuple[Work, dict[core.Var, Value]]:
    """FLOPs of a program, and what is known of its arrays.

    Where branches are chosen when the program runs, the one with the least work counts: MoE layers
    have another one for loads that are far from even. A loop whose iterations are known only then
    counts once (`moe.even_load` traces models without such loops).

    Args:
      jaxpr: the program.
      values: what is known of its inputs.
      mesh: sizes of the mesh's axes.
    """
    program = _Program(mesh, dict(zip(jaxpr.invars, values, strict=True)))
    for var in jaxpr.constvars:
        program.known[var] = Value(splits.whole(len(array_of(var).shape)))
    for equation in jaxpr.eqns:
        program.run(equation)
    return program.work, program.known


def array_of(var: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable, or of a literal."""
    return var.aval


def value_of(var: Any, known: Mapping[core.Var, Value]) -> Value:
    """What is known of a variable, or of a literal."""
    if isinstance(var, core.Literal):
        return Value(splits.whole(len(array_of(var).shape)))
    return known[var]


def multiplies(equation: core.JaxprEqn) -> bool:
    """Whether an equation is a matrix product, or holds one."""
    return equation.primitive.name in _PRODUCTS or any(
        multiplies(inner) for program in _programs(equation) for inner in program.eqns
    )


def recomputes(equation: core.JaxprEqn) -> bool:
    """Whether an equation computes results again that a model says are not kept, or holds one."""
    return "remat" in equation.primitive.name or any(
        recomputes(inner) for program in _programs(equation) for inner in program.eqns
    )


def moves_by_index(equation: core.JaxprEqn) -> bool:
    """Whether an equation moves values to where other arrays say, or holds one that does; indices
    are no values.
    """
    if not any(jnp.issubdtype(array_of(var).dtype, jnp.inexact) for var in equation.outvars):
        return False
    return equation.primitive.name.startswith(("gather", "scatter")) or any(
        moves_by_index(inner) for program in _programs(equation) for inner in program.eqns
    )


def device_bytes(
    var: core.Var,
    known: Mapping[core.Var, Value],
    mesh: MeshShape,
    tile: tuple[int, int] | None = None,
) -> int:
    """Bytes of an array on one device; where arrays are padded to tiles, in the layout that pads it
    least.
    """
    array = array_of(var)
    shape = splits.local_shape(array.shape, known[var].split, mesh)
    return (math.prod(shape) if tile is None else splits.tiled_size(shape, tile)) * (
        array.dtype.itemsize
    )


def _recomputed(jaxpr: core.Jaxpr, known: Mapping[core.Var, Value], mesh: MeshShape) -> Work:
    """What a part of a backward pass computes again, at once."""
    read_by_gradients = {
        var
        for equation in jaxpr.eqns
        if any(known[var].is_gradient for var in equation.outvars)
        for var in equation.invars
        if isinstance(var, core.Var)
    }
    found = Work()
    for equation in jaxpr.eqns:
        if equation.primitive.name in VIEWS:
            continue
        for var in equation.outvars:
            if not known[var].is_gradient and var in read_by_gradients:
                nbytes = device_bytes(var, known, mesh)
                found.recomputed_bytes += nbytes
                if multiplies(equation):
                    found.recomputed_product_bytes += nbytes
    if read_by_gradients:
        found.held_bytes = _held_at_peak(jaxpr, known, mesh)
    return found


def _held_at_peak(jaxpr: core.Jaxpr, known: Mapping[core.Var, Value], mesh: MeshShape) -> int:
    """Bytes of results that a program holds at its peak; its operands are left out.

    Kept are results of matrix products, and other results that several products read. All others
    are computed where they are read, from what is kept.
    """
    sources: dict[core.Var, frozenset[core.Var]] = {}  # what is kept that an array is made from
    seen_in: dict[core.Var, core.Var] = {}  # what a view shows
    readers: dict[core.Var, set[int]] = {}  # products that read an array, or a view of it
    for i, equation in enumerate(jaxpr.eqns):
        operands = [var for var in equation.invars if isinstance(var, core.Var)]
        if equation.primitive.name in (*VIEWS, "transpose") and operands:
            seen_in[equation.outvars[0]] = seen_in.get(operands[0], operands[0])
        elif multiplies(equation):
            for var in operands:
                readers.setdefault(seen_in.get(var, var), set()).add(i)
    last: dict[core.Var, int] = {}
    made: dict[int, list[core.Var]] = {}
    for i, equation in enumerate(jaxpr.eqns):
        operands = [var for var in equation.invars if isinstance(var, core.Var)]
        origins: frozenset[core.Var] = frozenset().union(
            *(sources.get(var, frozenset()) for var in operands)
        )
        is_product = multiplies(equation)
        for var in equation.outvars:
            kept = is_product or len(readers.get(var, ())) > 1
            sources[var] = frozenset([var]) if kept else origins
            if kept:
                made.setdefault(i, []).append(var)
        if i in made:
            last |= dict.fromkeys(origins, i)
    results = [var for var in jaxpr.outvars if isinstance(var, core.Var)]
    for var in results:
        last |= dict.fromkeys(sources.get(var, ()), len(jaxpr.eqns))
    ends: dict[int, list[core.Var]] = {}
    for var, i in last.items():
        ends.setdefault(i, []).append(var)
    now = peak = 0
    for i in range(len(jaxpr.eqns)):
        now += sum(device_bytes(var, known, mesh) for var in made.get(i, ()))
        peak = max(peak, now)
        now -= sum(device_bytes(var, known, mesh) for var in ends.get(i, ()))
    return peak


def called(equation: core.JaxprEqn) -> core.Jaxpr | None:
    """The program that an equation runs once on its operands; None for operations."""
    if equation.primitive.name.startswith("reduce"):  # how two elements become one
        return None
    found = next((equation.params[key] for key in _CALLED if key in equation.params), None)
    return getattr(found, "jaxpr", found)


def _programs(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """Programs inside an equation."""
    for parameter in equation.params.values():
        for one in parameter if isinstance(parameter, tuple | list) else (parameter,):
            program = getattr(one, "jaxpr", one)
            if isinstance(program, core.Jaxpr):
                yield program


class _Program:
    """A walk over the equations of one program, in order."""

    def __init__(self, mesh: MeshShape, known: dict[core.Var, Value]) -> None:
        self.mesh, self.known, self.work = mesh, known, Work()
        self.ones: set[core.Var] = set()

    def run(self, equation: core.JaxprEqn) -> None:
        """Counts an equation and learns its results."""
        name = equation.primitive.name
        values = [value_of(var, self.known) for var in equation.invars]
        if name == "scan":
            found = self._scan(equation.params, values)
        elif name == "while":
            found = self._while(equation.params, values)
        elif name == "cond":
            found = self._cond(equation.params["branches"], values[1:])
        elif (program := called(equation)) is not None:
            found = self._call(program, values, recomputes="remat" in name)
        else:
            found = self._operation(equation, values)
        for var, value in zip(equation.outvars, found, strict=True):
            self.known[var] = value

    def _operation(self, equation: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
        is_gradient = any(value.is_gradient for value in values)
        given = [value.split for value in values]
        if _is_vector_of_ones(equation):
            self.ones.update(equation.outvars)
        if rule := _PRODUCTS.get(equation.primitive.name):
            total, local, split = rule(equation, given, self.mesh)
            if any(var in self.ones for var in equation.invars if isinstance(var, core.Var)):
                pass  # a sum, in the form that is fast on CPUs
            elif is_gradient:
                self.work.gradient_products += total
            else:
                self.work.products += total
            self.work.device += local
            return [Value(split, is_gradient)]
        results = _results(equation, given)
        self.work.device += self._elementwise(equation, given, results)
        return [Value(split, is_gradient) for split in results]

    def _elementwise(
        self, equation: core.JaxprEqn, given: Sequence[Split], results: Sequence[Split]
    ) -> float:
        """FLOPs on one device of an operation that is no matrix product."""
        name = equation.primitive.name
        if name in _FREE or name.startswith("random_"):
            return 0.0

        def local(var: Any, split: Split) -> int:
            return math.prod(splits.local_shape(array_of(var).shape, split, self.mesh))

        written = sum(map(local, equation.outvars, results))
        if name.startswith("scatter"):
            return local(equation.invars[2], given[2])
        if name.startswith(("reduce_", "arg")) and name != "reduce_precision":
            reduced = local(equation.invars[0], given[0]) - written
            return reduced * (_composed(equation) if name in _COMPOSED else 1)
        return written * (_composed(equation) if name in _COMPOSED else 1)

    def _inner(self, program: Any, values: Sequence[Value]) -> tuple[list[Value], Work]:
        jaxpr = getattr(program, "jaxpr", program)
        work, known = count(jaxpr, values, self.mesh)
        return [value_of(var, known) for var in jaxpr.outvars], work

    def _call(self, jaxpr: core.Jaxpr, values: Sequence[Value], *, recomputes: bool) -> list[Value]:
        work, known = count(jaxpr, values, self.mesh)
        self.work.add(work)
        if recomputes:
            self.work.add(_recomputed(jaxpr, known, self.mesh))
        return [value_of(var, known) for var in jaxpr.outvars]

    def _cond(self, branches: Sequence[Any], values: Sequence[Value]) -> list[Value]:
        ran = [self._inner(branch, values) for branch in branches]
        self.work.add(min((work for _, work in ran), key=lambda work: work.device))
        return [_merged(options) for options in zip(*(found for found, _ in ran), strict=True)]

    def _while(self, params: Mapping[str, Any], values: Sequence[Value]) -> list[Value]:
        consts = values[params["cond_nconsts"] :][: params["body_nconsts"]]
        carry = values[params["cond_nconsts"] + params["body_nconsts"] :]
        return self._loop(params["body_jaxpr"], consts, carry, [], times=1)

    def _scan(self, params: Mapping[str, Any], values: Sequence[Value]) -> list[Value]:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        consts, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
        rows = [
            Value(value.split[1:], value.is_gradient) for value in values[num_consts + num_carry :]
        ]
        found = self._loop(params["jaxpr"], consts, carry, rows, times=params["length"])
        stacked = [Value(((), *value.split), value.is_gradient) for value in found[num_carry:]]
        return [*found[:num_carry], *stacked]

    def _loop(
        self,
        body: Any,
        consts: Sequence[Value],
        carry: Sequence[Value],
        rows: Sequence[Value],
        *,
        times: int,
    ) -> list[Value]:
        """What a body returns when its carry no longer changes what is known of it."""
        while True:
            found, work = self._inner(body, [*consts, *carry, *rows])
            merged = [_merged(pair) for pair in zip(carry, found[: len(carry)], strict=True)]
            if merged == list(carry):
                self.work.add(work, times)
                return [*merged, *found[len(carry) :]]
            carry = merged


def _is_vector_of_ones(equation: core.JaxprEqn) -> bool:
    """Whether that is what an equation makes."""
    if equation.primitive.name != "broadcast_in_dim" or len(equation.params["shape"]) != 1:
        return False
    value = equation.invars[0]
    return isinstance(value, core.Literal) and bool(value.val == 1)


def _merged(values: Sequence[Value]) -> Value:
    first = values[0].split
    return Value(
        splits.joined([value.split for value in values], len(first)),
        any(value.is_gradient for value in values),
    )


def _dot(
    equation: core.JaxprEqn, given: Sequence[Split], mesh: MeshShape
) -> tuple[int, float, Split]:
    """FLOPs over all devices, on one device, and the split of the result."""
    lhs, rhs = map(array_of, equation.invars)
    numbers = equation.params["dimension_numbers"]
    left, _, result = splits.of_product(
        given[0], given[1], numbers, lhs_is_larger=lhs.size >= rhs.size
    )
    contracted = numbers[0][0]

    def flops(out: Sequence[int], lhs: Sequence[int]) -> int:
        return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)

    shape = array_of(equation.outvars[0]).shape
    local = flops(
        splits.local_shape(shape, result, mesh), splits.local_shape(lhs.shape, left, mesh)
    )
    return flops(shape, lhs.shape), local, result


def _ragged_dot(
    equation: core.JaxprEqn, given: Sequence[Split], mesh: MeshShape
) -> tuple[int, float, Split]:
    """Rows in groups `[m, k]`, each times its group's matrix of `[g, k, n]`: `[m, n]`. Or the
    matrices' gradient, each group's rows `[m, k]` and `[m, n]` contracted: `[g, k, n]`.

    Rows are spread evenly over devices, whichever have their groups' matrices.
    """
    numbers = equation.params["ragged_dot_dimension_numbers"]
    lhs, rhs, out = map(array_of, (*equation.invars[:2], *equation.outvars))
    (contracted, of_rhs), _ = numbers.dot_dimension_numbers
    rows, columns = given[0], given[1]
    if numbers.rhs_group_dimensions:
        total = 2 * out.size * math.prod(lhs.shape[axis] for axis in contracted)
        split = splits.joined([(rows[0], columns[3 - of_rhs[0]])], 2)
        columns = columns[1:]  # groups do not divide the work: rows do
    else:
        total = 2 * lhs.size * rhs.shape[1]
        split = splits.joined([((), rows[1], columns[1])], 3)
    divided = {axis for axes in (*rows, *columns) for axis in axes}
    return total, total / math.prod(mesh.get(axis, 1) for axis in divided), split


def _conv(
    equation: core.JaxprEqn, given: Sequence[Split], mesh: MeshShape
) -> tuple[int, float, Split]:
    """A convolution: every element of the result is a sum over the kernel of its feature."""
    numbers, kernel = equation.params["dimension_numbers"], array_of(equation.invars[1])
    out = array_of(equation.outvars[0]).shape
    found: list[tuple[str, ...]] = [()] * len(out)
    found[numbers.out_spec[0]] = given[0][numbers.lhs_spec[0]]
    found[numbers.out_spec[1]] = given[1][numbers.rhs_spec[0]]
    split = splits.joined([tuple(found)], len(out))
    each = 2 * kernel.size // kernel.shape[numbers.rhs_spec[0]]
    local = math.prod(splits.local_shape(out, split, mesh))
    return math.prod(out) * each, local * each, split


_PRODUCTS: dict[str, Callable[..., tuple[int, float, Split]]] = {
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
}


def _results(equation: core.JaxprEqn, given: Sequence[Split]) -> list[Split]:
    """Splits of the results of an operation that is no matrix product."""
    name, params = equation.primitive.name, equation.params
    before = [tuple(array_of(var).shape) for var in equation.invars]
    after = [tuple(array_of(var).shape) for var in equation.outvars]
    if name == "gather":
        return [splits.of_gather(given[0], given[1], (before[0], len(after[0])), params)]
    if name.startswith("scatter"):
        numbers = params["dimension_numbers"]
        return [
            splits.of_scatter(given[0], given[1], given[2], numbers, replaces=name == "scatter")
        ]
    return [splits.of_move(name, params, before, shape, given) for shape in after]


@functools.cache
def _composed_as(primitive: Any, settings: tuple[tuple[str, Any], ...], dtype: Any) -> float:
    """FLOPs per element, as XLA counts what it makes of a primitive."""
    params, rows, size = dict(settings), 8, 128
    reduces = "axes" in params
    operand = jax.ShapeDtypeStruct((rows, size), dtype)
    lowered = jax.jit(functools.partial(primitive.bind, **params)).lower(operand)
    elements = rows * size - (rows if reduces else 0)
    return dict(lowered.cost_analysis() or {}).get("flops", 0.0) / elements


def _composed(equation: core.JaxprEqn) -> float:
    settings = tuple(
        sorted((key, value) for key, value in equation.params.items() if key != "axes")
    )
    if "axes" in equation.params:
        settings += (("axes", (1,)),)
    return _composed_as(equation.primitive, settings, array_of(equation.invars[0]).dtype)
