"""A tiny T5, and what a step of it costs."""

import dataclasses

import jax
import pytest

from upcycle_jax.costs import step
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.partitioning import Partitioner

TINY = T5Config(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=8,
    mlp_dim=32,
    dropout_rate=0.0,
)


@pytest.fixture
def tiny():
    """Makes tiny models: `tiny()` is dense, `tiny(num_experts=4, ...)` has one MoE layer in each
    stack.
    """

    def make(*, model=None, **moe):
        config = dataclasses.replace(TINY, **(model or {}))
        return EncoderDecoderModel(
            dataclasses.replace(config, moe=MoeConfig(**moe)) if moe else config
        )

    return make


@pytest.fixture
def costs_of():
    """Costs of a step of a model on rows of so many input and target tokens, on one device."""

    def count(model, rows, inputs, targets, partitioner=None, num_microbatches=1):
        shape = StepShape(
            batch_size=rows,
            lengths={"inputs": inputs, "targets": targets},
            num_microbatches=num_microbatches,
        )
        one = partitioner or Partitioner(devices=(jax.devices()[0],))
        return step.of_step(model, shape, one)

    return count
