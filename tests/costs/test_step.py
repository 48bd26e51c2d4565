"""Costs of steps of a tiny T5, worked out by hand."""

import dataclasses

import pytest

from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import (
    DroplessTopK,
    HashTop1,
    SigmoidTopK,
    SoftMoe,
    SwitchTop1,
    TokensChoose,
)
from upcycle_jax.partitioning import Partitioner

MLP = 3 * 2 * 16 * 32
"""One token through one MLP: two gates of 16 x 32, and 32 x 16 back."""
SHALLOW = {"num_encoder_layers": 1, "num_decoder_layers": 1}
"""For differences that do not depend on how many layers there are: each takes time to trace."""
ONE_LAYER = {"model": SHALLOW, "encoder_sparse_layout": (0,), "num_decoder_sparse_layers": 0}
"""For numbers of an MoE layer alone: it is the encoder."""
ONE_OF_EACH = {"model": SHALLOW, "encoder_sparse_layout": (0,), "decoder_sparse_layout": (0,)}


def test_flops_by_hand(tiny, costs_of):
    # d = 16, heads * head_dim = 16, ff 32, vocab 64, two layers each. 3 rows of 10 and 4 tokens: 30
    # and 12.
    costs = costs_of(tiny(), 3, 10, 4)
    projection = 2 * 16 * 16
    # Per token and layer: four projections, logits and weighted sum over the length; per stack the
    # bias, 2 * 2 heads * 32 * length^2.
    encoder = 2 * 30 * (4 * projection + 2 * 2 * 16 * 10)
    decoder = 2 * 12 * (4 * projection + 2 * 2 * 16 * 4)
    # Query and out on the decoder's tokens, key and value on the encoder's.
    cross = 2 * (12 * 2 * projection + 30 * 2 * projection + 12 * 2 * 2 * 16 * 10)
    bias = 2 * 2 * 32 * (10**2 + 4**2)
    logits = 12 * 2 * 16 * 64
    forward = encoder + decoder + cross + bias + 2 * (30 + 12) * MLP + logits
    assert costs.forward_flops == forward
    # Every product has two gradients; the one-hot rows of the position bias have none.
    assert costs.model_flops == 3 * forward - bias
    assert costs.recomputed_flops == 0


def test_microbatches_are_counted_one_by_one(tiny, costs_of):
    model = tiny(model=SHALLOW)
    whole, parts = (costs_of(model, 4, 8, 4, num_microbatches=n) for n in (1, 2))
    # Position biases are computed for every microbatch: 2 * 2 heads * 32 * length^2, forward and
    # the gradient of the table.
    assert parts.model_flops - whole.model_flops == 2 * 2 * 2 * 32 * (8**2 + 4**2)
    assert parts.activation_bytes == pytest.approx(whole.activation_bytes / 2)


def test_what_is_computed_again(tiny, costs_of):
    # The products of both layers of each stack, but for the last of a dense MLP, which only feeds
    # the residual stream; 'minimal' keeps those without batch dimensions.
    projection, tokens = 2 * 16 * 16, (4 * 8, 4 * 4)
    products = 2 * (tokens[0] * 2 * 2 * 16 * 8 + tokens[1] * 2 * 2 * 16 * (4 + 8))
    projections = 2 * (4 * sum(tokens) + 2 * sum(tokens)) * projection
    again = {
        policy: costs_of(tiny(model={"remat_policy": policy}), 4, 8, 4).recomputed_flops
        for policy in ("minimal", "full")
    }
    assert again["minimal"] == products
    assert again["full"] == products + projections + 2 * sum(tokens) * MLP * 2 // 3


def test_flops_of_experts_count_slots(tiny, costs_of):
    # The layer of each stack is sparse. Encoder: 32 tokens in 2 groups of 16, capacity 2 *
    # 16 / 4 = 8 slots for 4 experts, so 64 in all. Decoder: 16 tokens, one group, 8 slots each, 32
    # in all. Routers: 16 x 4 for each token. The decoder's load-balancing loss takes two sums over
    # its 16 tokens, for each expert.
    model = tiny(num_experts=4, group_size=16, **ONE_OF_EACH)
    more = costs_of(model, 4, 8, 4).forward_flops - costs_of(model.dense, 4, 8, 4).forward_flops
    assert more == (64 + 32 - 32 - 16) * MLP + (32 + 16) * 2 * 16 * 4 + 2 * 2 * 16 * 4


