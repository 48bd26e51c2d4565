"""What each reader is said to make of a model, and which form of it is chosen."""

import dataclasses
import json
import re

import numpy as np
import pytest

from tests.checkpoints.random_decoders import (
    ALL,
    BASE,
    DENSE,
    GEMMA,
    LLAMA3,
    MIXED,
    OLMO2,
    PLAIN,
    SPARSE,
    UNIT,
    of,
)
from upcycle_jax.checkpoints.huggingface.decoder.choosing import choose, forms
from upcycle_jax.checkpoints.huggingface.decoder.config_writing import config_json
from upcycle_jax.checkpoints.huggingface.decoder.holding import router_refused, why_not
from upcycle_jax.checkpoints.huggingface.decoder.reading_back import check
from upcycle_jax.checkpoints.huggingface.decoder.verdicts import READERS, verdicts
from upcycle_jax.checkpoints.huggingface.verdict import Kind, table
from upcycle_jax.layers.rope import Rope
from upcycle_jax.moe.routing import (
    DroplessTopK,
    ExpertsChoose,
    SigmoidTopK,
    SoftMoe,
    SwitchTop1,
    TokensChoose,
)
from upcycle_jax.text import Format

QWEN3 = of(qk_norm="head")
SHARED = dataclasses.replace(UNIT, shared_expert_mlp_dim=16, shared_expert_gate=True)
HALF = dataclasses.replace(SHARED, num_sparse_layers=1)
PLAIN_SHARED = dataclasses.replace(SHARED, router=PLAIN.router)

ROWS = [
    # Type, model, reader, verdict, a reason.
    ("mixtral", of(moe=UNIT), "sglang", Kind.EXACT, ""),
    ("mixtral", of(moe=UNIT, rope=LLAMA3), "sglang", Kind.DIFFERS, "ignores rope scaling"),
    ("mixtral", of(moe=UNIT, rope=LLAMA3), "vllm", Kind.EXACT, "earlier ignore rope scaling"),
    ("mixtral", of(moe=UNIT, **ALL), "sglang", Kind.DIFFERS, "ignores the sliding window"),
    ("mixtral", of(moe=UNIT, head_dim=16), "sglang", Kind.REFUSED, "32 / 4 entries"),
    ("mixtral", of(moe=dataclasses.replace(UNIT, num_experts=6)), "llama.cpp", Kind.UNKNOWN,
     "a power of two"),
    ("mixtral", of(moe=UNIT, mlp_activations=("gelu", "linear")), "vllm", Kind.REFUSED, "silu"),
    ("qwen2_moe", of(moe=SHARED), "vllm", Kind.REFUSED, "whatever qkv_bias says"),
    ("qwen2_moe", of(moe=SHARED, qkv_bias=True), "vllm", Kind.EXACT, ""),
    ("qwen2_moe", of(moe=SHARED, qkv_bias=True, head_dim=16), "vllm", Kind.REFUSED, "entries"),
    ("qwen2_moe", of(moe=SHARED, qkv_bias=True), "llama.cpp", Kind.DIFFERS, "never renormalises"),
    ("qwen2_moe", of(moe=PLAIN_SHARED, qkv_bias=True), "llama.cpp", Kind.EXACT, ""),
    ("qwen2_moe", of(moe=HALF, qkv_bias=True), "sglang", Kind.REFUSED, "pad them"),
    ("qwen2_moe", of(moe=SHARED, qkv_bias=True, **MIXED), "transformers4", Kind.DIFFERS,
     "window is that of all layers"),
    ("qwen3_moe", of(QWEN3, moe=UNIT), "vllm", Kind.EXACT, ""),
    ("qwen3_moe", of(QWEN3, moe=PLAIN), "llama.cpp", Kind.DIFFERS, "always renormalises"),
    ("qwen3_moe", of(QWEN3, moe=dataclasses.replace(UNIT, num_sparse_layers=1)), "vllm",
     Kind.EXACT, ""),
    ("olmoe", of(qk_norm="projection", moe=UNIT), "vllm", Kind.DIFFERS, "never renormalises"),
    ("olmoe", of(qk_norm="projection", moe=PLAIN, num_kv_heads=4), "vllm", Kind.EXACT, ""),
    ("olmoe", of(qk_norm="projection", moe=PLAIN), "sglang", Kind.REFUSED, "as many heads"),
    ("flex_olmo", of(OLMO2, moe=UNIT), "vllm", Kind.NEAR, "divides their scale out"),
    ("flex_olmo", of(OLMO2, moe=PLAIN), "vllm", Kind.EXACT, ""),
    ("flex_olmo", of(OLMO2, moe=UNIT), "llama.cpp", Kind.REFUSED, "no such architecture"),
    ("granitemoe", of(moe=UNIT, head_dim=16), "transformers4", Kind.REFUSED, "entries"),
    ("granitemoe", of(moe=UNIT, rope=LLAMA3), "vllm", Kind.EXACT, "2025 and earlier"),
    ("granitemoe", of(moe=UNIT, rope=LLAMA3), "sglang", Kind.DIFFERS, "rope_theta alone"),
    ("gemma2", DENSE["gemma2"], "transformers5", Kind.EXACT, "attn_implementation='eager'"),
    ("gemma", of(GEMMA, embedding_multiplier=5.65625), "transformers5", Kind.NEAR,
     "in the weights' dtype"),
    ("olmo3", of(OLMO2, sliding_rope=Rope(theta=7.0), **MIXED), "transformers4", Kind.DIFFERS,
     "one rope_theta"),
    ("mistral", of(**ALL), "llama.cpp", Kind.DIFFERS, "sliding window"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "config", "reader", "kind", "reason"), ROWS, ids=range(len(ROWS))
)
def test_verdicts(model_type, config, reader, kind, reason):
    assert why_not(model_type, config) == []
    found = {one.reader: one for one in verdicts(model_type, config)}
    assert (found[reader].kind, reason in "; ".join(found[reader].reasons)) == (kind, True), found


