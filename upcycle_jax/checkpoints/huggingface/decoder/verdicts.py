"""What each reader of a Hugging Face folder makes of a model, said before the folder is written.

The facts about engines are those of their code as of mid 2026, see docs/huggingface.md. They
change: a verdict is a prediction, `verify --served` is the test.
"""

from collections.abc import Callable, Iterator, Sequence

from upcycle_jax.checkpoints.huggingface.decoder.holding import HOLDERS, windows
from upcycle_jax.checkpoints.huggingface.verdict import Kind, Verdict
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig

READERS = ("transformers5", "transformers4", "vllm", "sglang", "llama.cpp")
"""transformers 5, transformers 4.57, and the engines."""


Finding = tuple[Kind, str]


def verdicts(
    model_type: str, config: DecoderConfig, rewritings: Sequence[str] = ()
) -> tuple[Verdict, ...]:
    """What every reader makes of a model.

    Args:
      model_type: that it is written as; it can hold the model (`holding.why_not`).
      config: of the model as it is written, after rewriting.
      rewritings: names of those that were needed.
    """
    return tuple(_verdict(reader, model_type, config, rewritings) for reader in READERS)


def _verdict(
    reader: str, model_type: str, config: DecoderConfig, rewritings: Sequence[str]
) -> Verdict:
    found = [*_everywhere(config), *_RULES[reader](model_type, config)]
    order = list(Kind)
    found.sort(key=lambda finding: -order.index(finding[0]))
    kind = found[0][0] if found else Kind.EXACT
    reasons = tuple(reason for _, reason in found)
    if rewritings and kind in (Kind.EXACT, Kind.REWRITTEN):
        kind, reasons = Kind.REWRITTEN, (", ".join(rewritings), *reasons)
    return Verdict(reader, kind, reasons)


def _everywhere(config: DecoderConfig) -> Iterator[Finding]:
    """Readers drop no token, whatever the model does."""
    moe = config.moe
    if moe is None or not config.sparse_layers or moe.router.has_room_for_all:
        return
    name, factor = type(moe.router).__name__, moe.train_expert_capacity_factor
    predicts = (
        "predictions here drop none either"
        if moe.inference_routing == "independent"
        else "predictions here drop them too (inference_routing='grouped')"
    )
    yield (
        Kind.NEAR,
        f"{name} was trained with a capacity of {factor:g} and drops tokens beyond it, no reader"
        f" does; {predicts}",
    )


def _joined(config: DecoderConfig) -> bool:
    return config.num_heads * config.head_dim == config.emb_dim


def _wrong_heads(config: DecoderConfig) -> str:
    return (
        f"its heads have {config.emb_dim} / {config.num_heads} entries, the model's"
        f" {config.head_dim}"
    )


def _is_mixed(config: DecoderConfig) -> bool:
    return 0 < len(config.sparse_layers) < config.num_layers


def _moe(config: DecoderConfig) -> DecoderMoeConfig:
    assert config.moe is not None
    return config.moe


def _scaled(config: DecoderConfig) -> bool:
    return config.rope is not None and config.rope.kind != "default"


def _transformers5(model_type: str, config: DecoderConfig) -> Iterator[Finding]:
    if config.attention_softcap:
        yield Kind.EXACT, "load it with attn_implementation='eager': others ignore the soft-cap"
    exact = config.emb_dim**0.5
    if HOLDERS[model_type].embedding == "sqrt" and config.embedding_multiplier != exact:
        yield (
            Kind.NEAR,
            f"it multiplies the embedding by {exact:.6g} in the weights' dtype, the model by"
            f" {config.embedding_multiplier:.6g}",
        )


def _transformers4(model_type: str, config: DecoderConfig) -> Iterator[Finding]:
    yield from _transformers5(model_type, config)
    found = windows(config)
    if model_type.startswith("granitemoe") and not _joined(config):
        yield Kind.REFUSED, _wrong_heads(config)
    if model_type == "qwen2_moe" and len(set(found)) > 1:
        yield Kind.DIFFERS, "its window is that of all layers, the model's of some"
    kind = config.rope.kind if config.rope is not None else "default"
    if model_type == "olmo" and kind not in ("default", "linear"):
        yield Kind.REFUSED, f"it takes no rope_scaling of type {kind!r}"
    sliding = config.sliding_rope or config.rope
    if any(found) and sliding is not None and config.rope is not None:
        if model_type in ("olmo3", "gemma3_text") and sliding.kind != "default":
            yield (
                Kind.DIFFERS,
                "its layers with a window have a plain rope, the model's a scaled one",
            )
        if model_type == "olmo3" and sliding.theta != config.rope.theta:
            yield Kind.DIFFERS, "all its layers have one rope_theta, the model's two"


