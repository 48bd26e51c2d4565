"""Settings of a vision transformer and of its MoE layers."""

import dataclasses
from typing import Annotated, Any, Literal

from upcycle_jax import checks
from upcycle_jax.checks import Range
from upcycle_jax.layers.mlp import ACTIVATIONS
from upcycle_jax.models import layout
from upcycle_jax.models.layout import SparseLayout
from upcycle_jax.models.settings import StackedSettings
from upcycle_jax.models.stacking import RematPolicy
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.routing import ExpertsChoose, Router

STACK = "encoder"
"""The name of the one stack."""

Pool = Literal["mean", "class_token", "map"]


@dataclasses.dataclass(frozen=True)
class VitMoeConfig(MoeSettings):
    """Which blocks have experts, and how those route. The defaults are the paper's for vision: the
    last half of the blocks, 32 experts that choose, each token's weights renormalised. What all
    families have in common is `MoeSettings`.

    Attributes:
      router: any; images are seen whole.
      num_sparse_layers: MoE layers; None for half of the blocks, or for as many as `sparse_layout`
        names.
      sparse_layout: where they are: 'TOP' (the last ones), 'MIXED', 'BOTTOM', 'MIDDLE', 'LAST_ODD'
        (V-MoE's "Last n": the last of the odd blocks), or a tuple of block indices, which decides
        alone.
      ignore_padding_tokens: rows that fill a batch up take no expert's place.

    Raises:
      ValueError: a number out of range, or K > E.
    """

    router: Router = dataclasses.field(default_factory=lambda: ExpertsChoose(renormalize=True))
    num_sparse_layers: checks.CountOrZero | None = None
    sparse_layout: SparseLayout = "TOP"
    ignore_padding_tokens: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sparse_layout, list):
            object.__setattr__(self, "sparse_layout", tuple(self.sparse_layout))
        self.check_routers([self.router])
        if self.t5x_mode:
            raise ValueError("t5x_mode is for T5: leave it False for a vision transformer")
        if self.extra_mlp:
            raise ValueError("extra_mlp is for T5: leave it False for a vision transformer")


@dataclasses.dataclass(frozen=True)
class VitConfig(StackedSettings):
    """Shape and numerics of a vision transformer (Dosovitskiy et al., arXiv 2010.11929), dense or
    with MoE layers. The defaults are big_vision's; the switches make it Hugging Face's ViT, a
    SigLIP or CLIP vision tower, or DINOv2.

    Attributes:
      num_classes: columns of the head; 0 for none (the features are the result).
      image_size: side of an image, in pixels.
      patch_size: side of a patch, which divides `image_size`.
      emb_dim: d, the width of the residual stream.
      num_layers: blocks.
      num_heads: attention heads, which divide d.
      mlp_dim: hidden size of the dense MLP.
      pool: what the head sees: the 'mean' of all tokens, the 'class_token', or attention pooling
        ('map': Lee et al., arXiv 1810.00825).
      mlp_activations: ('gelu',) is the tanh form, big_vision's and SigLIP's; ('gelu_exact',)
        Hugging Face's ViT and DINOv2; ('quick_gelu',) CLIP.
      norm_epsilon: of all layer norms.
      patch_bias: the patch embedding has a bias.
      pre_norm: a layer norm before the first block (CLIP).
      final_norm: a layer norm after the last block; CLIP's is on the class token alone, which is
        the same for its head.
      layer_scale: each sublayer's output is multiplied by a vector (DINOv2).
      channels: of an image.
      head_bias_init: value that the head's biases start with; V-MoE has -ln(num_classes).
      dropout_rate: dropout of the embedding, of hidden activations and of sublayer outputs.
      dtype: dtype of activations; parameters, norms' statistics, softmax, logits and routing are
        float32.
      remat_policy: what the backward pass computes again instead of keeping it: 'none', 'minimal'
        or 'full' (`stacking.REMAT_POLICIES`). It changes no value.
      scan_layers: compile a run of equal blocks once and loop over it (see `stacking`).
        Checkpoints are the same either way.
      moe: the MoE layers, or None for a dense model.

    Raises:
      ValueError: a number out of range, a patch that does not divide the image, heads that do not
        divide the width, an unknown activation, or MoE layers that do not fit the blocks.
    """

    num_classes: checks.CountOrZero
    image_size: checks.Size
    patch_size: checks.Size
    emb_dim: checks.Size
    num_layers: checks.Layers
    num_heads: checks.Size
    mlp_dim: checks.Size
    pool: Pool = "mean"
    mlp_activations: tuple[str, ...] = ("gelu",)
    norm_epsilon: Annotated[float, Range(above=0, below=1)] = 1e-6
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    layer_scale: bool = False
    channels: checks.Size = 3
    head_bias_init: float = 0.0
    dropout_rate: checks.BelowOne = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat_policy: RematPolicy = "none"
    scan_layers: bool = False
    moe: VitMoeConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        checks.check_fields(self)
        unknown = [name for name in self.mlp_activations if name not in ACTIVATIONS]
        if unknown or not self.mlp_activations:
            raise ValueError(
                f"unknown MLP activations {self.mlp_activations}; known: {sorted(ACTIVATIONS)}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}"
            )
        if self.emb_dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide emb_dim={self.emb_dim}")
        _ = self.sparse_layers

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Positions of the stack: patches, and the class token where there is one."""
        return self.grid**2 + (self.pool == "class_token")

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, ascending; empty for a dense model."""
        if self.moe is None:
            return ()
        return layout.sparse_layers(
            self.num_layers, self.moe.num_sparse_layers, self.moe.sparse_layout, stack=STACK
        )

    @property
    def forward_settings(self) -> dict[str, Any]:
        """The settings that decide what a dense model computes and that the names and shapes of
        its parameters do not show.
        """
        return {name: getattr(self, name) for name in STATED}


STATED = ("num_heads", "mlp_activations", "norm_epsilon", "pool")
"""Fields of `VitConfig` that `forward_settings` states; the others show in the parameters."""
