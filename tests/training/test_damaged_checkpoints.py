"""Damage of a run's checkpoints: what it falls back to, what it refuses, and what it names."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from upcycle_jax import trees
from upcycle_jax.checkpoints import CheckpointManager, open_checkpoint
from upcycle_jax.checkpoints.checksums import checksum, device_checksums
from upcycle_jax.checkpoints.verification import (
    CHECKSUMS_KEY,
    DIGESTS_FILE,
    DamagedCheckpointError,
    NonFiniteParameterError,
)
from upcycle_jax.surgery.recipe import NoisyCopies, Recipe
from upcycle_jax.training.config import (
    CheckpointConfig,
    RestoreCheckpointConfig,
    SaveCheckpointConfig,
)
from upcycle_jax.training.train import Train

EMBEDDING, KERNEL = "target/token_embedder/embedding", "target/decoder/layers_0/mlp/wo/kernel"


def run(bags, folder, *, steps, checkpoint_cfg=None, **kwargs):
    """A run without evaluation that saves every second step."""
    arguments = {
        "model": bags.Model(),
        "model_dir": folder,
        "train_dataset_cfg": bags.Dataset(),
        "checkpoint_cfg": checkpoint_cfg or CheckpointConfig(save=SaveCheckpointConfig(period=2)),
        "partitioner": bags.one_device,
        "trainer": bags.trainer(),
        "total_steps": steps,
    }
    return Train(**arguments | kwargs).run()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bags):
    """`saved`: a run with checkpoints of steps 2 and 4. `whole`: the same, ended at step 5."""
    folder = tmp_path_factory.mktemp("runs")
    run(bags, folder / "saved", steps=4)
    run(bags, folder / "whole", steps=5)
    return folder


@pytest.fixture
def hurt(runs, tmp_path):
    """A copy of the run, to be damaged."""
    shutil.copytree(runs / "saved", tmp_path / "run")
    return tmp_path / "run"


def leaves(path):
    reader = open_checkpoint(path)
    return {name: reader.read(name) for name in reader.specs()}


def assert_ends_as_the_whole(runs, folder):
    whole, found = leaves(runs / "whole" / "checkpoint_5"), leaves(folder / "checkpoint_5")
    assert whole.keys() == found.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)


def change(checkpoint, name, value):
    """Stores another value in a leaf's first element; everything else about the files is right."""
    array = open_checkpoint(checkpoint)._array(name)
    array[(0,) * array.ndim].write(value).result()


