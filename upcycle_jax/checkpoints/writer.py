"""Writes one Orbax checkpoint in T5X's layout piece by piece: bounded memory, resumable after a
kill, visible only when complete.

While it is written, the checkpoint lies at `<path>.partial`. Every stored chunk becomes visible in
the database at once or not at all, so the database itself says what is done: there is no journal
that could disagree with it.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.formats import PARTIAL_SUFFIX
from upcycle_jax.checkpoints.ocdbt import MANIFEST, drop_unused
from upcycle_jax.checkpoints.orbax_metadata import (
    STATE_ITEM,
    STEP_METADATA,
    TREE_METADATA,
    step_metadata,
    tree_metadata,
)
from upcycle_jax.checkpoints.output import (
    COMMIT_MARK,
    IDENTITY,
    LOCK,
    check_partial,
    checked_output,
    read_identity,
    tidy_finished,
    try_lock,
)
from upcycle_jax.checkpoints.reader import Index, checked_index, index_shape
from upcycle_jax.files import write_whole
from upcycle_jax.state_tree import STEP
from upcycle_jax.trees import LeafSpec, Role

DEFAULT_CHUNK_BYTES = 64 << 20
DEFAULT_PENDING_BYTES = 128 << 20


def create_checkpoint(
    path: os.PathLike | str,
    specs: Mapping[str, LeafSpec],
    *,
    step: int,
    metadata: Mapping[str, Any],
    layouts: Mapping[str, storage.ZarrLayout] | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    pending_bytes: int = DEFAULT_PENDING_BYTES,
    compress: bool = True,
) -> "CheckpointWriter":
    """Starts a checkpoint at `path`, or goes on with one that the same call started earlier.

    Args:
      path: the checkpoint's folder, e.g. `MODEL_DIR/checkpoint_1000`. It must not exist; it appears
        when `finalize` is done.
      specs: every leaf by full path. A leaf of experts (`Role.EXPERT`) is stored with one chunk
        row per expert. `state/step` (int32 scalar) is
        added where it is missing, and written here.
      step: the training step.
      metadata: JSON-serialisable record (recipe, seed, source, versions);
        `CheckpointReader.metadata` returns it.
      layouts: chunks and codec per leaf, where they are not the default ones.
      chunk_bytes: default upper bound of one stored chunk, uncompressed.
      pending_bytes: bound on the bytes that `write` holds before it waits for the disk; encoding
        takes about as much again.
      compress: zstd level 1, as Orbax does, or raw bytes.

    Raises:
      FileExistsError: there is something at `path`.
      ValueError: the partial checkpoint was started with other specs, step, metadata or chunks, is
        damaged or holds foreign files; or `path` is one that cannot be written (`checked_output`).
      OSError: the folder cannot be written to. Nothing was changed.
    """
    final = checked_output(path)
    if final.exists():
        raise FileExistsError(
            f"{final} was finished by a call that was killed right after; what that call left"
            " beside the arrays is removed now, and there is nothing more to do"
            if tidy_finished(final)
            else f"{final} exists already: nothing was changed. Choose another output path or"
            " remove it first"
        )
    specs = dict(sorted({STEP: LeafSpec((), np.dtype(np.int32)), **specs}.items()))
    kind = specs[STEP].dtype
    if kind.kind not in "iu" or not 0 <= step <= np.iinfo(kind).max:
        raise ValueError(
            f"step {step} is none that {specs[STEP]} holds: give the step to record, a whole number"
            " from 0 on"
        )
    _check_names(specs)
    plan = {}
    for name, spec in specs.items():
        layout = (layouts or {}).get(name) or _default_layout(spec, chunk_bytes, compress)
        if layout.shape != spec.shape or layout.numpy_dtype != spec.dtype:
            raise ValueError(
                f"{name}: layout of {layout.dtype}{list(layout.shape)} given for a leaf {spec}"
            )
        plan[name] = layout
    identity = {
        "format": 1,
        "step": int(step),
        "metadata": json.loads(json.dumps(metadata)),
        "leaves": {name: layout.to_json() for name, layout in plan.items()},
    }
    writer = CheckpointWriter(final, specs, plan, identity, pending_bytes)
    writer.write(STEP, None, np.asarray(step, specs[STEP].dtype))
    return writer


def _check_names(specs: Mapping[str, LeafSpec]) -> None:
    keys = collections.defaultdict(list)
    for name in specs:
        keys[name.replace("/", ".")].append(name)
    clashes = [names for names in keys.values() if len(names) > 1]
    if clashes:
        raise ValueError(f"leaves {clashes[0]} would share one stored name: rename one of them")


def _default_layout(spec: LeafSpec, chunk_bytes: int, compress: bool) -> storage.ZarrLayout:
    per_expert = spec.role is Role.EXPERT and spec.shape not in ((), (1,))
    chunks = storage.choose_chunks(
        spec.shape, spec.dtype.itemsize, leading=int(per_expert), limit=chunk_bytes
    )
    return storage.new_layout(spec.shape, chunks, spec.dtype, compress=compress)


class CheckpointWriter:
    """A checkpoint in the making. Use `create_checkpoint`.

    Attributes:
      path: where the checkpoint will appear.
      partial: where it lies until then.
      specs: every leaf, by full path.
      resumed: whether an earlier, interrupted call had begun it.
    """

    def __init__(
        self,
        path: Path,
        specs: dict[str, LeafSpec],
        layouts: dict[str, storage.ZarrLayout],
        identity: dict[str, Any],
        pending_bytes: int,
    ):
        self.path, self.specs = path, specs
        self.partial = path.with_name(path.name + PARTIAL_SUFFIX)
        self._layouts, self._identity, self._pending_limit = layouts, identity, pending_bytes
        self._pending: collections.deque[tuple[ts.Future, int, list[str]]] = collections.deque()
        self._pending_bytes = 0
        self._arrays: dict[str, ts.TensorStore] = {}
        self._closed = False
        with self.explained():
            self.resumed = self._claim()
        try:
            with self.explained():
                self.state.mkdir(exist_ok=True)
                # A kill leaves the file that TensorStore was about to rename; it would write into
                # it again without truncating it.
                for scratch in self.state.rglob("*.__lock"):
                    scratch.unlink()
                self.context = storage.new_context()
                self._drop_superseded()
                self.store = ts.KvStore.open(
                    storage.ocdbt_spec(self.state, create=True), context=self.context
                ).result()
            self.refresh()
            self._declare()
        except BaseException:
            self._lock.close()
            raise

    @property
    def state(self) -> Path:
        """The folder of the array tree, inside the partial checkpoint."""
        return self.partial / STATE_ITEM

    def _claim(self) -> bool:
        """Takes the partial folder for this process; says whether it was begun before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_partial(self.partial)
        self.partial.mkdir(exist_ok=True)
        self._lock = try_lock(self.partial / LOCK)  # Held until close or death.
        if self._lock is None:
            raise ValueError(
                f"{self.partial} is being written by another process: wait for it or stop it"
            )
        try:
            begun = read_identity(self.partial)
            if begun is not None:
                self._check_identity(begun)
                return True
            if self.state.exists():
                raise ValueError(
                    f"{self.partial} was not begun by this writer: remove it and run again"
                )
            write_whole(self.partial / IDENTITY, json.dumps(self._identity), durable=True)
            return False
        except BaseException:
            self._lock.close()
            raise

    def _check_identity(self, begun: dict[str, Any]) -> None:
        differing = [part for part in self._identity if begun.get(part) != self._identity[part]]
        if not differing:
            return
        details = []
        for part in differing:
            old, new = begun.get(part), self._identity[part]
            if isinstance(old, dict) and isinstance(new, dict):
                inner = sorted(
                    key for key in old.keys() | new.keys() if old.get(key) != new.get(key)
                )
                details.append(
                    f"{part} ({', '.join(inner[:5])}{', ...' if len(inner) > 5 else ''})"
                )
            else:
                details.append(f"{part} ({old!r} then, {new!r} now)")
        raise ValueError(
            f"{self.partial} was begun with another {' and '.join(details)}: run the command that"
            " began it to finish it, or remove it to start afresh"
        )

    def _drop_superseded(self) -> None:
        """Removes what earlier calls wrote and the database no longer needs: on a full disk every
        try would leave more of it, until there is no room for what is left to write.
        """
        if not (self.state / MANIFEST).exists():
            return
        try:
            drop_unused(self.state, self.context, keep_linked=True)
        except (ValueError, KeyError) as error:
            if storage.storage_errno(str(error)) is not None:
                raise
            raise ValueError(
                f"{self.partial} is damaged ({error}): remove it and run again"
            ) from None

    def _declare(self) -> None:
        """Stores the shape, chunks and codec of every leaf in one commit, without values."""
        absent = [name for name in self.specs if f"{_key(name)}/.zarray" not in self._present]
        transaction = ts.Transaction(atomic=True)
        store = self.store.with_transaction(transaction)
        with self.explained():
            for name in absent:
                text = json.dumps(
                    self._layouts[name].to_json(), sort_keys=True, separators=(",", ":")
                )
                store.write(f"{_key(name)}/.zarray", text).result()
            transaction.commit_async().result()

    # Writing.

    def layout(self, name: str) -> storage.ZarrLayout:
        """Chunks and codec of a leaf: `write` takes whole chunks."""
        return self._layouts[name]

    def pieces(self, name: str) -> Iterator[Index]:
        """The index of every stored chunk of a leaf, in order: the smallest pieces that can be
        written.
        """
        layout = self._layouts[name]
        for position in itertools.product(*(range(n) for n in layout.grid)):
            yield layout.region(position)

    def is_written(self, name: str, index: Index | None = None) -> bool:
        """Whether every chunk of a leaf (or of the part that `index` selects) is on disk, from this
        call or an interrupted one.

        Pieces still under way count as not written: call `flush` first to be sure of them.
        """
        return all(
            key in self._present for key in self._chunk_keys(name, self._aligned(name, index))
        )

    def is_stored(self, name: str, key: str) -> bool:
        """As `is_written`, of one chunk by its key below the leaf's own."""
        return f"{_key(name)}/{key}" in self._present

    def missing(self) -> dict[str, int]:
        """Leaves that are not complete, with the number of chunks that they lack. Waits for pending
        writes.
        """
        self.flush()
        out = {}
        for name, spec in self.specs.items():
            lacking = sum(
                key not in self._present
                for key in self._chunk_keys(name, checked_index(name, spec.shape, None))
            )
            if lacking:
                out[name] = lacking
        return out

    def write(self, name: str, index: Index | None, value: np.ndarray) -> None:
        """Hands a leaf, or a part of it made of whole chunks, to the disk. Returns before it is
        there; do not modify `value` afterwards.

        Args:
          name: full path.
          index: one slice per leading dimension, on chunk boundaries; None for the whole leaf.
          value: array of exactly the selected shape and the leaf's dtype: nothing is cast silently.

        Raises:
          KeyError: no such leaf in the specs.
          ValueError: shape, dtype or boundaries do not fit.
          OSError: the disk is full or cannot be written. What was written stays and is resumed by
            the same call.
        """
        index = self._aligned(name, index)
        value = np.asarray(value)
        if value.shape != index_shape(index) or value.dtype != self.specs[name].dtype:
            raise ValueError(
                f"{name}: {value.dtype.name}{list(value.shape)} given for"
                f" {self.specs[name].dtype.name}{list(index_shape(index))}"
            )
        with self.explained():
            # `indefinitely` spares a copy: the array is encoded later, from the caller's memory.
            future = (
                self._array(name)[index]
                .write(value, can_reference_source_data_indefinitely=True)
                .commit
            )
        self._enqueue(future, value.nbytes, self._chunk_keys(name, index))

    def write_encoded(self, name: str, keys_and_values: Mapping[str, bytes]) -> None:
        """Stores chunks that are encoded already, by their key below the leaf's own (see
        `storage.ZarrLayout.key`).
        """
        for key, value in keys_and_values.items():
            full = f"{_key(name)}/{key}"
            with self.explained():
                future = self.store.write(full, value)
            self._enqueue(future, len(value), [full])

    def key(self, name: str) -> str:
        """The key of a leaf in `store`."""
        return _key(name)

    def refresh(self) -> None:
        """Looks again which chunks are there, after chunks were put into `store` by other means
        than `write`.
        """
        self.flush()
        with self.explained():
            self._present = {key.decode() for key in self.store.list().result()}

    def flush(self) -> None:
        """Waits until everything handed over is on disk."""
        self._wait(0)

    def _enqueue(self, future: ts.Future, nbytes: int, keys: list[str]) -> None:
        self._pending.append((future, nbytes, keys))
        self._pending_bytes += nbytes
        self._wait(self._pending_limit)

    def _wait(self, limit: int) -> None:
        while self._pending and (self._pending_bytes > limit or limit == 0):
            future, nbytes, keys = self._pending.popleft()
            self._pending_bytes -= nbytes
            with self.explained():
                future.result()
            self._present.update(keys)

    def _array(self, name: str) -> ts.TensorStore:
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        if name not in self.specs:
            raise KeyError(
                f"{name} is not among the {len(self.specs)} leaves that the checkpoint was begun"
                " with"
            )
        if name not in self._arrays:
            spec = {
                "driver": "zarr",
                "kvstore": {**self.store.spec().to_json(), "path": f"{_key(name)}/"},
                "store_data_equal_to_fill_value": (
                    True
                ),  # Zeros are data: a chunk that is absent is one that was never written.
            }
            self._arrays[name] = ts.open(spec, open=True, context=self.context).result()
        return self._arrays[name]

    def _aligned(self, name: str, index: Index | None) -> Index:
        if name not in self.specs:
            raise KeyError(
                f"{name} is not among the {len(self.specs)} leaves that the checkpoint was begun"
                " with"
            )
        layout = self._layouts[name]
        out = checked_index(name, layout.shape, index)
        for entry, chunk, size in zip(out, layout.chunks, layout.shape, strict=True):
            if entry.start % chunk or (entry.stop % chunk and entry.stop != size):
                raise ValueError(
                    f"{name}: slice {entry.start}:{entry.stop} cuts through the stored chunks"
                    f" {layout.chunks}; see `pieces`"
                )
        return out

    def _chunk_keys(self, name: str, index: Index) -> list[str]:
        layout = self._layouts[name]
        ranges = [
            range(e.start // c, math.ceil(e.stop / c))
            for e, c in zip(index, layout.chunks, strict=True)
        ]
        return [f"{_key(name)}/{layout.key(position)}" for position in itertools.product(*ranges)]

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns failures of the storage into an OSError that says what was kept and what to do."""
        try:
            yield
        except OSError as error:
            raise type(error)(
                error.errno, f"cannot write {self.partial}: {error.strerror}. {self._kept()}"
            ) from None
        except (ValueError, RuntimeError) as error:
            code = storage.storage_errno(str(error))
            if code is None:
                raise
            raise OSError(
                code, f"cannot write {self.partial}: {os.strerror(code)}. {self._kept()}"
            ) from None

    def _kept(self) -> str:
        kept = (
            "What was written so far is kept: make room or fix the permission, then run the same"
            " command to go on"
        )
        return kept if (self.partial / IDENTITY).exists() else "Nothing was written"

    # Finishing.

    def finalize(self, metadata: Mapping[str, Any] | None = None) -> Path:
        """Checks that every leaf is complete and moves the checkpoint to `path` in one step.

        Args:
          metadata: the record to store, where it says more than the one that the checkpoint was
            begun with; None: that one.

        Raises:
          ValueError: leaves are missing or incomplete; they are named.
          FileExistsError: something appeared at `path` meanwhile.
          OSError: the disk is full or cannot be written.
        """
        lacking = self.missing()
        if lacking:
            shown = ", ".join(
                f"{name} ({count} chunks)" for name, count in list(lacking.items())[:8]
            )
            raise ValueError(
                f"{self.partial} lacks {len(lacking)} of {len(self.specs)} leaves:"
                f" {shown}{' ...' if len(lacking) > 8 else ''}"
            )
        if os.path.lexists(self.path):
            raise FileExistsError(
                f"{self.path} appeared meanwhile: the finished work is kept in {self.partial}; move"
                " one of them away"
            )
        with self.explained():
            drop_unused(self.state, self.context)
            storage.write_json(self.state / TREE_METADATA, tree_metadata(self.specs))
            record = self._identity["metadata"] if metadata is None else metadata
            storage.write_json(self.partial / STEP_METADATA, step_metadata(record))
            for folder in (self.state, self.partial):
                (folder / COMMIT_MARK).write_text(
                    f"Checkpoint commit was successful to {self.path}"
                )
            os.rename(self.partial, self.path)
            for leftover in (
                IDENTITY,
                LOCK,
            ):  # After the rename: a kill before it must still find them.
                (self.path / leftover).unlink(missing_ok=True)
            storage.sync_folder(self.path.parent)
        self.close()
        return self.path

    def close(self) -> None:
        """Lets go of the partial checkpoint without finishing it. The same `create_checkpoint` call
        goes on with it.
        """
        if not self._closed:
            self._closed = True
            # The lock must not be free while writes are under way; whether they succeed matters to
            # the next call.
            while self._pending:
                self._pending.popleft()[0].exception()
            self._arrays.clear()
            self._lock.close()

    def discard(self) -> None:
        """Removes the partial checkpoint."""
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _key(name: str) -> str:
    return name.replace("/", ".")
