"""Runs of decoder-only language models: upcycled from a Hugging Face folder while they restore,
killed and resumed, in microbatches, and scanned.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.random_data import RandomData
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.models.decoder.config import DecoderConfig, DecoderMoeConfig
from upcycle_jax.models.decoder.model import DecoderModel
from upcycle_jax.moe.routing import LossFreeTopK
from upcycle_jax.surgery import Recipe
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.model_of_checkpoint import model_of_checkpoint
from upcycle_jax.training.optimizers import AdamW
from upcycle_jax.training.parameter_groups import ParameterGroup
from upcycle_jax.training.schedules import create_learning_rate_scheduler
from upcycle_jax.training.train import Train
from upcycle_jax.training.train_state import TrainState
from upcycle_jax.training.train_step import make_train_step

pytestmark = pytest.mark.usefixtures("drawn_parameters")
D, F, V, LENGTH, ROWS = 16, 24, 32, 16, 8
MOE = DecoderMoeConfig(
    num_experts=2, group_size=16, router=LossFreeTopK(num_selected_experts=1, update_rate=2.0**-9)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two layers, four heads and two of keys and values, as Hugging Face keeps it."""
    path = tmp_path_factory.mktemp("llama")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(2):
        name = f"model.layers.{layer}."
        shapes |= {
            f"{name}input_layernorm.weight": (D,),
            f"{name}post_attention_layernorm.weight": (D,),
            f"{name}self_attn.q_proj.weight": (D, D),
            f"{name}self_attn.k_proj.weight": (D // 2, D),
            f"{name}self_attn.v_proj.weight": (D // 2, D),
            f"{name}self_attn.o_proj.weight": (D, D),
            f"{name}mlp.gate_proj.weight": (F, D),
            f"{name}mlp.up_proj.weight": (F, D),
            f"{name}mlp.down_proj.weight": (D, F),
        }
    random = np.random.default_rng(0)
    tensors = {n: random.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path, tensors


def data_of(model):
    return RandomData(
        lambda k: model.features.random(V, batch_size=ROWS, length=LENGTH, seed=k),
        ROWS,
        {"targets": LENGTH},
        ids=V,
    )


@pytest.fixture
def start(bags, folder, tmp_path):
    """Upcycles the folder and trains; experts and embedding are frozen in the first two steps."""

    def run(name, steps, **changes):
        recipe = Recipe(step="reset")
        model = model_of_checkpoint(str(folder[0]), recipe=recipe, moe=MOE, dropout_rate=0.1)
        model = DecoderModel(dataclasses.replace(model.config, **changes))
        frozen = ParameterGroup(
            roles=("expert", "dense"), frozen=True, until_step=2, step_offset="start"
        )
        trainer = bags.trainer(
            optimizer=AdamW(b2=0.95, weight_decay=0.1, step_offset="start"),
            learning_rate_fn=create_learning_rate_scheduler(
                "constant * linear_warmup * sqrt_cooldown",
                base_learning_rate=0.01,
                warmup_steps=2,
                total_steps=8,
                cooldown_steps=4,
                step_offset="start",
            ),
            parameter_groups=(ParameterGroup(kinds=("vector",), weight_decay=0.0), frozen),
            max_gradient_norm=1.0,
        )
        restore = RestoreCheckpointConfig(path=str(folder[0]), recipe=recipe)
        return Train(
            model=model,
            model_dir=tmp_path / name,
            train_dataset_cfg=data_of(model),
            checkpoint_cfg=CheckpointConfig(restore=restore, save=SaveCheckpointConfig(period=2)),
            partitioner=bags.one_device,
            trainer=trainer,
            total_steps=steps,
            stats_period=1,
        ).run()

    return run


def saved(path, step):
    reader = open_checkpoint(path / f"checkpoint_{step}")
    return {name: reader.read(name) for name in reader.specs()}


def test_an_upcycled_folder_is_trained_and_resumed_with_the_same_bits(start, folder, tmp_path):
    assert start("whole", 5).start == "upcycle"
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (4, 5):  # as if it had been killed after step 3
        shutil.rmtree(tmp_path / "parts" / f"checkpoint_{step}")
    assert start("parts", 5).start == "resume"
    whole, parts = saved(tmp_path / "whole", 5), saved(tmp_path / "parts", 5)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(parts[name], value, err_msg=name)
    # Each states the whole model, so that it can be written as a folder again.
    stated = open_checkpoint(tmp_path / "whole" / "checkpoint_5").model_config()
    assert isinstance(stated, DecoderConfig) and stated.moe == MOE
    # What was frozen until step 2 is the folder's until then; the routers' bias moves at each step.
    frozen, tensors = saved(tmp_path / "parts", 2), folder[1]
    layer = "target/decoder/layers_0/mlp"
    gate = tensors["model.layers.0.mlp.gate_proj.weight"].T
    for expert in frozen[f"{layer}/expert/wi_0/kernel"]:
        np.testing.assert_array_equal(expert, gate)
    for expert in whole[f"{layer}/expert/wi_0/kernel"]:
        assert not np.array_equal(expert, gate)
    assert np.any(whole[f"{layer}/router/bias"])
    assert not np.any(frozen["state/param_states/decoder/layers_0/mlp/expert/wi_0/kernel/nu"])


@pytest.mark.slow
def test_a_run_goes_on_with_its_layers_in_a_loop(start, tmp_path):
    """A scanned run resumes what an unrolled one has saved, and computes the same up to rounding;
    without dropout, whose masks differ.
    """
    start("unrolled", 4, dropout_rate=0.0)
    start("scanned", 2, dropout_rate=0.0)
    start("scanned", 4, dropout_rate=0.0, scan_layers=True, remat_policy="full")
    unrolled, scanned = saved(tmp_path / "unrolled", 4), saved(tmp_path / "scanned", 4)
    assert unrolled.keys() == scanned.keys()
    for name, value in unrolled.items():
        if name.startswith("target/"):
            np.testing.assert_allclose(scanned[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("num_microbatches", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_microbatches_change_neither_loss_nor_update(bags, num_microbatches):
    config = DecoderConfig(
        vocab_size=V,
        emb_dim=D,
        num_layers=1,
        num_heads=4,
        head_dim=4,
        mlp_dim=F,
        moe=DecoderMoeConfig(num_experts=4, num_sparse_layers=1, group_size=LENGTH),
    )
    model = DecoderModel(config)
    batch = data_of(model).batch(0)
    with jax.default_device(jax.devices()[0]):
        params = jax.jit(model.init_params)(jax.random.key(0))

    def step(parts):
        optimizer = AdamW(eps=1e-3)
        trainer = bags.trainer(
            optimizer=optimizer,
            learning_rate_fn=lambda step: jnp.float32(0.1),
            num_microbatches=parts,
            max_gradient_norm=0.5,
        )
        state = TrainState(jnp.int32(0), params, optimizer.init(model.param_specs()))
        with bags.one_device.activate():
            return jax.jit(make_train_step(model, trainer, seed=0))(state, batch)

    (whole, want), (parts, got) = step(None), step(num_microbatches)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=1e-5)
    for path, value in trees.flatten(whole.params).items():
        np.testing.assert_allclose(
            trees.flatten(parts.params)[path], value, rtol=1e-4, atol=1e-5, err_msg=path
        )
