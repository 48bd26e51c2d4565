"""The Hugging Face folder that a decoder-only language model becomes, dense or with MoE layers."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.checkpoints.huggingface.base import Export, Leaf, WritingOptions, leaves_of
from upcycle_jax.checkpoints.huggingface.carried import carried_files, check_tokenizer, origin
from upcycle_jax.checkpoints.huggingface.decoder import reading_back, verdicts
from upcycle_jax.checkpoints.huggingface.decoder.choosing import choose
from upcycle_jax.checkpoints.huggingface.decoder.config_writing import (
    SPECIAL_TOKENS,
    Beside,
    config_json,
)
from upcycle_jax.checkpoints.huggingface.decoder.tensors import NAMES, Place, layout
from upcycle_jax.checkpoints.huggingface.files import CONFIG, load_json
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.models import registry
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.moe import roles
from upcycle_jax.state_tree import TARGET
from upcycle_jax.text import Format
from upcycle_jax.trees import LeafSpec, Role, diff

_FIRST = f"{TARGET}decoder/layers_0/self_attention/query/kernel"


def export(reader: CheckpointReader, options: WritingOptions) -> Export | None:
    """See `base.FolderFamily.export`."""
    stored = leaves_of(reader)
    if _FIRST not in stored or any(path.startswith(f"{TARGET}encoder/") for path in stored):
        return None
    config = _config(reader, options, stored)
    home = origin(reader)
    keys = load_json(home, CONFIG) if home is not None else {}
    form, why = choose(
        config,
        model_type=options.model_type,
        readers=options.readers,
        preferred=_text(keys.get("model_type")),
    )
    places = list(layout(form.model_type, form.config, NAMES[form.model_type]))
    leaves = form.leaves({path.removeprefix(TARGET): leaf for path, leaf in stored.items()})
    _check_leaves(reader, places, leaves)
    dtype = options.dtype or functools.reduce(
        np.promote_types, (leaf.spec.dtype for leaf in leaves.values())
    )
    source = options.tokenizer or home
    beside, copied = _beside(source, options, config)
    table = verdicts.table(form.model_type, form.verdicts).render(Format.TEXT)
    said = [why, *([f"tokenizer from {source}"] if copied else [_NO_TOKENIZER])]
    content = config_json(form.config, form.model_type, np.dtype(dtype), beside)
    of_4 = form.verdict("transformers4")
    reading_back.check(content, form.config, by_4=of_4.kind not in verdicts.UNUSABLE)
    return Export(
        config=content,
        tensors={TARGET + place.path: place.sources for place in places},
        leaves={TARGET + path: leaf for path, leaf in leaves.items()},
        said=(*table.splitlines(), *said),
        verdicts=form.json() | {"why": why},
        copied=copied,
    )


_NO_TOKENIZER = "no tokenizer is copied: name the folder that has it with --tokenizer"


def _config(
    reader: CheckpointReader, options: WritingOptions, leaves: Mapping[str, Leaf]
) -> DecoderConfig:
    """The model: as given, as the checkpoint states it, or what the leaves of a dense one imply."""
    config = options.model or reader.model_config()
    if isinstance(config, DecoderConfig):
        return config
    if config is not None:
        raise ValueError(
            f"{reader.path} holds a decoder-only language model, the model given is a"
            f" {type(config).__name__}: name its own model file"
        )
    specs = roles.inferred({path: leaf.spec for path, leaf in leaves.items()})
    if any(spec.role != Role.DENSE for spec in specs.values()):
        raise ValueError(
            f"{reader.path} is a Mixture-of-Experts and does not state its router: name its model"
            " file with --gin_file"
        )
    return registry.infer_dense(specs, reader.model_settings())


def _check_leaves(
    reader: CheckpointReader, places: Sequence[Place], leaves: Mapping[str, Leaf]
) -> None:
    float32 = np.dtype(np.float32)
    expected = {place.path: LeafSpec(place.shape, float32) for place in places}
    found = {path: LeafSpec(leaf.spec.shape, float32) for path, leaf in leaves.items()}
    difference = diff(expected, found)
    if difference:
        shown = "\n".join(str(difference).splitlines()[:20])
        raise ValueError(
            f"the parameters of {reader.path} (+) are not those of the model that it states, or"
            f" that was given (-):\n{shown}"
        )


def _beside(
    source: Path | None, options: WritingOptions, config: DecoderConfig
) -> tuple[Beside, dict[str, Path]]:
    """What the folder of the tokenizer knows, and the files that are copied from it."""
    if source is None:
        return Beside(options.max_positions), {}
    try:
        copied = carried_files(source)
    except ValueError:
        if options.tokenizer is not None:
            raise
        copied = {}
    check_tokenizer(source, config.vocab_size)
    keys = load_json(source, CONFIG) if (source / CONFIG).is_file() else {}
    known = keys if keys.get("model_type") in NAMES else {}
    positions = options.max_positions or _count(known.get("max_position_embeddings"))
    special = {name: known[name] for name in SPECIAL_TOKENS if _is_token(known.get(name), config)}
    return Beside(positions, special), copied


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _is_token(value: Any, config: DecoderConfig) -> bool:
    """Whether a value out of a config.json is a token id, or a list of them."""
    ids = value if isinstance(value, list) and value else [value]
    return all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < config.vocab_size
        for one in ids
    )
