"""The files of a Hugging Face folder, none of which is trusted: JSON of any content, an index that
names what it likes, shards that hold something else than the index says.
"""

import dataclasses
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors looks up by name)
import numpy as np
import safetensors
from etils import epath

from upcycle_jax.checkpoints import untrusted
from upcycle_jax.printing import printable

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Safetensors' names of the dtypes that are read."""

_MAX_JSON_BYTES = 64 << 20
_COMPARED_BYTES = 16 << 20
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PLAIN_NAME = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}\.safetensors")
_PICKLED = (".bin", ".pt", ".ckpt", ".msgpack", ".h5")


def shown(value: object) -> str:
    """A name or another value out of a file, short and without control characters, for messages."""
    try:
        text = printable(value if isinstance(value, str | Path) else repr(value))
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 160 else f"{text[:150]}..."


def inner_file(folder: Path, name: str) -> Path:
    """A file of the folder.

    Links are followed inside the folder, and from a snapshot of the Hugging Face cache to the
    `blobs` beside it, where that cache keeps its files.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is a link that leaves the folder, or no regular file.
    """
    place = folder / name
    try:
        real, home = Path(os.path.realpath(place)), Path(os.path.realpath(folder))
        mode = os.stat(real).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} has no {name}: copy it again") from None
    except OSError as error:
        raise ValueError(f"{place} cannot be read ({error.strerror or error})") from None
    blobs = home.parent.parent / "blobs"
    if home not in real.parents and not (home.parent.name == "snapshots" and real.parent == blobs):
        raise ValueError(
            f"{place} is a link that leaves the folder (to {shown(real)}): copy the file itself"
            " into the folder"
        )
    if not stat.S_ISREG(mode):
        raise ValueError(f"{place} is no file: copy the folder again")
    return real


