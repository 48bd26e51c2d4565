"""The paper command: what it prints, and bad input."""

import json

import pytest

from upcycle_jax import config, paper
from upcycle_jax.papers.exhibits import exhibits


def test_table1_is_counted_and_equals_the_printed_sizes(capsys):
    assert paper.main(["table1", "--format=json"]) == 0
    rows = json.loads(capsys.readouterr().out)["sizes"]
    language = {(row["size"], row["method"]): row for row in rows if row["modality"] == "language"}
    # Section 1 of the T5 1.1 arithmetic: 2 embeddings of 32128 x 768, 24 MLPs of 3 x 768 x 2048, 36
    # attentions of 4 x 768 x 768, norms (12 x 2 + 12 x 3 + 2) x 768, 2 tables of 32 x 12.
    base = 2 * 32128 * 768 + 24 * 3 * 768 * 2048 + 36 * 4 * 768 * 768 + 62 * 768 + 2 * 32 * 12
    assert language["Base", "dense"]["parameters"] == base == 247_577_856
    # Half of the MLPs 31 times more, and a router of 768 x 32 for each.
    assert language["Base", "sparse"]["parameters"] == base + 12 * (31 * 3 * 768 * 2048 + 768 * 32)
    assert len(language) == 6 and all(
        row["equal"] and row["rounded"] == row["printed"] for row in language.values()
    )
    vision = {(row["size"], row["method"]): row for row in rows if row["modality"] == "vision"}
    assert len(vision) == 8 and all(row["equal"] for row in vision.values())
    # 12 blocks of 4 (768^2 + 768) + 4 x 768 and an MLP of 2 x 768 x 3072 + 3072 + 768; patches of
    # 16 x 16 x 3, 196 positions, a norm, a head of 18291 classes.
    block = 4 * (768**2 + 768) + 4 * 768 + 2 * 768 * 3072 + 3072 + 768
    b16 = 12 * block + 769 * 18291 + 768 * (16 * 16 * 3 + 1 + 196 + 2)
    assert vision["B/16", "dense"]["parameters"] == b16 == 99_862_899
    # 101,519,475 and 3,447,116,659 are cut off in print, not rounded.
    assert (vision["B/32", "dense"]["rounded"], vision["B/32", "dense"]["printed"]) == (
        "102M",
        "101M",
    )


def test_vision_has_numbers_and_commands(capsys):
    assert paper.main(["table2", "figure6"]) == 0
    out = capsys.readouterr().out
    assert "not yet supported" not in out
    assert "49.60" in out and "L/32 upcycled router=top_k C=2" in out
    assert "--gin.TokensChoose.num_selected_experts=2" in out
    assert "/data/dense/vit_b16/checkpoint_100000" in out and "--gin.TRAIN_STEPS=300000" in out


def test_everything_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(
        paper,
        "_load_config",
        lambda file: config.load(["models/t5_1_1_tiny.gin"]).macro("MODEL").config,
    )
    assert paper.main(["all"]) == 1  # the tiny model is no size of table 1
    out = capsys.readouterr().out
    assert not [line for line in out.splitlines() if len(line) > 140] and "DIFFERENT" in out
    assert paper.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in exhibits()) and not [
        line for line in listed.splitlines() if len(line) > 140
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["figure99"], "no numbers of 'figure99'"),
        (["figure2", "--results=/nowhere"], "/nowhere is not a folder: --results takes a folder"),
        (["figure2", "--checkpoint=/nowhere"], "--checkpoint is for figure13 and figure15"),
        (["figure15", "--checkpoint=/nowhere"], "/nowhere is no MODEL_DIR with a config.gin"),
        (["figure15", "--output_dir=x"], "--output_dir is for --checkpoint=PATH"),
    ],
)
def test_bad_input_is_one_clear_error(words, message, capsys):
    assert paper.main(words) == 2
    assert message in capsys.readouterr().err
