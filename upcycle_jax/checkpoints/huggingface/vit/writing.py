"""The Hugging Face folder that a dense vision transformer becomes: of the type that it was read as,
with the text tower and whatever else came with it, or of a type that computes the same.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.checkpoints.huggingface.base import (
    Computed,
    Export,
    Leaf,
    Source,
    Sources,
    WritingOptions,
    leaves_of,
)
from upcycle_jax.checkpoints.huggingface.beside import PREPARATION, Beside, find
from upcycle_jax.checkpoints.huggingface.files import CONFIG, load_json
from upcycle_jax.checkpoints.huggingface.verdict import Kind, Verdict, table
from upcycle_jax.checkpoints.huggingface.vit.config_json import read_config
from upcycle_jax.checkpoints.huggingface.vit.holding import (
    HOLDERS,
    Holder,
    config_json,
    preparation,
    why_not,
)
from upcycle_jax.checkpoints.huggingface.vit.reading import in_folder
from upcycle_jax.checkpoints.huggingface.vit.tensors import Names, Places, layout, names_of
from upcycle_jax.checkpoints.reader import CheckpointReader, Index
from upcycle_jax.checkpoints.vit.model import dense_model, is_vision
from upcycle_jax.models.vit.config import VitConfig
from upcycle_jax.state_tree import TARGET
from upcycle_jax.text import Format
from upcycle_jax.trees import LeafSpec, Role

READERS = ("transformers5", "transformers4")
"""Who reads such folders."""

_HEAD_BIAS = "head/bias"


def export(reader: CheckpointReader, options: WritingOptions) -> Export | None:
    """See `base.FolderFamily.export`."""
    if not is_vision(reader):
        return None
    if any(spec.role is not Role.DENSE for spec in reader.specs().values()):
        raise ValueError(
            f"{reader.path} is a vision transformer with experts, and Hugging Face has no class for"
            " it: write V-MoE's tree (--to vmoe), or merge the experts first"
            " (recipes/merge_mean.gin)"
        )
    _check_readers(options)
    config = dense_model(reader, options.model)
    stored = {path.removeprefix(TARGET): leaf for path, leaf in leaves_of(reader).items()}
    beside = _beside(reader, options)
    holder, why = choose(config, options.model_type, beside)
    own = beside if beside and beside.keys.get("model_type") == holder.model_type else None
    dtype = options.dtype or functools.reduce(
        np.promote_types, (leaf.spec.dtype for leaf in stored.values())
    )
    content = config_json(holder, config, np.dtype(dtype).name, own.keys if own else {})
    read = read_config(Path(), content)
    names = names_of(read, holder.model_type)
    plain = not config.num_classes and holder.model_type == "vit"
    if plain or holder.model_type == "dinov2":
        names = dataclasses.replace(names, base="")  # As the model without a head is saved.
    places = layout(names, config, qkv_bias=True)
    _check_read_back(config, dataclasses.replace(read.config, num_classes=config.num_classes))
    _check_leaves(reader, places, stored)
    if not holder.head_bias:
        _check_no_bias(reader, stored)
    tensors, leaves = _tensors(places, stored)
    rest = _rest(own, holder, names, config) if own else {}
    tensors |= {name: Source(name) for name in rest}
    leaves |= rest
    verdicts = [Verdict(name, Kind.EXACT) for name in READERS]
    return Export(
        config=content,
        tensors=tensors,
        leaves=leaves,
        said=(
            *table(holder.model_type, verdicts).render(Format.TEXT).splitlines(),
            why,
            *_said(beside, own=own is not None, names=sorted(rest)),
        ),
        verdicts={
            "model_type": holder.model_type,
            "rewritings": [],
            "verdicts": [one.json() for one in verdicts],
            "why": why,
        },
        copied=_copied(beside, holder, config),
    )


def _check_readers(options: WritingOptions) -> None:
    for name in options.readers:
        if name not in READERS:
            raise ValueError(
                f"--reader {name!r} reads no vision transformer: {' and '.join(READERS)} do"
            )


def _beside(reader: CheckpointReader, options: WritingOptions) -> Beside | None:
    """What lies beside the model: where the user says, or where it came from."""
    if options.tokenizer is not None:
        named = in_folder(options.tokenizer)
        if named is None:
            raise ValueError(
                f"{options.tokenizer} holds no vision transformer of Hugging Face: name the folder"
                " that the model came from"
            )
        return named
    found, folder = find(reader)
    return found if folder is None else in_folder(folder)


def choose(config: VitConfig, model_type: str | None, beside: Beside | None) -> tuple[Holder, str]:
    """The type to write, and why it is that one.

    Args:
      config: the model.
      model_type: write this one; None: what the model was read as, else the first that can hold it.
      beside: what came with the model.

    Raises:
      ValueError: no type can hold the model, or this one cannot.
    """
    came_as = beside.keys.get("model_type") if beside is not None else None
    holders = [one for one in HOLDERS if model_type in (None, one.model_type)]
    if not holders:
        known = ", ".join(dict.fromkeys(one.model_type for one in HOLDERS))
        raise ValueError(f"model_type {model_type!r} is not among {known}")
    reasons = {
        one: [
            *why_not(one, config),
            *(
                ["it has a text tower, and none came with the model"]
                if one.whole and not (came_as == one.model_type and _has_text(beside))
                else []
            ),
        ]
        for one in holders
    }
    found = [one for one, why in reasons.items() if not why]
    if not found:
        lines = [f"{one.model_type}: {'; '.join(why)}" for one, why in reasons.items()]
        raise ValueError(
            "no Hugging Face type can hold this vision transformer:\n"
            + "\n".join(sorted(lines, key=lambda line: line.count(";")))
        )
    best = next((one for one in found if one.model_type == came_as), found[0])
    if model_type is not None:
        why = "as asked for"
    elif best.model_type == came_as:
        why = "what it was read as"
    else:
        others = [one.model_type for one in found if one != best]
        why = f"chosen before {', '.join(others)}" if others else "the only type that can hold it"
    return best, f"{best.model_type}: {why}"


def _has_text(beside: Beside | None) -> bool:
    return beside is not None and any(name.startswith("text_model.") for name in beside.tensors)


def _rest(beside: Beside, holder: Holder, names: Names, config: VitConfig) -> dict[str, Leaf]:
    """The tensors beside the model under the names that they have in the folder."""
    out = {}
    for name, leaf in beside.tensors.items():
        if name.startswith("vision_model.head.") or (config.num_classes and ".pooler." in name):
            continue  # What a classifier does not have.
        if not holder.whole:
            name = names.base + name.removeprefix("vit.").removeprefix("dinov2.")
        out[name] = leaf
    return out


def _check_read_back(config: VitConfig, read: VitConfig) -> None:
    """The content of config.json has to state this model."""
    written = dataclasses.replace(
        read, dtype=config.dtype, head_bias_init=config.head_bias_init, moe=config.moe
    )
    differing = [
        f"{field.name} is {getattr(config, field.name)!r}, read as {getattr(written, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(written, field.name)
    ]
    if differing:
        raise ValueError(
            f"the {CONFIG} would be another model: {'; '.join(differing)}. Nothing was written"
        )


def _check_leaves(reader: CheckpointReader, places: Places, stored: Mapping[str, Leaf]) -> None:
    found = {path: leaf.spec.shape for path, leaf in stored.items()}
    unplaced = sorted(found.keys() ^ places.sources.keys())
    if unplaced:
        raise ValueError(
            f"the parameters of {reader.path} are not those of the model that it states:"
            f" {', '.join(unplaced[:5])}"
        )


def _check_no_bias(reader: CheckpointReader, stored: Mapping[str, Leaf]) -> None:
    """A projection has no bias: that of the head has to be zero."""
    leaf = stored.get(_HEAD_BIAS)
    if leaf is not None and np.any(leaf.read((slice(0, leaf.spec.shape[0]),))):
        raise ValueError(
            f"{reader.path} has a head whose bias is not zero, as it is trained here, and CLIP's"
            " projection has none. Nothing was written"
        )


def _tensors(
    places: Places, stored: Mapping[str, Leaf]
) -> tuple[dict[str, Sources], dict[str, Leaf]]:
    """What tensors are made of, and the leaves that they are made of."""
    tensors: dict[str, Sources] = {}
    leaves: dict[str, Leaf] = {}
    for path, source in places.sources.items():
        leaf = _finite(path, stored[path])
        if path in _TURNED:
            name = _tensor_of(source)
            shape = places.shapes[name]
            leaf, source = _turned(leaf, shape, _TURNED[path]), Source(name)
        elif isinstance(source, Computed):
            continue  # A bias of zeros, which was looked at.
        tensors[TARGET + path], leaves[TARGET + path] = source, leaf
    return tensors, leaves


def _tensor_of(source: Sources | Computed) -> str:
    """The tensor behind a leaf; the first of several."""
    if isinstance(source, Computed):
        return next(iter(source.tensors))
    return (source[0] if isinstance(source, tuple) else source).tensor


def _convolution(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`[p, p, channels, d]` as `[d, channels, p, p]`."""
    return kernel.transpose(3, 2, 0, 1)


