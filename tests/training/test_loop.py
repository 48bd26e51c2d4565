"""The whole of a run: what it writes, how it resumes, how it stops, what it refuses."""

import dataclasses
import json
import os
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest

from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.training import input_check
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.optimizers import AdamW
from upcycle_jax.training.progress import LossSpikeError
from upcycle_jax.training.spikes import LossSpikes
from upcycle_jax.training.train import Train
from upcycle_jax.trees import LeafSpec


def starter(bags, folder):
    """`Train` with small defaults in `folder`, run."""

    def run(name="run", *, period=4, restore=None, steps=8, dry_run=False, **kwargs):
        arguments = {
            "model": bags.Model(),
            "model_dir": folder / name,
            "train_dataset_cfg": bags.Dataset(),
            "train_eval_dataset_cfg": bags.Dataset(split="validation"),
            "checkpoint_cfg": CheckpointConfig(
                restore=restore, save=SaveCheckpointConfig(period=period)
            ),
            "partitioner": bags.one_device,
            "trainer": bags.trainer(),
            "total_steps": steps,
            "eval_steps": 2,
            "eval_period": 4,
            "stats_period": 1,
        }
        return Train(**arguments | kwargs).run(dry_run=dry_run)

    return run


@pytest.fixture
def start(bags, tmp_path):
    return starter(bags, tmp_path)


@pytest.fixture(scope="module")
def whole(bags, tmp_path_factory):
    """MODEL_DIR of an uninterrupted run of ten steps, which saved 4, 8 and 10. Only to be read."""
    folder = tmp_path_factory.mktemp("runs")
    starter(bags, folder)("whole", steps=10)
    return folder / "whole"


@pytest.fixture(scope="module")
def made_dense(bags, tmp_path_factory):
    """MODEL_DIR of a run of four steps. Only to be read."""
    folder = tmp_path_factory.mktemp("runs")
    starter(bags, folder)("dense", steps=4)
    return folder / "dense"


@pytest.fixture
def dense(made_dense, tmp_path):
    """A copy of a MODEL_DIR of four steps, to continue from, or in."""
    return shutil.copytree(made_dense, tmp_path / "dense")


def rows(folder, skip=("wall_time",)):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {k: v for k, v in row.items() if k not in skip and not k.startswith("timing/")}
        for row in lines
    }


def leaves(path):
    reader = open_checkpoint(path)
    return {name: reader.read(name) for name in reader.specs()}