def rewrite(content):
    return lambda path: path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    """One bit in the middle of the content."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def without(key):
    def edit(path):
        content = json.loads(path.read_text())
        del content["custom_metadata"][key]
        path.write_text(json.dumps(content))

    return edit


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


POSITION = "dataset/process_0-of-1"


# Every file is damaged in one way, its metadata in three; further ways are refused alike.
FURTHER = [
    ("_CHECKPOINT_METADATA", flip),
    ("_CHECKPOINT_METADATA", rewrite(b"[]")),
    ("_CHECKPOINT_METADATA", rewrite(b'{"custom_metadata": {"upcycle_jax": 3}}')),
    ("_CHECKPOINT_METADATA", without("upcycle_jax")),
    ("_CHECKPOINT_METADATA", remove),
    (f"{POSITION}/position.json", remove),
    (f"{POSITION}/{DIGESTS_FILE}", remove),
    ("state/_METADATA", rewrite(b"\xff\xfe")),
    ("state/_METADATA", remove),
]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("_CHECKPOINT_METADATA", cut),
        ("_CHECKPOINT_METADATA", rewrite(b'{"a":' * 20000)),
        ("_CHECKPOINT_METADATA", without(CHECKSUMS_KEY)),
        (f"{POSITION}/position.json", rewrite(b"3")),
        (f"{POSITION}/{DIGESTS_FILE}", flip),
        ("dataset", remove),
        ("state/_METADATA", rewrite(b"null")),
        ("state/manifest.ocdbt", flip),
        ("state/d", remove),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER),
    ],
)
def test_damage_of_the_latest_step_falls_back_to_the_one_before(
    runs, hurt, bags, caplog, file, damage
):
    damage(hurt / "checkpoint_4" / file)
    assert run(bags, hurt, steps=5).start == "resume"
    assert f"{hurt / 'checkpoint_4'} IS DAMAGED and is passed over" in caplog.text
    assert len(list(hurt.glob("damaged_checkpoint_4_*"))) == 1
    assert_ends_as_the_whole(runs, hurt)


def test_damaged_metadata_of_an_older_step_does_not_stop_the_latest(runs, hurt, bags, caplog):
    (hurt / "checkpoint_2" / "_CHECKPOINT_METADATA").write_text("[]")
    run(bags, hurt, steps=5)
    assert f"{hurt / 'checkpoint_2'} IS DAMAGED" in caplog.text
    assert_ends_as_the_whole(runs, hurt)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_changed_value_is_noticed_and_named(runs, hurt, bags, tmp_path, caplog, dtype):
    """The store is whole and decodes: only the checksums tell."""
    save = SaveCheckpointConfig(period=2, dtype=dtype)
    run(bags, tmp_path / "other", steps=4, checkpoint_cfg=CheckpointConfig(save=save))
    latest = tmp_path / "other" / "checkpoint_4"
    found = leaves(latest)
    saved = json.loads((latest / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert found[EMBEDDING].dtype.name == dtype
    assert saved[CHECKSUMS_KEY]["leaves"] == {name: checksum(a) for name, a in found.items()}
    for name, value in ((EMBEDDING, 0.125), ("state/step", 5)):
        folder = tmp_path / name.replace("/", "_")
        shutil.copytree(tmp_path / "other", folder)
        change(folder / "checkpoint_4", name, value)
        caplog.clear()
        assert run(bags, folder, steps=5).start == "resume"
        assert "checkpoint_4 IS DAMAGED" in caplog.text and "not what was saved" in caplog.text
        assert name in caplog.text or "the step in it, 5," in caplog.text
        if dtype == "float32":
            assert_ends_as_the_whole(runs, folder)


def test_both_switches_leave_the_comparison_out(hurt, bags, tmp_path, caplog):
    change(hurt / "checkpoint_4", EMBEDDING, 0.125)
    save = SaveCheckpointConfig(period=2, checksums=False)
    with caplog.at_level("INFO", logger="upcycle_jax"):
        run(bags, hurt, steps=6, checkpoint_cfg=CheckpointConfig(save=save, verify=False))
        assert "DAMAGED" not in caplog.text and "checkpoint_4: 16 leaves" in caplog.text
        metadata = json.loads((hurt / "checkpoint_6" / "_CHECKPOINT_METADATA").read_text())
        assert metadata["custom_metadata"] == {}
        caplog.clear()
        run(bags, hurt, steps=7)  # as from a checkpoint of an older version
    assert "checkpoint_6: 16 leaves" in caplog.text and "no checksums were saved" in caplog.text
    for kind, field in ((SaveCheckpointConfig, "checksums"), (CheckpointConfig, "verify")):
        with pytest.raises(ValueError, match=f"{field} must be True or False, got 'no'"):
            kind(**{field: "no"})


def test_the_seconds_are_logged(hurt, bags, caplog):
    with caplog.at_level("INFO", logger="upcycle_jax"):
        run(bags, hurt, steps=5)
    assert "checksums of 16 leaves (2.1 KiB) are those saved; looked at in" in caplog.text
    assert "s of it for 16 checksums)" in caplog.text


@pytest.mark.parametrize("recipe", [None, Recipe()])
def test_a_damaged_checkpoint_is_neither_continued_nor_upcycled(hurt, bags, tmp_path, recipe):
    change(hurt / "checkpoint_4", KERNEL, 0.125)
    config = CheckpointConfig(
        restore=RestoreCheckpointConfig(path=str(hurt / "checkpoint_4"), recipe=recipe)
    )
    model = bags.Model(num_experts=2 if recipe else 0)
    with pytest.raises(DamagedCheckpointError, match=rf"checkpoint_4: the leaf {KERNEL} of step 4"):
        run(bags, tmp_path / "more", steps=5, checkpoint_cfg=config, model=model)
    trusting = dataclasses.replace(config, verify=False)
    run(bags, tmp_path / "trusting", steps=5, checkpoint_cfg=trusting, model=model)


def save_with_nan(folder, step):
    """A checkpoint of another step with NaN in a parameter, and with the checksums of just that."""
    flat = {name: jax.numpy.asarray(a) for name, a in leaves(folder / "checkpoint_4").items()}
    flat[KERNEL] = flat[KERNEL].at[3, 5].set(np.nan).at[4, 1].set(np.inf)
    flat["state/step"] = jax.numpy.int32(step)
    with CheckpointManager(folder) as manager:
        manager.save(step, trees.unflatten(flat), checksums=device_checksums(flat))


NAN = rf"the parameter {KERNEL} has 2 NaN or infinite values of 128, the first at \[3, 5\]"


def test_nan_in_a_parameter_is_named_and_is_no_damage(hurt, bags, tmp_path):
    save_with_nan(hurt, 6)
    with pytest.raises(NonFiniteParameterError, match=rf"checkpoint_6: {NAN}. .*move .* away"):
        run(bags, hurt, steps=7)
    for number, (recipe, what) in enumerate(
        (
            (None, NAN),
            (Recipe(), NAN),
            (Recipe(expert_init=NoisyCopies()), r"upcycled from .*mlp/expert/wo/kernel has [1-9]"),
        )
    ):
        config = CheckpointConfig(restore=RestoreCheckpointConfig(path=str(hurt), recipe=recipe))
        model = bags.Model(num_experts=2 if recipe else 0)
        with pytest.raises(NonFiniteParameterError, match=what):
            run(bags, tmp_path / f"{number}", steps=7, checkpoint_cfg=config, model=model)
    assert (hurt / "checkpoint_6").exists() and not list(hurt.glob("damaged_*"))
    shutil.move(hurt / "checkpoint_6", tmp_path / "away")
    assert run(bags, hurt, steps=5).start == "resume"


def test_nan_parameters_are_not_saved_in_the_place_of_good_ones(bags, tmp_path):
    """The update that ends at step 4 spoils them; its own loss is fine."""
    broken = bags.trainer(
        learning_rate_fn=lambda step: jax.numpy.where(step == 3, jax.numpy.nan, 0.1)
    )
    config = CheckpointConfig(save=SaveCheckpointConfig(period=2, keep=1))
    with pytest.raises(NonFiniteParameterError, match=r"step 4: the parameter .* is not saved"):
        run(bags, tmp_path / "run", steps=8, trainer=broken, checkpoint_cfg=config)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint_*")] == ["checkpoint_2"]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    assert run(bags, tmp_path / "run", steps=4, checkpoint_cfg=config).step == 4


def test_a_renamed_checkpoint_is_refused(hurt, bags, tmp_path):
    (hurt / "checkpoint_4").rename(hurt / "checkpoint_40")
    message = r"checkpoint_40 is named for step 40, but it holds step 4: rename it to checkpoint_4"
    with pytest.raises(ValueError, match=message):
        run(bags, hurt, steps=41)
    for recipe in (None, Recipe()):
        config = CheckpointConfig(restore=RestoreCheckpointConfig(path=str(hurt), recipe=recipe))
        model = bags.Model(num_experts=2 if recipe else 0)
        with pytest.raises(ValueError, match=message):
            run(bags, tmp_path / "more", steps=41, checkpoint_cfg=config, model=model)
    (hurt / "checkpoint_40").rename(hurt / "checkpoint_0004")
    with pytest.raises(ValueError, match=r"Rename it to checkpoint_4 to resume"):
        run(bags, hurt, steps=5)
    continued = CheckpointConfig(restore=RestoreCheckpointConfig(path=str(hurt)))
    assert run(bags, tmp_path / "more", steps=5, checkpoint_cfg=continued).step == 5
    (hurt / "checkpoint_2").rename(hurt / "checkpoint_4")
    with pytest.raises(ValueError, match=r"has checkpoint_0004 and checkpoint_4, which name the"):
        run(bags, hurt, steps=5)


def test_data_of_another_run_is_no_damage(hurt, bags):
    class Other(bags.Dataset):
        def train_iterator(self, process_index=0, process_count=1):
            iterator = super().train_iterator()

            def restore(directory):
                raise ValueError("the data position belongs to another stream")

            iterator.restore = restore
            return iterator

    with pytest.raises(ValueError, match="belongs to another stream"):
        run(bags, hurt, steps=5, train_dataset_cfg=Other())
    assert (hurt / "checkpoint_4").exists() and not list(hurt.glob("damaged_*"))


def test_where_nothing_can_be_read_nothing_starts_over(hurt, bags):
    for step in (2, 4):
        change(hurt / f"checkpoint_{step}", KERNEL, 0.125)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read \(steps 4, 2\)"):
        run(bags, hurt, steps=5)
    assert (hurt / "checkpoint_4").exists() and (hurt / "checkpoint_2").exists()
