"""Settings of a decoder-only language model and of its MoE layers."""

import dataclasses
from typing import Annotated, Any, Literal

from upcycle_jax import checks
from upcycle_jax.checks import Range
from upcycle_jax.layers import rope as ropes
from upcycle_jax.layers.causal_attention import Implementation
from upcycle_jax.layers.mlp import ACTIVATIONS
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models import layout
from upcycle_jax.models.layout import SparseLayout
from upcycle_jax.models.settings import StackedSettings
from upcycle_jax.models.stacking import RematPolicy
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.routing import DroplessTopK, Router

STACK = "decoder"
"""The name of the one stack."""

Norm = Literal["rms", "rms_plus_one", "layer_norm", "layer_norm_without_parameters"]
NormPlace = Literal["pre", "post", "both"]
LayerType = Literal["full", "sliding"]


@dataclasses.dataclass(frozen=True)
class DecoderMoeConfig(MoeSettings):
    """Which layers are MoE layers, and how those route. The defaults are Mixtral's: every layer,
    8 experts, the weights of the two best renormalised, nothing dropped. What all families have in
    common is `MoeSettings`.

    Attributes:
      num_experts: E, in every MoE layer.
      router: it must be causal.
      num_sparse_layers: MoE layers; None for all of them, or for as many as `sparse_layout` names.
      sparse_layout: where they are: 'MIXED' (every so many layers, never the first), 'BOTTOM',
        'MIDDLE', 'TOP', or a tuple of layer indices, which decides alone.

    Raises:
      ValueError: a number out of range, K > E, or a router that is not causal.
    """

    num_experts: checks.Experts = 8
    router: Router = dataclasses.field(default_factory=lambda: DroplessTopK(renormalize=True))
    num_sparse_layers: checks.CountOrZero | None = None
    sparse_layout: SparseLayout = "MIXED"
    ignore_padding_tokens: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t5x_mode:
            raise ValueError("t5x_mode is for T5: leave it False for a decoder-only model")
        if self.extra_mlp:
            raise ValueError(
                "extra_mlp is for T5: a decoder-only model has shared_expert_mlp_dim for an MLP"
                " that every token passes"
            )
        if isinstance(self.sparse_layout, list):
            object.__setattr__(self, "sparse_layout", tuple(self.sparse_layout))
        self.check_routers([self.router])
        if reason := self.router.not_causal_because:
            raise ValueError(
                f"{type(self.router).__name__} cannot be the router of a language model: {reason}."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig(StackedSettings):
    """Shape and numerics of a decoder-only language model, dense or with MoE layers. The defaults
    are Llama's; the switches make it Mistral, Qwen, OLMo, Gemma, SmolLM, Granite, Phi-3 or
    GPT-NeoX.

    Attributes:
      vocab_size: rows of the embedding.
      emb_dim: d, the width of the residual stream.
      num_layers: depth.
      num_heads: H, query heads.
      head_dim: size of a head; heads * head_dim need not equal emb_dim.
      mlp_dim: hidden size of the dense MLP.
      num_kv_heads: KV, heads of keys and values, each shared by H / KV query heads; None for H.
      mlp_activations: ('silu', 'linear') is a gated MLP, ('gelu_exact',) GPT-NeoX's plain one; see
        `layers.mlp.ACTIVATIONS`.
      norm: 'rms', 'rms_plus_one' (scaled by 1 + its parameter: Gemma), 'layer_norm' (with scale and
        bias: GPT-NeoX), or 'layer_norm_without_parameters' (OLMo 1).
      norm_place: before each sublayer ('pre'), on its output ('post': OLMo 2 and 3), or 'both'
        (Gemma 2 and 3).
      norm_epsilon: added to the mean square or the variance in every norm.
      qk_norm: norm of queries and keys before they are rotated: 'head' by head (Qwen3, Gemma 3),
        the whole 'projection' (OLMo 2), or None.
      qkv_bias: the projections to queries, keys and values have biases.
      attention_out_bias: the projection of attention's output has one.
      mlp_bias: the MLP's projections have biases.
      clip_qkv: queries, keys and values are clipped to plus and minus this; None: they are not.
      rope: rotary position embedding; None for none at all.
      sliding_rope: that of layers of type 'sliding' where it differs (Gemma 3); None: `rope`.
      no_rope_layers: indices of layers without one (SmolLM3).
      layer_types: 'full' or 'sliding' of each layer; () where all are full.
      sliding_window: positions that a query of a 'sliding' layer sees, itself included.
      attention_scale: factor of attention logits; None for head_dim^-0.5.
      attention_softcap: c, attention logits become c tanh(logits / c) before the mask; None: not.
      logits_softcap: likewise for the output logits.
      embedding_multiplier: factor of the embedding's rows.
      residual_multiplier: factor of each sublayer's output (Granite).
      logits_divisor: output logits are divided by it (Granite).
      parallel_residual: attention and MLP both read the stream before the layer (GPT-NeoX).
      logits_via_embedding: output with the embedding table (unscaled) instead of `logits_dense`.
      logits_bias: `logits_dense` has a bias.
      attention_implementation: of `jax.nn.dot_product_attention`, which plain attention uses:
        'xla', or 'cudnn' (flash attention on NVIDIA GPUs, with dtype 'bfloat16').
      dropout_rate: dropout of attention probabilities, of hidden activations in MLPs and of
        sublayer outputs.
      dtype: dtype of activations; parameters, norms' statistics, softmax, logits and routing are
        float32.
      remat_policy: what the backward pass computes again instead of keeping it: 'none', 'minimal'
        or 'full' (`stacking.REMAT_POLICIES`). It changes no value.
      scan_layers: compile a block of layers that repeats once and loop over it (see `stacking`).
        Checkpoints are the same either way.
      moe: the MoE layers, or None for a dense model.

    Raises:
      ValueError: a number out of range, an unknown choice, heads that KV does not divide, layer
        types that do not fit the depth or lack a window, or MoE layers that do not fit the stack.
    """

    vocab_size: Annotated[int, Range(at_least=1, at_most=2**24)]
    emb_dim: checks.Size
    num_layers: checks.Layers
    num_heads: checks.Size
    head_dim: checks.Size
    mlp_dim: checks.Size
    num_kv_heads: checks.Size | None = None
    mlp_activations: tuple[str, ...] = ("silu", "linear")
    norm: Norm = "rms"
    norm_place: NormPlace = "pre"
    norm_epsilon: Annotated[float, Range(above=0, below=1)] = 1e-5
    qk_norm: Literal["head", "projection"] | None = None
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: checks.Positive | None = None
    rope: Rope | None = dataclasses.field(default_factory=Rope)
    sliding_rope: Rope | None = None
    no_rope_layers: tuple[int, ...] = ()
    layer_types: tuple[LayerType, ...] = ()
    sliding_window: checks.Count | None = None
    attention_scale: checks.Positive | None = None
    attention_softcap: checks.Positive | None = None
    logits_softcap: checks.Positive | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: checks.Positive = 1.0
    parallel_residual: bool = False
    logits_via_embedding: bool = False
    logits_bias: bool = False
    attention_implementation: Implementation = "xla"
    dropout_rate: checks.BelowOne = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat_policy: RematPolicy = "none"
    scan_layers: bool = False
    moe: DecoderMoeConfig | None = None

    def __post_init__(self) -> None:
        for name in ("mlp_activations", "no_rope_layers", "layer_types"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        checks.check_fields(self)
        unknown = [name for name in self.mlp_activations if name not in ACTIVATIONS]
        if unknown or not self.mlp_activations:
            raise ValueError(
                f"unknown MLP activations {self.mlp_activations}; known: {sorted(ACTIVATIONS)}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.kv_heads}"
            )
        self._check_layers()
        _ = self.sparse_layers

    def _check_layers(self) -> None:
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_layers is {self.num_layers}"
            )
        if "sliding" in self.layer_types and self.sliding_window is None:
            raise ValueError("layers of type 'sliding' need a sliding_window")
        outside = [i for i in self.no_rope_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"no_rope_layers {outside} are not among the layers 0 to {self.num_layers - 1}"
            )

    @property
    def kv_heads(self) -> int:
        """KV, heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def logit_scale(self) -> float:
        """Factor of attention logits."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def layer_type(self, index: int) -> LayerType:
        """'full' or 'sliding'."""
        return self.layer_types[index] if self.layer_types else "full"

    def layer_window(self, index: int) -> int | None:
        """Positions that a query of a layer sees, itself included; None for all before it."""
        return self.sliding_window if self.layer_type(index) == "sliding" else None

    def layer_rope(self, index: int) -> Rope | None:
        """Rotary position embedding of a layer."""
        if index in self.no_rope_layers:
            return None
        sliding = self.layer_type(index) == "sliding"
        return self.sliding_rope if sliding and self.sliding_rope else self.rope

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, ascending; empty for a dense model."""
        if self.moe is None:
            return ()
        count, where = self.moe.num_sparse_layers, self.moe.sparse_layout
        if count is None and isinstance(where, str):
            count = self.num_layers
        return layout.sparse_layers(self.num_layers, count, where, stack=STACK)

    @property
    def forward_settings(self) -> dict[str, Any]:
        """The settings that decide what a dense model computes and that the names and shapes of
        its parameters do not show, as JSON has them (tuples for lists).
        """
        plain = {name: getattr(self, name) for name in STATED}
        return plain | {name: ropes.as_plain(getattr(self, name)) for name in STATED_ROPES}


STATED_ROPES = ("rope", "sliding_rope")
STATED = (
    "num_heads",
    "head_dim",
    "mlp_activations",
    "norm",
    "norm_place",
    "norm_epsilon",
    "qk_norm",
    "clip_qkv",
    "no_rope_layers",
    "layer_types",
    "sliding_window",
    "attention_scale",
    "attention_softcap",
    "logits_softcap",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_divisor",
    "parallel_residual",
)
"""Fields of `DecoderConfig` that `forward_settings` states. Sizes, biases and the place of norms
show in the parameters; `num_heads` and `head_dim` show as a product alone.
"""
