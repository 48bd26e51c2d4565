"""A plan for reading: leaves that differ only in their layer or slot are one line."""

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set

import jax

from upcycle_jax.models import layer_names
from upcycle_jax.state_tree import PARAM_STATES, TARGET
from upcycle_jax.surgery.operations import Zeros
from upcycle_jax.surgery.plan import Dropped, Plan, Row
from upcycle_jax.text import aligned, size

HEADER = ("leaf of the result", "operation", "leaves", "source", "shape", "written")


def plan_text(
    plan: Plan,
    shardings: Mapping[str, jax.sharding.NamedSharding] | None = None,
    *,
    all_leaves: bool = False,
) -> str:
    """The plan as a table, and its totals.

    Args:
      plan: the plan.
      shardings: of the leaves of the result by path, shown where given.
      all_leaves: give every leaf a line of its own.
    """
    groups = [[row] for row in plan.rows] if all_leaves else _folded(plan.rows)
    lines = [HEADER, *map(_cells, groups)]
    if shardings is not None:
        specs = [_each({str(shardings[row.target].spec) for row in group}) for group in groups]
        lines = [(*line, spec) for line, spec in zip(lines, ["sharding", *specs], strict=True)]
    return "\n".join([*aligned(lines, right=[2, 5]), "", totals(plan)])


def _folded(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(_kind(row), []).append(row)
    return list(groups.values())


def _kind(row: Row) -> Hashable:
    """What rows of one line have in common."""
    is_slot = row.target.startswith(PARAM_STATES)
    if is_slot and isinstance(row.operation, Zeros):
        return PARAM_STATES, row.what
    path = row.target.rpartition("/")[0] if is_slot else row.target
    return _any_layer(path), row.what, row.spec.shape, row.spec.dtype, len(row.sources)


def _any_layer(path: str) -> Hashable:
    """A path without the number of its layer."""
    found = layer_names.split(path)
    return (found.stack, found.called, found.rest) if found else path


def _cells(rows: Sequence[Row]) -> tuple[str, ...]:
    sources = sorted({source for row in rows for source in row.sources})
    target, source = pattern([row.target for row in rows]), pattern(sources) if sources else "-"
    return (
        target,
        rows[0].what,
        str(len(rows)),
        "the same" if source == target else source,
        _each({str(row.spec) for row in rows}),
        size(sum(row.bytes_written for row in rows)),
    )


def _each(texts: Set[str]) -> str:
    return next(iter(texts)) if len(texts) == 1 else "various"


def pattern(paths: Sequence[str]) -> str:
    """Several paths as one: where they differ, what each has is in braces.

    >>> pattern(["a/layers_0/k", "a/layers_1/k", "a/layers_2/k", "a/layers_5/k"])
    'a/layers_{0-2,5}/k'
    >>> pattern(["a/k/v_col", "a/k/v_row"]), pattern(["a/b", "a/c/d"])
    ('a/k/{v_col,v_row}', 'a/...')
    """
    split = [path.split("/") for path in paths]
    if len({len(parts) for parts in split}) > 1:
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
        return "/".join([*(parts[0] for parts in shared), "..."])
    return "/".join(_one_of(list(dict.fromkeys(parts))) for parts in zip(*split, strict=True))


def _one_of(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    head = names[0].rpartition("_")[0]
    numbers = [name.removeprefix(f"{head}_") for name in names]
    if head and all(number.isdecimal() for number in numbers):
        return f"{head}_{{{','.join(_ranges(sorted(map(int, numbers))))}}}"
    return f"{{{','.join(names)}}}"


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Rising numbers, runs of three and more as their ends."""
    runs = itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    for _, run in runs:
        found = [str(number) for _, number in run]
        yield from [f"{found[0]}-{found[-1]}"] if len(found) > 2 else found


def totals(plan: Plan) -> str:
    """What is done to how many leaves, how much is read and written, and what is left out."""
    return "\n".join(_totals(plan))


def _totals(plan: Plan) -> Iterator[str]:
    counts: dict[str, list[int]] = {}
    for row in plan.rows:
        counts.setdefault(row.what, []).append(row.bytes_written)
    yield from (
        f"{len(written):6d} x {what} ({size(sum(written))})"
        for what, written in sorted(counts.items())
    )
    parameters = sum(row.spec.size for row in plan.rows if row.target.startswith(TARGET))
    drawn = any(row.operation.draws for row in plan.rows)
    yield (
        f"{len(plan.rows)} leaves, {parameters} parameters; read {size(plan.bytes_read)}, write"
        f" {size(plan.bytes_written)}{f'; drawn with seed {plan.recipe.seed}' if drawn else ''}"
    )
    yield from map(_dropped, _by_reason(plan.dropped)) if plan.dropped else ["dropped: nothing"]


def _by_reason(dropped: Sequence[Dropped]) -> Iterator[list[Dropped]]:
    by_reason = sorted(dropped, key=lambda item: item.reason)
    return (list(items) for _, items in itertools.groupby(by_reason, key=lambda item: item.reason))


def _dropped(items: Sequence[Dropped]) -> str:
    nbytes = sum(item.spec.nbytes for item in items)
    names = ", ".join(item.source for item in items[:3]) + (", ..." if len(items) > 3 else "")
    return f"dropped: {len(items)} source leaves ({size(nbytes)}), {items[0].reason}: {names}"
