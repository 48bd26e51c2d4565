"""Which models each `model_type` of Hugging Face can hold: what its config.json can say, and what
its code computes regardless.

Sources: the configuration and modelling files of transformers 5.24 and 4.57.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from upcycle_jax.models.decoder.config import DecoderConfig, Norm, NormPlace
from upcycle_jax.moe.routing import Router
from upcycle_jax.moe.routing.token_choice import SwitchTop1, TokensChoose

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu_pytorch_tanh",
    "gelu_exact": "gelu",
    "relu": "relu",
}
"""Our names of activations -> theirs."""

_DIVIDED = ("llama", "gemma2", "gemma3_text", "gpt_neox")
"""Types whose configuration refuses a width that is no multiple of the heads."""

OLMO_EPSILON = 1e-5
"""What OLMo 1 adds to the variance; no key of its config.json changes it."""

_NONE, _QKV = (False, False, False), (True, False, False)
_ATTENTION, _MLP = (True, True, False), (False, False, True)
_ANY_PAIR = frozenset({_NONE, _ATTENTION, _MLP, (True, True, True)})


@dataclasses.dataclass(frozen=True)
class MoeHolder:
    """What a type of MoE models can hold of `DecoderMoeConfig`.

    Attributes:
      mixed: some layers may be dense.
      weights: of the chosen experts: 'unit' always sum to 1, 'flag' is `norm_topk_prob`.
      shared: the shared expert: 'gated' by a sigmoid and always there, 'ungated' and always there,
        or None.
    """

    mixed: bool = False
    weights: Literal["unit", "flag"] = "flag"
    shared: Literal["gated", "ungated"] | None = None


@dataclasses.dataclass(frozen=True)
class Holder:
    """What a `model_type` can hold of `DecoderConfig`. The defaults are Llama's.

    Attributes:
      architecture: class of the model.
      norm: see `DecoderConfig`.
      norm_place: see `DecoderConfig`.
      qk_norm: see `DecoderConfig`.
      biases: which combinations of `qkv_bias`, `attention_out_bias` and `mlp_bias`.
      windows: 'none', 'all' (one window for all layers or for none) or 'layers'.
      gated: the MLP is gated.
      clip: it has `clip_qkv`.
      embedding: factor of the embedding: 'one', 'sqrt' (of the width) or 'free'.
      scale: of attention logits: 'head' (head_dim^-0.5), 'free', or 'inverse' (an integer^-0.5).
      multipliers: it has `residual_multiplier` and `logits_divisor`.
      softcaps: it has both soft-caps.
      fraction: a part of each head may be left unrotated.
      ropes: kinds of rope.
      sliding_rope: layers with a window may have a rope of their own.
      no_rope: layers may have none.
      parallel: attention and MLP may read the same stream.
      joined: heads * head_dim must be the width.
      grouped: keys and values may have fewer heads.
      moe: its MoE layers; None for a dense type.
    """

    architecture: str
    norm: Norm = "rms"
    norm_place: NormPlace = "pre"
    qk_norm: Literal["head", "projection"] | None = None
    biases: frozenset[tuple[bool, bool, bool]] = _ANY_PAIR
    windows: Literal["none", "all", "layers"] = "none"
    gated: bool = True
    clip: bool = False
    embedding: Literal["one", "sqrt", "free"] = "one"
    scale: Literal["head", "free", "inverse"] = "head"
    multipliers: bool = False
    softcaps: bool = False
    fraction: bool = False
    ropes: frozenset[str] = frozenset({"default", "linear", "llama3", "yarn", "longrope"})
    sliding_rope: bool = False
    no_rope: bool = False
    parallel: bool = False
    joined: bool = False
    grouped: bool = True
    moe: MoeHolder | None = None


_NO_BIAS, _ATTENTION_BIAS = frozenset({_NONE}), frozenset({_NONE, _ATTENTION})
_GRANITE = Holder(
    "GraniteForCausalLM", embedding="free", scale="free", multipliers=True, biases=_ANY_PAIR
)
_GRANITE_MOE = dataclasses.replace(
    _GRANITE,
    architecture="GraniteMoeForCausalLM",
    biases=_ATTENTION_BIAS,
    moe=MoeHolder(weights="unit"),
)
_GEMMA = Holder("GemmaForCausalLM", norm="rms_plus_one", biases=_ATTENTION_BIAS, embedding="sqrt")
_GEMMA2 = dataclasses.replace(
    _GEMMA,
    architecture="Gemma2ForCausalLM",
    norm_place="both",
    windows="layers",
    scale="inverse",
    softcaps=True,
)

HOLDERS: Mapping[str, Holder] = {
    "llama": Holder("LlamaForCausalLM"),
    "mistral": Holder("MistralForCausalLM", biases=_NO_BIAS, windows="all"),
    "qwen2": Holder("Qwen2ForCausalLM", biases=frozenset({_QKV}), windows="layers"),
    "qwen3": Holder("Qwen3ForCausalLM", qk_norm="head", biases=_ATTENTION_BIAS, windows="layers"),
    "smollm3": Holder("SmolLM3ForCausalLM", windows="layers", no_rope=True),
    "granite": _GRANITE,
    "phi3": Holder(
        "Phi3ForCausalLM",
        biases=_NO_BIAS,
        windows="all",
        fraction=True,
        ropes=frozenset({"default", "longrope"}),
    ),
    "olmo": Holder(
        "OlmoForCausalLM",
        norm="layer_norm_without_parameters",
        biases=_ATTENTION_BIAS,
        clip=True,
    ),
    "olmo2": Holder(
        "Olmo2ForCausalLM", norm_place="post", qk_norm="projection", biases=_ATTENTION_BIAS
    ),
    "olmo3": Holder(
        "Olmo3ForCausalLM",
        norm_place="post",
        qk_norm="projection",
        biases=_ATTENTION_BIAS,
        windows="layers",
        sliding_rope=True,
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": dataclasses.replace(
        _GEMMA2, architecture="Gemma3ForCausalLM", qk_norm="head", sliding_rope=True
    ),
    "gpt_neox": Holder(
        "GPTNeoXForCausalLM",
        norm="layer_norm",
        biases=frozenset({(True, True, True), (False, False, True)}),
        gated=False,
        fraction=True,
        parallel=True,
        joined=True,
        grouped=False,
    ),
    "mixtral": Holder(
        "MixtralForCausalLM", biases=_NO_BIAS, windows="all", moe=MoeHolder(weights="unit")
    ),
    "qwen3_moe": Holder(
        "Qwen3MoeForCausalLM",
        qk_norm="head",
        biases=_ATTENTION_BIAS,
        windows="all",
        moe=MoeHolder(mixed=True),
    ),
    "qwen2_moe": Holder(
        "Qwen2MoeForCausalLM",
        biases=frozenset({_NONE, _QKV}),
        windows="layers",
        moe=MoeHolder(mixed=True, shared="gated"),
    ),
    "olmoe": Holder(
        "OlmoeForCausalLM",
        qk_norm="projection",
        biases=_ATTENTION_BIAS,
        clip=True,
        joined=True,
        moe=MoeHolder(),
    ),
    "flex_olmo": Holder(
        "FlexOlmoForCausalLM",
        norm_place="post",
        qk_norm="projection",
        biases=_ATTENTION_BIAS,
        moe=MoeHolder(),
    ),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": dataclasses.replace(
        _GRANITE_MOE,
        architecture="GraniteMoeSharedForCausalLM",
        moe=MoeHolder(weights="unit", shared="ungated"),
    ),
}
"""By `model_type`; of those that can hold a model, the first is preferred."""


def why_not(model_type: str, config: DecoderConfig) -> list[str]:
    """What keeps a type from holding a model as it is; empty where it can.

    Args:
      model_type: one of `HOLDERS`.
      config: of the model.
    """
    holder = HOLDERS[model_type]
    checks = (_blocks, _attention, _positions, _factors, _experts)
    return [reason for check in checks for reason in check(model_type, holder, config)]


def _blocks(kind: str, holder: Holder, config: DecoderConfig) -> list[str]:
    out = []
    if config.norm != holder.norm:
        out.append(f"its norms are {holder.norm!r}, the model's {config.norm!r}")
    if config.norm_place != holder.norm_place:
        out.append(f"its norms stand {holder.norm_place!r}, the model's {config.norm_place!r}")
    if kind == "olmo" and config.norm_epsilon != OLMO_EPSILON:
        out.append(f"its norms add {OLMO_EPSILON}, the model's {config.norm_epsilon}")
    gated = len(config.mlp_activations) == 2 and config.mlp_activations[1] == "linear"
    if gated != holder.gated:
        out.append(f"its MLPs are {'gated' if holder.gated else 'plain'}, the model's not")
    activation = config.mlp_activations[0]
    if activation not in ACTIVATIONS or len(config.mlp_activations) > 2:
        out.append(f"transformers has no MLP with the activations {config.mlp_activations}")
    elif kind == "gemma" and activation == "gelu_exact":
        out.append("it takes 'gelu' for the tanh form")
    if config.parallel_residual and not holder.parallel:
        out.append("attention and MLP run in turn, the model's in parallel")
    if config.logits_bias:
        out.append("its logits have no bias, the model's have")
    return out


def _attention(kind: str, holder: Holder, config: DecoderConfig) -> list[str]:
    out = []
    if config.qk_norm != holder.qk_norm:
        out.append(
            f"its queries and keys are normed by {holder.qk_norm or 'nothing'}, the model's by"
            f" {config.qk_norm or 'nothing'}"
        )
    biases = (config.qkv_bias, config.attention_out_bias, config.mlp_bias)
    if biases not in holder.biases:
        out.append(f"it cannot have biases {_bias_names(biases)}")
    if config.clip_qkv is not None and not holder.clip:
        out.append(f"it cannot clip queries, keys and values (clip_qkv={config.clip_qkv})")
    if holder.joined and config.num_heads * config.head_dim != config.emb_dim:
        out.append(
            f"its heads have width / heads entries, the model's {config.head_dim} of"
            f" {config.emb_dim} / {config.num_heads}"
        )
    if kind in _DIVIDED and config.emb_dim % config.num_heads:
        out.append(f"its width must be a multiple of its {config.num_heads} heads")
    if not holder.grouped and config.kv_heads != config.num_heads:
        out.append("its keys and values have as many heads as its queries")
    if (config.attention_softcap or config.logits_softcap) and not holder.softcaps:
        out.append("it has no soft-caps")
    return out


def _bias_names(biases: tuple[bool, bool, bool]) -> str:
    names = ("of queries, keys and values", "of attention's output", "of the MLP")
    there = [name for name, has in zip(names, biases, strict=True) if has]
    return f"{' and '.join(there)} alone" if there else "nowhere"


def windows(config: DecoderConfig) -> tuple[int | None, ...]:
    """The window of each layer."""
    return tuple(config.layer_window(i) for i in range(config.num_layers))


def _positions(kind: str, holder: Holder, config: DecoderConfig) -> list[str]:
    out = []
    found = windows(config)
    if holder.windows == "none" and any(found):
        out.append(f"it has no sliding window, the model has one of {config.sliding_window}")
    if holder.windows == "all" and len(set(found)) > 1:
        out.append("its window is that of all layers, the model's of some")
    if config.rope is None:
        out.append("it has rotary positions, the model none")
        return out
    if config.no_rope_layers and not holder.no_rope:
        out.append("all its layers have rotary positions, some of the model's none")
    each = [config.layer_rope(i) for i in range(config.num_layers)]
    ropes = list(dict.fromkeys(rope for rope in (config.rope, *each) if rope is not None))
    if len(ropes) > 1 and not holder.sliding_rope:
        out.append("its layers have one rope, those of the model with a window another")
    for rope in ropes:
        if rope.kind not in holder.ropes:
            out.append(f"it has no rope of kind {rope.kind!r}")
        if rope.fraction != 1 and not holder.fraction:
            out.append("it rotates whole heads, the model parts of them")
    if kind == "phi3" and config.rope.kind == "longrope":
        alone = dataclasses.replace(config.rope, attention_factor=None).amplitude
        if not math.isclose(alone, config.rope.amplitude, rel_tol=1e-9):
            out.append("it computes the factor of its sines and cosines, the model has another")
    return out


def _factors(kind: str, holder: Holder, config: DecoderConfig) -> list[str]:
    out = []
    if holder.embedding != "free":
        wanted = math.sqrt(config.emb_dim) if holder.embedding == "sqrt" else 1.0
        # A bfloat16 Gemma rounds sqrt(d) to its weights' dtype: within 2^-8.
        slack = 2.0**-8 if holder.embedding == "sqrt" else 0.0
        if not math.isclose(config.embedding_multiplier, wanted, rel_tol=max(slack, 1e-9)):
            out.append(
                f"its embedding is multiplied by {wanted:.6g}, the model's by"
                f" {config.embedding_multiplier:.6g}"
            )
    scale, usual = config.logit_scale, config.head_dim**-0.5
    if holder.scale == "head" and not math.isclose(scale, usual, rel_tol=1e-9):
        out.append(f"its attention is scaled by head_dim^-0.5, the model's by {scale:.6g}")
    if holder.scale == "inverse" and not _is_inverse_root(scale):
        out.append(f"its attention is scaled by an integer^-0.5, the model's by {scale:.6g}")
    if not holder.multipliers and (config.residual_multiplier, config.logits_divisor) != (1, 1):
        out.append("it has neither residual_multiplier nor logits_scaling")
    return out


def _is_inverse_root(scale: float) -> bool:
    number = round(scale**-2)
    return number > 0 and math.isclose(number**-0.5, scale, rel_tol=1e-9)


def _experts(kind: str, holder: Holder, config: DecoderConfig) -> list[str]:
    moe, can = config.moe, holder.moe
    if moe is None or not config.sparse_layers:
        return [] if can is None else ["it has experts, the model none"]
    if can is None:
        return ["it is dense, the model has experts"]
    out = []
    if why := router_refused(moe.router):
        out.append(why)
    elif can.weights == "unit" and not moe.router.unit_weights:
        out.append("the weights of its chosen experts sum to 1, the model's do not")
    if moe.extra_mlp:
        out.append("no dense MLP follows its MoE layers, as in the model (extra_mlp)")
    if not can.mixed and len(config.sparse_layers) < config.num_layers:
        out.append("all its layers have experts, some of the model's are dense")
    if config.mlp_bias:
        out.append("its experts have no biases, the model's have")
    if moe.shared_expert_mlp_dim is None:
        shared = None
    else:
        shared = "gated" if moe.shared_expert_gate else "ungated"
    if shared != can.shared:
        there = f"a shared expert ({can.shared})" if can.shared else "no shared expert"
        ours = f"one ({shared})" if shared else "none"
        out.append(f"it has {there}, the model {ours}")
    return out


def router_refused(router: Router) -> str | None:
    """Why no type can hold a router; None where one can."""
    name = type(router).__name__
    if not router.per_token:
        return (
            f"{name}: experts choose tokens of a whole group, and no reader does that; what a token"
            " gets would depend on those after it. Train with a router that chooses per token"
        )
    if not isinstance(router, TokensChoose | SwitchTop1):
        return (
            f"{name}: these types choose by a softmax of the router's logits, and by nothing else"
        )
    return None
