"""The Hugging Face folder that a decoder-only language model becomes, dense or with MoE layers."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycle_jax.checkpoints.gguf.tokenizer import NoTokenizer
from upcycle_jax.checkpoints.huggingface import verdict
from upcycle_jax.checkpoints.huggingface.base import Export, Leaf, WritingOptions, leaves_of
from upcycle_jax.checkpoints.huggingface.carried import GENERATION, Home, home_at, origin
from upcycle_jax.checkpoints.huggingface.decoder import reading_back
from upcycle_jax.checkpoints.huggingface.decoder.choosing import choose
from upcycle_jax.checkpoints.huggingface.decoder.config_writing import (
    SPECIAL_TOKENS,
    Beside,
    config_json,
)
from upcycle_jax.checkpoints.huggingface.decoder.tensors import NAMES, Place, layout
from upcycle_jax.checkpoints.reader import CheckpointReader
from upcycle_jax.models import registry
from upcycle_jax.models.base import ModelConfig
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
    config = stated_model(reader, options.model)
    home = origin(reader)
    form, why = choose(
        config,
        model_type=options.model_type,
        readers=options.readers,
        preferred=_text(home.keys.get("model_type")) if home is not None else None,
    )
    places = list(layout(form.model_type, form.config, NAMES[form.model_type]))
    leaves = form.leaves({path.removeprefix(TARGET): leaf for path, leaf in stored.items()})
    _check_leaves(reader, places, leaves)
    dtype = options.dtype or functools.reduce(
        np.promote_types, (leaf.spec.dtype for leaf in leaves.values())
    )
    if options.tokenizer is not None:
        home = home_at(options.tokenizer)
    beside, copied, of_tokenizer = _beside(home, options, config)
    table = verdict.table(form.model_type, form.verdicts).render(Format.TEXT)
    content = config_json(form.config, form.model_type, np.dtype(dtype), beside)
    of_4 = form.verdict("transformers4")
    reading_back.check(content, form.config, by_4=of_4.kind not in verdict.UNUSABLE)
    return Export(
        config=content,
        tensors={TARGET + place.path: place.sources for place in places},
        leaves={TARGET + path: leaf for path, leaf in leaves.items()},
        said=(*table.splitlines(), why, of_tokenizer),
        verdicts=form.json() | {"why": why},
        copied=copied,
    )


def stated_model(reader: CheckpointReader, given: ModelConfig | None = None) -> DecoderConfig:
    """The model of a checkpoint.

    Args:
      reader: the checkpoint.
      given: the model; None: what the checkpoint states, or what the leaves of a dense one imply.

    Raises:
      ValueError: it is no language model, or nothing says which.
    """
    config = given or reader.model_config()
    if isinstance(config, DecoderConfig):
        return config
    if config is not None:
        raise ValueError(
            f"{reader.path} holds a decoder-only language model, the model given is a"
            f" {type(config).__name__}: name its own model file"
        )
    specs = roles.inferred(
        {path: spec for path, spec in reader.specs().items() if path.startswith(TARGET)}
    )
    if any(spec.role != Role.DENSE for spec in specs.values()):
        raise ValueError(
            f"{reader.path} is a Mixture-of-Experts and does not state its router: name its model"
            " file with --gin_file"
        )
    found = registry.infer_dense(specs, reader.model_settings())
    if not isinstance(found, DecoderConfig):
        raise ValueError(f"{reader.path} holds no decoder-only language model")
    return found


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
    home: Home | None, options: WritingOptions, config: DecoderConfig
) -> tuple[Beside, Mapping[str, Path | str], str]:
    """What is known where the tokenizer is, the files that come from there, and a line about
    them.
    """
    name_it = "name the folder or GGUF file that has one with --tokenizer"
    if home is None:
        return Beside(options.max_positions), {}, f"no tokenizer is copied: {name_it}"
    copied: Mapping[str, Path | str] = {}
    try:
        copied = home.files(config.vocab_size)
        line = f"tokenizer from {home.place}"
        if set(copied) <= {GENERATION}:
            line = f"{GENERATION} from {home.place}, which has no tokenizer: {name_it}"
    except NoTokenizer as error:
        if options.tokenizer is not None:
            raise
        line = f"no tokenizer is copied ({error}): {name_it}"
    known = home.keys if home.keys.get("model_type") in NAMES else {}
    positions = options.max_positions or _count(known.get("max_position_embeddings"))
    special = {name: known[name] for name in SPECIAL_TOKENS if _is_token(known.get(name), config)}
    return Beside(positions, special), copied, line


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
