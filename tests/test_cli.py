"""The console script, and that every command answers --help at once."""

import pathlib
import subprocess
import sys

from upcycle_jax import cli

COMMANDS = cli.commands()


HELP = """
import contextlib, sys
from upcycle_jax import cli
for name in sys.argv[1:]:
    print("== " + name)
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    print("imported", sorted({"jax", "flax", "orbax", "tensorflow"} & set(sys.modules)))
"""


def test_help_of_every_command_imports_neither_jax_nor_tensorflow():
    """This, not a clock, is what keeps start-up short. In one process: what one command imports
    would be seen in all after it.
    """
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr.strip() == "", done.stderr
    told = done.stdout.split("== ")[1:]
    assert len(told) == len(COMMANDS)
    for name, text in zip(COMMANDS, told, strict=True):
        assert text.startswith(f"{name}\n") and f"upcycle_jax.{name}" in text, text
        assert text.endswith("imported []\n"), f"{name} --help: {text.splitlines()[-1]}"


def test_every_command_says_what_it_does(capsys):
    assert {"train", "upcycle", "verify", "model_info", "check", "report"} <= set(COMMANDS)
    assert all(COMMANDS.values())
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_without_a_command_the_usage_is_shown(capsys):
    assert cli.main([]) == 2
    assert "usage: upcycle-jax <command>" in capsys.readouterr().out


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_the_documentation_has_every_command():
    text = (pathlib.Path(__file__).parent.parent / "docs" / "commands.md").read_text(
        encoding="utf-8"
    )
    assert [name for name in COMMANDS if f"`{name}`" not in text and f"## {name}" not in text] == []
