"""FLOPs and memory: by hand, and against what XLA counts."""

import dataclasses

import jax
import pytest

from upcycle_jax.layers.mlp import ACTIVATIONS
from upcycle_jax.models import accounting, step_cost, step_memory
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import DroplessTopK
from upcycle_jax.partitioning import Partitioner


def test_every_activation_has_its_costs():
    assert (
        set(ACTIVATIONS)
        == set(step_cost.ACTIVATION_OPERATIONS)
        == set(step_memory.ACTIVATION_RESIDUALS)
    )


def test_flops_by_hand(tiny):
    # d = 16, heads * head_dim = 16, ff 32, vocab 64, two layers each. 3 rows of 10 and 4 tokens: 30
    # and 12.
    flops = accounting.forward_flops(tiny(), batch_size=3, inputs_length=10, targets_length=4)
    projection = 2 * 16 * 16
    # Per token and layer: four projections, logits and weighted sum over the length; per stack the
    # bias, 2 * 2 heads * 32 * length^2.
    encoder = 2 * 30 * (4 * projection + 2 * 2 * 16 * 10)
    decoder = 2 * 12 * (4 * projection + 2 * 2 * 16 * 4)
    # Query and out on the decoder's tokens, key and value on the encoder's.
    cross = 2 * (12 * 2 * projection + 30 * 2 * projection + 12 * 2 * 2 * 16 * 10)
    assert flops.attention == encoder + decoder + cross
    assert flops.position_bias == 2 * 2 * 32 * (10**2 + 4**2)
    assert flops.mlp == 2 * (30 + 12) * 3 * 2 * 16 * 32
    assert flops.logits == 12 * 2 * 16 * 64
    assert (flops.experts, flops.routers) == (0, 0)
    assert flops.total == flops.attention + flops.position_bias + flops.mlp + flops.logits
    assert flops.train_step == 3 * flops.total - flops.position_bias


def test_flops_of_experts_count_slots(tiny):
    # One of two layers is sparse in each stack. Encoder: 32 tokens in 2 groups of 16, capacity 2 *
    # 16 / 4 = 8 slots for 4 experts, so 64 in all. Decoder: 16 tokens, one group, 8 slots each, 32
    # in all.
    config = tiny(num_experts=4, group_size=16)
    flops = accounting.forward_flops(config, batch_size=4, inputs_length=8, targets_length=4)
    per_token = 3 * 2 * 16 * 32
    assert flops.experts == (64 + 32) * per_token
    assert flops.mlp == (32 + 16) * per_token
    assert flops.routers == (32 + 16) * 2 * 16 * 4


def test_slots_that_cannot_be_filled_cost_nothing(tiny):
    # Capacity factor 4 of 4 experts is room for all; 100 is no more.
    costs = [
        accounting.forward_flops(
            tiny(num_experts=4, train_expert_capacity_factor=factor),
            batch_size=2,
            inputs_length=8,
            targets_length=8,
        ).experts
        for factor in (4.0, 100.0)
    ]
    assert costs[0] == costs[1]


@pytest.mark.parametrize("sparse", [False, True])
def test_flops_against_xla(sparse, tiny, make_batch, make_params):
    # Wide enough that matrix products dominate what XLA counts besides (norms, softmax,
    # activations).
    shape = {"emb_dim": 128, "head_dim": 32, "num_heads": 4, "mlp_dim": 256, "vocab_size": 512}
    config = tiny(model=shape, num_experts=4) if sparse else tiny(model=shape)
    model = EncoderDecoderModel(config)
    batch = make_batch(batch_size=4, inputs=32, targets=16)
    abstract = jax.eval_shape(lambda: make_params(model))
    counted = jax.jit(model.logits).lower(abstract, batch).compile().cost_analysis()["flops"]
    flops = accounting.forward_flops(
        config, batch_size=4, inputs_length=32, targets_length=16, train=False
    )
    assert flops.total == pytest.approx(counted, rel=0.1)


