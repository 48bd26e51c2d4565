"""Which types of Hugging Face models can hold a vision transformer, and what their config.json says
then.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle_jax.checkpoints.huggingface.vit.config_json import (
    ACTIVATIONS,
    CLASSIFIER,
    KINDS,
    WHOLE,
    gated_width,
)
from upcycle_jax.models.vit.config import VitConfig

_ACTIVATION = {"gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu"} | {
    ours: theirs for theirs, ours in ACTIVATIONS.items() if not ours.startswith("gelu")
}
"""Our names of activations -> transformers'."""

_PROCESSORS = {
    "vit": "ViTImageProcessor",
    "siglip_vision_model": "SiglipImageProcessor",
    "clip_vision_model": "CLIPImageProcessor",
    "dinov2": "BitImageProcessor",
}


@dataclasses.dataclass(frozen=True)
class Holder:
    """A type of models that are written.

    Attributes:
      model_type: as in config.json.
      pools: what its features are.
      heads: it may have a head, or has to: 'no', 'yes', 'maybe'.
      head_bias: its head has a bias.
      pre_norm: it has a norm before the first block.
      layer_scale: it has layer scales.
      patch_bias: its patch embedding has a bias.
      gated: its MLPs may be gated.
      whole: it has a text tower, which has to come from somewhere.
    """

    model_type: str
    pool: str
    head: str = "no"
    head_bias: bool = True
    pre_norm: bool = False
    layer_scale: bool = False
    patch_bias: bool = True
    gated: bool = False
    whole: bool = False

    @property
    def tower(self) -> str:
        """The type of the vision tower."""
        return WHOLE.get(self.model_type, self.model_type)


VIT = Holder("vit", "class_token", "maybe")
SIGLIP = Holder("siglip_vision_model", "map")
SIGLIP_WHOLE = dataclasses.replace(SIGLIP, model_type="siglip", whole=True)
SIGLIP_CLASSIFIER = Holder("siglip", "mean", "yes")
CLIP = Holder(
    "clip_vision_model", "class_token", "maybe", head_bias=False, pre_norm=True, patch_bias=False
)
CLIP_WHOLE = dataclasses.replace(CLIP, model_type="clip", head="yes", whole=True)
DINOV2 = Holder("dinov2", "class_token", layer_scale=True, gated=True)

HOLDERS = (VIT, SIGLIP_CLASSIFIER, SIGLIP_WHOLE, SIGLIP, CLIP_WHOLE, CLIP, DINOV2)
"""In the order of preference."""


def why_not(holder: Holder, config: VitConfig) -> list[str]:
    """What keeps a type from holding a dense model."""
    activations = config.mlp_activations
    found = []
    if config.pool != holder.pool:
        found.append(f"its features are {holder.pool!r}, the model's {config.pool!r}")
    if config.num_classes and holder.head == "no":
        found.append("it has no head")
    if not config.num_classes and holder.head == "yes":
        found.append("it has a head")
    for name in ("pre_norm", "layer_scale", "patch_bias"):
        if getattr(config, name) != getattr(holder, name):
            found.append(f"{name} is {getattr(holder, name)}, the model's {getattr(config, name)}")
    if not config.final_norm:
        found.append("it has a norm after the last block")
    if len(activations) == 1 and activations[0] not in _ACTIVATION:
        found.append(f"it knows no activation {activations[0]!r}")
    if len(activations) > 1 and (not holder.gated or activations != ("silu", "linear")):
        found.append(f"its MLPs have no gates {activations!r}")
    if KINDS[holder.tower].mlp_ratio is not None and _ratio(config) is None:
        found.append(f"no whole mlp_ratio gives MLPs of {config.mlp_dim} units")
    return found


def config_json(
    holder: Holder, config: VitConfig, dtype: str, base: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of config.json.

    Args:
      holder: the type, which can hold the model.
      config: the model.
      dtype: of the weights.
      base: what the folder that it came from says, where that was of this type; else nothing.
    """
    architecture = _architecture(holder, config)
    out = dict(base)
    tower = _tower(
        holder, config, base.get("vision_config") if holder.model_type in WHOLE else base
    )
    if holder.model_type in WHOLE:
        out.pop("vision_config_dict", None)
        out["vision_config"] = tower
        if holder.head_bias is False:
            out["projection_dim"] = config.num_classes
    else:
        out |= tower
    out |= {"architectures": [architecture], "model_type": holder.model_type}
    if config.num_classes and holder.head_bias:
        out |= _labels(base, config.num_classes)
    out.pop("num_labels", None)
    return out | {"dtype": dtype, "torch_dtype": dtype}


def _architecture(holder: Holder, config: VitConfig) -> str:
    names: dict[str, Sequence[str]] = {
        "vit": ("ViTModel", "ViTForImageClassification"),
        "siglip_vision_model": ("SiglipVisionModel",),
        "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
        "siglip": ("SiglipModel", CLASSIFIER),
        "clip": ("CLIPModel", "CLIPModel"),
        "dinov2": ("Dinov2Model",),
    }
    return names[holder.model_type][bool(config.num_classes)]


def _tower(holder: Holder, config: VitConfig, base: Any) -> dict[str, Any]:
    """Keys of the vision tower."""
    out = dict(base) if isinstance(base, Mapping) else {}
    size, patch = out.get("image_size"), config.patch_size
    # What is beyond the last whole patch is seen by nobody; how images are prepared is kept.
    covers = isinstance(size, int) and size // patch * patch == config.image_size
    out |= {
        "model_type": holder.tower,
        "hidden_size": config.emb_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": size if covers else config.image_size,
        "patch_size": patch,
        "num_channels": config.channels,
        "layer_norm_eps": config.norm_epsilon,
    }
    if KINDS[holder.tower].mlp_ratio is None:
        out["intermediate_size"] = config.mlp_dim
    else:
        gated = len(config.mlp_activations) > 1
        out |= {"mlp_ratio": _ratio(config), "use_swiglu_ffn": gated}
    if len(config.mlp_activations) == 1:
        out["hidden_act"] = _ACTIVATION[config.mlp_activations[0]]
    if holder.tower in ("vit", "dinov2"):
        out["qkv_bias"] = True
    if holder.tower == "siglip_vision_model":
        out["vision_use_head"] = config.pool == "map"
    if holder.tower == "clip_vision_model" and config.num_classes:
        out["projection_dim"] = config.num_classes
    return out


def _ratio(config: VitConfig) -> int | None:
    """DINOv2's `mlp_ratio`, a whole number; None where none gives the width of the MLPs."""
    gated = len(config.mlp_activations) > 1
    near = config.mlp_dim * (3 if gated else 2) // (2 * config.emb_dim)
    for ratio in (near, near + 1):
        if gated_width(ratio * config.emb_dim, gated=gated) == config.mlp_dim:
            return ratio
    return None


def _labels(base: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Names of the classes: those that are known, where there are so many."""
    known = base.get("id2label")
    if isinstance(known, Mapping) and len(known) == count:
        return {}
    names = [f"LABEL_{number}" for number in range(count)]
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def preparation(holder: Holder, config: VitConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json: images of the model's size in [-1, 1], as they are
    prepared here.
    """
    side = {"height": config.image_size, "width": config.image_size}
    return {
        "image_processor_type": _PROCESSORS[holder.tower],
        "do_resize": True,
        "size": side,
        "do_center_crop": False,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