def load_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the folder.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is no JSON object of a modest size, names a key twice, or is nested too deeply.
    """
    place, path = folder / name, inner_file(folder, name)
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise untrusted.damaged(place, f"it has {size} bytes, more than {_MAX_JSON_BYTES}")
    return untrusted.parse_json(untrusted.read_bytes(epath.Path(path)), place)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
      file: name of the file, in the folder.
      shape: dimensions.
      dtype: safetensors' name of the dtype.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """The safetensors files of a folder, opened once, their headers compared with the index.

    Args:
      folder: a local folder.

    Attributes:
      tensors: what is stored, by name.
      files: the files that count.

    Raises:
      FileNotFoundError: a file that the index names is missing.
      ValueError: no safetensors, a damaged file, or an index and headers that contradict each
        other.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, Any] = {}
        weight_map = self._weight_map()
        self.files = tuple(sorted(set(weight_map.values()))) if weight_map else (WEIGHTS,)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for name in self._header(file):
                if name in self.tensors:
                    raise ValueError(
                        f"{folder}: {shown(name)} is in two files, {self.tensors[name].file} and"
                        f" {file}: copy the folder again"
                    )
                piece = self._open[file].get_slice(name)
                self.tensors[name] = Stored(file, tuple(piece.get_shape()), str(piece.get_dtype()))
        if weight_map:
            self._check_index(weight_map)
        self._refuse_other_weights()

    def _weight_map(self) -> dict[str, str]:
        """Tensor -> file, as the index says; empty without an index."""
        index = self._folder / WEIGHTS_INDEX
        if not os.path.lexists(index):
            if not os.path.lexists(self._folder / WEIGHTS):
                raise ValueError(self._without_weights())
            return {}
        found = load_json(self._folder, WEIGHTS_INDEX).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise ValueError(
                f"{index} has no weight_map (tensor -> file): it is damaged, copy it again"
            )
        for tensor, file in found.items():
            if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
                raise ValueError(
                    f"{index}: weight_map places {shown(tensor)} in {shown(file)}; only a"
                    " *.safetensors file of the folder itself may stand there"
                )
        missing = sorted(
            file for file in set(found.values()) if not os.path.lexists(self._folder / file)
        )
        if missing:
            raise ValueError(
                f"{self._folder}: the index names {', '.join(map(shown, missing[:5]))}, which"
                f" {'is' if len(missing) == 1 else 'are'} missing: copy"
                f" {'it' if len(missing) == 1 else 'them'} again"
            )
        return found

    def _without_weights(self) -> str:
        names = sorted(child.name for child in self._folder.iterdir())
        shards = [name for name in names if _SHARD.fullmatch(name)]
        if shards:
            return (
                f"{self._folder} has the shards {', '.join(shards[:3])} but no {WEIGHTS_INDEX}:"
                " copy the index too"
            )
        pickled = [shown(name) for name in names if name.endswith(_PICKLED)]
        return (
            f"{self._folder} has no {WEIGHTS}"
            + (
                f", only {', '.join(pickled)}: pickled weights are not read; load them"
                if pickled
                else ": load the model"
            )
            + " with transformers and call save_pretrained(..., safe_serialization=True)"
        )

    def _refuse_other_weights(self) -> None:
        """Weights that lie there and are not read would be a part of the model for its writer."""
        names = sorted(child.name for child in self._folder.iterdir())
        others = [name for name in names if _SHARD.fullmatch(name) and name not in self.files]
        if others:
            raise ValueError(
                f"{self._folder}: {', '.join(others[:5])} lies beside {', '.join(self.files[:3])}"
                f" and is named by no {WEIGHTS_INDEX}: it is not clear which of them are the"
                " model. Remove those that are not, or copy the folder again"
            )
        if "adapter_config.json" in names:
            raise ValueError(
                f"{self._folder} holds an adapter (adapter_config.json), which changes the model:"
                " merge it with peft's merge_and_unload() and save the model, or remove it"
            )

    def _header(self, file: str) -> list[str]:
        """Opens a file; the names of its tensors. Safetensors compares sizes with the file."""
        path = inner_file(self._folder, file)
        try:
            self._open[file] = safetensors.safe_open(str(path), framework="numpy")
            return sorted(self._open[file].keys())
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{self._folder / file} is damaged or truncated ({error}): copy it again"
            ) from None

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        for tensor, file in sorted(weight_map.items()):
            stored = self.tensors.get(tensor)
            if stored is None or stored.file != file:
                where = f"it lies in {stored.file}" if stored else "no file has it"
                raise ValueError(
                    f"{self._folder}: the index places {shown(tensor)} in {file}, which lacks it"
                    f" ({where}): the index is of another model or damaged. Copy the folder again"
                )
        unnamed = sorted(self.tensors.keys() - weight_map.keys())
        if unnamed:
            first = unnamed[0]
            raise ValueError(
                f"{self._folder}: {shown(first)} is in {self.tensors[first].file} but not in the"
                f" index{f', nor are {len(unnamed) - 1} more' if unnamed[1:] else ''}: copy"
                f" {WEIGHTS_INDEX} again"
            )

    def dtype(self, tensor: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
          ValueError: it is quantised, or of integers.
        """
        stored = self.tensors[tensor]
        if stored.dtype not in DTYPES:
            raise ValueError(
                f"{self._folder}: {shown(tensor)} in {stored.file} is stored as {stored.dtype};"
                " quantised weights are not supported, use float16 or wider"
            )
        return np.dtype(DTYPES[stored.dtype])

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor.

        Raises:
          ValueError: its data cannot be read.
        """
        stored = self.tensors[tensor]
        try:
            return np.asarray(self._open[stored.file].get_slice(tensor)[index])
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{self._folder / stored.file}: {shown(tensor)} cannot be read ({error}): copy the"
                " file again"
            ) from None

    def equal(self, one: str, other: str) -> bool:
        """Whether two matrices hold the same values, read in parts up to the first difference."""
        shape = self.tensors[one].shape
        if shape != self.tensors[other].shape or not shape:
            return False
        same_dtype = self.dtype(one) == self.dtype(other)
        row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * 4)
        rows = max(1, _COMPARED_BYTES // row_bytes)
        for start in range(0, shape[0], rows):
            part = (slice(start, min(start + rows, shape[0])),)
            a, b = self.read(one, part), self.read(other, part)
            if same_dtype:
                equal = np.array_equal(a.view(np.uint8), b.view(np.uint8))
            else:
                equal = np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True)
            if not equal:
                return False
        return True
