"""Settings of a T5 1.1 encoder-decoder and of its MoE layers."""

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
from upcycle_jax.moe.routing import ExpertsChoose, Router, TokensChoose

StackName = Literal["encoder", "decoder"]
STACKS: tuple[StackName, ...] = ("encoder", "decoder")
"""In the order in which a batch passes them."""


@dataclasses.dataclass(frozen=True)
class MoeConfig(MoeSettings):
    """Which layers are MoE layers, and how those route. The defaults are the paper's language
    model. What both stacks have in common is `MoeSettings`.

    Attributes:
      encoder_router: routing in the encoder.
      decoder_router: routing in the decoder; it must be causal.
      num_encoder_sparse_layers: MoE layers in the encoder; None for half of its layers.
      num_decoder_sparse_layers: MoE layers in the decoder; None for half of its layers.
      encoder_sparse_layout: where they are: 'MIXED' (every so many layers, never the first),
        'BOTTOM', 'MIDDLE', 'TOP', or a tuple of layer indices, which decides alone.
      decoder_sparse_layout: likewise.

    Raises:
      ValueError: a number out of range, K > E, or a router that is not causal in the decoder.
    """

    encoder_router: Router = dataclasses.field(default_factory=ExpertsChoose)
    decoder_router: Router = dataclasses.field(default_factory=TokensChoose)
    num_encoder_sparse_layers: checks.CountOrZero | None = None
    num_decoder_sparse_layers: checks.CountOrZero | None = None
    encoder_sparse_layout: SparseLayout = "MIXED"
    decoder_sparse_layout: SparseLayout = "MIXED"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder_sparse_layout", "decoder_sparse_layout"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self.encoder_router.check(self.num_experts)
        counts = (self.num_encoder_sparse_layers, self.num_decoder_sparse_layers)
        routers = (self.encoder_router, self.decoder_router)
        self.check_routers([r for r, count in zip(routers, counts, strict=True) if count != 0])
        if self.num_decoder_sparse_layers != 0 and (
            reason := self.decoder_router.not_causal_because
        ):
            raise ValueError(
                f"{type(self.decoder_router).__name__} cannot be the decoder's router: {reason}."
            )

    def __repr__(self) -> str:
        """Unfinished predictions of earlier versions are gone on with by this text: the fields of
        the stacks come after the first, and later additions show where they are set.
        """
        first, *shared = (
            field.name for field in dataclasses.fields(MoeSettings) if checks.is_shown(self, field)
        )
        known = {field.name for field in dataclasses.fields(MoeSettings)}
        own = [f.name for f in dataclasses.fields(self) if f.name not in known]
        fields = (f"{name}={getattr(self, name)!r}" for name in (first, *own, *shared))
        return f"MoeConfig({', '.join(fields)})"

    def router(self, stack: StackName) -> Router:
        """The router of the encoder or the decoder."""
        return self.encoder_router if stack == "encoder" else self.decoder_router


