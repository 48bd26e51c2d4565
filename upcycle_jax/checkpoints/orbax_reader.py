"""Reads Orbax checkpoints (T5X's layout, this library's, and plain Orbax trees) straight through
TensorStore.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from upcycle_jax.checkpoints import storage, untrusted
from upcycle_jax.checkpoints.orbax_metadata import (
    STATE_ITEM,
    STEP_METADATA,
    TREE_METADATA,
    Zarr3Layout,
    read_record,
    read_tree_metadata,
)
from upcycle_jax.checkpoints.reader import Index, ReaderBase, checked_index, scalar_step
from upcycle_jax.moe import roles
from upcycle_jax.printing import printable
from upcycle_jax.state_tree import STEP
from upcycle_jax.trees import LeafSpec

LARGE_CHUNK = 64 << 20
"""Chunks above so many bytes are believed only after a look at a stored one."""


def find_item(path: epath.Path) -> epath.Path | None:
    """The folder below (or at) `path` that holds an Orbax array tree: `state` before any other;
    None where there is none.
    """
    if (path / TREE_METADATA).exists():
        return path
    if (path / STATE_ITEM / TREE_METADATA).exists():
        return path / STATE_ITEM
    items = sorted(
        child for child in path.iterdir() if child.is_dir() and (child / TREE_METADATA).exists()
    )
    if len(items) > 1:
        raise ValueError(
            f"{path} holds several Orbax trees ({', '.join(item.name for item in items)}): open the"
            " one you mean by its path"
        )
    return items[0] if items else None


class OrbaxReader(ReaderBase):
    """An Orbax array tree: OCDBT or one folder per array, zarr 2 or zarr 3.

    Attributes:
      item: the folder of the tree itself, e.g. `checkpoint_100/state`.
    """

    format = "orbax"

    def __init__(self, path: epath.Path, item: epath.Path):
        self.path = path
        self.item = item
        self.context = storage.new_context()
        self._arrays: dict[str, ts.TensorStore] = {}
        # First of all, so that no link out of the checkpoint is ever followed.
        self._stored_bytes = untrusted.stored_bytes(path) if storage.is_local(path) else None
        self._tree = read_tree_metadata(item / TREE_METADATA)
        self._keys = self._tree.keys
        database = (item / "manifest.ocdbt").exists()
        self.uses_ocdbt = database if self._tree.ocdbt is None else self._tree.ocdbt
        self.uses_zarr3 = self._tree.zarr3
        if self.uses_ocdbt and not database:
            raise ValueError(
                f"{item} has no manifest.ocdbt: the checkpoint is half-written or half-copied. Use"
                " another step or copy it again"
            )

    @functools.cached_property
    def store(self) -> ts.KvStore:
        """The key-value store that holds the arrays; keys begin with the '.'-joined name."""
        spec = storage.ocdbt_spec(self.item) if self.uses_ocdbt else storage.file_spec(self.item)
        try:
            return ts.KvStore.open(spec, context=self.context).result()
        except (ValueError, RuntimeError) as error:
            raise untrusted.damaged(self.item, storage.reason(error)) from None

    def key(self, name: str) -> str:
        """The '.'-joined key of a leaf.

        Raises:
          KeyError: no such leaf.
        """
        self.spec(name)
        return self._keys[name]

    @functools.cached_property
    def _documents(self) -> dict[str, bytes]:
        """The `.zarray` or `zarr.json` of every leaf."""
        reads = {
            name: self.store.read(f"{key}/{self._member}")
            for name, key in sorted(self._keys.items())
        }
        documents = {}
        for name, future in reads.items():
            try:
                result = future.result()
            except (ValueError, RuntimeError) as error:
                raise untrusted.damaged(
                    f"{self.item}: leaf {printable(name)}: {self._member}", storage.reason(error)
                ) from None
            if result.state != "value":
                raise ValueError(
                    f"{self.item}: leaf {printable(name)} is in the tree but its {self._member} is"
                    " missing: the checkpoint is damaged"
                )
            documents[name] = result.value
        return documents

    @property
    def _member(self) -> str:
        return "zarr.json" if self.uses_zarr3 else ".zarray"

    @functools.cached_property
    def _layouts(self) -> dict[str, storage.ZarrLayout | Zarr3Layout]:
        parse = Zarr3Layout.from_json if self.uses_zarr3 else storage.ZarrLayout.from_json
        layouts = {
            name: parse(text, f"{self.item}: leaf {printable(name)}: {self._member}")
            for name, text in self._documents.items()
        }
        self._check_stored(layouts)
        return layouts

    def _check_stored(self, layouts: dict[str, storage.ZarrLayout | Zarr3Layout]) -> None:
        """Checks the claimed shapes against what is stored: every chunk must be there, so that the
        claim is bounded by the number of chunks and the size of one.

        Plain files in a bucket are not listed (it would take a request for each thousand); there,
        reading says what is missing.
        """
        for name, layout in layouts.items():
            untrusted.check_chunk(
                layout.chunk_bytes, self._stored_bytes, f"{self.item}: leaf {printable(name)}"
            )
        if not self._every_chunk_is_stored or not (self.uses_ocdbt or storage.is_local(self.item)):
            return
        try:
            present = {key.decode(errors="replace") for key in self.store.list().result()}
        except (ValueError, RuntimeError) as error:
            raise untrusted.damaged(self.item, storage.reason(error)) from None
        for name, layout in layouts.items():
            # At most as many steps as there are chunks: the first absent one ends it.
            for position in storage.positions(layout.grid):
                if f"{self._keys[name]}/{layout.key(position)}" not in present:
                    raise ValueError(
                        f"{self.item}: leaf {printable(name)} of shape {list(layout.shape)} lacks"
                        f" its chunk {layout.key(position)}: the checkpoint is damaged. Copy it"
                        " again"
                    )

    @property
    def _every_chunk_is_stored(self) -> bool:
        """Whether an absent chunk is lost data. T5X and Orbax store zeros too; only old zarr 3
        trees leave chunks out that equal their fill value.
        """
        return self._tree.stores_zeros or not self.uses_zarr3

    def zarr_layout(self, name: str) -> storage.ZarrLayout:
        """Chunks and codec of one leaf.

        Raises:
          ValueError: the checkpoint is stored as zarr 3.
        """
        self.spec(name)
        layout = self._layouts[name]
        if isinstance(layout, Zarr3Layout):
            raise ValueError(f"{self.item} is stored as zarr 3, whose chunks are packed in shards")
        return layout

    @functools.cached_property
    def _specs(self) -> dict[str, LeafSpec]:
        return roles.inferred(
            {
                name: LeafSpec(layout.shape, layout.numpy_dtype)
                for name, layout in self._layouts.items()
            }
        )

    def names(self) -> Iterable[str]:
        return self._keys

    def specs(self) -> dict[str, LeafSpec]:
        return dict(self._specs)

    def spec(self, name: str) -> LeafSpec:
        found = self._specs.get(name)
        return super().spec(name) if found is None else found  # Which says what is missing.

    @property
    def step(self) -> int:
        """`state/step` where it is stored, else the number that the folder's name ends with, else
        0.
        """
        if STEP in self._keys:
            return scalar_step(self)
        found = re.search(r"(\d+)$", self.path.name)
        return int(found.group(1)) if found else 0

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            driver = "zarr3" if self.uses_zarr3 else "zarr"
            spec: storage.Json = {
                "driver": driver,
                "kvstore": {**self.store.spec().to_json(), "path": self._path(name)},
            }
            if self._every_chunk_is_stored:
                spec["fill_missing_data_reads"] = False
            self._check_large_chunk(name)
            self._arrays[name] = ts.open(spec, open=True, context=self.context).result()
        return self._arrays[name]

    def _check_large_chunk(self, name: str) -> None:
        """TensorStore takes memory for a whole chunk before it decodes it: the size of a large one
        is compared with the bytes of the first that is stored.
        """
        layout = self._layouts[name]
        if layout.chunk_bytes <= LARGE_CHUNK:
            return
        first = self.store.read(f"{self._keys[name]}/{layout.key((0,) * len(layout.shape))}")
        untrusted.check_chunk(
            layout.chunk_bytes, len(first.result().value), f"{self.item}: leaf {printable(name)}"
        )

    def _path(self, name: str) -> str:
        prefix = "" if self.uses_ocdbt else self.store.path
        return f"{prefix}{self._keys[name]}/"

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        return self.read_parts(name, [index or ()])[0]

    def read_parts(self, name: str, indices: Sequence[Index]) -> list[np.ndarray]:
        """Several parts of one leaf, in order; asked for at once, so that a chunk that several of
        them touch is decoded once.
        """
        shape = self.spec(name).shape
        checked = [checked_index(name, shape, index) for index in indices]
        try:
            array = self._array(name)
            return [
                np.asarray(future.result()) for future in [array[index].read() for index in checked]
            ]
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.item}: leaf {printable(name)} cannot be read, its data is missing or"
                f" damaged: {storage.reason(error)}"
            ) from None

    def metadata(self) -> dict[str, Any]:
        for folder in (self.path, self.item.parent):
            if (folder / STEP_METADATA).exists():
                return read_record(folder / STEP_METADATA)
        return {}
