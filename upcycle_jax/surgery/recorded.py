"""What a converted checkpoint says about its making, and whether that is as it was written.

The record lies in the checkpoint's own metadata from the moment it exists: recipe, sources, model,
and of every source leaf its shape, dtype and checksums, of its values and of its stored bytes.
`proof.json`, written
once the conversion is proved, repeats it and adds the checksums of the leaves that are not plain
copies, and the digests of the small files beside the arrays. Both carry a seal, so that damage in
one of them is told from damage in the arrays. A seal tells damage, not forgery: whoever rewrites a
file can seal it again.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.checkpoints import storage
from upcycle_jax.checkpoints.ocdbt import DATA_FOLDERS
from upcycle_jax.checkpoints.orbax_metadata import STEP_METADATA
from upcycle_jax.moe import roles
from upcycle_jax.surgery.leaf_sums import LeafSum
from upcycle_jax.surgery.parents import Reader
from upcycle_jax.surgery.recipe import MergeRecipe, Recipe
from upcycle_jax.surgery.recipe_json import from_json
from upcycle_jax.trees import LeafSpec

PROOF_FILE, PLAN_FILE = "proof.json", "plan.json"
SEAL = "seal"
RECORD_FILES = frozenset({STEP_METADATA, PROOF_FILE, PLAN_FILE})
"""Files of the result that are about the conversion; every other one is the checkpoint itself."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a digest of it, as plain JSON."""
    plain = json.loads(json.dumps(content))
    return {**plain, SEAL: _digest(plain)}


def is_broken(content: Mapping[str, Any]) -> bool:
    """Whether a sealed content has been changed. False for one that was never sealed."""
    return SEAL in content and content[SEAL] != _digest(content)


def _digest(content: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in content.items() if name != SEAL}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def source_leaves(
    specs: Mapping[str, LeafSpec], sums: Mapping[str, LeafSum], stored: Mapping[str, str]
) -> dict[str, Any]:
    """What is recorded of the source's leaves: shape, dtype, and the checksum of those that can be
    read; where it is known and all values are finite, that of the stored bytes, too.
    """
    return {
        name: {
            "shape": list(spec.shape),
            "dtype": spec.dtype.name,
            **({"checksum": sums[name].checksum} if sums[name].checksum else {}),
            **(
                {"stored": stored[name]}
                if name in stored and sums[name].checksum and not sums[name].nonfinite
                else {}
            ),
        }
        for name, spec in specs.items()
    }


@dataclasses.dataclass
class Recorded:
    """The record of a conversion.

    Attributes:
      recipe: what was followed; None where none is recorded.
      sources: paths of the checkpoints it was made from.
      fingerprint: of the source; '' where none is recorded.
      specs: shape and dtype of every source leaf; empty where none are recorded.
      checksums: of the source leaves, used or dropped.
      stored: of those whose values all are finite, the checksums of their stored bytes
        (`checkpoints.stored_sums`); those of older versions, and of sources that are no Orbax
        checkpoints, have none.
      results: checksums of the leaves of the result that are not plain copies, by path.
      files: sha256 of the small files of the result, by name relative to it.
      model: the configuration of the result's model, as JSON; None where none is recorded.
      content: the record as it was written.
      problems: what is damaged, one line each, with the file.
    """

    recipe: Recipe | MergeRecipe | None = None
    sources: tuple[str, ...] = ()
    fingerprint: str = ""
    specs: dict[str, LeafSpec] = dataclasses.field(default_factory=dict)
    checksums: dict[str, str] = dataclasses.field(default_factory=dict)
    stored: dict[str, str] = dataclasses.field(default_factory=dict)
    results: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    model: object = None
    content: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)


