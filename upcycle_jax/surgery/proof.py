"""Re-checks a conversion from the two checkpoints on disk, leaf by leaf, against the plan.

Three questions per leaf: are the parts that must be copies the source's bits; do the parts that
were drawn have the mean and deviation that the recipe promises; and does drawing them again give
the same values. One for the tree: is every leaf of the plan there, and nothing else. And one for
time: are source, result and record still what they were at the conversion.

Chunks that source and result share are read once, and not decoded where the checksum of their
stored bytes is the recorded one: it is compared, since damage in them changes both sides.
"""

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upcycle_jax import trees
from upcycle_jax.checkpoints.stored_sums import BLOCK_BYTES as STORED_BLOCK_BYTES
from upcycle_jax.checkpoints.workers import threads
from upcycle_jax.files import write_whole
from upcycle_jax.progress import Meter
from upcycle_jax.surgery.leaf_check import LeafVerdict
from upcycle_jax.surgery.leaf_proof import REGION_BYTES, LeafProver
from upcycle_jax.surgery.leaf_sums import BLOCK_BYTES, LeafSum, leaf_sums
from upcycle_jax.surgery.operations import Reach
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.plan import Plan, Row
from upcycle_jax.surgery.recipe_json import to_json
from upcycle_jax.surgery.recorded import (
    PROOF_FILE,
    RECORD_FILES,
    Recorded,
    changed_files,
    read_recorded,
    sealed,
)
from upcycle_jax.surgery.source_chunks import SourceChunks
from upcycle_jax.text import shorten, size

MAX_MEMORY = 2 << 30
MAX_SHOWN = 8
"""Changed files and leaves of each side that are shown to people; proof.json has all."""