def _vllm(model_type: str, config: DecoderConfig) -> Iterator[Finding]:
    if model_type == "smollm3":
        yield Kind.EXACT, "through its transformers backend"
    if HOLDERS[model_type].moe is None:
        if len(set(windows(config))) > 1 and model_type in ("qwen2", "qwen3"):
            yield Kind.UNKNOWN, "older versions refuse a window for some layers"
        return
    moe = _moe(config)
    activation = config.mlp_activations[0]
    if activation != "silu":
        raises = model_type in ("mixtral", "qwen2_moe", "qwen3_moe")
        kind = Kind.REFUSED if raises else Kind.DIFFERS
        yield kind, f"its experts compute silu, the model's {activation}"
    if model_type != "mixtral" and model_type != "qwen3_moe" and not _joined(config):
        yield Kind.REFUSED, _wrong_heads(config)
    if model_type == "qwen2_moe" and not config.qkv_bias:
        yield Kind.REFUSED, "its queries, keys and values have biases, whatever qkv_bias says"
    if model_type in ("qwen2_moe", "qwen3_moe") and any(windows(config)):
        yield Kind.DIFFERS, "it ignores the sliding window"
    if model_type not in ("mixtral", "qwen2_moe") and config.attention_out_bias:
        yield Kind.REFUSED, "its attention's output has no bias"
    if model_type == "mixtral" and (_scaled(config) or not _joined(config)):
        yield Kind.EXACT, "versions of 2025 and earlier ignore rope scaling and head_dim"
    if model_type.startswith("granitemoe") and _scaled(config):
        yield Kind.EXACT, "versions of 2025 and earlier ignore rope scaling"
    if model_type == "olmoe":
        yield from _olmoe(config)
    if model_type == "flex_olmo" and moe.router.unit_weights:
        yield (
            Kind.NEAR,
            "it does not renormalise the weights of chosen experts (hard-coded); the norm after"
            " the experts divides their scale out, but for its epsilon",
        )


def _olmoe(config: DecoderConfig) -> Iterator[Finding]:
    """What vLLM and SGLang have in common."""
    if _moe(config).router.unit_weights:
        yield Kind.DIFFERS, "it never renormalises the weights of chosen experts (hard-coded)"
    if config.clip_qkv is not None:
        yield Kind.DIFFERS, "it ignores clip_qkv"
    if config.norm_epsilon != 1e-5:
        yield Kind.DIFFERS, f"its norms add 1e-5, the model's {config.norm_epsilon:g}"
    if config.logits_via_embedding:
        yield Kind.REFUSED, "it looks for lm_head, which a tied model lacks"


def _sglang(model_type: str, config: DecoderConfig) -> Iterator[Finding]:
    if HOLDERS[model_type].moe is None:
        if any(windows(config)) and model_type in ("mistral", "phi3", "qwen2", "qwen3"):
            yield Kind.UNKNOWN, "whether it keeps the sliding window was not seen"
        return
    activation = config.mlp_activations[0]
    if model_type == "flex_olmo":
        yield Kind.UNKNOWN, "it has no class of its own for this type"
        return
    if activation != "silu":
        yield Kind.REFUSED, f"its experts compute silu, the model's {activation}"
    if model_type != "qwen3_moe" and not _joined(config):
        yield Kind.REFUSED, _wrong_heads(config)
    if model_type in ("qwen2_moe", "qwen3_moe") and _is_mixed(config):
        yield Kind.REFUSED, "mixed layers: it takes every layer for an MoE layer; pad them"
    if model_type in ("mixtral", "granitemoe", "granitemoeshared") and _scaled(config):
        yield Kind.DIFFERS, "it takes rope_theta alone and ignores rope scaling, without a word"
    if any(windows(config)):
        yield Kind.DIFFERS, "it ignores the sliding window"
    if model_type == "mixtral" and config.logits_via_embedding:
        yield Kind.UNKNOWN, "whether it ties lm_head to the embedding was not seen"
    if model_type not in ("mixtral", "qwen2_moe") and config.attention_out_bias:
        yield Kind.REFUSED, "its attention's output has no bias"
    if model_type == "qwen2_moe" and not config.qkv_bias:
        yield Kind.UNKNOWN, "whether it honours qkv_bias was not seen"
    if model_type == "olmoe":
        yield from _olmoe(config)
        if config.kv_heads != config.num_heads:
            yield Kind.REFUSED, "its keys have as many heads as its queries"


def _llama_cpp(model_type: str, config: DecoderConfig) -> Iterator[Finding]:
    any_window = any(windows(config))
    if any_window and model_type in (
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen2_moe",
        "qwen3_moe",
    ):
        yield Kind.DIFFERS, "it ignores the sliding window of this type"
    if HOLDERS[model_type].moe is None:
        return
    moe = _moe(config)
    unit, activation = moe.router.unit_weights, config.mlp_activations[0]
    if model_type == "flex_olmo":
        yield Kind.REFUSED, "it has no such architecture"
        return
    if activation != "silu":
        yield Kind.DIFFERS, f"its experts compute silu, the model's {activation}"
    if _is_mixed(config):
        yield Kind.REFUSED, "mixed layers: it takes every layer for an MoE layer; pad them"
    if model_type in ("qwen2_moe", "olmoe") and unit:
        yield Kind.DIFFERS, "it never renormalises the weights of chosen experts (hard-coded)"
    if model_type == "qwen3_moe" and not unit:
        yield Kind.DIFFERS, "it always renormalises the weights of chosen experts (hard-coded)"
    if model_type == "qwen2_moe" and config.logits_via_embedding:
        yield Kind.REFUSED, "it needs an output matrix of its own; the model is tied"
    if model_type == "mixtral" and moe.num_experts & (moe.num_experts - 1):
        yield (
            Kind.UNKNOWN,
            f"older versions take a power of two of experts, the model has {moe.num_experts}",
        )


_RULES: dict[str, Callable[[str, DecoderConfig], Iterator[Finding]]] = {
    "transformers5": _transformers5,
    "transformers4": _transformers4,
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}