def assert_same_arrays(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_a_run_leaves_what_it_promises(start, tmp_path):
    result = start(files={"config.gin": "A = 1\n"})
    folder = tmp_path / "run"
    assert (result.step, result.start, result.interrupted) == (8, "scratch", None)
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.gin",
        "model-info.txt",
        "manifest.json",
        "train",
        "training_eval",
        "checkpoint_4",
        "checkpoint_8",
    } <= names
    assert (folder / "config.gin").read_text() == "A = 1\n"
    assert (
        "Total number of parameters: 448" in (folder / "model-info.txt").read_text()
    )  # 24 * 8 + 2 * 8 * 16
    assert list(rows(folder / "train")) == list(range(1, 9))
    for task in ("bags_a", "bags_b"):
        assert list(rows(folder / "training_eval" / task)) == [0, 4, 8]
        assert list((folder / "training_eval" / task).glob("events.out.tfevents.*"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["status"],
        manifest["step"],
        manifest["start_step"],
        manifest["parameters"],
    ) == ("finished", 8, 0, 448)
    assert manifest["starts"][0]["versions"]["jax"] == jax.__version__
    assert manifest["data"]["name"] == "bags"


def test_training_reduces_the_loss(start, tmp_path):
    result = start(steps=60, period=100, eval_period=60)
    first = rows(tmp_path / "run" / "training_eval" / "bags_a")[0]["cross_ent_loss"]
    assert result.evaluation["bags_a"]["cross_ent_loss"] < first - 0.1


def test_a_run_that_waits_for_its_batches_says_so(start, bags, caplog, monkeypatch):
    class Slow(bags.Dataset):
        def batch(self, k):
            time.sleep(0.1)
            return super().batch(k)

    monkeypatch.setattr(input_check, "SHORTEST", 0.0)
    start(train_dataset_cfg=Slow(), stats_period=4)
    (said,) = [text for text in caplog.messages if text.startswith("INPUT limits this run")]
    assert said.endswith(
        "came. Its batches are made by the host: give the host more processors, or"
        " run nothing beside it."
    )


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(start, whole, dense):
    assert start("dense", steps=7).start == "resume"
    start("dense", steps=10)
    # Every metric of every step, as printed to JSON without loss of digits.
    assert rows(whole / "train") == rows(dense / "train")
    assert_same_arrays(leaves(whole / "checkpoint_10"), leaves(dense / "checkpoint_10"))
    assert (
        rows(whole / "training_eval" / "bags_b")[8] == rows(dense / "training_eval" / "bags_b")[8]
    )


def test_finished_run_started_again_does_nothing(start, tmp_path):
    start()
    before = (tmp_path / "run" / "train" / "metrics.jsonl").read_text()
    assert start().step == 8
    assert (tmp_path / "run" / "train" / "metrics.jsonl").read_text() == before


def test_a_signal_saves_after_the_step_and_the_run_goes_on_later(start, whole, tmp_path, bags):
    class Interrupting(bags.Dataset):
        def batch(self, k):
            if k == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(k)

    result = start("cut", steps=10, train_dataset_cfg=Interrupting())
    assert (result.step, result.interrupted) == (6, "SIGTERM")
    assert (tmp_path / "cut" / "checkpoint_6").exists()
    assert (
        json.loads((tmp_path / "cut" / "manifest.json").read_text())["status"]
        == "interrupted by SIGTERM"
    )
    start("cut", steps=10)
    assert_same_arrays(leaves(whole / "checkpoint_10"), leaves(tmp_path / "cut" / "checkpoint_10"))


def test_continuing_keeps_step_schedule_optimizer_and_data_position(start, whole, dense, tmp_path):
    restore = RestoreCheckpointConfig(path=str(dense))
    result = start("more", steps=8, restore=restore)
    assert (result.start, result.step) == ("continue", 8)
    # Everything is carried on, so a continuation in another MODEL_DIR is the same run.
    assert_same_arrays(leaves(whole / "checkpoint_8"), leaves(tmp_path / "more" / "checkpoint_8"))
    manifest = json.loads((tmp_path / "more" / "manifest.json").read_text())
    assert manifest["start_step"] == 4 and manifest["restored_from"]["path"].endswith(
        "checkpoint_4"
    )
    evaluated = rows(tmp_path / "more" / "training_eval" / "bags_a")
    assert (
        evaluated[4] == rows(dense / "training_eval" / "bags_a")[4]
    )  # the restored state, before any update


@pytest.mark.parametrize(("position", "batch"), [("step", 4), ("start", 0), ("checkpoint", 4)])
def test_data_position_after_restoring(start, dense, bags, position, batch):
    seen = []

    class Recording(bags.Dataset):
        def batch(self, k):
            seen.append(k)
            return super().batch(k)

    restore = RestoreCheckpointConfig(path=str(dense), data_position=position)
    start("more", steps=6, restore=restore, train_dataset_cfg=Recording())
    assert seen == [batch, batch + 1]


def test_first_batch_shifts_the_data_and_a_resumed_run_stays_on_course(start, bags):
    seen = []

    class Recording(bags.Dataset):
        def batch(self, k):
            seen.append(k)
            return super().batch(k)

    start("scratch", steps=4, first_batch=100, train_dataset_cfg=Recording())
    start("scratch", steps=6, first_batch=100, train_dataset_cfg=Recording())
    assert seen == [100, 101, 102, 103, 104, 105]


def test_restoring_with_a_new_optimizer_and_step(start, dense, tmp_path, bags):
    restore = RestoreCheckpointConfig(path=str(dense), optimizer_state="reset", step="reset")
    result = start(
        "tune", steps=2, restore=restore, trainer=bags.trainer(optimizer=AdamW()), period=1
    )
    assert result.step == 2
    assert {
        name.rsplit("/", 1)[-1]
        for name in leaves(tmp_path / "tune" / "checkpoint_2")
        if "param_states" in name
    } == {"mu", "nu"}


def test_a_checkpoint_without_optimizer_state_starts_it_afresh(start, dense, tmp_path, caplog):
    state = leaves(dense / "checkpoint_4")
    bare = {
        name: array for name, array in state.items() if "param_states" not in name
    }  # as a Hugging Face folder has it
    writer = create_checkpoint(
        tmp_path / "bare",
        {name: LeafSpec(a.shape, a.dtype) for name, a in bare.items()},
        step=4,
        metadata={},
    )
    for name, array in bare.items():
        if name != "state/step":
            writer.write(name, None, array)
    writer.finalize()
    with caplog.at_level("INFO", logger="upcycle_jax"):
        start("more", steps=5, restore=RestoreCheckpointConfig(path=str(tmp_path / "bare")))
    assert "holds no optimizer state: the optimizer starts afresh" in caplog.text
    start(
        "reset",
        steps=5,
        restore=RestoreCheckpointConfig(path=str(dense), optimizer_state="reset"),
    )
    assert_same_arrays(
        leaves(tmp_path / "more" / "checkpoint_5"), leaves(tmp_path / "reset" / "checkpoint_5")
    )


def test_a_full_disk_is_noticed_before_anything_is_written(start, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"1000 Bytes free, one checkpoint takes"):
        start()
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_prepared_leave_no_trace(start, bags, tmp_path):
    class Damaged(bags.Dataset):
        def train_iterator(self, process_index=0, process_count=1):
            def prepare(first_batch, num_batches):
                raise ValueError("the image 7.jpg cannot be read")

            iterator = super().train_iterator()
            iterator.prepare = prepare
            return iterator

    with pytest.raises(ValueError, match=r"7\.jpg cannot be read"):
        start(train_dataset_cfg=Damaged())
    assert not (tmp_path / "run").exists()


def test_dry_run_describes_and_writes_nothing(start, dense, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    start("more", restore=RestoreCheckpointConfig(path=str(dense)), dry_run=True)
    out = capsys.readouterr().out
    assert (
        "continue from" in out
        and "4 -> 8 (4 to do)" in out
        and "448" in out
        and "data 1 x expert 1 x model 1" in out
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_dir_of_another_model_is_refused_and_left_alone(start, dense, tmp_path, bags):
    dense.rename(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "run").rglob("*"))}
    with pytest.raises(ValueError, match=r"belongs to a run of another model"):
        start(model=bags.Model(hidden=32))
    with pytest.raises(
        ValueError,
        match=(
            r"belongs to another model or optimizer.*nu.*expected, not there.*Choose another"
            r" MODEL_DIR"
        ),
    ):
        with_dots(lambda: start(trainer=bags.trainer(optimizer=AdamW())))
    (tmp_path / "run" / "manifest.json").rename(
        tmp_path / "manifest.json"
    )  # a MODEL_DIR that something else wrote
    with pytest.raises(ValueError, match=r"mlp/wi_0/kernel: expected \[8,32\], found \[8,16\]"):
        start(model=bags.Model(hidden=32))
    (tmp_path / "manifest.json").rename(tmp_path / "run" / "manifest.json")
    assert {
        path: path.stat().st_mtime_ns
        for path in sorted((tmp_path / "run").rglob("*"))
        if path != tmp_path / "run"
    } == {path: time for path, time in before.items() if path != tmp_path / "run"}


def with_dots(call):
    """Raises what `call` raises, on one line."""
    try:
        call()
    except ValueError as error:
        raise ValueError(str(error).replace("\n", " ")) from None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 4}, r"at step 4, TRAIN_STEPS is 4: .*set it above 4"),
        ({"restore": "nowhere"}, r"nowhere does not exist"),
        ({"hidden": 32}, r"wi_0/kernel: expected \[8,32\], found \[8,16\].*Choose the model file"),
        (
            {"num_experts": 2},
            r"dense and the model has experts: set RestoreCheckpointConfig.recipe",
        ),
        ({"optimizer": AdamW()}, r"Only the optimizer state differs: .*optimizer_state = 'reset'"),
        ({"step_offset": 5}, r"step_offset is 5, but the run starts at step 4"),
        ({"batch_size": 6, "microbatches": 4}, r"BATCH_SIZE 6 does not split into 4 microbatches"),
        ({"vocabulary": 100}, r"has 100 ids, the model's vocab_size is 24"),
        ({"eval_period": 0}, r"train.eval_period is 0"),
        ({"first_batch": -1}, r"train.first_batch is -1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    start, dense, tmp_path, bags, arguments, message
):
    given = dict(arguments)
    kwargs = {
        "restore": RestoreCheckpointConfig(path=str(tmp_path / given.pop("restore", "dense"))),
        "model": bags.Model(
            hidden=given.pop("hidden", 16), num_experts=given.pop("num_experts", 0)
        ),
        "train_dataset_cfg": bags.Dataset(
            batch_size=given.pop("batch_size", 8), vocabulary=given.pop("vocabulary", 24)
        ),
    }
    optimizer = given.pop("optimizer", bags.trainer().optimizer)
    if "step_offset" in given:
        optimizer = dataclasses.replace(optimizer, step_offset=given.pop("step_offset"))
    kwargs["trainer"] = bags.trainer(
        optimizer=optimizer, num_microbatches=given.pop("microbatches", None)
    )
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        with_dots(lambda: start("new", **kwargs, **given))
    assert not (tmp_path / "new").exists()


