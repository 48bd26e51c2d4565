"""The routing check: silent where nothing is wrong, once and by name where something is."""

import logging

import jax
import numpy as np
import pytest

from upcycle_jax.models import metrics
from upcycle_jax.models.base import Stack
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.config import MoeSettings
from upcycle_jax.moe.routing import (
    DroplessTopK,
    ExpertsChoose,
    HashTop1,
    LossFreeTopK,
    SoftMoe,
    TokensChoose,
)
from upcycle_jax.training.routing_check import RoutingCheck

LAYER = "decoder/layers_1"


def check(router=None, **settings):
    moe = MoeSettings(num_experts=8, **settings)
    router = router or TokensChoose()
    return RoutingCheck([Stack("decoder", 2, (1,), router, True, moe, "decoder_target_tokens")])


def values(first=0.125, dropped=0.0):
    """Expert 0 has the share `first` of the tokens, the others the rest evenly."""
    load = np.full(8, (1 - first) / 7)
    load[0] = first
    return {f"experts/{LAYER}/load": load, f"experts/{LAYER}/dropped": dropped, "loss": 2.0}


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        (values(), 0),
        (values(first=0.5, dropped=0.1), 0),  # Busy, and no more than a tenth.
        (values(first=0.026), 0),  # A fifth of 12.5 % is 2.5 %.
        (values(first=0.024), 1),
        (values(dropped=0.11), 1),
        (values(first=0.011, dropped=0.138), 2),
        ({"loss": 2.0}, 0),
        (values(first=np.nan, dropped=np.nan), 0),  # Others stop such a run.
    ],
)
def test_what_deserves_a_warning(found, kinds):
    assert len(check().look(found)) == kinds


def test_once_and_by_name_with_what_to_change(caplog):
    routing = check(train_expert_capacity_factor=1.25, ignore_padding_tokens=False)
    with caplog.at_level(logging.WARNING):
        starved, dropped = routing.look(values(first=0.011, dropped=0.138))
        assert routing.look(values(first=0.01, dropped=0.2)) == []  # said already
    assert [record.message for record in caplog.records] == [starved, dropped]
    assert f"{LAYER}: " in starved and "expert 0 (1.1%) got less than a fifth" in starved
    assert "even share of 12.5%" in starved and "ignore_padding_tokens to True" in starved
    assert "AUX_LOSS_FACTOR (aux_loss_factor, 0.01)" in starved
    assert "13.8% of the choices" in dropped
    assert "TRAIN_EXPERT_CAPACITY_FACTOR (train_expert_capacity_factor, 1.25)" in dropped
    assert "GROUP_SIZE (group_size, 4096)" in dropped


@pytest.mark.parametrize(
    ("router", "remedy"),
    [
        (TokensChoose(), "Raise AUX_LOSS_FACTOR"),
        (DroplessTopK(), "Raise AUX_LOSS_FACTOR"),
        (LossFreeTopK(update_rate=0.002), "LossFreeTopK.update_rate (0.002)"),
        (HashTop1(), "HashTop1 balances nothing"),
        (ExpertsChoose(), "TRAIN_EXPERT_CAPACITY_FACTOR"),
        (SoftMoe(), "TRAIN_EXPERT_CAPACITY_FACTOR"),
    ],
)
def test_remedies_are_those_of_the_router(router, remedy):
    texts = check(router).look(values(first=0.01, dropped=0.3))
    assert any(remedy in text for text in texts)
    assert not any("Padding" in text for text in texts)  # It takes no place by default.


@pytest.mark.parametrize("ignore", [True, False])
def test_a_model_whose_padding_is_routed_is_told(ignore, tiny):
    """12 real tokens in 40 positions of the decoder, 2 choices each, 4 experts with room for 20
    each. Where padding is routed, the 28 zero vectors tie: they fill experts 0 and 1.
    """
    model = EncoderDecoderModel(
        tiny(
            model={"num_encoder_layers": 1, "num_decoder_layers": 1},
            num_experts=4,
            decoder_router=TokensChoose(renormalize=True),
            decoder_sparse_layout=(0,),
            num_encoder_sparse_layers=0,
            eval_expert_capacity_factor=1.0,
            ignore_padding_tokens=ignore,
        )
    )
    targets = np.where(np.arange(10) < np.array([[1], [2], [2], [7]]), 5, 0).astype(np.int32)
    targets *= 1 + np.arange(10, dtype=np.int32)  # Different words.
    batch = {
        "encoder_input_tokens": np.full((4, 4), 7, np.int32),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.int32),
    }
    params = jax.jit(model.init_params)(jax.random.key(0))
    found = metrics.compute(jax.jit(model.eval_fn)(params, batch))
    said = RoutingCheck(model.stacks.values()).look(found)
    assert any("choices of tokens were dropped" in text for text in said) != ignore
    assert any("Padding is routed" in text for text in said) != ignore
