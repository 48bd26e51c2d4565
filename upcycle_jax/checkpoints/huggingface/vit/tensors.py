"""Where the tensors of a vision transformer belong, by type of model.

A linear layer there holds `W [out, in]`, here `[in, out]`; the convolution of patches holds
`[d, channels, p, p]`, here `[p, p, channels, d]`. Where the class token has a position of its own,
that is added to the token, so that positions are those of patches.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from upcycle_jax.checkpoints.huggingface.base import (
    Computed,
    Rows,
    Source,
    Sources,
    consecutive,
)
from upcycle_jax.checkpoints.huggingface.vit.config_json import Stated
from upcycle_jax.layers.mlp import input_kernel_names
from upcycle_jax.models.vit.config import STACK, VitConfig


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a type's tensors, `.weight` and `.bias` left out.

    Attributes:
      base: what some folders have before all names but the head's.
      patches: the convolution.
      positions: the table, a parameter or the weight of an embedding.
      layer: a block, with `{n}` and a dot at the end; the next ones are inside it.
      norms: before attention and MLP.
      attention: queries, keys, values and the output; the first three alike where they are rows of
        one matrix.
      mlp: the layers of an MLP.
      final_norm: after the last block.
      token: the class token, where there is one.
      pre_norm: the norm before the first block, where there is one.
      scales: what the outputs of attention and MLP are multiplied by.
      gated_mlp: the layers of a gated MLP, whose first one holds the gate's rows first.
      head: the linear layer after the features, where there may be one.
      head_bias: it has a bias.
    """

    base: str
    patches: str
    positions: str
    layer: str
    norms: tuple[str, str]
    attention: tuple[str, str, str, str]
    mlp: tuple[str, str]
    final_norm: str
    token: str | None = None
    pre_norm: str | None = None
    scales: tuple[str, str] | None = None
    gated_mlp: tuple[str, str] | None = None
    head: str | None = None
    head_bias: bool = True