def test_memory_per_device(tiny):
    specs = EncoderDecoderModel(tiny(num_experts=4)).param_specs()
    one = accounting.memory(specs, Partitioner(devices=jax.devices()[:1]))
    assert one.total == one.per_device == sum(leaf.nbytes for leaf in specs.values())
    split = accounting.memory(specs, Partitioner(num_expert_partitions=4))
    experts = sum(leaf.nbytes for leaf in specs.values() if accounting.is_expert(leaf))
    assert split.per_device == one.total - experts + experts // 4


def test_active_parameters_follow_the_router(tiny):
    config = tiny(num_experts=4, train_expert_capacity_factor=1.0, eval_expert_capacity_factor=3.0)
    specs = EncoderDecoderModel(config).param_specs()
    expert = 3 * 16 * 32
    dense_part = sum(leaf.size for leaf in specs.values() if not accounting.is_expert(leaf))
    # Encoder, experts choose: the capacity factor; decoder: K = 2.
    assert accounting.count_parameters(config, specs).active == dense_part + (1 + 2) * expert
    assert (
        accounting.count_parameters(config, specs, train=False).active
        == dense_part + (3 + 2) * expert
    )


def test_exchanged_bytes_by_hand(tiny):
    # As in test_flops_of_experts_count_slots: 64 + 32 slots of 16 float32, four times, shared by
    # eight devices.
    config = tiny(num_experts=4, group_size=16)
    lengths = {"batch_size": 4, "inputs_length": 8, "targets_length": 4}
    assert (
        accounting.exchange_bytes(config, Partitioner(num_expert_partitions=4), **lengths)
        == 4 * 96 * 16 * 4 // 8
    )
    assert accounting.exchange_bytes(config, Partitioner(), **lengths) == 0
    assert accounting.exchange_bytes(tiny(), Partitioner(num_expert_partitions=4), **lengths) == 0
    # Computed again, slots go to the experts and back once more: six times.
    again = dataclasses.replace(config, remat_policy="full")
    assert (
        accounting.exchange_bytes(again, Partitioner(num_expert_partitions=4), **lengths)
        == 6 * 96 * 16 * 4 // 8
    )
    assert not accounting.exchange_follows_load(config)


def test_exchanged_bytes_of_a_dropless_router_by_hand(tiny):
    # One sparse layer in each stack, 4 x 64 and 4 x 32 tokens on eight devices: 32 and 16 on each,
    # two choices, four destinations. An even share is 16 and 8 tokens for each, and two blocks of 8
    # and one (the smallest) of 8: 64 and 32 slots.
    config = tiny(num_experts=4, encoder_router=DroplessTopK(), decoder_router=DroplessTopK())
    mesh, lengths = (
        Partitioner(num_expert_partitions=4),
        {
            "batch_size": 4,
            "inputs_length": 64,
            "targets_length": 32,
        },
    )
    # Float32 of width 16: tokens with two experts and two weights; sums; gradients of sums;
    # gradients of tokens and weights.
    assert accounting.exchange_bytes(config, mesh, **lengths) == (64 + 32) * 4 * (
        (16 + 4) + 16 + 16 + (16 + 2)
    )
    again = dataclasses.replace(config, remat_policy="minimal")
    assert accounting.exchange_bytes(again, mesh, **lengths) == (64 + 32) * 4 * (
        2 * (16 + 4) + 16 + 16 + (16 + 2)
    )
    # In bfloat16 sums of outputs stay float32.
    narrow = dataclasses.replace(config, dtype="bfloat16")
    assert accounting.exchange_bytes(narrow, mesh, **lengths) == (64 + 32) * (
        (32 + 16) + 64 + 64 + (32 + 8)
    )
    assert accounting.exchange_bytes(config, Partitioner(), **lengths) == 0
    assert accounting.exchange_follows_load(config)
