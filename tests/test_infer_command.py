"""`python -m upcycle_jax.infer`: JSON lines, in shards, that an interruption does not change."""

import json
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

from upcycle_jax import infer as infer_command
from upcycle_jax import trees
from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.checksums import device_checksums
from upcycle_jax.checkpoints.manager import CheckpointManager
from upcycle_jax.config import load
from upcycle_jax.data import DatasetConfig
from upcycle_jax.data.examples import as_json, task_examples
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.inference import job_files, ranking, running
from upcycle_jax.inference.json_lines import json_line
from upcycle_jax.training import holding

sys.path.insert(0, str(pathlib.Path(__file__).parent / "inference"))
import small_tasks

pytestmark = pytest.mark.usefixtures("shared_programs")
Runner = running.Runner
FEATURES = EncoderDecoderFeatures()
MODEL = [
    "T5Config.num_encoder_layers=1",
    "T5Config.num_decoder_layers=1",
    "ENCODER_SPARSE_LAYOUT=(0,)",
    "DECODER_SPARSE_LAYOUT=(0,)",
]
LENGTHS = {"inputs": 24, "targets": 6}
NAME = "small_parity"


def flags(*bindings):
    files = ["--gin_file=models/t5_1_1_tiny_upcycled.gin", "--gin_file=runs/infer.gin"]
    common = [
        *MODEL,
        "BATCH_SIZE=8",
        f"TASK_FEATURE_LENGTHS={LENGTHS}",
        f"MIXTURE_OR_TASK_NAME='{NAME}'",
        "CHECKPOINT_PERIOD=1",
    ]
    return files + [f"--gin.{binding}" for binding in (*common, *bindings)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with random parameters: its path, the model and the parameters."""
    folder = tmp_path_factory.mktemp("inferred")
    model = load(["models/t5_1_1_tiny_upcycled.gin"], MODEL).macro("MODEL")
    random = np.random.default_rng(0)
    params = trees.unflatten(
        {
            path: jax.numpy.asarray(random.normal(size=s.shape) * 0.3, "float32")
            for path, s in model.param_specs().items()
        }
    )
    manager = CheckpointManager(folder)
    manager.save(
        7,
        {"target": params, "state": {"step": jax.numpy.int32(7), "param_states": {}}},
        dataset=None,
        metadata={},
    )
    manager.wait()
    manager.close()
    return folder / "checkpoint_7", model, params


def infer(checkpoint, folder, *bindings):
    code = infer_command.main(
        flags(f"CHECKPOINT_PATH='{checkpoint[0]}'", f"INFER_OUTPUT_DIR='{folder}'", *bindings)
    )
    files = sorted(folder.glob("*.jsonl-*"))
    return code, {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in files
    }


def test_scores_are_the_models(checkpoint, tmp_path, capsys):
    code, files = infer(checkpoint, tmp_path, "MODE='score'", "INCLUDE_ALL_INPUTS=True")
    assert (
        code == 0
        and str(tmp_path / f"{NAME}-score.jsonl-00000-of-00001") in capsys.readouterr().out
    )
    rows = files[f"{NAME}-score.jsonl-00000-of-00001"]
    _, model, params = checkpoint
    (task,) = task_examples(DatasetConfig(NAME, LENGTHS, split="validation"), FEATURES)
    want = jax.jit(model.score_batch)(params, task.batch(list(task.examples()), 11))
    np.testing.assert_allclose([row["score"] for row in rows], want, atol=1e-4)
    # b'even' in ByT5's ids is byte + 3, then EOS.
    assert rows[0]["inputs"]["targets"] == [104, 121, 104, 113, 1] and rows[0]["inputs"]["idx"] == 0
    assert [path.name for path in tmp_path.glob("tmp-*")] == [] and (
        tmp_path / "config.gin"
    ).exists()


def test_ranked_answers_with_shots(checkpoint, tmp_path):
    options = [
        "RANK_OPTIONS=('even', 'odd')",
        "FEW_SHOT=@FewShot()",
        "FewShot.num_shots=1",
        "NUM_EXAMPLES=3",
    ]
    code, files = infer(
        checkpoint,
        tmp_path,
        "MODE='rank'",
        *options,
        "TASK_FEATURE_LENGTHS={'inputs': 48, 'targets': 6}",
    )
    rows = files[f"{NAME}-rank.jsonl-00000-of-00001"]
    assert code == 0 and len(rows) == 3
    for row in rows:
        assert row["prediction"] == max(row["options"], key=row["options"].get) and set(
            row["options"]
        ) == {"even", "odd"}
        assert row["inputs"]["inputs_pretokenized"].count(NAME) == 2


def test_interrupted_resumed_and_in_shards(checkpoint, tmp_path, monkeypatch, capsys):
    draw = ("DECODER=@Sampling()", "Sampling.num_decodes=2", "MODE='predict_with_aux'")
    code, whole = infer(checkpoint, tmp_path / "whole", *draw)
    (rows,) = whole.values()
    assert code == 0 and len(rows) == small_tasks.NUM_EXAMPLES
    assert rows[4]["inputs"] == {"inputs_pretokenized": f"{NAME} 4", "targets_pretokenized": "even"}
    assert (
        rows[4]["prediction"] == rows[4]["aux"]["predictions"][0]
        and len(rows[4]["aux"]["scores"]) == 2
    )
    assert rows[4]["aux"]["scores"][0] >= rows[4]["aux"]["scores"][1]

    # Interrupted in the second of two chunks: the first is kept, and the result is the same
    # although it was drawn.
    predict, calls = Runner.predict, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, *arguments)

    monkeypatch.setattr(Runner, "predict", stops)
    with pytest.raises(KeyboardInterrupt):
        infer(checkpoint, tmp_path / "resumed", *draw)
    chunks = [path.name for path in (tmp_path / "resumed").glob("tmp-*/chunk-*")]
    assert chunks == ["chunk-000000.jsonl"]
    code, _ = infer(checkpoint, tmp_path / "resumed", *draw, "RANDOM_SEED=1")
    assert code == 2
    code, resumed = infer(checkpoint, tmp_path / "resumed", *draw)
    assert code == 0 and list(resumed.values()) == [rows] and len(calls) == 3
    # Finished: nothing is computed again, and chunks that a kill has left behind the finished file
    # are removed.
    left = tmp_path / "resumed" / f"tmp-{NAME}-predict_with_aux-00000-of-00001"
    left.mkdir()
    assert (
        infer(checkpoint, tmp_path / "resumed", *draw)[0] == 0
        and len(calls) == 3
        and not left.exists()
    )
    # The file of other settings is not taken for the result of these.
    assert (
        infer(checkpoint, tmp_path / "resumed", *draw, "RANDOM_SEED=1")[0] == 2 and len(calls) == 3
    )
    message = capsys.readouterr().err
    assert (
        f"{NAME}-predict_with_aux.jsonl-00000-of-00001 is the result of other settings (data/seed,"
        " random_seed): remove it" in message
    )

    for shard in (1, 0):
        code, shards = infer(
            checkpoint, tmp_path / "shards", *draw, f"SHARD_ID={shard}", "NUM_SHARDS=2"
        )
        assert code == 0
    assert list(shards) == [
        f"{NAME}-predict_with_aux.jsonl-{shard:05}-of-00002" for shard in (0, 1)
    ]
    first, second = shards.values()
    assert first == rows[0::2] and second == rows[1::2]


def test_unfinished_work_of_other_settings_is_named(checkpoint, tmp_path, capsys):
    folder = tmp_path / f"tmp-{NAME}-predict-00000-of-00001"
    folder.mkdir()
    (folder / job_files.SETTINGS_FILE).write_text("{}")
    assert infer(checkpoint, tmp_path)[0] == 2
    message = capsys.readouterr().err
    assert (
        "holds an unfinished job of other settings (batch_size, checkpoint, " in message
        and ", data, " in message
    )


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            "MODE='guess'",
            "mode must be one of 'predict', 'predict_with_aux', 'score', 'rank', got 'guess'",
        ),
        ("MODE='rank'", "does not say which answers it allows"),
        ("SHARD_ID=2", "shard_id must be from 0 to 0 (num_shards=1), got 2"),
        ("CHECKPOINT_PERIOD=0", "checkpoint_period) must be at least 1"),
        ("CHECKPOINT_PATH='nowhere'", "does not exist"),
        ("T5Config.mlp_dim=128", "is not a checkpoint of this model"),
        ("Sampling.top_p=2.0", "top_p must be above 0"),
    ],
)
def test_bad_settings_are_one_clear_line(binding, message, checkpoint, tmp_path, capsys):
    code, _ = infer(checkpoint, tmp_path / "out", "DECODER=@Sampling()", binding)
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    bindings = flags(
        f"CHECKPOINT_PATH='{checkpoint[0]}'",
        f"INFER_OUTPUT_DIR='{tmp_path}/out'",
        "DECODER=@BeamSearch()",
    )
    assert infer_command.main([*bindings, "--dry_run"]) == 0
    assert (
        "BeamSearch(num_decodes=4, alpha=0.6)" in capsys.readouterr().out
        and not (tmp_path / "out").exists()
    )


def test_a_damaged_checkpoint_or_one_with_nan_is_named_and_nothing_is_written(
    checkpoint, tmp_path, capsys
):
    leaf = "target/decoder/decoder_norm/scale"
    for name, value, checksums, message in (
        ("nan", np.nan, False, f"the parameter {leaf} has 1 NaN or infinite values of"),
        ("changed", 3.0, True, f"checkpoint_7: the leaf {leaf} of step 7 is not what was saved"),
    ):
        state = {"target": checkpoint[2], "state": {"step": jax.numpy.int32(7)}}
        with CheckpointManager(tmp_path / name) as manager:
            manager.save(7, state, checksums=device_checksums(state) if checksums else None)
        array = open_checkpoint(tmp_path / name)._array(leaf)
        array[2].write(value).result()
        code, files = infer((tmp_path / name, *checkpoint[1:]), tmp_path / f"{name}_out")
        error = capsys.readouterr().err
        assert (code, files) == (2, {})
        assert message in error and "Traceback" not in error
        assert not (tmp_path / f"{name}_out").exists()
    renamed = tmp_path / "changed" / "checkpoint_70"
    (tmp_path / "changed" / "checkpoint_7").rename(renamed)
    assert infer((renamed, *checkpoint[1:]), tmp_path / "out") == (2, {})
    assert "is named for step 70, but it holds step 7" in capsys.readouterr().err


def test_numbers_that_json_does_not_know_become_null():
    record = {"a": [1.5, float("nan"), {"b": (-float("inf"), True, None)}], "c": "NaN"}
    line = json_line(record)
    assert line == '{"a": [1.5, null, {"b": [null, true, null]}], "c": "NaN"}'


def test_an_answer_of_score_nan_is_not_ranked():
    task = types.SimpleNamespace(
        name="t",
        options=lambda example, given: ["yes", "no"],
        answered=lambda example, text: (example, text),
        batch=lambda rows, size: {"decoder_target_tokens": np.zeros((size, 2), np.int32)},
        padded_targets=lambda row: np.zeros(2, np.int32),
    )
    scores = iter([np.array([-1.0, -2.0]), np.array([-1.0, np.nan])])
    runner = types.SimpleNamespace(batch_size=2, score=lambda *_: next(scores))
    with pytest.raises(
        ValueError, match=r"t: the score of the answer 'no' to example 1 of these 2"
    ):
        ranking.rank(task, runner, {}, [{}, {}], None)


def test_features_become_json():
    value = {"a": b"caf\xc3\xa9", "b": np.int64(3), "c": np.array([[1.5]]), "d": (True, None)}
    assert as_json(value) == {"a": "café", "b": 3, "c": [[1.5]], "d": [True, None]}


def test_a_call_beside_another_is_refused_for_its_part_alone(checkpoint, tmp_path, capsys):
    name = f"{NAME}-score-00000-of-00002"
    with holding.hold_results(tmp_path, name, setting="INFER_OUTPUT_DIR"):
        before = sorted(tmp_path.iterdir())
        shard = ["MODE='score'", "NUM_SHARDS=2", "NUM_EXAMPLES=3"]
        assert infer(checkpoint, tmp_path, *shard, "SHARD_ID=0")[0] == 2
        assert f"{name} in {tmp_path} is in use: process" in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
        assert infer(checkpoint, tmp_path, *shard, "SHARD_ID=1")[0] == 0