def read_recorded(target: Reader) -> Recorded:
    """Reads what a checkpoint records about its making. Damage and a recipe of another version are
    reported in `problems`, not raised.
    """
    folder = _folder(target)
    problems: list[str] = []
    record = _own_record(target, problems)
    proof = _proof_file(folder, problems) if folder is not None else {}
    repeated = proof.get("record")
    if isinstance(repeated, dict) and repeated:
        if record is None:
            record = repeated
        elif record != repeated:
            problems.append(f"{STEP_METADATA} and {PROOF_FILE} record two different conversions")
    out = _parsed(record or {}, problems)
    if out.content:
        try:
            out.results = {
                str(leaf["path"]): str(leaf["checksum"])
                for leaf in proof.get("leaves", ())
                if leaf.get("checksum")
            }
            out.files = {
                str(name): str(value) for name, value in (proof.get("files") or {}).items()
            }
        except (TypeError, KeyError, AttributeError) as error:
            problems.append(f"{PROOF_FILE} is of an unknown form: {error}")
    out.problems = problems
    return out


def _own_record(target: Reader, problems: list[str]) -> dict[str, Any] | None:
    """The record in the checkpoint's metadata; None where it is damaged."""
    try:
        found = target.metadata()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problems.append(f"{STEP_METADATA} cannot be read: {error}")
        return None
    surgery = found.get("surgery", {})
    unsealed = SEAL not in found and isinstance(surgery, dict) and "leaves" in surgery
    if is_broken(found) or unsealed or not isinstance(surgery, dict):
        problems.append(f"{STEP_METADATA} is not as it was written: its seal is broken")
        return None
    return found


def _proof_file(folder: Path, problems: list[str]) -> dict[str, Any]:
    """The content of proof.json; empty where it is missing, damaged, or has no seal."""
    path = folder / PROOF_FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{PROOF_FILE} cannot be read: {error}")
        return {}
    if is_broken(found) or (found.get("record") and SEAL not in found):
        problems.append(f"{PROOF_FILE} is not as it was written: its seal is broken")
        return {}
    return found if SEAL in found else {}


def _parsed(content: dict[str, Any], problems: list[str]) -> Recorded:
    """The record as an object; an empty one, with a problem, where this version cannot read it."""
    try:
        surgery = content.get("surgery", {})
        leaves = surgery.get("leaves", {})
        recipe, source = surgery.get("recipe"), surgery.get("source")
        return Recorded(
            recipe=None if recipe is None else from_json(recipe),
            sources=tuple(map(str, surgery.get("sources") or ([source] if source else []))),
            fingerprint=str(surgery.get("source_fingerprint", "")),
            specs=roles.inferred(
                {
                    name: LeafSpec(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))
                    for name, leaf in leaves.items()
                }
            ),
            checksums={
                name: str(leaf["checksum"]) for name, leaf in leaves.items() if leaf.get("checksum")
            },
            stored={
                name: str(leaf["stored"])
                for name, leaf in leaves.items()
                if leaf.get("stored") and leaf.get("checksum")
            },
            model=content.get("model"),
            content=content,
        )
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        problems.append(f"{STEP_METADATA} has a record that this version cannot read: {error}")
        return Recorded()


def _folder(target: Reader) -> Path | None:
    """The local folder of a checkpoint; None where it has none."""
    path = getattr(target, "path", None)
    if path is None or not storage.is_local(path) or not os.path.isdir(path):
        return None
    return Path(os.fspath(path))


def small_files(target: Reader) -> dict[str, str]:
    """sha256 of every file of a result but the arrays' data and `proof.json`, by relative name;
    empty where it is not a local folder.
    """
    folder = _folder(target)
    if folder is None:
        return {}
    return {
        str(path.relative_to(folder)): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.parent.name not in DATA_FOLDERS
        and path.parent / path.stem != folder / "proof"  # Nor what it is renamed from.
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def changed_files(target: Reader, recorded: Recorded) -> list[str]:
    """Small files of a result that are not as they were when it was proved first."""
    now = small_files(target)
    return [name for name, digest in sorted(recorded.files.items()) if now.get(name) != digest]
