"""What config.json says of the function that a vision transformer computes: every key that changes
it is read, and what cannot be computed here, or is not known, is refused.

Source: the configuration and modeling files of transformers 5.24.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle_jax.checkpoints.huggingface import keys as shared
from upcycle_jax.checkpoints.huggingface.keys import Keys
from upcycle_jax.models.vit.config import Pool, VitConfig

ACTIVATIONS = {**shared.ACTIVATIONS, "quick_gelu": "quick_gelu"}
"""transformers' names of activations -> those of `layers.mlp.ACTIVATIONS`."""

SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("mlp_ratio", "image_size", "patch_size", "num_channels", "projection_dim"),
)
"""Keys of sizes, for messages."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a type of models has in common.

    Attributes:
      epsilon: `layer_norm_eps` where nothing is said.
      patch_size: the same.
      activation: `hidden_act`, the same.
      pool: what its features are.
      settings: of `VitConfig`, where they are not the defaults.
      mlp_ratio: `mlp_ratio` where nothing is said; None: `intermediate_size` states the MLP.
    """

    epsilon: float
    patch_size: int
    activation: str = "gelu"
    pool: Pool = "class_token"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mlp_ratio: int | None = None


KINDS: Mapping[str, Kind] = {
    "vit": Kind(1e-12, 16),
    "siglip_vision_model": Kind(1e-6, 16, "gelu_pytorch_tanh", "map"),
    "clip_vision_model": Kind(
        1e-5, 32, "quick_gelu", settings={"pre_norm": True, "patch_bias": False}
    ),
    "dinov2": Kind(1e-6, 14, settings={"layer_scale": True}, mlp_ratio=4),
}
"""By `model_type`."""

WHOLE: Mapping[str, str] = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Types of models with a text tower, or with a classifier on a vision tower -> that tower's type.
"""

CLASSIFIER = "SiglipForImageClassification"
"""A vision tower whose head sees the mean of all tokens, and no text tower."""

NOT_READ = {
    "siglip2_vision_model": "its images have any shape, and there is one size here",
    "dinov2_with_registers": "its register tokens have no counterpart here",
    "dinov3_vit": "its positions are rotary, and they are a learned table here",
    "deit": "its distillation token has no counterpart here",
    "beit": "its attention has relative positions, and they are a learned table here",
    "vit_mae": "it is trained without most patches; load it as a ViTModel and save that",
    "vit_msn": "it is no plain ViT; load it as a ViTModel and save that",
}
"""Types near to these -> why they are not read."""

HARMLESS = frozenset(
    {
        # Where the file comes from.
        "_name_or_path", "_commit_hash", "architectures", "auto_map", "model_type",
        "transformers_version", "license",
        # Training: initialisation and dropout.
        "initializer_range", "initializer_factor", "attention_dropout", "dropout",
        "attention_probs_dropout_prob", "hidden_dropout_prob", "drop_path_rate",
        "layerscale_value", "gradient_checkpointing", "problem_type", "finetuning_task",
        # How transformers runs and what it returns.
        "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
        "return_dict", "output_attentions", "output_hidden_states", "torchscript",
        "use_bfloat16", "chunk_size_feed_forward", "label2id", "transformers.js_config",
        # Masked images, the pooler after the class token, feature maps of single layers.
        "encoder_stride", "use_mask_token", "pooler_act", "pooler_output_size",
        "out_features", "out_indices", "stage_names", "apply_layernorm",
        "reshape_hidden_states", "num_image_tokens",
        # The text tower, and the scale of a contrastive loss at first.
        "text_config", "text_config_dict", "logit_scale_init_value",
        # Text generation, which old versions wrote into every file.
        "max_length", "min_length", "temperature", "top_k", "top_p", "typical_p", "num_beams",
        "num_beam_groups", "num_return_sequences", "repetition_penalty", "length_penalty",
    }
)  # fmt: skip
"""Keys that do not change what a model computes from pixels to features or logits."""


@dataclasses.dataclass(frozen=True)
class Stated:
    """What config.json states.

    Attributes:
      config: the model, without a head.
      qkv_bias: queries, keys and values have biases; those of others are zero here.
      num_labels: classes; None where it says nothing.
      projection_dim: columns of a projection; None where it says nothing.
      has_head: the folder is that of a classifier, or has a projection.
      tower: the type of the vision tower; `model_type` where that is all there is.
    """

    config: VitConfig
    qkv_bias: bool
    num_labels: int | None
    projection_dim: int | None
    has_head: bool
    tower: str


def read_config(folder: Path, keys: Mapping[str, Any]) -> Stated:
    """What config.json states.

    Args:
      folder: for messages.
      keys: content of config.json, whose `model_type` is one of `KINDS` or `WHOLE`.

    Raises:
      ValueError: it is damaged, contradicts itself, or describes what cannot be computed here; the
        message names file, key, value and remedy.
    """
    if keys["model_type"] in WHOLE:
        return _whole(folder, keys)
    return _VitKeys(folder, keys).stated()


def _whole(folder: Path, keys: Mapping[str, Any]) -> Stated:
    """What the config.json of a model with a text tower, or of SigLIP's classifier, states."""
    outer, kind = Keys(folder, keys), keys["model_type"]
    outer.check_plain()
    names = [name for name in outer.get("architectures", list, []) if isinstance(name, str)]
    # What old versions wrote beside it decides, as in transformers.
    inside = "vision_config_dict" if keys.get("vision_config_dict") else "vision_config"
    tower = {"model_type": WHOLE[kind], **outer.get(inside, dict, {})}
    outer.value("vision_config")
    if tower["model_type"] != WHOLE[kind]:
        raise outer.refused(inside, f"its model_type should be {WHOLE[kind]}")
    classifies = kind == "siglip" and CLASSIFIER in names
    stated = _VitKeys(folder, tower, inside).stated(pooled=not classifies)
    labels = _num_labels(outer)
    projection = outer.size("projection_dim") or 512 if kind == "clip" else None
    outer.refuse_unknown(kind, HARMLESS)
    pool: Pool = "mean" if classifies else stated.config.pool
    return dataclasses.replace(
        stated,
        config=dataclasses.replace(stated.config, pool=pool),
        num_labels=labels if classifies else None,
        projection_dim=projection,
        has_head=classifies or "CLIPModel" in names,
    )


