"""`python -m upcycle_jax.eval`: one, several and all checkpoints; metrics equal SeqIO's own
Evaluator's.
"""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import seqio

from upcycle_jax import eval as eval_command
from upcycle_jax import trees
from upcycle_jax.checkpoints.manager import CheckpointManager
from upcycle_jax.config import load
from upcycle_jax.data import DatasetConfig
from upcycle_jax.data.examples import task_examples
from upcycle_jax.data.opening import open_dataset
from upcycle_jax.features import EncoderDecoderFeatures
from upcycle_jax.inference.decoding import Greedy
from upcycle_jax.training import holding

sys.path.insert(0, str(pathlib.Path(__file__).parent / "inference"))
import small_tasks

pytestmark = pytest.mark.usefixtures("shared_programs")
FEATURES = EncoderDecoderFeatures()
MODEL = [
    "T5Config.num_encoder_layers=1",
    "T5Config.num_decoder_layers=1",
    "ENCODER_SPARSE_LAYOUT=(0,)",
    "DECODER_SPARSE_LAYOUT=(0,)",
    "VOCAB_SIZE=384",
]
LENGTHS = {"inputs": 24, "targets": 6}


def flags(run, *bindings):
    files = ["--gin_file=models/t5_1_1_tiny_upcycled.gin", f"--gin_file=runs/{run}.gin"]
    return files + [
        f"--gin.{binding}"
        for binding in (*MODEL, "BATCH_SIZE=8", f"TASK_FEATURE_LENGTHS={LENGTHS}", *bindings)
    ]


