"""Small JSON-able descriptions of what a stream of batches is made of, and their comparison. No
TensorFlow.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

_INFORMATIVE = "versions"  # a newer library is told, not refused


def source(data_source: Any) -> dict[str, Any]:
    """A SeqIO source: its own fingerprint where it has one, else its kind and the data set's
    name.
    """
    if hasattr(data_source, "fingerprint"):
        return data_source.fingerprint()
    described: dict[str, Any] = {"kind": type(data_source).__name__}
    dataset = getattr(data_source, "tfds_dataset", None)
    if dataset is not None:
        described["tfds"] = str(dataset.name)
    patterns = getattr(data_source, "_split_to_filepattern", None)
    if patterns is not None:
        described["files"] = {str(split): str(pattern) for split, pattern in patterns.items()}
    return described


def _step(preprocessor: Any) -> str:
    if isinstance(preprocessor, functools.partial):
        settings = ", ".join(
            f"{name}={value!r}"
            for name, value in sorted(preprocessor.keywords.items())
            if not callable(value)
        )
        return f"{_step(preprocessor.func)}({settings})"
    return getattr(preprocessor, "__name__", type(preprocessor).__name__)


def preprocessors(task: Any) -> list[str]:
    """Names and settings of a SeqIO task's steps."""
    return [_step(preprocessor) for preprocessor in task.preprocessors]


def vocabulary(vocab: Any) -> dict[str, Any]:
    """Kind and size of a vocabulary, and the sha256 of its model where it has one, or what else
    it says of itself.
    """
    described: dict[str, Any] = {"kind": type(vocab).__name__, "size": int(vocab.vocab_size)}
    if hasattr(vocab, "fingerprint"):
        described |= vocab.fingerprint()
    model = getattr(vocab, "sp_model", None)
    if isinstance(model, bytes):
        described["sha256"] = hashlib.sha256(model).hexdigest()
    return described


def differences(saved: Any, current: Any, *, path: str = "") -> list[str]:
    """What differs between two fingerprints, one line each, versions of libraries aside.

    >>> differences({"seed": 1, "versions": {}}, {"seed": 2})
    ['seed: was 1, is 2']
    """
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        found = []
        for name in sorted(saved.keys() | current.keys()):
            if not path and name == _INFORMATIVE:
                continue
            found += differences(
                saved.get(name), current.get(name), path=f"{path}/{name}" if path else name
            )
        return found
    if isinstance(saved, tuple):
        saved = list(saved)
    if isinstance(current, tuple):
        current = list(current)
    return [] if saved == current else [f"{path}: was {saved!r}, is {current!r}"]
