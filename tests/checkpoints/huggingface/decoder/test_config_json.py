"""What config.json of a decoder-only model states, in both dialects, and what of it is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upcycle_jax.checkpoints.huggingface.decoder.config_json import read_config
from upcycle_jax.checkpoints.huggingface.decoder.kinds import KINDS
from upcycle_jax.layers.rope import Rope
from upcycle_jax.models.decoder.config import DecoderMoeConfig
from upcycle_jax.moe.routing import DroplessTopK

FOLDER = Path("/models/one")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {**EXPERTS, "moe_intermediate_size": 24}


def read(model_type, **keys):
    """The model of a config.json with `SIZES`; a value of `...` leaves a key out."""
    found = {"model_type": model_type, **SIZES, **keys}
    if model_type == "gpt_neox":
        found.setdefault("head_dim", 8)
        found["num_key_value_heads"] = found["num_attention_heads"]
    found = {key: value for key, value in found.items() if value is not ...}
    return read_config(FOLDER, json.loads(json.dumps(found)))


# Dialects.


@pytest.mark.parametrize(
    ("model_type", "old", "new", "want"),
    [
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            Rope(5e5, "llama3", factor=8.0, original_length=64),
        ),
        (
            "llama",
            {"rope_theta": 1e5, "rope_scaling": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
            Rope(1e5),
        ),
        (
            "olmo2",
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
            Rope(5e5, "linear", factor=2.0),
        ),
        (  # No original length: transformers takes that of the file.
            "qwen3",
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 256,
                }
            },
            Rope(1e6, "yarn", factor=4.0, original_length=256),
        ),
        (
            "gpt_neox",
            {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
            {"rope_parameters": {"rope_theta": 2e4, "partial_rotary_factor": 0.5}},
            Rope(2e4, fraction=0.5),
        ),
        ("gpt_neox", {}, {"rope_parameters": {"rope_theta": 1e4}}, Rope(1e4, fraction=0.25)),
        (  # 'su' is an early name; 256 / 64 = 4 times as long.
            "phi3",
            {
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
                "rope_scaling": {
                    "type": "su",
                    "short_factor": [1.0, 1.0, 1.0, 1.5],
                    "long_factor": [2.0, 2.0, 2.0, 3],
                },
            },
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 1.0,
                    "original_max_position_embeddings": 64,
                    "short_factor": [1.0, 1.0, 1.0, 1.5],
                    "long_factor": [2.0, 2.0, 2.0, 3],
                },
            },
            Rope(
                kind="longrope",
                factor=4.0,
                original_length=64,
                short_factors=(1.0, 1.0, 1.0, 1.5),
                long_factors=(2.0, 2.0, 2.0, 3.0),
            ),
        ),
    ],
)
def test_a_rope_in_both_dialects(model_type, old, new, want):
    assert read(model_type, **old).rope == want
    assert read(model_type, **new).rope == want
    assert read(model_type, **(old | new)).rope == want


def test_the_ropes_of_gemma_3_in_both_dialects():
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear}
    new = {
        "rope_parameters": {
            FULL: {"rope_theta": 1e6, **linear},
            SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
        }
    }
    for keys in (old, new, old | new):
        config = read("gemma3_text", num_hidden_layers=7, **keys)
        assert config.layer_types == ("sliding",) * 5 + ("full", "sliding")
        assert config.rope == Rope(1e6, "linear", factor=8.0)
        assert config.sliding_rope == Rope(1e4)
    for keys, where in (
        (old | {"rope_local_base_freq": 2e4}, SLIDING),
        (old | {"rope_theta": 5e5}, FULL),
        (old | {"rope_scaling": ...}, FULL),
    ):
        with pytest.raises(ValueError, match=rf"in {where} layers, but .* compute different"):
            read("gemma3_text", **{**new, **keys})


def test_the_scaling_of_olmo_3_is_that_of_its_full_layers():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    old = {"rope_theta": 5e5, "rope_scaling": yarn}
    new = {
        "rope_parameters": {
            FULL: {"rope_theta": 5e5, **yarn},
            SLIDING: {"rope_theta": 5e5, "rope_type": "default"},
        }
    }
    for keys in (old, new, old | new):
        config = read("olmo3", **keys)
        assert config.rope == Rope(5e5, "yarn", factor=4.0, original_length=64)
        assert config.sliding_rope == Rope(5e5)
        assert config.layer_types == ("sliding",) * 3 + ("full",)
        assert config.sliding_window == 4096
    # transformers 4 takes 10000 then, and 5 takes 500000.
    with pytest.raises(ValueError, match=r"rope_scaling.rope_theta is missing: the versions"):
        read("olmo3")


def test_the_attention_factor_that_two_scales_of_yarn_mean():
    yarn = {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    # (0.1 ln 40 + 1) / (0.05 ln 40 + 1) = 1.368888 / 1.184444
    config = read("qwen2", rope_scaling=yarn)
    assert config.rope.attention_factor == pytest.approx(1.368888 / 1.184444, rel=1e-6)


def test_what_files_before_rope_theta_mean():
    assert read("llama").rope == Rope(1e4)
    assert read("mixtral", **EXPERTS).rope == Rope(1e6)
    assert read("smollm3").rope == Rope(2e6)
    assert read("flex_olmo", **EXPERTS).rope == Rope(5e5)
    assert read("gemma3_text").sliding_rope == Rope(1e4)


# Layers.


def windows(model_type, **keys):
    config = read(model_type, **keys)
    return tuple(config.layer_window(i) for i in range(config.num_layers))


def test_windows():
    assert windows("mistral", sliding_window=8) == (8,) * 4
    assert windows("mistral", sliding_window=None) == (None,) * 4
    assert windows("mistral") == (4096,) * 4  # what transformers takes where nothing is said
    assert windows("mixtral", **EXPERTS) == (None,) * 4
    assert windows("qwen2", sliding_window=8) == (None,) * 4
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert windows("qwen2", **used, max_window_layers=3) == (None,) * 3 + (8,)
    assert windows("qwen3", **used) == (None,) * 4  # from layer 28 on
    assert windows("qwen3_moe", **MOE, **used) == (8,) * 4
    assert windows("qwen2_moe", **MOE, use_sliding_window=False, sliding_window=0) == (None,) * 4
    types = [FULL, SLIDING, FULL, SLIDING]
    assert windows("qwen2_moe", **MOE, **used, layer_types=types) == (None, 8, None, 8)
    assert windows("qwen2", **used, max_window_layers=0, layer_types=types) == (None, 8, None, 8)
    assert windows("gemma2", sliding_window=8) == (8, None, 8, None)
    assert windows("gemma3_text", sliding_window=8, sliding_window_pattern=2) == (8, None, 8, None)
    assert windows("gemma2", layer_types=[FULL] * 4, sliding_window=None) == (None,) * 4
    assert windows("smollm3", **used) == (None, None, None, 8)  # the one without a rope


def test_layers_without_a_rope():
    assert read("smollm3").no_rope_layers == (3,)
    assert read("smollm3", no_rope_layer_interval=2).no_rope_layers == (1, 3)
    assert read("smollm3", no_rope_layers=[0, 1, 1, 0]).no_rope_layers == (0, 3)


def test_moe_layers():
    mixtral = read("mixtral", num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02)
    router = DroplessTopK(num_selected_experts=2, renormalize=True)
    assert mixtral.moe == DecoderMoeConfig(
        num_experts=4, router=router, aux_loss_factor=0.02, aux_loss="joint"
    )
    assert read("mixtral", **EXPERTS).moe.aux_loss_factor == 0.001
    assert read("olmoe", **EXPERTS).moe.aux_loss_factor == 0.01
    assert read("olmoe", **EXPERTS, router_aux_loss_coef=0).moe.aux_loss_factor == 0
    assert mixtral.sparse_layers == (0, 1, 2, 3)
    shared = {"shared_expert_intermediate_size": 16}
    qwen = read("qwen2_moe", **MOE, **shared, decoder_sparse_step=2, mlp_only_layers=[3])
    assert qwen.sparse_layers == (1,)
    assert qwen.moe == DecoderMoeConfig(
        num_experts=4,
        router=DroplessTopK(num_selected_experts=2),
        expert_mlp_dim=24,
        shared_expert_mlp_dim=16,
        shared_expert_gate=True,
        sparse_layout=(1,),
        aux_loss_factor=0.001,
        aux_loss="joint",
    )
    assert qwen.qkv_bias
    assert not read("qwen2_moe", **MOE, qkv_bias=False).qkv_bias
    assert read("qwen2_moe", **MOE, mlp_only_layers=[0, 1, 2, 3]).moe is None
    assert read("qwen3_moe", **MOE, norm_topk_prob=True).moe.router == router
    both = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    assert read("olmoe", **both).moe.router == DroplessTopK(num_selected_experts=2)
    granite = read("granitemoeshared", **both, shared_intermediate_size=16).moe
    assert granite.router == DroplessTopK(num_selected_experts=2, softmax_order="after_top_k")
    assert (granite.shared_expert_mlp_dim, granite.shared_expert_gate) == (16, False)


# Numbers.


def test_defaults_of_types_that_transformers_does_not_write_out():
    gemma = read("gemma2", head_dim=...)
    assert (gemma.head_dim, gemma.logits_softcap, gemma.attention_softcap) == (256, 30.0, 50.0)
    assert gemma.logits_via_embedding
    assert gemma.embedding_multiplier == pytest.approx(32**0.5)
    assert gemma.attention_scale is None  # 256^-0.5, as heads of 256 have without being told
    assert read("gemma2", final_logit_softcapping=None).logits_softcap is None
    assert read("qwen3").head_dim == 128
    assert read("qwen2").head_dim == 8
    assert read("llama", num_key_value_heads=...).kv_heads == 4
    assert read("llama", num_key_value_heads=None).kv_heads == 4
    assert read("llama").norm_epsilon == 1e-6
    assert read("olmo").norm_epsilon == 1e-5
    assert read("gpt_neox", layer_norm_eps=1e-6).norm_epsilon == 1e-6
    assert read("granite", attention_multiplier=8**-0.5).attention_scale is None


def test_activations():
    # Gemma 1 was released with 'gelu', and was trained with the form by tanh.
    assert read("gemma", hidden_act="gelu").mlp_activations == ("gelu", "linear")
    both = {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}
    assert read("gemma", **both).mlp_activations == ("gelu", "linear")
    assert read("gpt_neox").mlp_activations == ("gelu_exact",)
    assert read("gemma3_text", hidden_activation="silu").mlp_activations == ("silu", "linear")


@pytest.mark.parametrize("model_type", KINDS)
def test_keys_that_change_nothing(model_type):
    noise = {
        "architectures": ["SomeModel"],
        "_name_or_path": "somewhere",
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "transformers_version": "4.57.6",
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "use_cache": True,
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "router_jitter_noise": 0.01,
        "something_new_that_is_off": False,
        "another": None,
    }
    experts = MOE if "qwen" in model_type else EXPERTS
    more = experts if KINDS[model_type].moe else {}
    theta = {"rope_theta": 1e4}
    assert read(model_type, **more, **theta, **noise) == read(model_type, **more, **theta)


def test_released_files():
    """Keys and values as they were released, at the sizes of these tests."""
    common = {
        "architectures": ["AForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "use_cache": True,
    }
    smollm = {
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "pretraining_tp": 1,
        "mlp_bias": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    }
    assert read("llama", **common, **smollm).rope == Rope(1e5)
    qwen = {
        "max_window_layers": 24,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_mrope": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    }
    assert read("qwen2", **common, **qwen).rope == Rope(1e6)
    gemma = {
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 224,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "rope_theta": 10000.0,
    }
    both = common | {"hidden_act": "gelu_pytorch_tanh"}
    assert read("gemma2", **both, **gemma).attention_scale == 224**-0.5
    with pytest.raises(ValueError, match="sliding_window_size is 4096: sliding_window says 8"):
        read("gemma2", **both, **(gemma | {"sliding_window": 8}))
    phi4 = {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1, 1.5, 2],
            "long_factor": [1, 2, 4],
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    }
    found = read("phi3", **common, **phi4).rope  # 32768 / 4096 = 8; 6 of 8 entries turn.
    assert (found.kind, found.fraction, found.factor) == ("longrope", 0.75, 8.0)
    pythia = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_probs_dropout_prob": 0,
    }
    assert read("gpt_neox", **(common | pythia)).parallel_residual


# Refusals.


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats()
    | st.sampled_from(["", "llama3", "yarn", "longrope", "silu", FULL, SLIDING, "x" * 300])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
_KEYS = sorted(
    {*SIZES, *MOE, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"}
    | {"sliding_window", "use_sliding_window", "max_window_layers", "no_rope_layers", "clip_qkv"}
    | {"mlp_only_layers", "decoder_sparse_step", "norm_topk_prob", "hidden_act", "rms_norm_eps"}
    | {"attention_multiplier", "query_pre_attn_scalar", "partial_rotary_factor", "dtype"}
    | {"shared_expert_intermediate_size", "attn_logit_softcapping", "rope_local_base_freq"}
)
_ROPE_KEYS = st.sampled_from(
    ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "short_factor", FULL, SLIDING]
)


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(
    model_type=st.sampled_from(sorted(KINDS)),
    keys=st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=3),
    rope=st.none() | st.dictionaries(_ROPE_KEYS, _VALUES, max_size=3),
)
def test_any_values_at_all_give_a_model_or_one_clear_error(model_type, keys, rope):
    more = MOE if "qwen" in model_type and KINDS[model_type].moe else {}
    found = {"model_type": model_type, **SIZES, **more, **keys}
    found |= {"rope_scaling": rope} if rope is not None else {}
    try:
        config = read_config(FOLDER, found)
    except ValueError as error:
        text = str(error)
        assert str(FOLDER) in text
        assert "\n" not in text
        assert text.isprintable()
    else:
        assert config.forward_settings


@pytest.mark.parametrize(
    ("model_type", "keys", "match"),
    [
        ("llama", {"vocab_size": ...}, "vocab_size is missing"),
        ("llama", {"hidden_size": "32"}, "hidden_size is '32': an integer belongs there"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0: a positive size"),
        ("llama", {"num_hidden_layers": 5000}, "config.json is no decoder's: .*num_layers"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads is 5: hidden_size 32"),
        ("llama", {"num_key_value_heads": 3}, "num_heads=4 must be a multiple"),
        ("llama", {"head_dim": 7}, "head_dim is 7|heads of 7 do not rotate"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps is 0: a number between 0 and 1"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps is None"),
        ("olmo", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06: this type .* 1e-05, always"),
        ("llama", {"hidden_act": "quick_gelu"}, "'quick_gelu': this activation is not supported"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act is 'silu': hidden_activation means"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no': true or false"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ("llama", {"torch_dtype": "int8"}, "torch_dtype is 'int8': known are"),
        (
            "llama",
            {"sliding_window": 8},
            "sliding_window is 8: models of type 'llama' have no such",
        ),
        ("llama", {"new_trick": 3}, "new_trick is 3: .*may change what they compute. Remove it"),
        ("mistral", {"attention_bias": True}, "attention_bias is True: models of type 'mistral'"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder is True: it has an encoder"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "sees those after it"),
        ("llama", {"layer_types": [SLIDING] * 4}, "layer_types .* this type of model has no win"),
        ("mistral", {"layer_types": [FULL] * 4}, "layer_types .*sliding_window 4096 .* Correct"),
        ("qwen2", {"layer_types": [SLIDING] * 4}, "not what sliding_window None and use_slid.* f"),
        ("gemma2", {"layer_types": [FULL] * 3}, "layer_types is .* 4 times 'full_attention'"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 4}, "4 times 'full_attention' or"),
        ("gemma2", {"sliding_window": None}, "sliding_window is None: some layers are of a slid"),
        ("gemma2", {"sliding_window": -1}, "sliding_window is -1: a positive size"),
        ("qwen2_moe", {**MOE, "use_sliding_window": True}, "Add layer_types"),
        ("smollm3", {"no_rope_layers": [1, 1]}, "no_rope_layers is .* 4 numbers"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0: a number above 0"),
        ("granitemoe", {**EXPERTS, "position_embedding_type": "nope"}, "positions are rotary"),
        ("gpt_neox", {"head_dim": 16}, "head_dim is 16: this type of model has 32 / 4"),
        # Ropes.
        ("llama", {"rope_theta": "1e4"}, "rope_theta is '1e4': a number above 0"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic': its frequencies"),
        ("llama", {"rope_scaling": {"type": "x"}}, r"rope_scaling.type is 'x': known are default"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
            "rope_scaling.type is 'yarn': rope_type says 'linear'",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5}},
            "rope_scaling in config.json: low_freq_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 3}},
            "rope_scaling.beta is 3: a rope of type 'linear' has no such key",
        ),
        (
            "llama",
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "theta 500000.0 in full_attention layers, but rope_theta .* compute different models",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "this type of model rotates whole heads"),
        ("gpt_neox", {"rotary_pct": 0.1}, "is 0.1: of heads of 8 an even number"),
        ("llama", {"rope_parameters": {FULL: {}}}, "has one rope for all layers"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "objects full_attention and"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_scaling.short_factor is .*: 4 positive numbers",
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 64,
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "factor": 8.0,
                },
            },
            "rope_scaling.factor is 8.0: .* is 4; transformers 4 takes that, 5 takes factor",
        ),
        # MoE layers.
        ("mixtral", {"num_experts_per_tok": 2}, "num_experts is missing"),
        ("mixtral", {"num_local_experts": 4}, "num_experts_per_tok is missing"),
        (
            "qwen3_moe",
            {**MOE, "num_local_experts": 8},
            "num_experts is 4: num_local_experts says 8",
        ),
        ("qwen3_moe", {**MOE, "moe_intermediate_size": ...}, "moe_intermediate_size is missing"),
        ("qwen3_moe", {**MOE, "num_experts_per_tok": 5}, "num_selected_experts=5 is more than"),
        ("qwen3_moe", {**MOE, "mlp_only_layers": ["1"]}, "mlp_only_layers .*indices of layers"),
        ("qwen3_moe", {**MOE, "num_experts": 10**6}, "MoE layers of its config.json"),
    ],
)
def test_refused(model_type, keys, match):
    with pytest.raises(ValueError, match=match) as caught:
        read(model_type, **keys)
    text = str(caught.value)
    assert str(FOLDER) in text
    assert "\n" not in text
