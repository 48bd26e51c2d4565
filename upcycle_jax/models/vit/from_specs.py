"""The shape of a vision transformer that a checkpoint implies, for conversions where no model file
is given.
"""

import math
from collections.abc import Mapping
from typing import Any

from upcycle_jax.layers.mlp import input_kernel_names
from upcycle_jax.models.vit.config import STACK, VitConfig
from upcycle_jax.state_tree import TARGET
from upcycle_jax.trees import LeafSpec

_FIRST = f"{TARGET}{STACK}/layers_0"


def from_specs(specs: Mapping[str, LeafSpec], stated: Mapping[str, Any]) -> VitConfig | None:
    """The dense configuration of a vision transformer, read off its shapes and what the checkpoint
    states of its forward pass; dtype and dropout are the defaults. None where the leaves are not a
    vision transformer's.

    Args:
      specs: of every leaf, by full path.
      stated: the settings of the forward pass that the checkpoint states.

    Raises:
      ValueError: it does not state its heads, or shapes are no vision transformer's.
    """
    patch, positions = specs.get(f"{TARGET}embedding/kernel"), specs.get(f"{TARGET}pos_embedding")
    if patch is None or positions is None:
        return None
    settings = dict(stated)
    if "num_heads" not in settings:
        raise ValueError(
            "the source is a vision transformer, but does not state its num_heads, which its shapes"
            " do not show: name a model file"
        )
    activations = tuple(settings.get("mlp_activations", ("gelu",)))
    inner = specs.get(f"{_FIRST}/mlp/{input_kernel_names(activations)[0]}/kernel")
    if inner is None or [len(s.shape) for s in (patch, positions, inner)] != [4, 3, 2]:
        raise ValueError(
            f"the source's leaves have the shapes of no vision transformer: its patch embedding is"
            f" {patch}, its positions are {positions}, its first MLP kernel is {inner}"
        )
    size, _, channels, emb_dim = patch.shape
    grid = math.isqrt(positions.shape[1])
    if grid**2 != positions.shape[1]:
        raise ValueError(
            f"the source has {positions.shape[1]} positions, which are no square of patches"
        )
    head = specs.get(f"{TARGET}head/kernel")
    num_layers = sum(
        name.startswith(f"{TARGET}{STACK}/layers_") and name.endswith("/attention/query/kernel")
        for name in specs
    )
    return VitConfig(
        num_classes=0 if head is None else head.shape[1],
        image_size=grid * size,
        patch_size=size,
        channels=channels,
        emb_dim=emb_dim,
        num_layers=num_layers,
        mlp_dim=inner.shape[1],
        patch_bias=f"{TARGET}embedding/bias" in specs,
        pre_norm=f"{TARGET}pre_norm/scale" in specs,
        final_norm=f"{TARGET}{STACK}/encoder_norm/scale" in specs,
        layer_scale=f"{_FIRST}/attention_scale" in specs,
        **settings,
    )
