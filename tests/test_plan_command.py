"""The plan command: steps from a configuration, and bad input."""

import json
import re

import jax
import pytest

from upcycle_jax import plan

TINY = [
    "VOCAB_SIZE=100",
    "T5Config.emb_dim=8",
    "T5Config.num_heads=2",
    "T5Config.num_encoder_layers=1",
    "T5Config.num_decoder_layers=1",
    "ENCODER_SPARSE_LAYOUT=(0,)",
    "DECODER_SPARSE_LAYOUT=(0,)",
    "T5Config.head_dim=4",
    "T5Config.mlp_dim=16",
    "NUM_EXPERTS=4",
    "GROUP_SIZE=32",
    "BATCH_SIZE=8",
    "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 4}",
]


def run(*words, bindings=TINY):
    flags = [
        "--gin_file=models/t5_1_1_base_upcycled.gin",
        "--gin_file=runs/continue_pretrain.gin",
        *(f"--gin.{text}" for text in bindings),
    ]
    return plan.main([*flags, *words])


def test_the_command_takes_steps_from_the_configuration(capsys):
    steps = [
        "--gin.TRAIN_STEPS=1100000",
        "--gin.INITIAL_CHECKPOINT_PATH='/data/dense/checkpoint_1000000'",
    ]
    assert run("--hardware=tpu_v5e:8", "--format=json", *steps) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["extra_steps"], found["dense_steps"], found["hardware"]["devices"]) == (
        100_000,
        1_000_000,
        8,
    )
    assert run("--hardware=tpu_v5e:8", "--format=json", "--extra_steps=7", "--mfu=0.1,0.2") == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["dense_steps"] is None
        and not found["extra_steps_assumed"]
        and found["mfu"]["dense"] == {"low": 0.1, "high": 0.2}
    )
    assert run("--hardware=tpu_v5e:8") == 0
    assert "extra 100,000 (assumed: give --extra_steps)" in capsys.readouterr().out
    assert len(jax.devices()) == 8  # nothing was asked of the 8 chips


def test_other_numbers_of_chips(capsys):
    assert run("--hardware=tpu_v5e:8", "--format=json", "--scale=8,1024") == 0
    found = json.loads(capsys.readouterr().out)["at_scale"]
    assert [(one["chips"], one["slices"], one["batch_size"]) for one in found] == [
        (8, 1, 8),
        (1024, 4, 1024),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware=nothing:8", "--extra_steps=1"], "no accelerator 'nothing' is known"),
        (["--hardware=tpu_v5e:8", "--extra_steps=1", "--mfu=fast"], "--mfu=fast is not LOW,HIGH"),
        (["--hardware=tpu_v5e:8", "--scale=1024,all"], "--scale=1024,all is not CHIPS,CHIPS"),
        (
            ["--hardware=tpu_v5e:8", "--extra_steps=1", "--gin.NUM_EXPERT_PARTITIONS=5"],
            "Change NUM_EXPERT_PARTITIONS",
        ),
    ],
)
def test_the_command_refuses_bad_input(words, message, capsys):
    assert run(*words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_images_per_second_are_rows_over_step_times(capsys):
    words = [
        "--hardware=tpu_v5e:8",
        "--gin_file=models/vit_tiny_upcycled.gin",
        "--gin_file=runs/continue_pretrain_images.gin",
        "--gin.RECIPE=@Recipe()",
        "--gin.BATCH_SIZE=32",
        "--gin.NUM_EXPERT_PARTITIONS=4",
    ]
    assert plan.main([*words, "--format=json"]) == 0
    costs = json.loads(capsys.readouterr().out)["costs"]["upcycled"]
    seconds, images = costs["step_seconds"]["total"], costs["images_per_second"]
    assert images["low"] == pytest.approx(32 / seconds["high"])
    assert images["high"] == pytest.approx(32 / seconds["low"])
    assert plan.main(words) == 0
    said = capsys.readouterr().out
    # Four images are 64 tokens; 2 * 64 / 4 slots.
    assert "groups of 64 tokens, 32 slots of each of 4 experts: capacity factor 2 (2 asked" in said
    assert "images per second" in said