@dataclasses.dataclass
class Proof:
    """The verdict on a conversion.

    Attributes:
      leaves: one verdict per leaf of the plan.
      missing: leaves of the plan that the result lacks.
      unexplained: leaves of the result that the plan does not know.
      dropped: source leaves that were not used, with the reason.
      context: recipe, paths, fingerprints.
      function: what the function check found (`function_check.FunctionCheck.json`), once it ran.
      damage: what is not as it was at the conversion, in the 'source', the 'result' and the
        'record': leaves and files, one line each.
      source_gone: the result was proved against the recorded checksums alone.
      recorded: checksums were recorded at the conversion, so that damage can be told.
    """

    leaves: list[LeafVerdict]
    missing: list[str]
    unexplained: list[str]
    dropped: dict[str, str]
    context: dict[str, Any]
    function: dict[str, Any] | None = None
    damage: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    source_gone: bool = False
    recorded: bool = False

    @property
    def ok(self) -> bool:
        """Every leaf is right, none lacks, none is too many, nothing is damaged, and the function
        check, if it ran, held.
        """
        held = self.function is None or bool(self.function.get("ok", False))
        return self.leaves_ok and held and not any(self.damage.values())

    @property
    def leaves_ok(self) -> bool:
        """The same without the function check."""
        return not self.missing and not self.unexplained and all(leaf.ok for leaf in self.leaves)

    @property
    def readable(self) -> bool:
        """Whether every leaf of both sides is there and can be read, right or wrong."""
        return not self.missing and all(leaf.readable for leaf in self.leaves)

    def text(self) -> str:
        """A summary; wrong leaves in full."""
        identical, drawn = (
            sum(leaf.identical for leaf in self.leaves),
            sum(leaf.drawn for leaf in self.leaves),
        )
        pure = sum(leaf.ok and leaf.identical == leaf.elements for leaf in self.leaves)
        shared = sum(leaf.shared for leaf in self.leaves)
        by_checksum = sum(leaf.by_checksum for leaf in self.leaves)
        counts = len(self.missing), len(self.unexplained), len(self.dropped)
        lines = [
            f"proof: {'PASSED' if self.ok else 'FAILED'}",
            (
                f"  {sum(leaf.ok for leaf in self.leaves)} of {len(self.leaves)} leaves right;"
                f" {pure} of them bit-identical throughout"
            ),
            (
                f"  {identical} values equal their source (or the zeros planned) bit for bit,"
                f" {drawn} values are drawn anew"
            ),
            "  {} leaves unwritten, {} unexplained; {} source leaves dropped by name".format(
                *counts
            ),
        ]
        if by_checksum:
            lines.append(f"  {by_checksum} values have the checksums recorded at the conversion")
        if shared:
            lines.append(
                f"  {shared} values are proved by stored chunks that they share, each read once"
            )
        lines += self._sides()
        moments = [
            f"{leaf.path}: {leaf.operation}: drawn values have mean {leaf.mean:.3g},"
            f" standard deviation {leaf.std:.3g}"
            for leaf in self.leaves
            if leaf.ok and leaf.std is not None
        ]
        lines += [f"  {line}" for line in shorten(moments, MAX_SHOWN, of="drawn leaves")]
        lines += [f"  - {path}: not in the result" for path in self.missing]
        lines += [f"  + {path}: in the result, not in the plan" for path in self.unexplained]
        lines += [
            f"  ! {leaf.path} ({leaf.operation}): {problem}"
            for leaf in self.leaves
            for problem in leaf.problems
        ]
        if self.function is not None:
            lines += [f"  {line}" for line in self.function.get("text", "").splitlines()]
        return "\n".join(lines)

    def _sides(self) -> list[str]:
        """One line each about source, result and record, and what is wrong with them."""
        right = {
            "source": "gone: the result is proved against the checksums recorded at the conversion"
            if self.source_gone
            else "as it was at the conversion"
            if self.recorded
            else "",
            "result": "as it was at the conversion" if self.recorded and self.leaves_ok else "",
            "record": "intact" if self.recorded else "no checksums (by an older version)",
        }
        lines = []
        for side, words in right.items():
            found = self.damage.get(side, [])
            if not found:
                lines += [f"  {side}: {words}"] if words else []
                continue
            lines.append(f"  {side}: DAMAGED, or changed since the conversion:")
            lines += [f"    {line}" for line in shorten(found, MAX_SHOWN)]
        return lines

    def json(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        return {
            "ok": self.ok,
            "leaves_ok": self.leaves_ok,
            **self.context,
            "missing": self.missing,
            "unexplained": self.unexplained,
            "dropped": self.dropped,
            "leaves": [{**dataclasses.asdict(leaf), "ok": leaf.ok} for leaf in self.leaves],
            "damage": self.damage,
            "source_gone": self.source_gone,
            "function": self.function,
        }

    def write(self, directory: os.PathLike | str) -> Path:
        """Writes `proof.json` into a folder, in one step, with a seal that tells damage to it."""
        path = Path(directory) / PROOF_FILE
        write_whole(path, json.dumps(sealed(self.json()), indent=1) + "\n")
        return path


def prove(
    plan: Plan,
    source: Reader | None,
    target: Reader,
    *,
    recorded: Recorded | None = None,
    max_memory: int = MAX_MEMORY,
    progress: Callable[[str], None] | None = None,
) -> Proof:
    """Checks a result against the plan, the source and the record.

    Args:
      plan: what should have been done.
      source: reader of the source checkpoint; None: it is gone, and the result is compared with the
        recorded checksums.
      target: reader of the result.
      recorded: what the result records about its making; None: it is read from there.
      max_memory: bytes of arrays to hold at a time, of all threads. The floor is one thread and a
        few times the largest leaf (or expert) that can only be made whole.
      progress: called with a line of text about every second.
    """
    recorded = recorded if recorded is not None else read_recorded(target)
    specs = target.specs()
    difference = trees.diff(plan.specs(), specs)
    rows = [row for row in plan.rows if row.target in specs]
    dropped = {item.source for item in plan.dropped} & set(recorded.checksums)
    origins = SourceChunks(source)
    sums = (
        _source_sums(rows, dropped, source, origins, recorded, max_memory, progress)
        if source is not None
        else {}
    )
    workers = _workers(rows, max_memory)
    meter = Meter(sum(row.spec.nbytes for row in rows), progress, verb="proved")
    region_bytes = min(REGION_BYTES, max_memory // 8) // workers
    prover = LeafProver(plan, source, target, recorded, sums, meter, region_bytes, origins)
    found: dict[str, LeafVerdict] = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            large_first = sorted(rows, key=lambda row: -row.spec.nbytes)
            for verdict in pool.map(prover.prove, large_first):
                found[verdict.path] = verdict
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    leaves = [found[row.target] for row in rows]
    context = {
        "recipe": to_json(plan.recipe),
        "source": {
            "path": str(getattr(source, "path", "")) if source else " + ".join(recorded.sources),
            "step": source.step if source else None,
            "fingerprint": source.fingerprint() if source else recorded.fingerprint,
        },
        "result": {"path": str(getattr(target, "path", "")), "step": target.step},
        "bytes": size(plan.bytes_written),
        "record": recorded.content,
        "files": recorded.files,
    }
    return Proof(
        leaves,
        list(difference.missing),
        list(difference.unexpected),
        {item.source: item.reason for item in plan.dropped},
        context,
        damage={
            "source": _source_damage(prover, sums),
            "result": _result_damage(prover, leaves),
            "record": recorded.problems
            + [f"{name}" for name in changed_files(target, recorded) if name in RECORD_FILES],
        },
        source_gone=source is None,
        recorded=bool(recorded.checksums),
    )


def _source_sums(
    rows: list[Row],
    dropped: set[str],
    source: Reader,
    origins: SourceChunks,
    recorded: Recorded,
    max_memory: int,
    progress: Callable[[str], None] | None,
) -> dict[str, LeafSum]:
    """Reads every source leaf: those that are used, of which one that is not what was planned with
    is a problem of its own; and those that were dropped, where they still are.

    A leaf whose stored bytes are those of the record has the recorded values, which are finite. The
    others are decoded, so that their values, or what is wrong with them, can be told.
    """
    planned = {
        name: spec for row in rows for name, spec in zip(row.sources, row.source_specs, strict=True)
    }
    found, problems = source.specs(), {}
    for name, spec in planned.items():
        now = found.get(name)
        if now is None:
            problems[name] = LeafSum("", problem="it is not there any more")
        elif (now.shape, now.dtype) != (spec.shape, spec.dtype):
            problems[name] = LeafSum("", problem=f"it is {now}, planned with {spec}")
    block_bytes = min(BLOCK_BYTES, max_memory // (4 * threads()))
    there = set(planned) - set(problems)
    there |= dropped & set(found)
    stored = origins.sums(
        there & set(recorded.stored),
        block_bytes=min(STORED_BLOCK_BYTES, block_bytes),
        progress=progress,
    )
    as_recorded = {
        name: LeafSum(recorded.checksums[name])
        for name, text in stored.items()
        if text == recorded.stored[name]
    }
    decoded = leaf_sums(
        source, there - set(as_recorded), block_bytes=block_bytes, progress=progress
    )
    return as_recorded | decoded | problems


def _workers(rows: list[Row], max_memory: int) -> int:
    """How many leaves may be looked at at a time: sources, a slab of them made again and its
    statistics are held of those that can only be made whole.
    """
    whole = [
        row.bytes_read + row.spec.nbytes // (row.spec.shape[0] if row.operation.stacked else 1)
        for row in rows
        if row.operation.reach is Reach.WHOLE
    ]
    return max(1, min(threads(), max_memory // (4 * max(whole, default=1))))


def _source_damage(prover: LeafProver, sums: dict[str, LeafSum]) -> list[str]:
    """A line for each source leaf that is not what it was at the conversion."""
    lines = []
    for name in filter(prover.changed, sums):
        found, then = sums[name], prover.recorded.checksums.get(name)
        chunks, leaf = prover.origins.origin(name)
        what = (
            f"cannot be read: {found.problem}"
            if found.problem
            else f"checksum {found.checksum}, recorded {then}"
        )
        lines.append(f"{name} ({what}){_stored_in(chunks.files(leaf))}")
    return lines


def _result_damage(prover: LeafProver, leaves: list[LeafVerdict]) -> list[str]:
    """A line for each leaf and small file of the result that is not what it was when written."""
    lines = [
        f"{leaf.path}{_stored_in(prover.stored.files(leaf.path))}"
        for leaf in leaves
        if leaf.blame in ("result", "both")
    ]
    changed = changed_files(prover.target, prover.recorded)
    return lines + [name for name in changed if name not in RECORD_FILES]


def _stored_in(files: list[str]) -> str:
    return f", stored in {', '.join(files)}" if files else ""