def _token(token: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The class token `[1, 1, d]`, with its position in it."""
    return token.reshape(shape)


def _table(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Positions `[1, N, d]` as a table; where that has one row more, for the class token, that row
    is zero.
    """
    out = np.zeros(shape, positions.dtype)
    rows = out.reshape(-1, shape[-1])
    rows[len(rows) - positions.shape[1] :] = positions[0]
    return out


_TURNED: Mapping[str, Callable[[np.ndarray, tuple[int, ...]], np.ndarray]] = {
    "embedding/kernel": _convolution,
    "cls": _token,
    "pos_embedding": _table,
}
"""Small leaves that are no tensor, transposed or not."""


def _turned(
    leaf: Leaf, shape: tuple[int, ...], turn: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
) -> Leaf:
    """A small leaf in the shape of its tensor."""

    def read(index: Index) -> np.ndarray:
        whole = tuple(slice(0, size) for size in leaf.spec.shape)
        return np.ascontiguousarray(turn(leaf.read(whole), shape)[index])

    return Leaf(LeafSpec(shape, leaf.spec.dtype), read)


def _finite(path: str, leaf: Leaf) -> Leaf:
    """A leaf of whose values none is NaN or infinite; reading it raises a ValueError otherwise."""

    def read(index: Index) -> np.ndarray:
        value = leaf.read(index)
        if not np.isfinite(value).all():
            raise ValueError(
                f"{path} has NaN or infinite values: the checkpoint is of a run that diverged, or"
                " damaged. Take an earlier one"
            )
        return value

    return Leaf(leaf.spec, read)


def _said(beside: Beside | None, *, own: bool, names: list[str]) -> Iterator[str]:
    if beside is None:
        return
    if names and own:
        yield f"{len(names)} tensors beside the model, {names[0]} the first, from {beside.folder}"
    elif beside.tensors and not own:
        yield f"the {len(beside.tensors)} tensors beside the model in {beside.folder} are left out"


def _copied(beside: Beside | None, holder: Holder, config: VitConfig) -> dict[str, Path | str]:
    """Files that are copied, and how images are prepared."""
    out: dict[str, Path | str] = {} if beside is None else dict(beside.files())
    keys = preparation(holder, config)
    if beside is not None and PREPARATION in out:
        stated = load_json(beside.folder, PREPARATION)
        if not _is_of_other_size(stated, beside.keys, config):
            return out
        keys = {**stated, "size": keys["size"]}
    out[PREPARATION] = json.dumps(keys, indent=2) + "\n"
    return out


def _is_of_other_size(
    stated: Mapping[str, Any], keys: Mapping[str, Any], config: VitConfig
) -> bool:
    """Whether images are prepared for a model of another size than this one."""
    size = stated.get("size")
    side = size.get("height") if isinstance(size, dict) else None
    if not isinstance(side, int) or side == config.image_size:
        return False
    tower = keys.get("vision_config", keys)
    # An image whose last patch is not whole is prepared as it was.
    as_before = isinstance(tower, dict) and side == tower.get("image_size")
    return not (as_before and side // config.patch_size * config.patch_size == config.image_size)
