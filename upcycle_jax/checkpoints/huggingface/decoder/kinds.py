"""What transformers' class of each `model_type` computes: one row of switches for each type.

Sources: the configuration and modeling files of transformers 4.57.6 and 5.24; defaults are those of
both, and None where the two differ.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from upcycle_jax.models.decoder.config import Norm, NormPlace

Windows = Literal[
    "none",
    "all",
    "all if used",
    "late if used",
    "without rope if used",
    "listed if used",
    "pattern",
]


@dataclasses.dataclass(frozen=True)
class MoeKind:
    """MoE layers of a type.

    Attributes:
      width: key of an expert's hidden size.
      renormalize: the chosen weights are always divided by their sum; else `norm_topk_prob` says.
      after_top_k: the softmax is taken over the chosen logits alone.
      steps: `decoder_sparse_step` and `mlp_only_layers` say which layers are MoE layers; else all.
      shared: key of the shared expert's hidden size; '' where the type has none.
      shared_gate: the shared expert has a gate.
      aux_loss: default of `router_aux_loss_coef`.
    """

    width: str = "intermediate_size"
    renormalize: bool = False
    after_top_k: bool = False
    steps: bool = False
    shared: str = ""
    shared_gate: bool = False
    aux_loss: float = 0.001


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of models. Where a key is named, its value decides, and the default where it is
    absent.

    Attributes:
      norm: see `DecoderConfig`.
      norm_place: see `DecoderConfig`.
      epsilon_key: of `norm_epsilon`; '' where nothing but `epsilon` is computed.
      epsilon: default of it.
      qk_norm: see `DecoderConfig`.
      activation_key: of the activation.
      activation: default of it.
      gated: the MLP is gated.
      kv_heads: default of `num_key_value_heads`; None for the query heads.
      head_dim: default of `head_dim`; None for hidden_size / num_attention_heads.
      own_head_dim: whether `head_dim` is read at all.
      bias_key: of biases of query, key and value; '' where `bias` alone decides.
      bias: default of it.
      out_bias: the projection of attention's output has a bias where those have.
      mlp_bias_key: of biases in the MLP; '' where `mlp_bias` alone decides.
      mlp_bias: default of it.
      theta: default base of the rope; None where transformers 4 and 5 differ.
      local_theta: default base in sliding layers, of types that have their own there; None for
        `theta`.
      layered_rope: `rope_parameters` has an object for each type of layer.
      fraction: default of the part of a head that is rotated; None where it is always whole.
      windows: which layers have one: 'none'; 'all'; all or the last ones, or those without rope, or
        those that `layer_types` names, if `use_sliding_window`; or all but every so many
        ('pattern'). Of the last four `layer_types` decides where it is there.
      window: default of `sliding_window`.
      period: of the pattern: every so many layers one without a window.
      tied: default of `tie_word_embeddings`.
      scaled_embedding: the embedding is multiplied by sqrt(hidden_size).
      query_scalar: default of `query_pre_attn_scalar`, whose square root divides the attention
        logits; None where the size of a head does.
      softcaps: defaults of `attn_logit_softcapping` and `final_logit_softcapping`; None where the
        type has none.
      clips: `clip_qkv` is read.
      multipliers: Granite's four are read.
      no_rope: `no_rope_layers` is read.
      parallel: `use_parallel_residual` is read.
      moe: its MoE layers; None where it is dense.
    """

    norm: Norm = "rms"
    norm_place: NormPlace = "pre"
    epsilon_key: str = "rms_norm_eps"
    epsilon: float = 1e-6
    qk_norm: Literal["head", "projection"] | None = None
    activation_key: str = "hidden_act"
    activation: str = "silu"
    gated: bool = True
    kv_heads: int | None = None
    head_dim: int | None = None
    own_head_dim: bool = True
    bias_key: str = "attention_bias"
    bias: bool = False
    out_bias: bool = True
    mlp_bias_key: str = ""
    mlp_bias: bool = False
    theta: float | None = 1e4
    local_theta: float | None = None
    layered_rope: bool = False
    fraction: float | None = None
    windows: Windows = "none"
    window: int | None = None
    period: int = 0
    tied: bool = False
    scaled_embedding: bool = False
    query_scalar: float | None = None
    softcaps: tuple[float | None, float | None] | None = None
    clips: bool = False
    multipliers: bool = False
    no_rope: bool = False
    parallel: bool = False
    moe: MoeKind | None = None


_LLAMA = Kind(mlp_bias_key="mlp_bias")
_QWEN2 = Kind(
    bias_key="", bias=True, out_bias=False, kv_heads=32, windows="late if used", window=4096
)
_OLMO2 = Kind(norm_place="post", epsilon=1e-5, qk_norm="projection")
_GEMMA = Kind(
    norm="rms_plus_one",
    activation="gelu_pytorch_tanh",
    kv_heads=16,
    head_dim=256,
    tied=True,
    scaled_embedding=True,
)
_GEMMA2 = dataclasses.replace(
    _GEMMA,
    norm_place="both",
    activation_key="hidden_activation",
    kv_heads=4,
    query_scalar=256.0,
    softcaps=(50.0, 30.0),
    windows="pattern",
    window=4096,
    period=2,
)
_GRANITE = dataclasses.replace(_LLAMA, multipliers=True)
_GRANITE_MOE = Kind(multipliers=True, moe=MoeKind(after_top_k=True))
_QWEN_MOE = MoeKind(width="moe_intermediate_size", steps=True)

