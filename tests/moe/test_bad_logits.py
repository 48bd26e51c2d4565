"""Router logits that are NaN or infinite stop a run, and the error names the layer; a batch of them
can be skipped.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from upcycle_jax.models.t5.config import MoeConfig, T5Config
from upcycle_jax.models.t5.model import EncoderDecoderModel
from upcycle_jax.moe.routing import SigmoidTopK
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.training.optimizers import AdamW
from upcycle_jax.training.progress import LossWatch, NonFiniteLossError
from upcycle_jax.training.train_state import initial_state, state_specs
from upcycle_jax.training.train_step import StepOutput, make_train_step
from upcycle_jax.training.trainer import NonFinite, Trainer


def output(loss, **bad):
    bad_logits = {name.replace("__", "/"): np.float32(count) for name, count in bad.items()}
    return StepOutput(
        metrics={}, loss=np.float32(loss), grad_norm=np.float32(1.0), bad_logits=bad_logits
    )


def watch(tmp_path, policy=NonFinite.STOP):
    layers = [f"{stack}/layers_{i}" for stack in ("encoder", "decoder") for i in range(12)]
    return LossWatch(epath.Path(tmp_path), policy, layers=layers)


def test_the_first_layer_in_the_order_of_the_forward_pass_is_named(tmp_path):
    seen = watch(tmp_path)
    seen.add(
        7,
        output(
            math.nan,
            decoder__layers_1=9,
            encoder__layers_11=4,
            encoder__layers_3=2,
            encoder__layers_1=0,
        ),
        batch=6,
        rows={"x": np.frombuffer(b"abc", np.uint8)},
    )
    with pytest.raises(
        NonFiniteLossError,
        match=r"step 7: the loss is nan .*: 2 in encoder/layers_3, the first of 3 such MoE layers",
    ):
        seen.settle()
    report = json.loads((tmp_path / "non_finite_7.json").read_text())
    assert report["batch_crc32"] == {"x": "352441c2"}  # the CRC-32 of "abc"
    assert report["non_finite_router_logits"] == {
        "decoder/layers_1": 9,
        "encoder/layers_11": 4,
        "encoder/layers_3": 2,
    }


def test_a_finite_loss_does_not_hide_them(tmp_path):
    seen = watch(tmp_path)
    seen.add(3, output(2.5, decoder__layers_1=1), batch=2, rows={})
    with pytest.raises(
        NonFiniteLossError, match=r"step 3: the loss is 2.5 .*1 in decoder/layers_1, the first of 1"
    ):
        seen.settle()


def test_finite_steps_pass(tmp_path):
    seen = watch(tmp_path)
    seen.add(3, output(2.5, decoder__layers_1=0), batch=2, rows={})
    seen.settle()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("drawn_parameters")
def test_a_train_step_counts_them_and_skips_the_update():
    # An infinite entry in the router of the second encoder layer: sigmoid gates make 1 of an
    # infinite logit, and the loss stays finite.
    moe = MoeConfig(
        num_experts=4,
        encoder_router=SigmoidTopK(1),
        num_decoder_sparse_layers=0,
        encoder_sparse_layout=(1,),
    )
    config = T5Config(64, 16, 2, 2, 1, 8, 32, dropout_rate=0.0, moe=moe)
    model = EncoderDecoderModel(config, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS")
    trainer = Trainer(
        optimizer=AdamW(), learning_rate_fn=lambda step: jnp.float32(0.1), non_finite="skip"
    )
    shardings = Partitioner(devices=(jax.devices()[0],)).shardings(
        state_specs(model, trainer.optimizer)
    )
    state = initial_state(model, trainer.optimizer, seed=0, shardings=shardings)
    kernel = state.params["encoder"]["layers_1"]["mlp"]["router"]["router_weights"]["w"]
    kernel["kernel"] = kernel["kernel"].at[0, 0].set(jnp.inf)
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 1, 64)
    names = (
        "encoder_input_tokens",
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_loss_weights",
    )
    after, step = jax.jit(make_train_step(model, trainer, seed=0))(
        state, dict.fromkeys(names, tokens)
    )
    assert step.bad_logits == {"encoder/layers_1": 16}
    assert int(after.step) == 1
    before, now = (s.params["decoder"]["layers_0"]["mlp"]["wo"]["kernel"] for s in (state, after))
    np.testing.assert_array_equal(now, before)
