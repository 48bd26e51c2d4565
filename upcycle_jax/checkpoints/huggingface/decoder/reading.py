"""Where the tensors of a decoder-only model's folder go.

Every leaf is a tensor, rows of one, or several of them; every tensor has its place, is a copy that
is compared, or is among the few that no model uses (`_UNUSED`). Anything else is refused, and so is
what config.json says otherwise.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.base import Source, Sources
from upcycle_jax.checkpoints.huggingface.comparing import compare, few, numbered
from upcycle_jax.checkpoints.huggingface.decoder.config_json import SIZES, read_config
from upcycle_jax.checkpoints.huggingface.decoder.tensors import (
    EMBEDDING,
    IN_MEMORY,
    NAMES,
    Place,
    layout,
    shapes_of,
)
from upcycle_jax.checkpoints.huggingface.files import CONFIG, WeightFiles, shown
from upcycle_jax.models.decoder.config import DecoderConfig
from upcycle_jax.state_tree import TARGET

_MORE_SIZES = (
    *("num_key_value_heads", "head_dim", "num_experts", "num_local_experts"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
)
"""Keys of sizes that some types have."""

_UNUSED = re.compile(
    r"(?:.*\.)?(?:rotary_emb\.inv_freq|attention\.(?:bias|masked_bias|rotary_emb\.inv_freq))"
)
"""Tables of sines and masks that transformers once stored, and computes today."""


class DecoderLayout:
    """See `base.Layout`.

    Args:
      folder: for messages.
      keys: content of config.json.

    Raises:
      ValueError: see `config_json.read_config`.
    """

    def __init__(self, folder: Path, keys: Mapping[str, Any]):
        self._folder, self._keys = folder, keys
        self._config = read_config(folder, keys)

    @property
    def config(self) -> DecoderConfig:
        return self._config

    @property
    def settings(self) -> dict[str, Any]:
        return self._config.forward_settings

    def sources(self, weights: WeightFiles) -> dict[str, Sources]:
        return _Placing(self._folder, self._keys, self._config, weights).sources()


class _Placing:
    """Finds the tensors behind every leaf."""

    def __init__(
        self, folder: Path, keys: Mapping[str, Any], config: DecoderConfig, weights: WeightFiles
    ):
        self._folder, self._config, self._weights = folder, config, weights
        self._type: str = keys["model_type"]
        sizes = [(key, keys.get(key)) for key in (*SIZES, *_MORE_SIZES)]
        self._given = ", ".join(f"{key} {value}" for key, value in sizes if value is not None)
        names = (IN_MEMORY if self._is_in_memory() else NAMES)[self._type]
        self._names = names if self._has(names.base) else dataclasses.replace(names, base="")

    def sources(self) -> dict[str, Sources]:
        self._check_depth()
        self._check_experts()
        tensors, config, moe = self._weights.tensors, self._config, self._config.moe
        places, copies = self._places()
        unused = {name for name in tensors if _UNUSED.fullmatch(name)}
        experts = f", {len(config.sparse_layers)} of them with {moe.num_experts}" if moe else ""
        compare(
            self._folder,
            self._weights,
            shapes_of(places),
            ignored=unused | copies | self._empty_shared(),
            kind=f"a {self._type} model",
            describes=f"{config.num_layers} layers{f'{experts} experts' if moe else ''}",
            given=self._given,
        )
        return {TARGET + place.path: place.sources for place in places}

    def _places(self) -> tuple[list[Place], set[str]]:
        """Where every parameter is, and the tensors that are copies of those."""
        places = list(layout(self._type, self._config, self._names))
        head = f"{self._names.head}.weight"
        embedding = f"{self._names.base}{self._names.embedding}.weight"
        if not self._config.logits_via_embedding:
            if head not in self._weights.tensors:
                raise ValueError(
                    f"{self._folder} has no {head}, but tie_word_embeddings in {CONFIG} is false"
                    " (given or by default): the output matrix is missing, as where a model was"
                    " saved without its head. Save the whole model, or set it to true where"
                    f" {embedding} is the output matrix"
                )
            return places, set()
        if embedding in self._weights.tensors or head not in self._weights.tensors:
            self._check_tied(embedding, head)
            return places, {head}
        # One matrix under the other of its names.
        named = [
            dataclasses.replace(p, sources=Source(head)) for p in places if p.path == EMBEDDING
        ]
        return [*named, *(p for p in places if p.path != EMBEDDING)], set()

    def _has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self._weights.tensors)

    def _is_in_memory(self) -> bool:
        """Whether tensors have the names that transformers 5 has in memory."""
        names = IN_MEMORY.get(self._type)
        if names is None:
            return False
        if names.moe is None:
            return f"{names.head}.weight" in self._weights.tensors
        ends = tuple(f".{name}" for name in (names.moe.gate, names.moe.down))
        return any(name.endswith(ends) for name in self._weights.tensors)

    def _check_depth(self) -> None:
        """Compares the numbers of layers before their tensors are listed."""
        start, _, end = f"{self._names.base}{self._names.layer}".partition("{n}")
        pattern = re.compile(rf"{re.escape(start)}(0|[1-9]\d{{0,8}}){re.escape(end)}\.")
        layers, depth = numbered(self._weights, pattern), self._config.num_layers
        if not layers:
            first = min(self._weights.tensors, default="none at all")
            raise ValueError(
                f"{self._folder} has no tensor of a layer, {NAMES[self._type].base}layers.0, as a"
                f" {self._type} model has (the first tensor is {shown(first)}): {CONFIG} is of"
                " another model"
            )
        if layers != set(range(depth)):
            raise ValueError(
                f"{self._folder} has tensors of the layers {few(layers)}, but num_hidden_layers in"
                f" {CONFIG} is {depth}: a layer is missing, or {CONFIG} is of another model"
            )

    def _check_experts(self) -> None:
        """Compares the number of experts before their tensors are listed."""
        moe, names = self._config.moe, self._names.moe
        if moe is None or names is None or "{e}" not in names.gate:
            return
        before, _, after = names.gate.partition("{e}")
        pattern = re.compile(rf".*\.{re.escape(before)}(0|[1-9]\d{{0,8}}){re.escape(after)}")
        experts = numbered(self._weights, pattern)
        if experts != set(range(moe.num_experts)):
            raise ValueError(
                f"{self._folder} has tensors of the experts {few(experts)}, but {CONFIG} describes"
                f" {moe.num_experts}: an expert is missing, or {CONFIG} is of another model"
            )

    def _empty_shared(self) -> set[str]:
        """Tensors of shared experts without a hidden unit, and their gates."""
        moe, names = self._config.moe, self._names.moe
        if moe is None or names is None or names.shared is None or moe.shared_expert_mlp_dim:
            return set()
        tensors, out = self._weights.tensors, set()
        for number in self._config.sparse_layers:
            theirs = f"{self._names.base}{self._names.layer.format(n=number)}."
            empty = [theirs + name for name in names.shared if theirs + name in tensors]
            if empty and all(0 in tensors[name].shape for name in empty):
                out |= set(empty) | ({theirs + names.shared_gate} if names.shared_gate else set())
        return out

    def _check_tied(self, embedding: str, head: str) -> None:
        tensors = self._weights.tensors
        if embedding not in tensors or head not in tensors:
            return
        if not self._weights.equal(embedding, head):
            raise ValueError(
                f"{self._folder}: {head} in {tensors[head].file} differs from {embedding}, but"
                f" tie_word_embeddings in {CONFIG} is true (given or by default): set it to false"
                f" where {head} counts, or remove {head} where the embedding does"
            )