KINDS: Mapping[str, Kind] = {
    "llama": _LLAMA,
    "mistral": Kind(bias_key="", kv_heads=8, windows="all", window=4096),
    "qwen2": _QWEN2,
    "qwen3": dataclasses.replace(
        _QWEN2,
        bias_key="attention_bias",
        bias=False,
        out_bias=True,
        qk_norm="head",
        head_dim=128,
    ),
    "olmo": Kind(norm="layer_norm_without_parameters", epsilon_key="", epsilon=1e-5, clips=True),
    "olmo2": _OLMO2,
    "olmo3": dataclasses.replace(
        _OLMO2, theta=None, layered_rope=True, windows="pattern", window=4096, period=4
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": dataclasses.replace(
        _GEMMA2,
        qk_norm="head",
        softcaps=(None, None),
        theta=1e6,
        local_theta=1e4,
        layered_rope=True,
        period=6,
    ),
    "smollm3": dataclasses.replace(
        _LLAMA,
        kv_heads=4,
        theta=2e6,
        windows="without rope if used",
        tied=True,
        no_rope=True,
    ),
    "granite": _GRANITE,
    "phi3": Kind(bias_key="", epsilon=1e-5, fraction=1.0, windows="all"),
    "gpt_neox": Kind(
        norm="layer_norm",
        epsilon_key="layer_norm_eps",
        epsilon=1e-5,
        activation="gelu",
        gated=False,
        own_head_dim=False,
        bias=True,
        mlp_bias=True,
        fraction=0.25,
        parallel=True,
    ),
    "mixtral": Kind(
        bias_key="",
        epsilon=1e-5,
        kv_heads=8,
        theta=1e6,
        windows="all",
        moe=MoeKind(renormalize=True),
    ),
    "qwen2_moe": Kind(
        bias_key="qkv_bias",
        bias=True,
        out_bias=False,
        kv_heads=16,
        windows="listed if used",
        window=4096,
        moe=dataclasses.replace(
            _QWEN_MOE, shared="shared_expert_intermediate_size", shared_gate=True
        ),
    ),
    "qwen3_moe": Kind(
        qk_norm="head", kv_heads=4, windows="all if used", window=4096, moe=_QWEN_MOE
    ),
    "olmoe": Kind(epsilon=1e-5, qk_norm="projection", clips=True, moe=MoeKind(aux_loss=0.01)),
    "flex_olmo": Kind(
        norm_place="post", qk_norm="projection", theta=5e5, moe=MoeKind(aux_loss=0.01)
    ),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": dataclasses.replace(
        _GRANITE_MOE, moe=MoeKind(after_top_k=True, shared="shared_intermediate_size")
    ),
}
"""Types of models that are read."""

NOT_READ: Mapping[str, str] = {
    "gpt2": "its positions are a learned table, and there are only rotary ones here",
    "opt": "its positions are a learned table, and there are only rotary ones here",
    "gemma3": "it also sees images; save its language model alone (model_type gemma3_text)",
    "mistral3": "it also sees images; save its language model alone (model_type mistral)",
    "llama4": "it also sees images, and its experts get scaled inputs",
    "llama4_text": "its router scales what experts read, and attention is chunked",
    "phimoe": "its router draws from its two best experts by a method of its own",
    "gpt_oss": "its attention has sinks, and its experts an activation of their own",
    "deepseek_v2": "its attention is latent (MLA), which is not computed here",
    "deepseek_v3": "its attention is latent (MLA), which is not computed here",
    "glm4_moe": "its router chooses by groups and biases that have no counterpart here",
    "dots1": "its router chooses by groups and biases that have no counterpart here",
    "qwen3_next": "it mixes linear attention with softmax attention",
    "qwen2_vl": "it also sees images",
    "granitemoehybrid": "it mixes state-space layers with attention",
    "cohere": "its norms and rotary positions are of another kind",
    "falcon": "its layers are of another kind",
    "phi": "its layers are of another kind; phi3 is read",
    "mamba": "it is a state-space model",
}
"""Types near to these -> why they are not read."""

HARMLESS = frozenset(
    {
        # Where the file comes from.
        "_name_or_path", "_commit_hash", "architectures", "auto_map", "custom_pipelines",
        "model_type", "transformers_version", "transformers_weights", "unsloth_version",
        "unsloth_fixed", "tokenizer_class", "base_model_name_or_path", "license",
        # Token ids and generation: the tokenizer's and the sampler's.
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
        "cls_token_id", "mask_token_id", "decoder_start_token_id", "bad_words_ids",
        "begin_suppress_tokens", "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
        "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_beams",
        "num_beam_groups", "num_return_sequences", "diversity_penalty", "early_stopping",
        "max_length", "min_length", "max_new_tokens", "exponential_decay_length_penalty",
        "remove_invalid_values", "cache_implementation", "generation_config",
        # Training: initialisation, dropout, losses and their statistics.
        "initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout",
        "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "output_router_logits",
        "attention_probs_dropout_prob", "attention_dropout_prob", "hidden_dropout_prob",
        "router_jitter_noise", "gradient_checkpointing", "pretraining_tp",
        "use_cache", "z_loss_coefficient",
        # How transformers runs and what it returns.
        "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
        "_experts_implementation", "chunk_size_feed_forward", "return_dict", "output_attentions",
        "output_hidden_states", "torchscript", "tf_legacy_loss", "use_bfloat16", "is_decoder",
        "prefix", "problem_type", "finetuning_task", "task_specific_params", "id2label",
        "label2id", "num_labels", "_num_labels", "transformers.js_config", "is_llama_config",
        "max_sequence_length", "seq_length", "model_max_length", "_sliding_window_pattern",
        "tokenizer_model_max_length", "tokenizer_padding_side", "bos_token", "eos_token",
        "pad_token", "unk_token", "full_attn_mod", "interpolate_factor",
        # Read where it matters, elsewhere without effect.
        "max_window_layers",
    }
)  # fmt: skip
"""Keys that do not change what a model computes from token ids to logits without dropout."""