def test_a_model_dir_that_cannot_be_written_to(start, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"MODEL_DIR .*file/run cannot be written to"):
        start("file/run")


def test_damaged_latest_checkpoint_falls_back_to_the_one_before(start, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "hurt")
    shutil.rmtree(tmp_path / "hurt" / "checkpoint_10")
    for data in (tmp_path / "hurt" / "checkpoint_8" / "state").rglob("d/*"):
        data.write_bytes(b"\0" * data.stat().st_size)
    result = start("hurt", steps=10)
    assert result.step == 10 and "IS DAMAGED" in caplog.text
    assert list((tmp_path / "hurt").glob("damaged_checkpoint_8_*"))
    assert_same_arrays(leaves(whole / "checkpoint_10"), leaves(tmp_path / "hurt" / "checkpoint_10"))


def test_nan_stops_the_run_and_names_step_and_batch(start, tmp_path, bags):
    broken = bags.trainer(
        learning_rate_fn=lambda step: jax.numpy.where(step == 5, jax.numpy.nan, 0.1)
    )
    with pytest.raises(
        ValueError, match=r"step 7: the loss is nan"
    ):  # the update that ends at step 6 spoils the parameters
        start(trainer=broken, steps=12, eval_period=100)
    report = json.loads((tmp_path / "run" / "non_finite_7.json").read_text())
    assert report["batch"] == 6 and set(report["batch_crc32"]) == {
        "encoder_input_tokens",
        "decoder_target_tokens",
    }
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    assert (
        not (tmp_path / "run" / "checkpoint_8").exists()
        and (tmp_path / "run" / "checkpoint_4").exists()
    )


