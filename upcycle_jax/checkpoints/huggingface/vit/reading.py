"""Where the tensors of a vision transformer's folder go.

Every leaf is a tensor, rows of one, or computed from one or two; every tensor has its place or is
among the few that no feature depends on (`_UNUSED`). Anything else is refused, and so is what
config.json says otherwise.
"""

import dataclasses
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.base import Computed, Leaf, Sources
from upcycle_jax.checkpoints.huggingface.beside import FOLDER, Beside, at, tensors_behind
from upcycle_jax.checkpoints.huggingface.comparing import compare, few, numbered
from upcycle_jax.checkpoints.huggingface.files import CONFIG, WeightFiles, load_json, shown
from upcycle_jax.checkpoints.huggingface.vit.config_json import (
    KINDS,
    SIZES,
    WHOLE,
    Stated,
    read_config,
)
from upcycle_jax.checkpoints.huggingface.vit.tensors import layout, names_of
from upcycle_jax.models.vit.config import VitConfig
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec

_UNUSED = re.compile(
    r"(?:\w+\.)?(?:embeddings\.(?:position_ids|mask_token)|pooler\.dense\.(?:weight|bias))"
)
"""The numbers of positions, the stand-in for masked patches, and ViT's pooler, a layer behind the
features that no classifier uses.
"""

_NUMBERS = "position_ids"
"""The end of the names of tables of numbers, which nobody needs."""

_TEXT = re.compile(
    r"text_model\..+|text_projection\.(?:weight|bias)|logit_scale|logit_bias|vision_model\.head\..+"
)
"""What a model has beside its vision tower, and what a classifier has and does not use."""


class VitLayout:
    """See `base.Layout`.

    Args:
      folder: for messages.
      keys: content of config.json.

    Raises:
      ValueError: see `config_json.read_config`.
    """

    def __init__(self, folder: Path, keys: Mapping[str, Any]):
        self._folder, self._keys = folder, keys
        self._stated = read_config(folder, keys)

    @property
    def settings(self) -> dict[str, Any]:
        return self._stated.config.forward_settings

    @property
    def config(self) -> None:
        """Settings and leaves say it all: see `models.vit.from_specs`."""
        return None

    def sources(self, weights: WeightFiles) -> dict[str, Sources | Computed]:
        return _Placing(self._folder, self._keys, self._stated, weights).sources()

    def beside(self, weights: WeightFiles, sources: Mapping[str, Sources | Computed]) -> Beside:
        """See `beside.LayoutWithMore`."""
        return Beside(
            self._folder, self._keys, tensors_beside(weights, tensors_behind(sources.values()))
        )


def in_folder(folder: Path) -> Beside | None:
    """What lies beside the vision transformer in a folder, of Hugging Face or as `beside.carry`
    wrote it; None where there is none.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: it is damaged.
    """
    keys = load_json(folder, CONFIG)
    if keys.get("model_type") not in (*KINDS, *WHOLE):
        return None
    if folder.name == FOLDER:
        return at(folder)
    found, weights = VitLayout(folder, keys), WeightFiles(folder)
    return found.beside(weights, found.sources(weights))


def tensors_beside(weights: WeightFiles, placed: Set[str]) -> dict[str, Leaf]:
    """What a folder holds beside the vision transformer: its text tower, a pooler, a mask token.

    Args:
      weights: of the folder.
      placed: names of the tensors that leaves are made of.
    """

    def leaf(name: str) -> Leaf:
        spec = LeafSpec(weights.tensors[name].shape, weights.dtype(name))
        return Leaf(spec, lambda index: weights.read(name, index))

    names = sorted(weights.tensors.keys() - placed)
    return {name: leaf(name) for name in names if not name.endswith(_NUMBERS)}


class _Placing:
    """Finds the tensors behind every leaf."""

    def __init__(self, folder: Path, keys: Mapping[str, Any], stated: Stated, weights: WeightFiles):
        self._folder, self._stated, self._weights = folder, stated, weights
        self._type: str = keys["model_type"]
        tower = (keys.get("vision_config") or {}) if self._type in WHOLE else {}
        sizes = [(key, {**keys, **tower}.get(key)) for key in SIZES]
        self._given = ", ".join(f"{key} {value}" for key, value in sizes if value is not None)
        names = names_of(stated, self._type)
        has_base = any(name.startswith(names.base) for name in weights.tensors)
        self._names = names if has_base else dataclasses.replace(names, base="")

    def sources(self) -> dict[str, Sources | Computed]:
        self._check_depth()
        tensors, stated = self._weights.tensors, self._stated
        config = dataclasses.replace(stated.config, num_classes=self._num_classes())
        places = layout(self._names, config, qkv_bias=stated.qkv_bias)
        unused = {name for name in tensors if _UNUSED.fullmatch(name)}
        if self._type in WHOLE:
            unused |= {name for name in tensors if _TEXT.fullmatch(name)}
        compare(
            self._folder,
            self._weights,
            places.shapes,
            ignored=unused,
            kind=f"a {self._type} model",
            describes=_words(config, stated),
            given=self._given,
        )
        return {TARGET + path: sources for path, sources in places.sources.items()}

    def _num_classes(self) -> int:
        """Columns of the head; 0 for none."""
        if self._names.head != "classifier" and "classifier.weight" in self._weights.tensors:
            raise ValueError(
                f"{self._folder} is a classifier of type {self._type}, whose head sees more than"
                " the features (of DINOv2 the mean of all patches beside the class token, of CLIP"
                " that mean alone). Save the model inside it alone"
            )
        if self._names.head is None:
            return 0
        stored = self._weights.tensors.get(f"{self._names.head}.weight")
        if stored is None and not self._stated.has_head:
            return 0
        projects = not self._names.head_bias
        said = self._stated.projection_dim if projects else self._stated.num_labels
        found = stored.shape[0] if stored is not None and stored.shape else said or 1
        if said is not None and said != found:
            raise ValueError(
                f"{self._folder}: {self._names.head}.weight has {found} rows, but {CONFIG} states"
                f" {'projection_dim' if projects else 'labels:'} {said}: one of the two is of"
                " another model"
            )
        return found

    def _check_depth(self) -> None:
        """Compares the number of layers before their tensors are listed."""
        start = f"{self._names.base}{self._names.layer}".partition("{n}")[0]
        pattern = re.compile(rf"{re.escape(start)}(0|[1-9]\d{{0,8}})\.")
        layers, depth = numbered(self._weights, pattern), self._stated.config.num_layers
        if not layers:
            first = min(self._weights.tensors, default="none at all")
            raise ValueError(
                f"{self._folder} has no tensor of a layer, {start}0, as a {self._type} model has"
                f" (the first tensor is {shown(first)}): {CONFIG} is of another model"
            )
        if layers != set(range(depth)):
            raise ValueError(
                f"{self._folder} has tensors of the layers {few(layers)}, but num_hidden_layers in"
                f" {CONFIG} is {depth}: a layer is missing, or {CONFIG} is of another model"
            )


def _words(config: VitConfig, stated: Stated) -> str:
    bias = "" if stated.qkv_bias else ", queries, keys and values without biases"
    gated = ", gated MLPs" if len(config.mlp_activations) > 1 else ""
    return f"{config.num_layers} layers{bias}{gated}"
