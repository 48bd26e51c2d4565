"""`MODEL_DIR/manifest.json`: what a run is, what it started from and with which versions, for
reports and for refusing strangers.
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from upcycle_jax.files import write_whole
from upcycle_jax.leases.process_record import this_process

MANIFEST_FILE = "manifest.json"
PACKAGES = (
    "upcycle_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "seqio",
    "tensorflow",
    "tensorflow-cpu",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that are installed; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def devices(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Kind and number of devices, and how the mesh is laid over them."""
    return {
        "platform": mesh.devices.flat[0].platform,
        "kind": mesh.devices.flat[0].device_kind,
        "count": int(mesh.devices.size),
        "processes": jax.process_count(),
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
    }


def read(model_dir: epath.PathLike) -> dict[str, Any]:
    """The manifest of a MODEL_DIR; empty where there is none.

    Raises:
      ValueError: it is no JSON object.
    """
    path = epath.Path(model_dir) / MANIFEST_FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a JSON object is expected, not {type(found).__name__}")
        return found
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError too
        raise ValueError(
            f"{path} is damaged ({error}): remove it if {model_dir} belongs to this run"
        ) from None


def write(model_dir: epath.PathLike, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest, whole or not at all; only process 0 writes."""
    write_text(
        epath.Path(model_dir) / MANIFEST_FILE, json.dumps(as_json(manifest), indent=2) + "\n"
    )


def as_json(value: Any) -> Any:
    """The value as it comes back from a JSON file; what JSON does not know becomes its text."""
    return json.loads(json.dumps(value, default=str))


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small file so that a reader sees the old one or the new one; only process 0
    writes.
    """
    if jax.process_index() == 0:
        write_whole(path, text)


def update(model_dir: epath.PathLike, **entries: Any) -> None:
    """Sets entries of the manifest that is there."""
    write(model_dir, read(model_dir) | entries)


def model_changes(previous: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Settings of the model that are not what the manifest so far says, one text each; nothing
    where there is none.

    >>> model_changes({"model": {"moe": {"a": 1, "b": 2}}}, {"model": {"moe": {"a": 1, "b": None}}})
    ['model.moe.b was 2 and is None']
    """
    if not previous.get("model"):
        return []
    return _differences(previous["model"], as_json(identity["model"]), "model")


def _differences(before: Any, now: Any, name: str) -> list[str]:
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [f"{name} was {before!r} and is {now!r}"]
    keys = dict.fromkeys([*before, *now])
    found = [_differences(before.get(key), now.get(key), f"{name}.{key}") for key in keys]
    return [text for texts in found for text in texts]


def start(
    previous: Mapping[str, Any], *, identity: Mapping[str, Any], this_start: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest at the start of a process: what the run is stays as first written, each start is
    added to a list.

    Args:
      previous: the manifest so far, empty for a new run.
      identity: entries that describe the run as a whole, e.g. `start_step`, `parameters`,
        `model_hash`, `recipe`.
      this_start: entries of this process: step, restore source, versions, devices, configuration.
    """
    starts = [*previous.get("starts", ()), {"time": now(), "process": this_process(), **this_start}]
    kept = {
        name: value
        for name, value in previous.items()
        if name in ("start_step", "restored_from", "recipe", "created")
    }
    return {
        "created": now(),
        **identity,
        **kept,
        "status": "running",
        "step": this_start.get("step", 0),
        "starts": starts,
    }
