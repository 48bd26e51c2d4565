"""The model interface, of the families that there are."""

import dataclasses

from upcycle_jax.models.base import Stack
from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import DroplessTopK, ExpertsChoose, TokensChoose
from upcycle_jax.trees import Role

CONFIG = T5Config(
    vocab_size=32,
    emb_dim=8,
    num_heads=2,
    num_encoder_layers=3,
    num_decoder_layers=2,
    head_dim=4,
    mlp_dim=16,
    moe=MoeConfig(
        num_experts=2,
        encoder_sparse_layout=(0, 2),
        num_decoder_sparse_layers=0,
        encoder_router=DroplessTopK(),
        shared_expert_mlp_dim=16,
    ),
)


def test_stacks_describe_depth_sparse_layers_router_and_causality():
    stacks = EncoderDecoderModel(CONFIG).stacks
    assert list(stacks) == ["encoder", "decoder"]
    assert stacks["encoder"] == Stack(
        "encoder", 3, (0, 2), DroplessTopK(), False, CONFIG.moe, "encoder_input_tokens"
    )
    assert stacks["encoder"].moe_layers == ("encoder/layers_0", "encoder/layers_2")
    assert stacks["decoder"] == Stack("decoder", 2, (), None, True, None, "decoder_input_tokens")
    assert stacks["decoder"].layers == ("decoder/layers_0", "decoder/layers_1")
    paper = dataclasses.replace(CONFIG, num_encoder_layers=2, moe=MoeConfig())
    routers = [stack.router for stack in EncoderDecoderModel(paper).stacks.values()]
    assert routers == [ExpertsChoose(), TokensChoose()]


def test_every_leaf_without_a_dense_twin_is_a_router():
    sparse = EncoderDecoderModel(CONFIG).param_specs()
    dense = EncoderDecoderModel(CONFIG.dense).param_specs()
    for path, spec in sparse.items():
        if spec.role == Role.ROUTER:
            assert spec.twin == ""
        else:
            shape = spec.shape[1:] if spec.role == Role.EXPERT else spec.shape
            assert dense[spec.twin].shape == shape, path
    without = {Role.ROUTER_BIAS, Role.SHARED_GATE}
    assert {spec.role for spec in sparse.values()} == set(Role) - without
    assert all(spec.twin == path and spec.role == Role.DENSE for path, spec in dense.items())


def test_the_text_of_a_configuration_is_as_earlier_versions_wrote_it():
    """`infer` compares it before it goes on with predictions."""
    text = repr(MoeConfig(num_experts=4))
    start = "MoeConfig(num_experts=4, encoder_router=ExpertsChoose(renormalize=False"
    end = (
        "decoder_sparse_layout='MIXED', expert_mlp_dim=None, shared_expert_mlp_dim=None, extra_mlp"
    )
    assert text.startswith(start) and end in text and text.endswith(", independent=False)")
