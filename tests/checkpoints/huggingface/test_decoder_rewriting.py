"""Rewritings of parameters: values by hand, and parts of leaves."""

import dataclasses

import numpy as np
import pytest

from tests.checkpoints.random_decoders import GEMMA, OLMO2, UNIT, Held, of
from upcycle_jax.checkpoints.huggingface.base import Leaf, leaves_of
from upcycle_jax.checkpoints.huggingface.decoder.rewriting import (
    Centred,
    Folded,
    HalfGate,
    Padded,
    SharedInExperts,
    UntiedHead,
    ZeroBiases,
    ZeroSharedExpert,
)
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.trees import LeafSpec

OLMO = of(norm="layer_norm_without_parameters", logits_via_embedding=True)
SHARED = dataclasses.replace(UNIT, shared_expert_mlp_dim=16)
MIXED = dataclasses.replace(UNIT, num_sparse_layers=1)

CASES = {
    "zero biases": (ZeroBiases(), of()),
    "untied": (UntiedHead(), of(logits_via_embedding=True)),
    "centred": (Centred(), OLMO),
    "folded": (Folded(), GEMMA),
    "zero shared": (ZeroSharedExpert(), of(moe=UNIT)),
    "half gate": (HalfGate(), of(moe=SHARED)),
    "shared within experts": (SharedInExperts(), of(moe=SHARED)),
    "padded": (Padded(), of(moe=MIXED)),
    "padded, wider experts": (Padded(), of(moe=dataclasses.replace(MIXED, expert_mlp_dim=60))),
    "padded, shared": (Padded(), of(moe=dataclasses.replace(SHARED, num_sparse_layers=1))),
}


def rewritten(rewriting, config):
    held = Held(config)
    leaves = {name.removeprefix("target/"): leaf for name, leaf in leaves_of(held).items()}
    return held, rewriting.leaves(leaves, config)


def whole(leaf):
    return leaf.read(tuple(slice(0, size) for size in leaf.spec.shape))


@pytest.mark.parametrize("name", CASES)
def test_the_leaves_are_those_of_the_model_after_it(name):
    """Names, shapes, and every part of every leaf as of the whole."""
    rewriting, config = CASES[name]
    _, leaves = rewritten(rewriting, config)
    expected = DecoderModel(rewriting.config(config)).param_specs()
    assert {path: leaf.spec.shape for path, leaf in leaves.items()} == {
        path: spec.shape for path, spec in expected.items()
    }
    rng = np.random.default_rng(0)
    for path, leaf in leaves.items():
        bounds = [sorted(rng.integers(0, size + 1, 2)) for size in leaf.spec.shape]
        index = tuple(slice(int(a), int(b)) for a, b in bounds)
        value = whole(leaf)
        assert value.dtype == leaf.spec.dtype
        np.testing.assert_array_equal(leaf.read(index), value[index], err_msg=path)


def test_centred_values():
    """(I - 11^T/d) applied to what is written to the stream; [1, 2, 6] - 3 = [-2, -1, 3]."""
    held, leaves = rewritten(Centred(), OLMO)
    for path in ("token_embedder/embedding", "decoder/layers_1/mlp/wo/kernel"):
        mean = held.leaves[path].astype(np.float64).mean(-1, keepdims=True)
        np.testing.assert_allclose(whole(leaves[path]), held.leaves[path] - mean, atol=1e-6)
    row = np.array([[1.0, 2.0, 6.0]], np.float32)
    leaf = Leaf(LeafSpec((1, 3), row.dtype), lambda index: row[index])
    alone = Centred().leaves({"token_embedder/embedding": leaf}, OLMO)
    assert whole(alone["token_embedder/embedding"]).tolist() == [[-2.0, -1.0, 3.0]]


def test_folded_values():
    """1 + w; the embedding times sqrt(32), and the head without it."""
    held, leaves = rewritten(Folded(), GEMMA)
    norm = "decoder/layers_0/pre_mlp_layer_norm/scale"
    np.testing.assert_array_equal(whole(leaves[norm]), 1 + held.leaves[norm])
    table = held.leaves["token_embedder/embedding"]
    np.testing.assert_array_equal(
        whole(leaves["token_embedder/embedding"]), table * np.float32(32**0.5)
    )
    np.testing.assert_array_equal(whole(leaves["decoder/logits_dense/kernel"]), table.T)


def test_padded_layers_read_each_part_once():
    """Copies of an expert cost one read, and only of what is asked for."""
    config = of(moe=MIXED)
    held = Held(config)
    asked = []

    def leaf(path, spec):
        def read(index):
            asked.append((path, index))
            return held.leaves[path][index]

        return Leaf(spec, read)

    leaves = {
        path: leaf(path, LeafSpec(value.shape, value.dtype)) for path, value in held.leaves.items()
    }
    out = Padded().leaves(leaves, config)
    assert asked == []
    out["decoder/layers_0/mlp/expert/wi_0/kernel"].read((slice(0, 4), slice(2, 3), slice(0, 48)))
    assert asked == [("decoder/layers_0/mlp/wi_0/kernel", (slice(2, 3), slice(0, 48)))]


def test_dense_layers_wider_than_experts_are_not_padded():
    narrow = of(moe=dataclasses.replace(MIXED, expert_mlp_dim=24))
    assert "48 hidden units, more than an expert's 24" in Padded().why_not(narrow)
    assert Padded().why_not(of(OLMO2, moe=MIXED)) is None
