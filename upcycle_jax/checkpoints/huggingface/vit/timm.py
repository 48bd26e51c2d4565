"""Folders of timm's plain vision transformers: config.json names an architecture, and sizes are
those of the tensors.

What timm computes is erf GELU and epsilon 1e-6 for all of these, also where weights were trained
with tanh GELU in JAX. Source: `timm/models/vision_transformer.py` of 1.0.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface.base import Computed, Sources
from upcycle_jax.checkpoints.huggingface.beside import Beside, tensors_behind
from upcycle_jax.checkpoints.huggingface.comparing import compare, few, numbered
from upcycle_jax.checkpoints.huggingface.files import CONFIG, WeightFiles
from upcycle_jax.checkpoints.huggingface.keys import Keys
from upcycle_jax.checkpoints.huggingface.vit.reading import tensors_beside
from upcycle_jax.checkpoints.huggingface.vit.tensors import Names, layout
from upcycle_jax.models.vit.config import VitConfig
from upcycle_jax.state_tree import TARGET

TYPE = "timm"
"""What stands for `model_type`, which timm's folders do not have."""

_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16}
_ARCHITECTURE = re.compile(rf"vit_({'|'.join(_HEADS)})_patch(\d{{1,3}})_(\d{{1,4}}|dinov2)")
_NAMES = Names(
    base="",
    patches="patch_embed.proj",
    positions="pos_embed",
    token="cls_token",
    layer="blocks.{n}.",
    norms=("norm1", "norm2"),
    attention=("attn.qkv", "attn.qkv", "attn.qkv", "attn.proj"),
    mlp=("mlp.fc1", "mlp.fc2"),
    final_norm="norm",
    head="head",
)
_LAYER = re.compile(r"blocks\.(0|[1-9]\d{0,8})\.")


def is_timm(keys: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of timm's."""
    return "model_type" not in keys and isinstance(keys.get("architecture"), str)


class TimmLayout:
    """See `base.Layout`.

    Args:
      folder: for messages.
      keys: content of config.json.

    Raises:
      ValueError: it is of another architecture.
    """

    def __init__(self, folder: Path, keys: Mapping[str, Any]):
        self._folder, self._keys = folder, keys
        stated = Keys(folder, keys)
        name = stated.get("architecture", str, "")
        match = _ARCHITECTURE.fullmatch(name)
        if match is None:
            raise stated.refused(
                "architecture",
                "of timm's models those named vit_<size>_patch<p>_<pixels> or _dinov2 are read, of"
                f" sizes {', '.join(_HEADS)}",
            )
        if stated.get("global_pool", str, "token") != "token":
            raise stated.refused(
                "global_pool", "a norm after the mean of tokens has no counterpart here"
            )
        if stated.get("model_args", dict, {}):
            raise stated.refused("model_args", "they may change what the model computes")
        self._heads, self._scaled = _HEADS[match[1]], match[3] == "dinov2"
        self._classes = stated.get("num_classes", int, None)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "num_heads": self._heads,
            "mlp_activations": ("gelu_exact",),
            "norm_epsilon": 1e-6,
            "pool": "class_token",
        }

    @property
    def config(self) -> None:
        """Settings and leaves say it all."""
        return None

    def sources(self, weights: WeightFiles) -> dict[str, Sources | Computed]:
        """See `base.Layout`."""
        config = self._config(weights)
        scales = ("ls1.gamma", "ls2.gamma") if self._scaled else None
        names = dataclasses.replace(_NAMES, scales=scales)
        places = layout(names, config, qkv_bias=True)
        compare(
            self._folder,
            weights,
            places.shapes,
            ignored={"mask_token"},
            kind=f"the architecture {self._keys['architecture']}",
            describes=f"{config.num_classes} classes",
            given=f"num_classes {config.num_classes}",
        )
        return {TARGET + path: sources for path, sources in places.sources.items()}

    def beside(self, weights: WeightFiles, sources: Mapping[str, Sources | Computed]) -> Beside:
        """See `beside.LayoutWithMore`."""
        behind = tensors_behind(sources.values())
        return Beside(self._folder, self._keys, tensors_beside(weights, behind))

    def _config(self, weights: WeightFiles) -> VitConfig:
        """The sizes that tensors have."""
        patch = self._shape(weights, "patch_embed.proj.weight", 4)
        positions = self._shape(weights, "pos_embed", 3)[1]
        inner = self._shape(weights, "blocks.0.mlp.fc1.weight", 2)[0]
        layers = numbered(weights, _LAYER)
        if layers != set(range(len(layers))):
            raise ValueError(
                f"{self._folder} has tensors of the layers {few(layers)}: one is missing"
            )
        grid = math.isqrt(positions - 1) if positions > 1 else 0
        if grid**2 != positions - 1 or not grid:
            raise ValueError(
                f"{self._folder}: pos_embed has {positions} positions; of a class token and a"
                " square of patches there would be n^2 + 1"
            )
        head = weights.tensors.get("head.weight")
        classes = self._classes
        if classes is None:
            classes = head.shape[0] if head is not None and head.shape else 0
        try:
            return VitConfig(
                num_classes=classes,
                image_size=grid * patch[2],
                patch_size=patch[2],
                channels=patch[1],
                emb_dim=patch[0],
                num_layers=len(layers),
                mlp_dim=inner,
                layer_scale=self._scaled,
                **self.settings,
            )
        except ValueError as error:
            raise ValueError(f"{self._folder}: {error}: {CONFIG} is of another model") from None

    def _shape(self, weights: WeightFiles, name: str, rank: int) -> tuple[int, ...]:
        stored = weights.tensors.get(name)
        if stored is None or len(stored.shape) != rank:
            found = "is missing" if stored is None else f"has the shape {list(stored.shape)}"
            raise ValueError(
                f"{self._folder}: {name} {found}: {CONFIG} is of another model, or the folder holds"
                " a part of one"
            )
        return stored.shape
