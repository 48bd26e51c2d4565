"""Weights & Biases: what is sent, that a resumed run goes on in the same W&B run, and the error
without the package.
"""

import importlib.util
import json
import sys
import types

import pytest

from upcycle_jax.training.config import CheckpointConfig, SaveCheckpointConfig
from upcycle_jax.training.tracking import Wandb
from upcycle_jax.training.train import Train


@pytest.fixture
def sent(monkeypatch):
    """A stand-in for the package, and what it was told."""
    told = {"inits": [], "rows": [], "finished": [], "metrics": []}

    class Run:
        def define_metric(self, name, **kwargs):
            told["metrics"].append((name, kwargs))

        def log(self, row):
            told["rows"].append(row)

        def finish(self, exit_code=None):
            told["finished"].append(exit_code)

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.init = lambda **kwargs: (told["inits"].append(kwargs), Run())[1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


@pytest.fixture
def start(bags, tmp_path):
    def run(steps, **kwargs):
        arguments = {
            "model": bags.Model(),
            "model_dir": tmp_path / "run",
            "train_dataset_cfg": bags.Dataset(),
            "train_eval_dataset_cfg": bags.Dataset(split="validation"),
            "checkpoint_cfg": CheckpointConfig(save=SaveCheckpointConfig(period=2)),
            "partitioner": bags.one_device,
            "trainer": bags.trainer(),
            "total_steps": steps,
            "eval_steps": 1,
            "eval_period": 2,
            "stats_period": 1,
        }
        return Train(**arguments | kwargs).run()

    return run


def test_what_is_sent_is_what_is_written(start, sent, tmp_path):
    start(2, tracker=Wandb(project="mine", tags=("a",)))
    (init,) = sent["inits"]
    assert (init["project"], init["name"], init["tags"], init["resume"], init["dir"]) == (
        "mine",
        "run",
        ["a"],
        "allow",
        str(tmp_path / "run"),
    )
    assert init["config"]["parameters"] == 448 and ("*", {"step_metric": "step"}) in sent["metrics"]
    written = [
        json.loads(line)
        for line in (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = {row["step"]: row["train/loss"] for row in sent["rows"] if "train/loss" in row}
    assert losses == {row["step"]: row["loss"] for row in written} and sent["finished"] == [0]
    assert [
        row["step"] for row in sent["rows"] if "training_eval/bags_b/cross_ent_loss" in row
    ] == [0, 2]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(start, sent):
    start(2, tracker=Wandb())
    start(4, tracker=Wandb(name="other"))
    first, second = sent["inits"]
    assert first["id"] == second["id"] and len(first["id"]) == 16 and second["name"] == "other"


def test_a_failed_run_is_marked(start, sent, bags):
    broken = bags.trainer(learning_rate_fn=lambda step: float("nan"))
    with pytest.raises(ValueError, match="the loss is nan"):
        start(4, tracker=Wandb(), trainer=broken)
    assert sent["finished"] == [1]


def test_nothing_is_imported_where_it_is_off(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    assert start(1).step == 1


def test_without_the_package_the_error_comes_before_anything_is_written(
    start, monkeypatch, tmp_path
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"wandb is not installed: pip install 'upcycle_jax\[wandb\]', or set TRACKER = None",
    ):
        start(1, tracker=Wandb())
    assert not (tmp_path / "run").exists()


def test_a_mode_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"Wandb.mode is 'off': choose one of 'online', 'offline', 'disabled'"
    ):
        Wandb(mode="off")


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="the package wandb is not installed (extra 'wandb')",
)
def test_the_package_itself_offline(start, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    start(2, tracker=Wandb())
    start(3, tracker=Wandb())
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(list(folder.glob("run-*.wandb")) for folder in folders)
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # one id