_VIT = Names(
    base="vit.",
    patches="embeddings.patch_embeddings.projection",
    positions="embeddings.position_embeddings",
    token="embeddings.cls_token",
    layer="encoder.layer.{n}.",
    norms=("layernorm_before", "layernorm_after"),
    attention=(
        *("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "attention.output.dense",
    ),
    mlp=("intermediate.dense", "output.dense"),
    final_norm="layernorm",
    head="classifier",
)
_SIGLIP = Names(
    base="vision_model.",
    patches="embeddings.patch_embedding",
    positions="embeddings.position_embedding.weight",
    layer="encoder.layers.{n}.",
    norms=("layer_norm1", "layer_norm2"),
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    mlp=("mlp.fc1", "mlp.fc2"),
    final_norm="post_layernorm",
)
NAMES: Mapping[str, Names] = {
    "vit": _VIT,
    "siglip_vision_model": _SIGLIP,
    "clip_vision_model": dataclasses.replace(
        _SIGLIP,
        token="embeddings.class_embedding",
        pre_norm="pre_layrnorm",
        head="visual_projection",
        head_bias=False,
    ),
    "dinov2": dataclasses.replace(
        _VIT,
        base="dinov2.",
        norms=("norm1", "norm2"),
        mlp=("mlp.fc1", "mlp.fc2"),
        gated_mlp=("mlp.weights_in", "mlp.weights_out"),
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        head=None,
    ),
}
"""By `model_type`."""


def names_of(stated: Stated, model_type: str) -> Names:
    """The names of a model's tensors.

    Args:
      stated: by config.json.
      model_type: the model's; not that of its tower.
    """
    names = NAMES[stated.tower]
    if model_type == "siglip" and stated.has_head:
        return dataclasses.replace(names, head="classifier")
    return names


_POOLING = "head."
"""SigLIP's attention pooling."""


@dataclasses.dataclass
class Places:
    """Where everything is.

    Attributes:
      sources: what is behind every leaf, by path without `target/`.
      shapes: of every tensor, by name.
    """

    sources: dict[str, Sources | Computed] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def take(
        self,
        path: str,
        tensor: str,
        shape: tuple[int, ...],
        *,
        transposed: bool = False,
        rows: Rows | None = None,
    ) -> None:
        """A leaf that is a tensor of this shape, or some of its rows."""
        self.shapes[tensor] = shape
        self.sources[path] = Source(tensor, transposed=transposed, rows=rows)

    def norm(self, path: str, module: str, width: int) -> None:
        """A layer norm."""
        self.take(f"{path}/scale", f"{module}.weight", (width,))
        self.take(f"{path}/bias", f"{module}.bias", (width,))

    def linear(self, path: str, module: str, inner: int, outer: int, *, bias: bool = True) -> None:
        """A linear layer from `inner` to `outer`; without a bias there, it is zero here."""
        self.take(f"{path}/kernel", f"{module}.weight", (outer, inner), transposed=True)
        if bias:
            self.take(f"{path}/bias", f"{module}.bias", (outer,))
        else:
            self.sources[f"{path}/bias"] = Computed((outer,), lambda: np.zeros(outer, np.float32))

    def fused(self, paths: tuple[str, ...], weight: str, bias: str, inner: int, outer: int) -> None:
        """Linear layers of one width, whose rows follow each other in one tensor."""
        for number, path in enumerate(paths):
            rows = consecutive(number * outer, outer)
            shape = (len(paths) * outer, inner)
            self.take(f"{path}/kernel", weight, shape, transposed=True, rows=rows)
            self.take(f"{path}/bias", bias, shape[:1], rows=rows)


def layout(names: Names, config: VitConfig, *, qkv_bias: bool) -> Places:
    """Where everything is.

    Args:
      names: of the tensors.
      config: the model.
      qkv_bias: queries, keys and values have biases.
    """
    places, width = Places(), config.emb_dim
    _embedding(places, names, config)
    if names.pre_norm is not None:
        places.norm("pre_norm", names.base + names.pre_norm, width)
    for number in range(config.num_layers):
        theirs, ours = names.base + names.layer.format(n=number), f"{STACK}/layers_{number}"
        places.norm(f"{ours}/pre_attention_layer_norm", theirs + names.norms[0], width)
        places.norm(f"{ours}/pre_mlp_layer_norm", theirs + names.norms[1], width)
        _attention(places, f"{ours}/attention", theirs, names, width, qkv_bias=qkv_bias)
        _mlp(places, f"{ours}/mlp", theirs, names, config)
        if names.scales is not None:
            places.take(f"{ours}/attention_scale", theirs + names.scales[0], (width,))
            places.take(f"{ours}/mlp_scale", theirs + names.scales[1], (width,))
    places.norm(f"{STACK}/encoder_norm", names.base + names.final_norm, width)
    if config.pool == "map":
        _pooling(places, names.base + _POOLING, config)
    if config.num_classes and names.head is not None:
        places.linear("head", names.head, width, config.num_classes, bias=names.head_bias)
    return places


def _embedding(places: Places, names: Names, config: VitConfig) -> None:
    width, patch, count = config.emb_dim, config.patch_size, config.grid**2
    convolution = f"{names.base}{names.patches}.weight"
    places.shapes[convolution] = (width, config.channels, patch, patch)
    places.sources["embedding/kernel"] = Computed(
        (patch, patch, config.channels, width),
        lambda kernel: kernel.transpose(2, 3, 1, 0),
        {convolution: places.shapes[convolution]},
    )
    if config.patch_bias:
        places.take("embedding/bias", f"{names.base}{names.patches}.bias", (width,))
    positions, is_table = names.base + names.positions, names.positions.endswith(".weight")
    first = 0 if names.token is None else 1
    shape = (first + count, width) if is_table else (1, first + count, width)
    patches = Source(positions, rows=consecutive(first, count))
    places.shapes[positions] = shape
    # A table is stacked alone, which gives it the first axis.
    places.sources["pos_embedding"] = (patches,) if is_table else patches
    if names.token is None:
        return
    token = names.base + names.token
    places.shapes[token] = (width,) if is_table else (1, 1, width)
    places.sources["cls"] = Computed(
        (1, 1, width),
        lambda token, table: token.reshape(1, 1, width) + table.reshape(1, -1, width)[:, :1],
        {token: places.shapes[token], positions: shape},
        widened=True,
    )


def _attention(
    places: Places, ours: str, theirs: str, names: Names, width: int, *, qkv_bias: bool
) -> None:
    query, key, value, out = (theirs + module for module in names.attention)
    places.linear(f"{ours}/out", out, width, width)
    if query == key == value:
        assert qkv_bias  # No type has a fused matrix without a bias.
        paths = tuple(f"{ours}/{part}" for part in ("query", "key", "value"))
        places.fused(paths, f"{query}.weight", f"{query}.bias", width, width)
        return
    for part, module in (("query", query), ("key", key), ("value", value)):
        places.linear(f"{ours}/{part}", module, width, width, bias=qkv_bias)


def _mlp(places: Places, ours: str, theirs: str, names: Names, config: VitConfig) -> None:
    width, inner = config.emb_dim, config.mlp_dim
    kernels = input_kernel_names(config.mlp_activations)
    if len(kernels) == 1:
        first, second = names.mlp
        places.linear(f"{ours}/{kernels[0]}", theirs + first, width, inner)
    else:
        assert names.gated_mlp is not None
        first, second = names.gated_mlp
        paths = tuple(f"{ours}/{kernel}" for kernel in kernels)
        module = theirs + first
        places.fused(paths, f"{module}.weight", f"{module}.bias", width, inner)
    places.linear(f"{ours}/wo", theirs + second, inner, width)


def _pooling(places: Places, theirs: str, config: VitConfig) -> None:
    width, ours, attention = config.emb_dim, "map_head", f"{theirs}attention"
    places.take(f"{ours}/probe", f"{theirs}probe", (1, 1, width))
    places.fused(
        tuple(f"{ours}/attention/{part}" for part in ("query", "key", "value")),
        f"{attention}.in_proj_weight",
        f"{attention}.in_proj_bias",
        width,
        width,
    )
    places.linear(f"{ours}/attention/out", f"{attention}.out_proj", width, width)
    places.norm(f"{ours}/layer_norm", f"{theirs}layernorm", width)
    places.linear(f"{ours}/mlp/wi", f"{theirs}mlp.fc1", width, config.mlp_dim)
    places.linear(f"{ours}/mlp/wo", f"{theirs}mlp.fc2", config.mlp_dim, width)
