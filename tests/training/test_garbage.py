"""The collector of cycles rests while a run starts, and works again whatever happens then."""

import gc

import pytest

from upcycle_jax.training import garbage, loop, prepare
from upcycle_jax.training.train import Train


@pytest.fixture(autouse=True)
def enabled():
    gc.enable()
    yield
    garbage.resume()
    assert gc.isenabled()


def short_run(bags, model_dir):
    return Train(
        model=bags.Model(),
        model_dir=model_dir,
        train_dataset_cfg=bags.Dataset(),
        train_eval_dataset_cfg=None,
        partitioner=bags.one_device,
        trainer=bags.trainer(),
        total_steps=2,
    )


def test_a_pause_ends_once_and_for_all():
    garbage.pause()
    garbage.pause()
    assert not gc.isenabled()
    garbage.resume()
    assert gc.isenabled()
    garbage.resume()
    assert gc.isenabled()


def test_who_has_turned_it_off_keeps_it_off():
    gc.disable()
    garbage.pause()
    garbage.resume()
    assert not gc.isenabled()
    gc.enable()


def test_it_rests_while_a_run_starts_and_works_in_the_loop(bags, tmp_path, monkeypatch):
    found = {}

    def spy(module, name):
        function = getattr(module, name)

        def seen(*args, **kwargs):
            found[name] = gc.isenabled()
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, seen)

    spy(prepare, "prepare")
    spy(prepare, "open_data")
    spy(loop.batches, "check_first_batch")
    result = short_run(bags, tmp_path).run()
    assert result.step == 2, result
    assert found == {"prepare": False, "open_data": False, "check_first_batch": True}
    assert gc.isenabled()


def test_it_works_again_after_a_refusal(bags, tmp_path, monkeypatch):
    def fails(*_):
        raise FileNotFoundError("no such data")

    monkeypatch.setattr(prepare, "open_data", fails)
    run = short_run(bags, tmp_path)
    with pytest.raises(FileNotFoundError):
        run.run()
    assert gc.isenabled()