class _VitKeys(Keys):
    """What the keys of a vision transformer's config.json state."""

    def __init__(self, folder: Path, keys: Mapping[str, Any], inside: str = ""):
        super().__init__(folder, keys, inside)
        self._type: str = keys["model_type"]
        self._kind = KINDS[self._type]

    def stated(self, *, pooled: bool = True) -> Stated:
        """What they state; `pooled` where SigLIP's attention pooling counts."""
        self.check_plain()
        kind = self._kind
        patch = self._side("patch_size", kind.patch_size)
        image = self._side("image_size", 224)
        if image < patch:
            raise self.refused("image_size", f"an image is smaller than a patch, {patch}")
        heads, width = self.needed("num_attention_heads"), self.needed("hidden_size")
        self.check_heads(width, heads)
        mlp_dim, activations = self._mlp(width)
        settings: dict[str, Any] = {
            "num_classes": 0,
            # The convolution does not see what is beyond the last whole patch.
            "image_size": image // patch * patch,
            "patch_size": patch,
            "emb_dim": width,
            "num_layers": self.needed("num_hidden_layers"),
            "num_heads": heads,
            "mlp_dim": mlp_dim,
            "pool": kind.pool,
            "mlp_activations": activations,
            "norm_epsilon": self.number("layer_norm_eps", kind.epsilon, below=1) or kind.epsilon,
            "channels": self.size("num_channels") or 3,
            **kind.settings,
        }
        try:
            config = VitConfig(**settings)
        except ValueError as error:
            raise ValueError(
                f"{self._folder}: its config.json is no vision transformer's: {error}"
            ) from None
        stated = Stated(
            config,
            qkv_bias=self.get("qkv_bias", bool, True) if self._type in ("vit", "dinov2") else True,
            num_labels=_num_labels(self),
            projection_dim=self.size("projection_dim"),
            has_head=any(
                isinstance(name, str)
                and name.endswith(("ForImageClassification", "WithProjection"))
                for name in self.get("architectures", list, [])
            ),
            tower=self._type,
        )
        if kind.pool == "map" and not self.get("vision_use_head", bool, True) and pooled:
            raise self.refused(
                "vision_use_head", "without its attention pooling the model has no features"
            )
        self.refuse_unknown(self._type, HARMLESS)
        return stated

    def _side(self, key: str, default: int) -> int:
        """The side of a square, stated once or for height and width."""
        value = self.value(key)
        if not isinstance(value, list):
            return self.size(key) or default
        if len(value) != 2 or value[0] != value[1] or value[0] is None:
            raise self.refused(key, "images and patches are squares here")
        return Keys(self._folder, {key: value[0]}).size(key) or default

    def _mlp(self, width: int) -> tuple[int, tuple[str, ...]]:
        """The hidden size of MLPs, and their activations."""
        kind, key = self._kind, "hidden_act"
        ours = self.activation(key, self.get(key, str, kind.activation), ACTIVATIONS)
        if kind.mlp_ratio is None:
            return self.needed("intermediate_size"), (ours,)
        if self.value("intermediate_size") is not None:
            raise self.refused("intermediate_size", "this type of model states its mlp_ratio")
        ratio = self.number("mlp_ratio", kind.mlp_ratio, below=1 << 16) or kind.mlp_ratio
        gated = self.get("use_swiglu_ffn", bool, False)
        inner = gated_width(int(width * ratio), gated=gated)
        if gated:  # hidden_act is not asked then.
            return inner, ("silu", "linear")
        return inner, (ours,)


def gated_width(inner: int, *, gated: bool) -> int:
    """Hidden units of DINOv2's MLPs: of those that are gated two thirds, a multiple of 8."""
    return (int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner


def _num_labels(keys: Keys) -> int | None:
    """Classes that are named, or counted."""
    labels, count = keys.get("id2label", dict, None), keys.size("num_labels")
    if labels and count is not None and len(labels) != count:
        raise keys.refused("num_labels", f"id2label names {len(labels)}. Correct one of them")
    return len(labels) if labels else count
