"""What all commands say alike: unused bindings, code from outside, and what the user can mend."""

import errno
import os

import pytest

from upcycle_jax import check, model_info
from upcycle_jax.config import command, load
from upcycle_jax.config.parse import ConfigError

TINY = "--gin_file=models/t5_1_1_tiny_upcycled.gin"


def _info(*words: str) -> int:
    return model_info.main([TINY, *words])


def _body(error: Exception):
    def raises(flags, loaded):
        raise error

    return raises


@pytest.mark.parametrize(
    "number", [errno.ENAMETOOLONG, errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EISDIR]
)
def test_what_the_user_can_mend_is_one_line(capsys, number):
    error = OSError(number, os.strerror(number), "x" * 5000)
    assert command.run("eval", ["--dry_run"], description="", body=_body(error)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and os.strerror(number) in said and len(said) < 400


def test_other_errors_of_the_system_keep_their_traceback():
    for error in (OSError(errno.EIO, "Input/output error"), TypeError("a bug")):
        with pytest.raises(type(error)):
            command.run("eval", ["--dry_run"], description="", body=_body(error))


def test_unused_bindings_are_said_but_not_those_of_shipped_files(capsys, tmp_path):
    own = tmp_path / "own.gin"
    own.write_text("UniformRouter.std = 0.1\n")
    words = (f"--gin_file={own}", "--gin_file=runs/upcycle.gin", "--gin.NormalRouter.std=0.5")
    assert _info(*words) == 0
    said = capsys.readouterr().err
    assert "--gin.NormalRouter.std: NormalRouter.std is not used by model_info" in said
    assert f"{own}:1: UniformRouter.std is not used by model_info" in said
    assert said.count("is not used") == 2


def test_what_another_command_would_use_is_no_mistake(capsys):
    assert _info("--gin_file=runs/pretrain.gin", "--gin.LEARNING_RATE=0.5") == 0
    assert "is not used" not in capsys.readouterr().err


def test_a_macro_that_a_command_reads_is_checked(capsys):
    assert _info("--gin.MODEL='t5'") == 2
    said = capsys.readouterr().err
    assert "MODEL must be a Model, got 't5': write one of @EncoderDecoderModel()," in said
    assert _info("--gin_file=runs/pretrain.gin", "--gin.BATCH_SIZE='8'") == 2
    assert "BATCH_SIZE must be a whole number, got '8'" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--devices=-1", "--devices=0", "--device_memory=nan"])
def test_flags_of_check_have_ranges(capsys, flag):
    assert check.main([TINY, "--gin_file=runs/pretrain.gin", flag]) == 2
    assert f"{flag.partition('=')[0]} is" in capsys.readouterr().err


def test_code_from_outside_is_named_before_it_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "loud_module.py").write_text("print('the code runs')\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = tmp_path / "own.gin"
    own.write_text(
        "import loud_module\nimport upcycle_jax.tasks\nMIXTURE_OR_TASK_MODULE = 'mine'\n"
    )
    words = [f"--gin_file={own}", TINY, "--gin_file=runs/pretrain.gin"]
    seen = []
    with pytest.raises(ConfigError, match="must be set"):
        load(
            [word.partition("=")[2] for word in (*words[1:], words[0])],
            before_imports=seen.append,
        ).build("train")
    assert seen == [[f"loud_module ({own}:1)", "mine (MIXTURE_OR_TASK_MODULE)"]]
    monkeypatch.delitem(__import__("sys").modules, "loud_module")
    capsys.readouterr()
    command.run("eval", [*words, "--dry_run"], description="", body=lambda flags, loaded: 0)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"imports from outside the project: loud_module ({own}:1)", "the code runs"]
    command.run("eval", [TINY, "--dry_run"], description="", body=lambda flags, loaded: 0)
    assert capsys.readouterr().out == ""


def test_files_that_are_no_gin_text(tmp_path, capsys):
    bom, latin, null = (tmp_path / name for name in ("bom.gin", "latin.gin", "null.gin"))
    bom.write_bytes(b"\xef\xbb\xbfinclude 'models/t5_1_1_tiny.gin'\r\nVOCAB_SIZE = 640\r\n")
    assert load([str(bom)]).macro("VOCAB_SIZE") == 640
    latin.write_bytes(b"# caf\xe9\n")
    null.write_bytes(b"A = 1\0\n")
    for path, text in (
        (latin, "is no UTF-8 text (byte 5 is 0xe9): save it as UTF-8"),
        (null, "holds null bytes"),
        (tmp_path, "is a folder: name a file in it"),
        ("x" * 5000, "is in none of"),
        ("a\0b", "is in none of"),
    ):
        assert _info(f"--gin_file={path}") == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "write"), [("false", "False"), ("TRUE", "True"), ("none", "None")]
)
def test_constants_are_written_as_in_python(value, write):
    with pytest.raises(ConfigError, match=rf"write --gin.SCAN_LAYERS={write}$"):
        load(["models/t5_1_1_tiny.gin"], [f"SCAN_LAYERS={value}"])
