"""Bad settings are refused with their numbers."""

import pytest

from upcycle_jax.models.t5.config import MoeConfig
from upcycle_jax.moe.routing import DroplessTopK, ExpertsChoose, SwitchTop1, TokensChoose


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": -3}, "num_experts must be at least 1, got -3"),
        (
            {"train_expert_capacity_factor": 0.0},
            r"train_expert_capacity_factor must be above 0, got 0\.0: .*DroplessTopK",
        ),
        (
            {"eval_expert_capacity_factor": -1.0},
            r"eval_expert_capacity_factor must be above 0, got -1\.0",
        ),
        ({"train_expert_capacity_factor": float("nan")}, "finite number in float32, got nan"),
        (
            {"eval_expert_capacity_factor": float("inf")},
            r"finite number in float32, got inf: .*DroplessTopK\(\)",
        ),
        ({"min_expert_capacity": 0}, "min_expert_capacity must be at least 1, got 0"),
        ({"aux_loss_factor": -0.01}, r"aux_loss_factor must be at least 0, got -0\.01"),
        (
            {"router_z_loss_factor": float("nan")},
            "router_z_loss_factor must be a finite number in float32, got nan",
        ),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"expert_mlp_dim": 0}, "expert_mlp_dim must be at least 1.*got 0"),
        (
            {"expert_dropout_rate": 1.0},
            r"expert_dropout_rate must be at least 0 and below 1, got 1\.0",
        ),
        (
            {"num_experts": 4, "decoder_router": TokensChoose(num_selected_experts=5)},
            "num_selected_experts=5 is more than num_experts=4",
        ),
        (
            {"num_experts": 1, "encoder_router": TokensChoose()},
            "num_selected_experts=2 is more than num_experts=1",
        ),
        (
            {"decoder_router": ExpertsChoose()},
            "ExpertsChoose cannot be the decoder's router: .*later tokens.*TokensChoose",
        ),
        (
            {"decoder_router": TokensChoose(batch_prioritized=True)},
            "TokensChoose cannot be the decoder's router: .*batch_prioritized=False",
        ),
        (
            {"importance_loss_factor": 0.005},
            r"importance_loss_factor=0\.005 weighs .* by a softmax, and ExpertsChoose is no such",
        ),
        (
            {"encoder_router": TokensChoose(), "load_loss_factor": 0.005},
            r"load_loss_factor=0\.005 weighs .* under noise, and the TokensChoose .*noise_std",
        ),
        ({"t5x_mode": True, "capacity_rounding": "ceil"}, "t5x_mode follows Flaxformer.*'ceil'"),
        ({"capacity_rounding": "up"}, "capacity_rounding must be"),
        ({"capacity_multiple": 0}, "capacity_multiple must be at least 1, got 0"),
        (
            {"t5x_mode": True, "encoder_router": ExpertsChoose(noise_std=1.0)},
            "t5x_mode follows Flaxformer, which has no",
        ),
        ({"decoder_router": "TokensChoose"}, "decoder_router must be a Router, got 'TokensChoose'"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoeConfig(**settings)


def test_a_decoder_without_moe_layers_needs_no_causal_router():
    MoeConfig(decoder_router=ExpertsChoose(), num_decoder_sparse_layers=0)


def test_batch_priority_is_fine_in_the_encoder():
    MoeConfig(encoder_router=TokensChoose(batch_prioritized=True))


def test_configs_are_hashable_and_equal_by_value():
    assert MoeConfig() == MoeConfig() and hash(MoeConfig()) == hash(MoeConfig())
    assert MoeConfig(encoder_sparse_layout=[1, 2]) == MoeConfig(encoder_sparse_layout=(1, 2))


def test_texts_of_routers_show_later_settings_where_they_are_set():
    assert repr(ExpertsChoose()) == "ExpertsChoose(renormalize=False, jitter_noise=0.0)"
    assert repr(ExpertsChoose(noise_std=1.0)).endswith("jitter_noise=0.0, noise_std=1.0)")
    for router in (TokensChoose, DroplessTopK, SwitchTop1):
        assert "noise_std" not in repr(router())
        assert "noise_std=0.5" in repr(router(noise_std=0.5)), router