def test_nan_can_be_skipped(start, tmp_path, bags):
    class NanAtStepFive(bags.Model):
        def loss_fn(self, params, batch, dropout_rng, *, denominator, aux_scale=1.0):
            loss, metrics = super().loss_fn(
                params, batch, dropout_rng, denominator=denominator, aux_scale=aux_scale
            )
            poison = jax.numpy.where(
                batch["encoder_input_tokens"][0, 0] == marked, jax.numpy.nan, 1.0
            )
            return loss * poison, metrics

    marked = int(bags.Dataset().batch(4)["encoder_input_tokens"][0, 0])
    bad = [k for k in range(8) if bags.Dataset().batch(k)["encoder_input_tokens"][0, 0] == marked]
    start(
        model=NanAtStepFive(), trainer=bags.trainer(non_finite="skip"), period=1, eval_period=None
    )
    before, after = (
        leaves(tmp_path / "run" / "checkpoint_4"),
        leaves(tmp_path / "run" / "checkpoint_5"),
    )
    assert after.pop("state/step") == before.pop("state/step") + 1
    assert_same_arrays(before, after)
    final = rows(tmp_path / "run" / "train")[8]
    assert final["skipped_updates"] == len(bad) and np.isfinite(final["loss"])


def test_bfloat16_checkpoints_restore(start, tmp_path):
    config = CheckpointConfig(save=SaveCheckpointConfig(period=4, dtype="bfloat16"))
    start(steps=4, checkpoint_cfg=config)
    specs = open_checkpoint(tmp_path / "run" / "checkpoint_4").specs()
    assert specs["target/token_embedder/embedding"].dtype.name == "bfloat16"
    assert specs["state/param_states/token_embedder/embedding/v_row"].dtype.name == "float32"
    assert start(steps=6, checkpoint_cfg=config).start == "resume"


def with_spikes(bags, *marked, by=50.0):
    """A model whose loss of the batches `marked` is multiplied; batches are told by their first
    tokens.
    """
    prints = [
        tuple(int(token) for token in bags.Dataset().batch(k)["encoder_input_tokens"][0])
        for k in marked
    ]

    class Spiking(bags.Model):
        def loss_fn(self, params, batch, dropout_rng, *, denominator, aux_scale=1.0):
            loss, metrics = super().loss_fn(
                params, batch, dropout_rng, denominator=denominator, aux_scale=aux_scale
            )
            row = batch["encoder_input_tokens"][0]
            hit = jax.numpy.any(
                jax.numpy.stack([jax.numpy.all(row == jax.numpy.array(p)) for p in prints])
            )
            return loss * jax.numpy.where(hit, by, 1.0), metrics

    return Spiking()