def test_slots_that_cannot_be_filled_cost_nothing(tiny, costs_of):
    # Capacity factor 4 of 4 experts is room for all; 100 is no more.
    costs = [
        costs_of(
            tiny(num_experts=4, train_expert_capacity_factor=factor, **ONE_LAYER), 2, 8, 8
        ).forward_flops
        for factor in (4.0, 100.0)
    ]
    assert costs[0] == costs[1]


def test_a_shared_expert_computes_every_token(tiny, costs_of):
    before, after = (
        costs_of(
            tiny(num_experts=4, shared_expert_mlp_dim=width, **ONE_LAYER), 2, 8, 4
        ).forward_flops
        for width in (None, 8)
    )
    # 16 tokens, once each through three products of 16 x 8.
    assert after - before == 16 * 3 * 2 * 16 * 8


@pytest.mark.parametrize(
    ("router", "expert_rows", "router_flops"),
    [
        # 4 rows of 8 tokens, 8 experts, d 16. Capacity 2 * 32 / 8 = 8 slots.
        (SwitchTop1(), 8 * 8, 32 * 2 * 16 * 8),
        (SigmoidTopK(), 8 * 8, 32 * 2 * 16 * 8),
        (HashTop1(), 8 * 8, 0),
        # Three choices of each token, without slots, loops or padding.
        (DroplessTopK(num_selected_experts=3), 3 * 32, 32 * 2 * 16 * 8),
        # Two slots of eight experts in each of 4 sequences; logits, and mixing there and back, over
        # 16 slots.
        (SoftMoe(2), 4 * 8 * 2, 32 * 3 * 2 * 16 * 16),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_routers_by_hand(router, expert_rows, router_flops, tiny, costs_of):
    model = tiny(num_experts=8, encoder_router=router, **ONE_LAYER)
    more = costs_of(model, 4, 8, 8).forward_flops - costs_of(model.dense, 4, 8, 8).forward_flops
    # Losses and reports take at most two sums over all tokens for each expert.
    assert 0 <= more - (expert_rows - 32) * MLP - router_flops <= 2 * 2 * 32 * 8


def test_choices_are_divided_over_devices(tiny, costs_of):
    """Dropless rows of an even load: each of eight devices computes an eighth of them."""
    model = tiny(
        num_experts=8, encoder_router=DroplessTopK(), decoder_router=TokensChoose(), group_size=32
    )
    one = costs_of(model, 16, 16, 16)
    eight = costs_of(model, 16, 16, 16, Partitioner(num_expert_partitions=4))
    assert eight.model_flops == one.model_flops
    assert one.device_flops / 8 < eight.device_flops < one.device_flops / 7.5
    # Beside them a device reserves rows for what may arrive: the encoder's 32 tokens of each of
    # four devices could all choose the two experts of one, 256 rows; an even load fills 64.
    reserved = (256 - 64) * (6 * 32 + 4 * 16) * 4
    assert (eight.activation_bytes - reserved) * 8 == one.activation_bytes


def test_a_loop_over_layers_costs_what_its_layers_cost(tiny, costs_of):
    unrolled, scanned = (
        costs_of(
            tiny(
                model=SHALLOW
                | {"scan_layers": scan, "remat_policy": "full", "num_encoder_layers": 4}
            ),
            2,
            8,
            4,
        )
        for scan in (False, True)
    )
    assert scanned.model_flops == unrolled.model_flops
    assert scanned.recomputed_flops == unrolled.recomputed_flops
    assert scanned.device_flops == pytest.approx(unrolled.device_flops, rel=0.02)


def test_a_large_model_is_counted_without_memory(tiny, costs_of):
    """Terabytes of parameters and activations: shapes alone are looked at."""
    large = dataclasses.replace(
        tiny(num_experts=64, **ONE_LAYER).config, emb_dim=2**16, mlp_dim=2**18, vocab_size=2**20
    )
    assert costs_of(EncoderDecoderModel(large), 2**10, 512, 128).model_flops > 1e17