@dataclasses.dataclass(frozen=True)
class T5Config(StackedSettings):
    """Shape and numerics of a T5 1.1 model, dense or with MoE layers.

    Attributes:
      vocab_size: rows of the embedding; T5's vocabularies are padded to a multiple of 128.
      emb_dim: d, the width of the residual stream.
      num_heads: attention heads.
      num_encoder_layers: encoder depth.
      num_decoder_layers: decoder depth.
      head_dim: size of a head; heads * head_dim need not equal emb_dim.
      mlp_dim: hidden size of the dense MLP.
      mlp_activations: ('gelu', 'linear') is T5 1.1's gated MLP; ('relu',) is T5 1.0's;
        see `layers.mlp.ACTIVATIONS`.
      dropout_rate: dropout everywhere but in experts (`MoeConfig.expert_dropout_rate`). 0.0 for
        pre-training, 0.1 for fine-tuning.
      dtype: dtype of activations; parameters, logits and routing are float32.
      logits_via_embedding: output with the embedding table, scaled by d^-0.5 (T5 1.0), instead of
        `logits_dense`.
      float32_attention_logits: attention logits and softmax in float32 whatever the dtype.
      remat_policy: what the backward pass computes again instead of keeping it: 'none', 'minimal'
        or 'full' (`stacking.REMAT_POLICIES`; T5X's names). It trades time for the memory of
        activations and changes no value.
      scan_layers: compile a block of layers that repeats once and loop over it (see `stacking` for
        what that costs). Checkpoints are the same either way. docs/benchmarks.md has what was
        measured.
      moe: the MoE layers, or None for a dense model.
      layer_norm_epsilon: added to the mean square in every layer norm.
      relative_attention_num_buckets: buckets of relative positions; columns of the tables of
        position biases.
      relative_attention_max_distance: distance from which on all positions share the last bucket.

    Raises:
      ValueError: a size below 1, an unknown activation, dtype or remat policy, an epsilon outside
        (0, 1), buckets that their distance leaves empty, or MoE layers that do not fit the stacks.
    """

    vocab_size: Annotated[int, Range(at_least=1, at_most=2**24)]
    emb_dim: checks.Size
    num_heads: checks.Size
    num_encoder_layers: checks.Layers
    num_decoder_layers: checks.Layers
    head_dim: checks.Size
    mlp_dim: checks.Size
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: checks.BelowOne = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    logits_via_embedding: bool = False
    float32_attention_logits: bool = True
    remat_policy: RematPolicy = "none"
    scan_layers: bool = False
    moe: MoeConfig | None = None
    layer_norm_epsilon: float = 1e-6
    relative_attention_num_buckets: checks.Size = 32
    relative_attention_max_distance: checks.Count = 128

    def __post_init__(self) -> None:
        checks.check_fields(self)
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        unknown = [name for name in self.mlp_activations if name not in ACTIVATIONS]
        if unknown or not self.mlp_activations:
            raise ValueError(
                f"unknown MLP activations {self.mlp_activations}; known: {sorted(ACTIVATIONS)}"
            )
        self._check_norms_and_positions()
        self.sparse_layers("encoder")
        self.sparse_layers("decoder")

    def _check_norms_and_positions(self) -> None:
        epsilon = self.layer_norm_epsilon
        if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
            raise ValueError(f"layer_norm_epsilon must be in (0, 1), got {epsilon!r}")
        object.__setattr__(self, "layer_norm_epsilon", float(epsilon))
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        # Half of the decoder's buckets, and a quarter of all in the encoder, hold one distance
        # each.
        if buckets < 4 or distance <= buckets // 2:
            raise ValueError(
                "relative_attention_num_buckets must be at least 4 and"
                " relative_attention_max_distance above half of it, got"
                f" {buckets} and {distance}"
            )

    def num_layers(self, stack: StackName) -> int:
        """Depth of the encoder or the decoder."""
        return self.num_encoder_layers if stack == "encoder" else self.num_decoder_layers

    def sparse_layers(self, stack: StackName) -> tuple[int, ...]:
        """Indices of the MoE layers of the encoder or the decoder, ascending; empty for a dense
        model.
        """
        if self.moe is None:
            return ()
        if stack == "encoder":
            count, where = self.moe.num_encoder_sparse_layers, self.moe.encoder_sparse_layout
        else:
            count, where = self.moe.num_decoder_sparse_layers, self.moe.decoder_sparse_layout
        return layout.sparse_layers(self.num_layers(stack), count, where, stack=stack)

    @property
    def mlp_dim_beside_experts(self) -> int:
        """Hidden units of the dense MLPs that every token passes in an MoE layer: a shared expert,
        and an MLP after the experts.
        """
        if self.moe is None:
            return 0
        return (self.moe.shared_expert_mlp_dim or 0) + (self.mlp_dim if self.moe.extra_mlp else 0)

    @property
    def forward_settings(self) -> dict[str, Any]:
        """The settings that decide what a dense model computes and that the names and shapes of
        its parameters do not show.
        """
        return {
            "mlp_activations": self.mlp_activations,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "relative_attention_max_distance": self.relative_attention_max_distance,
        }
