"""Bytes of all-to-alls, by hand."""

import dataclasses

from upcycle_jax.costs import exchange
from upcycle_jax.costs.shapes import StepShape
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.moe.routing import DroplessTopK
from upcycle_jax.partitioning import Partitioner


def sent(model, shape, *, partitions=4, recomputes=False):
    mesh = Partitioner(num_expert_partitions=partitions)
    return exchange.exchange_bytes(model, shape, mesh, recomputes=recomputes)


def test_slots_by_hand(tiny):
    # One sparse layer in each stack. Encoder: 32 tokens in 2 groups of 16, capacity 2 * 16 / 4 = 8
    # slots for 4 experts, so 64 in all. Decoder: 16 tokens, one group, 32 slots. 64 + 32 slots of
    # 16 float32, four times, shared by eight devices.
    model = tiny(num_experts=4, group_size=16)
    shape = StepShape(batch_size=4, lengths={"inputs": 8, "targets": 4})
    assert sent(model, shape) == 4 * 96 * 16 * 4 // 8
    assert sent(model, shape, partitions=1) == 0 == sent(tiny(), shape)
    # Computed again, slots go to the experts and back once more: six times.
    assert sent(model, shape, recomputes=True) == 6 * 96 * 16 * 4 // 8
    assert not exchange.follows_load(model)


def test_a_dropless_router_by_hand(tiny):
    # One sparse layer in each stack, 4 x 64 and 4 x 32 tokens on eight devices: 32 and 16 on each,
    # two choices, four destinations. An even share is 16 and 8 tokens for each, and two blocks of 8
    # and one (the smallest) of 8: 64 and 32 slots.
    model = tiny(num_experts=4, encoder_router=DroplessTopK(), decoder_router=DroplessTopK())
    shape = StepShape(batch_size=4, lengths={"inputs": 64, "targets": 32})
    # Float32 of width 16: tokens with two experts and two weights; sums; gradients of sums;
    # gradients of tokens and weights.
    assert sent(model, shape) == (64 + 32) * 4 * ((16 + 4) + 16 + 16 + (16 + 2))
    again = (64 + 32) * 4 * (2 * (16 + 4) + 16 + 16 + (16 + 2))
    assert sent(model, shape, recomputes=True) == again
    # In bfloat16 sums of outputs stay float32.
    narrow = EncoderDecoderModel(dataclasses.replace(model.config, dtype="bfloat16"))
    assert sent(narrow, shape) == (64 + 32) * ((32 + 16) + 64 + 64 + (32 + 8))
    assert sent(model, shape, partitions=1) == 0
    assert exchange.follows_load(model)


def test_experts_with_biases_by_hand():
    # 8 images of 16 patches, groups of 32, capacity 2 * 32 / 4 = 16 slots of 4 experts: 256 slots
    # of 24 float32, four times, shared by eight devices.
    moe = VitMoeConfig(num_experts=4, group_size=32)
    model = VitModel(VitConfig(5, 32, 8, 24, 2, 2, 40, moe=moe))
    shape = StepShape(batch_size=8, lengths={"image": 32})
    assert sent(model, shape) == 4 * 256 * 24 * 4 // 8


def test_rows_that_dropless_experts_reserve_by_hand(tiny):
    # Eight devices with 32 tokens of the encoder each. Four expert partitions: 4 x 32 tokens may
    # arrive, which all choose the one expert there: 128 rows, of which an even load of two choices
    # fills 64. One layer, computed again or not: tokens, outputs and their gradients of width 16,
    # and for each of two input matrices and the output's the hidden units of 32 and their
    # gradients, in float32.
    model = tiny(num_experts=4, encoder_router=DroplessTopK(), decoder_router=DroplessTopK())
    shape = StepShape(batch_size=4, lengths={"inputs": 64, "targets": 32})

    def reserved(model, partitions=4, **changes):
        mesh = Partitioner(num_expert_partitions=partitions)
        return exchange.reserved_bytes(model, shape, mesh, **({"recomputes": True} | changes))

    width, hidden = model.config.emb_dim, model.config.mlp_dim
    assert reserved(model) == (128 - 64) * (6 * hidden + 4 * width) * 4
    assert reserved(model, recomputes=False) == reserved(model)
    assert reserved(model, partitions=1) == 0 == reserved(tiny(num_experts=4, group_size=16))
