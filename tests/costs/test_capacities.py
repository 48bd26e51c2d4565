"""What capacity factors come to, said."""

import dataclasses

from upcycle_jax.costs.capacities import capacity_texts
from upcycle_jax.models.vit.config import VitConfig, VitMoeConfig
from upcycle_jax.models.vit.model import VitModel
from upcycle_jax.moe.routing import DroplessTopK, SoftMoe

# 4 x 4 patches of an image, and 8 experts.
MOE = VitMoeConfig(num_experts=8, group_size=16, min_expert_capacity=1)
CONFIG = VitConfig(5, 32, 8, 16, 2, 2, 24, moe=MOE)


def texts(**moe):
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, **moe))
    return capacity_texts(VitModel(config), batch_size=4, lengths={"image": 32})


def test_what_it_comes_to_is_told_beside_what_was_asked_for():
    # 2.25 * 16 / 8 = 4.5 slots: rounded up 5, filled up to 6. 6 * 8 / 16 = 3.
    found = texts(train_expert_capacity_factor=2.25, capacity_rounding="ceil", capacity_multiple=2)
    assert found == [
        "encoder: groups of 16 tokens, 6 slots of each of 8 experts: capacity factor 3 (2.25 asked"
        " for)"
    ]


def test_routers_without_a_capacity_have_none_to_tell():
    assert texts(router=DroplessTopK()) == texts(router=SoftMoe()) == []
    assert capacity_texts(VitModel(CONFIG.dense), batch_size=4, lengths={"image": 32}) == []
