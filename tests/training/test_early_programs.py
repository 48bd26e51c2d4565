"""Programs that are compiled while data are opened: the same ones, or none."""

import dataclasses
import json
import re
import threading

import jax
import numpy as np
import pytest

from upcycle_jax.training import batches, early_programs, loop, prepare, train_state
from upcycle_jax.training.config import CheckpointConfig, SaveCheckpointConfig
from upcycle_jax.training.early_programs import EarlyPrograms
from upcycle_jax.training.spikes import LossSpikes
from upcycle_jax.training.train import Train


@pytest.fixture(scope="module", autouse=True)
def trace_once():
    """Programs are compared here: each is traced by itself, as runs do."""


@pytest.fixture
def make(bags, tmp_path):
    """`Train` with small defaults."""

    def settings(name="run", **given):
        arguments = {
            "model": bags.Model(),
            "model_dir": tmp_path / name,
            "train_dataset_cfg": bags.Dataset(),
            "train_eval_dataset_cfg": None,
            "checkpoint_cfg": CheckpointConfig(save=SaveCheckpointConfig(period=4)),
            "partitioner": bags.one_device,
            "trainer": bags.trainer(),
            "total_steps": 4,
            "stats_period": 1,
        }
        return Train(**arguments | given)

    return settings


def arguments_of(run):
    """What the loop gives to the step: a state and a batch on the devices."""
    settings = run.settings
    shardings = settings.partitioner.shardings(run.specs)
    with settings.partitioner.activate():
        state = train_state.initial_state(
            settings.model,
            settings.trainer.optimizer,
            seed=settings.random_seed,
            shardings=shardings,
        )
    data = prepare.open_data(settings.model, settings.train_dataset_cfg)
    batch = next(data.train_iterator(process_index=0, process_count=1))
    return state, batches.to_global(batch, settings.partitioner, 1)


def program(compiled):
    """Its HLO, without the lines of source that it came from."""
    text = compiled.as_text()
    text = text[: text.find("FileNames")] + text[text.find("\n%") :]
    return re.sub(r", metadata=\{[^}]*\}", "", text)


@pytest.fixture(params=["one_device", "eight_devices"])
def partitioner(request, bags):
    from upcycle_jax.partitioning import Partitioner

    return bags.one_device if request.param == "one_device" else Partitioner()


def test_the_early_step_is_the_program_of_the_arrays_themselves(make, bags, partitioner):
    run = prepare.prepare(make(partitioner=partitioner))
    programs = EarlyPrograms(run)
    state, batch = arguments_of(run)
    early = programs.step(run, state, batch)
    assert early is programs._step.result()
    assert program(early) == program(early_programs.compiled_step(run, state, batch))
    fresh = programs.fresh_state()()
    assert jax.tree.structure(fresh) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(fresh), jax.tree.leaves(state), strict=True):
        assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    programs.close()


def test_a_limit_of_the_loss_is_an_argument_of_the_early_step(make, bags):
    trainer = bags.trainer(loss_spikes=LossSpikes(policy="skip"))
    run = prepare.prepare(make(trainer=trainer))
    programs = EarlyPrograms(run)
    state, batch = arguments_of(run)
    limit = batches.replicated_scalar(9.0, run.settings.partitioner)
    assert programs.step(run, state, batch, limit) is programs._step.result()
    programs.close()


def test_other_kinds_of_arguments_are_compiled_for_anew(make):
    run = prepare.prepare(make())
    programs = EarlyPrograms(run)
    state, batch = arguments_of(run)
    other = {name: np.asarray(rows, np.int16) for name, rows in batch.items()}
    found = programs.step(run, state, other)
    assert found is not programs._step.result()
    found(state, other)
    programs.close()


def test_settings_of_one_thread_alone_are_heeded(make):
    """Settings that hold in a `with` block do not hold in other threads."""
    run = prepare.prepare(make())
    with jax.default_matmul_precision("bfloat16"):
        programs = EarlyPrograms(run)
        state, batch = arguments_of(run)
        assert programs._step.result() is None and programs.fresh_state() is None
        assert program(programs.step(run, state, batch)) == program(
            early_programs.compiled_step(run, state, batch)
        )
    programs.close()


def test_a_run_has_the_losses_of_one_that_compiles_nothing_early(make, monkeypatch):
    make("early").run()
    used = []
    monkeypatch.setattr(
        early_programs, "_or_nothing", lambda *_: used.append(threading.current_thread().name)
    )
    make("late").run()
    assert len(used) == 2 and all(name.startswith("compile") for name in used)

    def rows(name):
        lines = (make(name).folder / "train" / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if "tim" not in k} for line in lines]

    assert len(rows("early")) == 4 and rows("early") == rows("late")


def test_an_error_of_the_model_is_raised_at_its_place(make, bags):
    class Wrong(bags.Model):
        def loss_fn(self, *args, **kwargs):
            raise RuntimeError("no such loss")

    run = prepare.prepare(make())
    state, batch = arguments_of(run)
    wrong = dataclasses.replace(run, settings=make(model=Wrong()))
    programs = EarlyPrograms(wrong)
    assert programs._step.result() is None
    with pytest.raises(RuntimeError, match="no such loss"):
        programs.step(wrong, state, batch)


def test_data_that_cannot_be_opened_are_not_waited_for(make, monkeypatch):
    """The error comes at once, however long the compiler takes."""
    release = threading.Event()
    monkeypatch.setattr(early_programs, "_early_step", lambda run: release.wait(60))

    def fails(*_):
        raise FileNotFoundError("no such data")

    monkeypatch.setattr(loop.prepare, "open_data", fails)
    settings = make()
    with pytest.raises(FileNotFoundError, match="no such data"):
        settings.run()
    assert not release.is_set() and not (settings.folder / "train").exists()
    release.set()
