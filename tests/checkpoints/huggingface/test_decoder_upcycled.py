"""A dense model, upcycled by copies, written, and loaded by transformers: the dense model's logits
wherever the verdict says so, and the predicted change elsewhere.
"""

import dataclasses
import functools
import json

import numpy as np
import pytest

from tests.checkpoints.random_decoders import (
    ALL,
    BASE,
    DENSE,
    GEMMA,
    GRANITE,
    LLAMA3,
    OLMO2,
    PLAIN,
    UNIT,
    Held,
    of,
    our_logits,
    random_leaves,
    their_logits,
)
from upcycle_jax.checkpoints.huggingface.base import WritingOptions
from upcycle_jax.checkpoints.huggingface.decoder.choosing import choose
from upcycle_jax.checkpoints.huggingface.writer import write_huggingface
from upcycle_jax.models.decoder.model import DecoderModel

FOUR = of(num_layers=4)
STEP_2 = dataclasses.replace(UNIT, num_sparse_layers=2)
ONE_DENSE = dataclasses.replace(UNIT, sparse_layout=(0, 2, 3))
TIED = of(logits_via_embedding=True, head_dim=16, rope=LLAMA3)
QWEN2 = of(FOUR, qkv_bias=True)
OLMO = of(norm="layer_norm_without_parameters")

EXACT = {
    "tied llama 3 with wide heads": (TIED, UNIT, "mixtral", [], ()),
    "mistral with its window": (of(**ALL), UNIT, "mixtral", [], ()),
    "qwen2": (QWEN2, UNIT, "qwen2_moe", ["zero shared expert"], ()),
    "qwen2, every second layer": (QWEN2, STEP_2, "qwen2_moe", ["zero shared expert"], ()),
    "qwen2, one dense layer": (QWEN2, ONE_DENSE, "qwen2_moe", ["zero shared expert"], ()),
    "llama, every second layer": (
        FOUR, STEP_2, "qwen2_moe",
        ["zero shared expert", "zero biases of queries, keys and values"], (),
    ),
    "llama, every second layer, for SGLang": (
        FOUR, STEP_2, "mixtral", ["padded mixed layers"], ("sglang",),
    ),
    "qwen3, tied": (
        of(qk_norm="head", head_dim=16, logits_via_embedding=True), UNIT, "qwen3_moe", [], (),
    ),
    "olmo2": (OLMO2, UNIT, "flex_olmo", [], ()),
    "olmo 1": (OLMO, UNIT, "mixtral", ["centred OLMo"], ()),
    "olmo 1, tied": (
        of(OLMO, logits_via_embedding=True), UNIT, "mixtral", ["centred OLMo"], (),
    ),
    "gemma 1": (GEMMA, UNIT, "mixtral", ["folded Gemma"], ()),
    "granite": (GRANITE, UNIT, "granitemoe", [], ()),
}  # fmt: skip
"""Dense model, MoE layers, the type that is chosen, rewritings, readers that are asked for."""


def upcycled(dense, moe, *, seed=3):
    """A model whose experts are copies of the dense MLP, with random routers."""
    config = dataclasses.replace(dense, moe=moe)
    parent = random_leaves(dense)
    routers = random_leaves(config, seed)
    leaves = {}
    for path, spec in DecoderModel(config).param_specs().items():
        value = parent[spec.twin] if spec.twin else routers[path]
        leaves[path] = np.broadcast_to(value, spec.shape)
    return Held(config, leaves)


@functools.cache
def dense_logits(dense):
    """Those of the parents of `upcycled`; several are made of one."""
    return our_logits(dense, random_leaves(dense))


@pytest.mark.parametrize(
    "name",
    [
        # Two with dense layers in between are of the same form.
        pytest.param(name, marks=pytest.mark.slow) if name == "qwen2" else name
        for name in EXACT
    ],
)
def test_the_dense_models_logits(name, tmp_path):
    dense, moe, model_type, rewritings, readers = EXACT[name]
    held = upcycled(dense, moe)
    folder = write_huggingface(held, tmp_path / "out", options=WritingOptions(readers=readers))
    said = json.loads((folder / "verdicts.json").read_text())
    assert (said["model_type"], said["rewritings"]) == (model_type, rewritings)
    kinds = {one["reader"]: one["verdict"] for one in said["verdicts"]}
    expected = "exact after rewriting" if rewritings else "exact"
    assert (kinds["transformers5"], kinds["transformers4"]) == (expected, expected)
    assert all(kinds[reader] in (expected, "unknown") for reader in readers)
    theirs = their_logits(folder)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(dense_logits(dense), theirs, atol=1e-4)