def test_every_reader_has_a_verdict_in_table_and_json():
    form, why = choose(of(moe=UNIT, rope=LLAMA3), readers=["vllm"])
    assert [one.reader for one in form.verdicts] == list(READERS)
    lines = table(form.model_type, form.verdicts).render(Format.TEXT).splitlines()
    assert lines[0] == "verdicts on mixtral"
    assert re.fullmatch(r" *sglang +differs +it takes rope_theta alone .*", lines[5])
    assert json.loads(json.dumps(form.json()))["verdicts"][2]["verdict"] == "exact"
    assert why == "mixtral: chosen among mixtral, qwen2_moe, granitemoe, for vllm"


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (
            TokensChoose(renormalize=True),
            "drops tokens beyond it, no reader does; predictions here",
        ),
        (SwitchTop1(), "SwitchTop1 was trained with a capacity of 2"),
    ],
)
def test_dropped_tokens_are_predicted(router, reason):
    """Training drops them, readers do not: the folder is near, and nowhere exact."""
    config = of(QWEN3, moe=dataclasses.replace(UNIT, router=router))
    for one in verdicts("qwen3_moe", config):
        assert one.kind in (Kind.NEAR, Kind.DIFFERS)
        assert any(reason in text for text in one.reasons)


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        (ExpertsChoose(), "experts choose tokens of a whole group"),
        (SoftMoe(), "choose tokens of a whole group"),
        (SigmoidTopK(), "choose by a softmax"),
        (DroplessTopK(), None),
    ],
)
def test_routers_that_no_type_has(router, reason):
    found = router_refused(router)
    assert found is None if reason is None else reason in found


def test_a_sigmoid_router_is_refused_with_its_name():
    config = of(moe=dataclasses.replace(UNIT, router=SigmoidTopK(dropless=True)))
    with pytest.raises(ValueError, match="SigmoidTopK: these types choose by a softmax"):
        choose(config)


def test_mixed_layers_are_padded_only_where_a_reader_needs_it():
    config = of(moe=dataclasses.replace(UNIT, num_sparse_layers=1))
    free, _ = choose(config)
    assert free.model_type == "qwen2_moe"
    assert "padded mixed layers" not in [one.name for one in free.rewritings]
    padded, _ = choose(config, readers=["sglang", "vllm"])
    assert [one.name for one in padded.rewritings] == ["padded mixed layers"]
    wide = of(moe=dataclasses.replace(config.moe, expert_mlp_dim=24))
    with pytest.raises(ValueError, match="sglang: refused: mixed layers"):
        choose(wide, readers=["sglang"])


def test_what_it_was_read_as_comes_first():
    """A Mistral without a window is a Llama, too, and stays a Mistral."""
    assert choose(BASE)[0].model_type == "llama"
    form, why = choose(BASE, preferred="mistral")
    assert (form.model_type, why) == ("mistral", "mistral: what it was read as")


def test_every_form_of_every_model_is_read_as_it_is():
    """No form loses a window, a flag or a rope, in either dialect of config.json."""
    count = 0
    for config in (DENSE | SPARSE).values():
        for form in forms(config):
            by_4 = form.verdict("transformers4").kind not in (Kind.DIFFERS, Kind.REFUSED)
            content = config_json(form.config, form.model_type, np.dtype(np.float32))
            check(content, form.config, by_4=by_4)
            count += 1
    assert count > 40


@pytest.mark.parametrize(
    ("model_type", "lost", "said"),
    [
        ("mixtral", {"sliding_window": None}, r"windows is \(7, 7\), read as \(None, None\)"),
        ("mixtral", {"rope_scaling": None}, "another model to transformers 4.57: the rope of"),
        ("mixtral", {"rope_parameters": None}, "another model to transformers 5: the rope of"),
        ("qwen3_moe", {"norm_topk_prob": None}, "renormalised is True, read as False"),
        ("qwen3_moe", {"mlp_only_layers": []}, r"sparse_layers is \(0,\), read as \(0, 1\)"),
        ("gemma3_text", {"rope_local_base_freq": 5.0}, "transformers 4.57: the rope of layer 0"),
        ("granite", {"attention_multiplier": 1.0}, "logit_scale is 0.2, read as 1.0"),
    ],
)  # fmt: skip
def test_a_lost_key_is_an_error(model_type, lost, said):
    """A window, a flag, or the rope of one dialect that were not written would be found."""
    config = (DENSE | SPARSE)[model_type]
    content = config_json(config, model_type, np.dtype(np.float32)) | lost
    content = {name: value for name, value in content.items() if value is not None}
    with pytest.raises(ValueError, match=said):
        check(content, config)