def make_run(folder, steps):
    """A MODEL_DIR with random parameters; returns the model and the parameters by step."""
    model = load(["models/t5_1_1_tiny_upcycled.gin"], MODEL).macro("MODEL")
    manager, params = CheckpointManager(folder), {}
    for step in steps:
        random = np.random.default_rng(step)
        flat = {
            path: random.normal(size=leaf.shape).astype(np.float32) * 0.3
            for path, leaf in model.param_specs().items()
        }
        params[step] = trees.unflatten(
            {path: jax.numpy.asarray(leaf) for path, leaf in flat.items()}
        )
        state = {
            "target": params[step],
            "state": {"step": jax.numpy.int32(step), "param_states": {}},
        }
        manager.save(step, state, dataset=None, metadata={})
    manager.wait()
    manager.close()
    return model, params


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, *make_run(folder, [2, 5])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_checkpoints_of_a_mixture(run, tmp_path, capsys):
    folder, model, params = run
    assert small_tasks.NUM_EXAMPLES == 11
    given = [
        f"CHECKPOINT_PATH='{folder}'",
        f"EVAL_OUTPUT_DIR='{tmp_path}'",
        "MIXTURE_OR_TASK_NAME='small_parities'",
    ]
    assert eval_command.main(flags("eval", *given, "CHECKPOINT_STEPS='all'")) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    out = tmp_path / "inference_eval"
    assert [(row["step"], row["task"]) for row in printed] == [
        (step, task)
        for step in (2, 5)
        for task in ("small_parity", "small_parity_again", "small_parities")
    ]

    metrics = rows_of(out / "small_parity" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [2, 5]
    assert list((out / "small_parity").glob("events.out.tfevents.*"))
    for row in metrics:
        assert {
            "exact_match",
            "mean_length",
            "mean_score",
            "teacher_forced/loss",
            "teacher_forced/accuracy",
        } <= set(row)
        lines = rows_of(out / f"small_parity-{row['step']}.jsonl")
        assert len(lines) == 11
        assert lines[3]["input"] == {
            "inputs_pretokenized": "small_parity 3",
            "targets_pretokenized": "odd",
        }
        assert lines[3]["target"] == "ODD" and lines[3]["prediction"] == lines[3]["output"].upper()
        assert row["mean_score"] == pytest.approx(
            np.mean([line["score"] for line in lines]), rel=1e-5
        )
    again = rows_of(out / "small_parity_again" / "metrics.jsonl")
    averages = rows_of(out / "small_parities" / "metrics.jsonl")
    for first, second, average in zip(metrics, again, averages, strict=True):
        own = np.mean([first[name] for name in ("exact_match", "mean_length", "mean_score")])
        assert average["average"] == pytest.approx((own + second["exact_match"]) / 2, rel=1e-5)

    # SeqIO's Evaluator, given the model's predictions and scores, computes the same.
    decode = jax.jit(lambda params, batch: model.predict_batch(params, batch, decoder=Greedy()))
    score = jax.jit(model.score_batch)

    def apply(function):
        def run_all(dataset):
            found = list(dataset.as_numpy_iterator())
            batch = {
                name: np.stack([features[name] for _, features in found]) for name in found[0][1]
            }
            return [
                (index, output)
                for (index, _), output in zip(
                    found, np.asarray(function(params[5], batch)), strict=True
                )
            ]

        return run_all

    evaluator = seqio.Evaluator(
        "small_parity", seqio.EncDecFeatureConverter(pack=False), sequence_length=LENGTHS
    )
    want = evaluator.evaluate(
        compute_metrics=True, predict_fn=apply(decode), score_fn=apply(score)
    )[0].result()["small_parity"]
    for name, value in want.items():
        assert metrics[1][name] == pytest.approx(float(value), rel=1e-4), name

    # Going on after an interruption leaves out what is there.
    assert (
        eval_command.main(flags("eval", *given, "CHECKPOINT_STEPS=(2, 5)", "SKIP_EVALUATED=True"))
        == 0
    )
    assert len(rows_of(out / "small_parity" / "metrics.jsonl")) == 2
    # The average is written last: where a kill came between, the step is not done.
    path = out / "small_parities" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert (
        eval_command.main(flags("eval", *given, "CHECKPOINT_STEPS='all'", "SKIP_EVALUATED=True"))
        == 0
    )
    assert [row["step"] for row in rows_of(path)] == [2, 5]
    assert [row["step"] for row in rows_of(out / "small_parity" / "metrics.jsonl")] == [2, 5, 5]


def test_batches_are_those_of_seqio():
    config = DatasetConfig(
        "small_parity", {"inputs": 12, "targets": 4}, split="validation", batch_size=11
    )
    (task,) = task_examples(config, FEATURES)
    got = task.batch(list(task.examples()), 11)
    want = next(open_dataset(config, FEATURES).eval_batches()["small_parity"]())
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    assert task.eos_ids == (1,) and task.outputs == ("prediction", "score")
    numbers = [int(example["idx"]) for example in task.examples(9, shard=1, num_shards=3)]
    assert numbers == [1, 4, 7]


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("CHECKPOINT_STEPS=3", "has no checkpoint of step 3; it has 2, 5"),
        (
            "CHECKPOINT_STEPS='last'",
            "CHECKPOINT_STEPS must be 'latest', 'all', a step or a list of steps, got 'last'",
        ),
        ("EVAL_SPLIT='test'", "has no split 'test'"),
        ("VOCAB_SIZE=256", "expected [256,32], found [384,32]"),
        ("NUM_EXAMPLES=0", "num_examples) must be at least 1"),
        ("PREDICT_BY='guess'", "PREDICT_BY must be 'decode' or 'rank', got 'guess'"),
        ("PREDICT_BY='rank'", "does not say which answers it allows"),
        ("BATCH_SIZE=12", "does not split over the 8 data shards"),
        ("T5Config.mlp_dim=128", "is not a checkpoint of this model"),
    ],
)
def test_bad_settings_are_one_clear_line(binding, message, run, tmp_path, capsys):
    given = [
        f"CHECKPOINT_PATH='{run[0]}'",
        f"EVAL_OUTPUT_DIR='{tmp_path}/out'",
        "MIXTURE_OR_TASK_NAME='small_parity'",
    ]
    code = eval_command.main(flags("eval", *given, binding))
    error = capsys.readouterr().err
    assert message in error
    assert code == 2 and not (tmp_path / "out").exists()


