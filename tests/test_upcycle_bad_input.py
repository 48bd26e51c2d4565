"""The command `upcycle` where the disk or the source is bad: one clear error, nothing at the
output, nothing of the source lost.
"""

import errno
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from upcycle_jax import config, upcycle
from upcycle_jax.checkpoints import create_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.stored_chunks import StoredChunks
from upcycle_jax.training.optimizers import Adafactor
from upcycle_jax.training.train_state import state_specs

TINY = (
    "VOCAB_SIZE=64",
    "T5Config.emb_dim=64",
    "T5Config.mlp_dim=1024",
    "T5Config.num_heads=2",
    "T5Config.head_dim=8",
    "T5Config.num_decoder_layers=1",
)
LIMIT = 150_000
"""More than the descriptive files of a result take, less than one kernel of one new expert, however
many of these share a file.
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    specs = state_specs(config.load(["models/t5_1_1_tiny.gin"], TINY).macro("MODEL"), Adafactor())
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("source") / "checkpoint_7"
    writer = create_checkpoint(folder, specs, step=7, metadata={})
    for name, spec in specs.items():
        if name != "state/step":
            writer.write(
                name, None, (rng.normal(size=spec.shape) * (spec.shape != (1,))).astype(spec.dtype)
            )
    writer.finalize()
    return folder


@pytest.fixture
def dense(written, tmp_path):
    """Each test has its own."""
    return shutil.copytree(written, tmp_path / "dense" / "checkpoint_7")


def words(source, output):
    paths = [
        f"--gin.INITIAL_CHECKPOINT_PATH='{source}'",
        f"--gin.OUTPUT_CHECKPOINT_PATH='{output}'",
        "--gin.FUNCTION_CHECK='off'",
        "--gin.OPTIMIZER=None",
    ]
    files = [
        "--gin_file=models/t5_1_1_tiny_upcycled.gin",
        "--gin_file=runs/upcycle.gin",
        "--gin_file=recipes/noisy_copies.gin",
    ]
    bindings = [*TINY, "DECODER_SPARSE_LAYOUT=(0,)"]
    return [*files, *(f"--gin.{line}" for line in bindings), *paths]


def digest(folder):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(capsys, source, output):
    """Runs the command, which must refuse, and returns its one message."""
    assert upcycle.main(words(source, output)) == 2
    message = capsys.readouterr().err
    assert message.startswith("upcycle_jax.upcycle: error: ") and "Traceback" not in message
    assert message.count("error: ") == 1
    return message


FULL_DISK = textwrap.dedent("""
    import resource, signal, sys
    from upcycle_jax import upcycle
    limit = int(sys.argv[1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(upcycle.main(sys.argv[2:]))
    """)


def run_with_limit(limit, arguments):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", FULL_DISK, str(limit), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )


def test_a_full_disk_is_one_error_and_the_same_command_finishes_later(dense, tmp_path, capsys):
    """A limit on file size stands in for a full disk: both surface as a failed write inside the
    storage library.
    """
    before, output = digest(dense), tmp_path / "sparse" / "checkpoint_7"
    stopped = run_with_limit(LIMIT, words(dense, output))
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    assert "cannot write" in stopped.stderr and "What was written so far is kept" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not output.exists()
    assert digest(dense) == before
    # Another conversion does not go on with what this one has written.
    kept = digest(tmp_path)
    assert upcycle.main([*words(dense, output), "--gin.Recipe.seed=1"]) == 2
    assert "checkpoint_7.partial" in capsys.readouterr().err
    assert digest(tmp_path) == kept
    assert upcycle.main(words(dense, output)) == 0
    assert "proof: PASSED" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["checkpoint_7"]
    assert digest(dense) == before


@pytest.mark.skipif(
    not os.path.isdir("/sys"), reason="needs Linux's /sys, where nobody may make folders"
)
def test_a_target_that_cannot_be_written(dense, tmp_path, capsys):
    before = digest(tmp_path)
    assert "cannot write /sys/upcycled/checkpoint_7.partial: " in refused(
        capsys, dense, "/sys/upcycled/checkpoint_7"
    )
    (tmp_path / "file").write_text("not a folder")
    assert "Nothing was written" in refused(capsys, dense, tmp_path / "file" / "checkpoint_7")
    (tmp_path / "file").unlink()
    assert digest(tmp_path) == before


def test_an_existing_output_is_left_as_it_is(dense, tmp_path, capsys):
    output = tmp_path / "taken" / "checkpoint_7"
    output.mkdir(parents=True)
    (output / "precious.txt").write_text("keep")
    before = digest(tmp_path)
    assert (
        "exists already: choose another OUTPUT_CHECKPOINT_PATH or remove it; nothing was changed"
        in refused(capsys, dense, output)
    )
    assert digest(tmp_path) == before
    # The source itself is no better a place.
    assert "exists already" in refused(capsys, dense, dense)
    assert digest(tmp_path) == before


def test_a_disk_that_is_full_when_the_proof_is_written(dense, tmp_path, capsys, monkeypatch):
    """The result is complete then; the message says what is missing, and the same command adds
    it.
    """
    output, write_text = tmp_path / "sparse" / "checkpoint_7", pathlib.Path.write_text

    def full(path, text, *args, **kwargs):
        if path.name == "plan.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_text(path, text, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "write_text", full)
        message = refused(capsys, dense, output)
    assert (
        f"{output}/plan.json: No space left on device" in message
        and "run the same command again" in message
    )
    assert upcycle.main(words(dense, output)) == 0
    assert "only the proof is missing" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["state/_METADATA", "state/manifest.ocdbt"])
def test_a_half_copied_source(dense, tmp_path, capsys, lost):
    broken = tmp_path / "broken" / "checkpoint_7"
    shutil.copytree(dense, broken)
    (broken / lost).unlink()
    assert str(broken) in refused(capsys, broken, tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists() and not (tmp_path / "sparse.partial").exists()


def test_a_source_that_is_still_being_written(tmp_path, capsys):
    (tmp_path / "run" / "checkpoint_9.partial").mkdir(parents=True)
    message = refused(capsys, tmp_path / "run", tmp_path / "sparse")
    assert (
        "holds no finished checkpoint, only checkpoint_9.partial: let the save finish or name"
        " another folder" in message
    )
    assert not (tmp_path / "sparse").exists()


def test_a_source_whose_data_are_lost_never_becomes_a_result_that_passes(dense, tmp_path, capsys):
    broken = tmp_path / "broken" / "checkpoint_7"
    shutil.copytree(dense, broken)
    # A database may keep files that nothing refers to: one that holds a kernel is lost.
    reader = open_checkpoint(broken)
    for file in StoredChunks(reader).files("target/encoder/layers_0/mlp/wi_0/kernel"):
        pathlib.Path(file).unlink()
    status = upcycle.main(words(broken, tmp_path / "sparse"))
    captured = capsys.readouterr()
    assert status in (1, 2)
    assert "proof: PASSED" not in captured.out
    if (
        status == 1
    ):  # Chunks are taken over without being decoded, so the loss shows when the proof reads them.
        assert "proof: FAILED" in captured.out and "cannot be read" in captured.out
        with pytest.raises((ValueError, OSError)):
            reader = open_checkpoint(tmp_path / "sparse")
            for name in reader.specs():
                reader.read(name)


def test_outputs_that_would_change_the_source_or_cannot_be(dense, tmp_path, capsys):
    before = digest(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for output, said in {
        "": "OUTPUT_CHECKPOINT_PATH",
        f"{dense}/x/checkpoint_7": f"lies inside the source {dense}",
        f"{dense}/state/d": f"lies inside the source {dense}",
        tmp_path / "nowhere": "is a link to",
        tmp_path / "a\\\\b": "backslash",
        tmp_path / ("n" * 245): "too long",
    }.items():
        assert said in refused(capsys, dense, output)
        assert upcycle.main([*words(dense, output), "--dry_run"]) == 2
        assert said in capsys.readouterr().err
    assert digest(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "nowhere"]


def test_a_kill_right_after_the_last_rename_leaves_nothing(dense, tmp_path, capsys):
    output = tmp_path / "sparse" / "checkpoint_7"
    assert upcycle.main(words(dense, output)) == 0
    whole = sorted(output.rglob("*"))
    for name in ("proof.json", "plan.json"):
        (output / name).unlink()
    (output / "resume.json").write_text("{}")
    (output / ".lock").touch()
    assert upcycle.main(words(dense, output)) == 0
    assert "only the proof is missing" in capsys.readouterr().out
    assert sorted(output.rglob("*")) == whole