def test_a_llama_as_granite_moe(tmp_path):
    """Its multipliers are written as those of a Llama: 1, and head_dim^-0.5."""
    held = upcycled(BASE, UNIT)
    options = WritingOptions(model_type="granitemoe")
    folder = write_huggingface(held, tmp_path / "out", options=options)
    np.testing.assert_allclose(dense_logits(BASE), their_logits(folder), atol=1e-4)


@pytest.mark.parametrize("moe", [PLAIN, STEP_2], ids=["every layer", "every second layer"])
def test_weights_that_do_not_sum_to_1_change_the_model_as_here(moe, tmp_path):
    """Two of four experts at random routers weigh about 0.6: the folder computes what the sparse
    model computes here, which is not the dense one's function.
    """
    moe = dataclasses.replace(moe, router=PLAIN.router)
    held = upcycled(FOUR, moe)
    options = WritingOptions(model_type="qwen2_moe")
    theirs = their_logits(write_huggingface(held, tmp_path / "out", options=options))
    np.testing.assert_allclose(our_logits(held.config, held.leaves), theirs, atol=1e-4)
    assert np.abs(dense_logits(FOUR) - theirs).max() > 0.05


def test_padded_layers_of_unnormalised_weights(tmp_path):
    """A padded layer weighs K/E = 2/4: its experts' outputs are twice as large."""
    moe = dataclasses.replace(STEP_2, router=PLAIN.router)
    held = upcycled(FOUR, moe)
    form, _ = choose(held.config, model_type="qwen2_moe", readers=["sglang"])
    assert form.rewritings[0].name == "padded mixed layers"
    options = WritingOptions(model_type="qwen2_moe", readers=("sglang",))
    theirs = their_logits(write_huggingface(held, tmp_path / "out", options=options))
    np.testing.assert_allclose(our_logits(held.config, held.leaves), theirs, atol=1e-4)


def test_an_ungated_shared_expert_behind_a_gate(tmp_path):
    moe = dataclasses.replace(UNIT, shared_expert_mlp_dim=48)
    held = upcycled(BASE, moe)
    options = WritingOptions(model_type="qwen2_moe")
    folder = write_huggingface(held, tmp_path / "out", options=options)
    assert "shared expert behind a gate of 1/2" in (folder / "verdicts.json").read_text()
    ours = our_logits(held.config, held.leaves)
    np.testing.assert_allclose(ours, their_logits(folder), atol=1e-4)


def test_an_ungated_shared_expert_within_every_expert(tmp_path):
    """Where no type with such blocks has a shared expert: 48 + 20 hidden units each."""
    moe = dataclasses.replace(UNIT, shared_expert_mlp_dim=20)
    held = Held(of(qk_norm="head", head_dim=16, moe=moe))
    folder = write_huggingface(held, tmp_path / "out")
    said = json.loads((folder / "verdicts.json").read_text())
    assert said["model_type"] == "qwen3_moe"
    assert said["rewritings"] == ["shared expert within every expert"]
    assert json.loads((folder / "config.json").read_text())["moe_intermediate_size"] == 68
    ours = our_logits(held.config, held.leaves)
    np.testing.assert_allclose(ours, their_logits(folder), atol=1e-4)
    # Weights that do not sum to 1 would scale it, and a gate has no place there.
    for other in (
        dataclasses.replace(moe, router=PLAIN.router),
        dataclasses.replace(moe, shared_expert_gate=True),
    ):
        with pytest.raises(ValueError, match="qwen3_moe: .*shared expert"):
            choose(dataclasses.replace(held.config, moe=other))


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        (DENSE["gemma2"], "flex_olmo: its norms stand 'post', the model's 'both'"),
        (DENSE["gemma3_text"], "mixtral: "),
        (DENSE["olmo3"], "flex_olmo: it has no sliding window, the model has one of 7"),
        (DENSE["olmo"], r"mixtral: it cannot clip queries, keys and values \(clip_qkv=1.0\)"),
        (DENSE["gpt_neox"], "granitemoe: "),
        (DENSE["llama"], "mixtral: it cannot have biases of queries, keys and values and"),
    ],
    ids=["gemma2", "gemma3", "olmo3", "olmo clipped", "gpt_neox", "llama with biases"],
)
def test_models_that_no_type_of_experts_can_hold(dense, said):
    with pytest.raises(ValueError, match=f"(?s)no Hugging Face type can hold this model.*{said}"):
        choose(dataclasses.replace(dense, moe=UNIT))
