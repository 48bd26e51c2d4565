"""The table of tensors: the parameters of well-known models counted from it, and fused projections
by hand. `test_reading` compares it with what transformers writes.
"""

import math
from pathlib import Path

import pytest

from upcycle_jax.checkpoints.huggingface.base import Rows, Source
from upcycle_jax.checkpoints.huggingface.decoder.config_json import read_config
from upcycle_jax.checkpoints.huggingface.decoder.kinds import KINDS
from upcycle_jax.checkpoints.huggingface.decoder.tensors import NAMES, places, tensor_shapes
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig


def sizes(vocab, d, f, layers, heads, kv_heads, **more):
    return {
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


TIED = {"tie_word_embeddings": True}
SMOL, TINY = sizes(49152, 576, 1536, 30, 9, 3), sizes(32000, 2048, 5632, 22, 32, 4)
LLAMA3 = sizes(128256, 4096, 14336, 32, 32, 8)
QWEN25 = sizes(151936, 896, 4864, 24, 14, 2, **TIED)
QWEN3 = sizes(151936, 1024, 3072, 28, 16, 8, head_dim=128, **TIED)
E8 = {"num_local_experts": 8, "num_experts_per_tok": 2}
# transformers counted these (on torch's meta device) from the same numbers.
COUNTS = [
    ("llama", {**SMOL, **TIED}, 134_515_008),
    ("llama", sizes(49152, 960, 2560, 32, 15, 5, **TIED), 361_821_120),
    ("llama", sizes(49152, 2048, 8192, 24, 32, 32, **TIED), 1_711_376_384),
    ("llama", TINY, 1_100_048_384),
    ("llama", sizes(32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    ("llama", LLAMA3, 8_030_261_248),
    ("llama", sizes(128256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED), 1_235_814_400),
    ("mistral", sizes(32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    ("qwen2", QWEN25, 494_032_768),
    ("qwen2", sizes(152064, 3584, 18944, 28, 28, 4), 7_615_616_512),
    ("qwen3", QWEN3, 596_049_920),
    ("qwen3", sizes(151936, 4096, 12288, 36, 32, 8, head_dim=128), 8_190_735_360),
    ("olmo", sizes(50304, 2048, 8192, 16, 16, 16, **TIED), 1_176_764_416),
    ("olmo2", sizes(100352, 2048, 8192, 16, 16, 16), 1_484_916_736),
    ("olmo2", sizes(100352, 4096, 11008, 32, 32, 32), 7_298_617_344),
    ("gemma", sizes(256000, 2048, 16384, 18, 8, 1, head_dim=256), 2_506_172_416),
    ("gemma2", sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256), 2_614_341_888),
    ("gemma3_text", sizes(262144, 640, 2048, 18, 4, 1, head_dim=256), 268_098_176),
    ("gemma3_text", sizes(262144, 1152, 6912, 26, 4, 1, head_dim=256), 999_885_952),
    ("smollm3", sizes(128256, 2048, 11008, 36, 16, 4), 3_075_098_624),
    ("mixtral", {**sizes(32000, 4096, 14336, 32, 32, 8), **E8}, 46_702_792_704),
    (
        "olmoe",
        sizes(50304, 2048, 1024, 16, 16, 16, num_experts=64, num_experts_per_tok=8),
        6_919_161_856,
    ),
    (
        "qwen2_moe",
        sizes(
            *(151936, 2048, 5632, 24, 16, 16),
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
        ),
        14_315_784_192,
    ),
    (
        "qwen3_moe",
        sizes(
            *(151936, 2048, 6144, 48, 32, 4),
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        30_532_122_624,
    ),
    # Upcycled.
    ("mixtral", {**SMOL, **TIED, **E8}, 692_036_928),
    ("mixtral", {**TINY, **E8}, 6_429_272_064),
    ("mixtral", {**LLAMA3, **E8}, 47_491_321_856),
    (
        "qwen3_moe",
        {**QWEN3, **E8, "moe_intermediate_size": 3072, "decoder_sparse_step": 2},
        1_521_008_640,
    ),
]


@pytest.mark.parametrize(("model_type", "keys", "want"), COUNTS)
def test_parameters_of_well_known_models(model_type, keys, want):
    keys = {"model_type": model_type, "rope_theta": 1e4, **keys}
    shapes = tensor_shapes(model_type, read_config(Path("/m"), keys))
    assert sum(map(math.prod, shapes.values())) == want


def test_a_shared_expert_without_units_leaves_its_gates_alone():
    keys = {
        "model_type": "qwen2_moe",
        **QWEN25,
        **E8,
        "moe_intermediate_size": 4864,
        "shared_expert_intermediate_size": 0,
        "decoder_sparse_step": 2,
    }
    shapes = tensor_shapes("qwen2_moe", read_config(Path("/m"), keys))
    # transformers also counts the gates, [1, d] in each of 12 layers.
    assert sum(map(math.prod, shapes.values())) == 1_592_381_824 - 12 * 896


def test_a_fused_projection_by_hand():
    # 2 heads of 4 and 1 head for keys and values: rows 0-7 are queries, 8-11 keys, 12-15 values.
    config = DecoderConfig(8, 8, 1, 2, 4, 16, num_kv_heads=1)
    attention = "decoder/layers_0/self_attention"
    found = places("phi3", config)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    want = {"query": Rows((8,), (1,), 0), "key": Rows((4,), (1,), 8), "value": Rows((4,), (1,), 12)}
    for part, rows in want.items():
        assert found[f"{attention}/{part}/kernel"] == Source(name, transposed=True, rows=rows)
    # GPT-NeoX: rows q0 k0 v0 q1 k1 v1, four of each.
    config = DecoderConfig(8, 8, 1, 2, 4, 16, mlp_activations=("gelu_exact",))
    found = places("gpt_neox", config)
    assert found[f"{attention}/value/kernel"].rows.indices().tolist() == [
        8,
        9,
        10,
        11,
        20,
        21,
        22,
        23,
    ]


def test_a_dense_type_has_no_experts():
    config = DecoderConfig(8, 8, 1, 2, 4, 16, moe=DecoderMoeConfig(num_experts=2))
    with pytest.raises(ValueError, match="a model of type 'llama' has no MoE layers"):
        places("llama", config)
    with pytest.raises(ValueError, match="model_type 'lama' is not among llama, mistral"):
        places("lama", config)


def test_every_type_that_is_read_has_names():
    assert KINDS.keys() == NAMES.keys()