def test_dry_run_and_help(run, tmp_path, capsys):
    given = [
        f"CHECKPOINT_PATH='{run[0]}'",
        f"EVAL_OUTPUT_DIR='{tmp_path}/out'",
        "MIXTURE_OR_TASK_NAME='small_parity'",
    ]
    assert (
        eval_command.main(
            [*flags("eval", *given, "CHECKPOINT_STEPS='all'", "DECODER=@BeamSearch()"), "--dry_run"]
        )
        == 0
    )
    assert "steps 2, 5" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert eval_command.main(flags("eval")) == 2
    message = capsys.readouterr().err
    assert all(
        name in message for name in ("CHECKPOINT_PATH", "EVAL_OUTPUT_DIR", "MIXTURE_OR_TASK_NAME")
    )
    code = (
        "import sys\nfrom upcycle_jax import eval\ntry:\n  eval.main(['--help'])\nfinally:\n "
        " print('jax' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "CHECKPOINT_STEPS" in done.stdout and done.stderr.strip() == "False"


def test_ranked_answers_are_the_likeliest(run, tmp_path, capsys):
    """Against the model's score of every answer, one example at a time: neither batch nor order
    matters.
    """
    folder, model, params = run
    given = [
        f"CHECKPOINT_PATH='{folder}'",
        "MIXTURE_OR_TASK_NAME='small_labels'",
        "PREDICT_BY='rank'",
        "TEACHER_FORCED=False",
    ]
    given.append("TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}")
    assert eval_command.main(flags("eval", *given, f"EVAL_OUTPUT_DIR='{tmp_path}'")) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    (task,) = task_examples(
        DatasetConfig("small_labels", {"inputs": 24, "targets": 8}, split="validation"), FEATURES
    )
    score, right = jax.jit(model.score_batch), []
    lines = rows_of(tmp_path / "inference_eval" / "small_labels-5.jsonl")
    for line, example in zip(lines, task.examples(), strict=True):
        answers = task.options(example)
        want = [
            float(score(params[5], task.batch([task.answered(example, text)], 1))[0])
            for text in answers
        ]
        assert tuple(line["options"]) == answers == ("even", "odd", "neither")
        np.testing.assert_allclose(list(line["options"].values()), want, rtol=1e-4)
        assert line["output"] == answers[int(np.argmax(want))] and line["prediction"] == int(
            np.argmax(want)
        )
        right.append(line["prediction"] == line["target"])
    assert row["accuracy"] == pytest.approx(100 * np.mean(right), abs=1e-4)

    # Answers given on the command line, and each example's own.
    two = [
        "RANK_OPTIONS={'small_labels': ('even', 'odd')}",
        "BATCH_SIZE=16",
        f"EVAL_OUTPUT_DIR='{tmp_path}/two'",
    ]
    assert eval_command.main(flags("eval", *given, *two)) == 0
    again = rows_of(tmp_path / "two" / "inference_eval" / "small_labels-5.jsonl")
    for line, before in zip(again, lines, strict=True):
        assert list(line["options"]) == ["even", "odd"]
        np.testing.assert_allclose(
            list(line["options"].values()), list(before["options"].values())[:2], rtol=1e-4
        )


def test_shots_are_before_the_inputs_of_the_own_metrics(run, tmp_path, capsys):
    shots = [
        "FEW_SHOT=@FewShot()",
        "FewShot.num_shots=2",
        "TASK_FEATURE_LENGTHS={'inputs': 80, 'targets': 6}",
        "TEACHER_FORCED=False",
    ]
    given = [
        f"CHECKPOINT_PATH='{run[0]}'",
        f"EVAL_OUTPUT_DIR='{tmp_path}'",
        "MIXTURE_OR_TASK_NAME='small_parities'",
        *shots,
    ]
    assert eval_command.main(flags("eval", *given)) == 0
    one, again, average = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["shots_per_example"] == 2.0
    own = np.mean(
        [one[name] for name in ("exact_match", "mean_length", "mean_score")]
    )  # the number of shots is no quality
    assert average["average"] == pytest.approx((own + again["exact_match"]) / 2, rel=1e-4)
    line = rows_of(tmp_path / "inference_eval" / "small_parity-5.jsonl")[3]
    assert line["input"]["inputs_pretokenized"].count("small_parity") == 3


def test_an_evaluation_beside_another_of_the_same_mixture_is_refused(run, tmp_path, capsys):
    given = [f"CHECKPOINT_PATH='{run[0]}'", f"EVAL_OUTPUT_DIR='{tmp_path}'"]
    folder = tmp_path / "inference_eval"
    with holding.hold_results(folder, "small_parities", setting="EVAL_OUTPUT_DIR"):
        before = sorted(tmp_path.rglob("*"))
        words = flags("eval", *given, "MIXTURE_OR_TASK_NAME='small_parities'")
        assert eval_command.main(words) == 2
        assert f"small_parities in {folder} is in use: process" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