def test_a_loss_spike_stops_the_run_and_names_the_batch(start, tmp_path, bags):
    stop = bags.trainer(loss_spikes=LossSpikes(window=8))
    with pytest.raises(
        LossSpikeError,
        match=r"step 11: the loss .* is a spike, above .*batch 10, .*LossSpikes.policy = 'skip'",
    ):
        start(model=with_spikes(bags, 10), trainer=stop, steps=16, eval_period=None)
    report = json.loads((tmp_path / "run" / "loss_spike_11.json").read_text())
    assert (
        report["batch"] == 10
        and float(report["loss"]) > report["limit"]
        and set(report["batch_crc32"]) == {"encoder_input_tokens", "decoder_target_tokens"}
    )
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    assert (tmp_path / "run" / "checkpoint_8").exists() and not (
        tmp_path / "run" / "checkpoint_12"
    ).exists()


def test_spikes_are_skipped_and_a_resumed_run_skips_the_same(start, tmp_path, bags):
    """Batch 3 comes before half a window (4 losses) is known, so it trains; 10 and 13 are skipped,
    wherever the run was cut.
    """
    arguments = {
        "model": with_spikes(bags, 3, 10, 13),
        "trainer": bags.trainer(loss_spikes=LossSpikes(policy="skip", window=8)),
        "eval_period": None,
        "period": 3,
    }
    start("whole", steps=16, **arguments)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (12, 15, 16):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint_{step}")
    for step in (11, 14):
        (tmp_path / "parts" / f"loss_spike_{step}.json").unlink()
    for steps in (12, 16):  # the window of step 11, and of step 14, lies partly before a cut
        start("parts", steps=steps, **arguments)
    assert sorted(path.name for path in (tmp_path / "parts").glob("loss_spike_*")) == [
        "loss_spike_11.json",
        "loss_spike_14.json",
    ]
    for name in ("loss_spike_11.json", "loss_spike_14.json"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert_same_arrays(
        leaves(tmp_path / "whole" / "checkpoint_16"), leaves(tmp_path / "parts" / "checkpoint_16")
    )
    assert rows(tmp_path / "whole" / "train", skip=("wall_time", "skipped_updates")) == rows(
        tmp_path / "parts" / "train", skip=("wall_time", "skipped_updates")
    )


def test_a_skipped_spike_changes_nothing_but_the_step(start, tmp_path, bags):
    skip = bags.trainer(loss_spikes=LossSpikes(policy="skip", window=8))
    start(model=with_spikes(bags, 10), trainer=skip, steps=11, eval_period=None, period=1)
    before, after = (
        leaves(tmp_path / "run" / "checkpoint_10"),
        leaves(tmp_path / "run" / "checkpoint_11"),
    )
    assert after.pop("state/step") == before.pop("state/step") + 1
    assert_same_arrays(before, after)
    assert rows(tmp_path / "run" / "train")[11]["skipped_updates"] == 1


def test_looking_for_spikes_leaves_a_run_without_any_as_it_was(start, tmp_path, bags):
    """'stop' runs the same program; 'skip' another one, which XLA may round otherwise."""
    start("plain", steps=12, eval_period=None, period=12)
    for policy in ("stop", "skip"):
        start(
            policy,
            steps=12,
            eval_period=None,
            period=12,
            trainer=bags.trainer(loss_spikes=LossSpikes(policy=policy, window=8)),
        )
    plain, stop, skip = (
        leaves(tmp_path / name / "checkpoint_12") for name in ("plain", "stop", "skip")
    )
    assert rows(tmp_path / "plain" / "train") == rows(tmp_path / "stop" / "train")
    assert_same_arrays(plain, stop)
    for name, array in plain.items():
        np.testing.assert_allclose(array, skip[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_continuation_in_another_model_dir_knows_no_losses(start, tmp_path, bags):
    """Another objective may have other losses: the window belongs to the run."""
    stop = bags.trainer(loss_spikes=LossSpikes(window=8))
    start("dense", steps=4, trainer=stop)
    assert (
        len(open_checkpoint(tmp_path / "dense" / "checkpoint_4").metadata()["recent_losses"]) == 4
    )
    start(
        "more", steps=5, trainer=stop, restore=RestoreCheckpointConfig(path=str(tmp_path / "dense"))
    )
    assert [
        step
        for step, _ in open_checkpoint(tmp_path / "more" / "checkpoint_5").metadata()[
            "recent_losses"
        ]
    ] == [5]
