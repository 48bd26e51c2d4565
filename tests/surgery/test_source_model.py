"""The model that a conversion gives, from what its source states."""

import dataclasses
import types

import pytest

from upcycle_jax import surgery
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.surgery import source_model

SPARSE = DecoderConfig(
    vocab_size=32,
    emb_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_layers=2,
    mlp_dim=24,
    moe=DecoderMoeConfig(num_experts=4, expert_mlp_dim=10, shared_expert_mlp_dim=6),
)


def merged(monkeypatch, config):
    monkeypatch.setattr(source_model, "stated_config", lambda source: config)
    source = types.SimpleNamespace(path="here")
    return source_model.inferred_model(source, surgery.MergeRecipe()).config


def test_merged_mlps_are_as_wide_as_an_expert_and_the_shared_expert(monkeypatch):
    found = merged(monkeypatch, SPARSE)
    assert found.moe is None and found.mlp_dim == 10 + 6
    as_dense = dataclasses.replace(SPARSE, moe=DecoderMoeConfig(num_experts=4))
    assert merged(monkeypatch, as_dense) == as_dense.dense


def test_dense_layers_of_another_width_have_no_way_back(monkeypatch):
    moe = dataclasses.replace(SPARSE.moe, num_sparse_layers=1)
    with pytest.raises(ValueError, match="MLPs of 16 hidden units.*dense layers have 24"):
        merged(monkeypatch, dataclasses.replace(SPARSE, moe=moe))
