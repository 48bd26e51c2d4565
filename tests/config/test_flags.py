import subprocess
import sys

import pytest

from upcycle_jax.config import command, flags


def parse(*words, **kwargs):
    return flags.parse("train", words, description="Trains.", **kwargs)


def test_t5x_flags():
    line = """--gin_file=a.gin --gin_file b.gin --gin.X=1 --gin.MODEL_DIR="/tmp/x"
        --gin_bindings=Y=[1,2] -gin.Z=3 --gin_search_paths=p,q --tfds_data_dir=d
        --seqio_additional_cache_dirs=c1,c2 --coordinator_address=h:1 --process_count=4
        --process_index=3
        --initialization_timeout=60 --dry_run"""
    got = parse(*line.split())
    assert got.gin_file == ("a.gin", "b.gin")
    assert got.gin_bindings == ("X=1", 'MODEL_DIR="/tmp/x"', "Y=[1,2]", "Z=3")
    assert got.gin_search_paths == ("p", "q")
    assert (got.tfds_data_dir, got.seqio_additional_cache_dirs) == ("d", ("c1", "c2"))
    assert (
        got.coordinator_address,
        got.process_count,
        got.process_index,
        got.initialization_timeout,
    ) == ("h:1", 4, 3, 60)
    assert got.dry_run and not got.multiprocess_gpu


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), False),
        (("--dry_run",), True),
        (("--dry_run=true",), True),
        (("--dry_run=False",), False),
        (("--dry_run", "--nodry_run"), False),
    ],
)
def test_booleans_as_absl_writes_them(words, expected):
    assert parse(*words).dry_run is expected


@pytest.mark.parametrize(
    "words",
    [
        ("--logtostderr",),
        ("--alsologtostderr=true", "--nologtostderr", "-showprefixforinfo"),
        ("--stderrthreshold=info", "--log_dir=/tmp/logs", "--verbosity=1"),
        ("--stderrthreshold", "info", "--log_dir", "/tmp/logs", "-v", "1"),
        ("-v=-1", "--v=2", "--logger_levels=jax:INFO", "--noshowprefixforinfo", "--undefok=a,b"),
    ],
)
def test_absl_s_flags_are_accepted_and_said_once(words, capsys):
    got = parse("--gin_file=a.gin", *words, "--gin.X=1", "--dry_run")
    assert (got.gin_file, got.gin_bindings, got.dry_run) == (("a.gin",), ("X=1",), True)
    said = capsys.readouterr().err
    assert said.count("flags of absl change nothing here") == 1
    assert words[0] in said and words[-1] in said


def test_a_flag_of_the_command_is_its_own(capsys):
    got = parse("--log_dir=x", extra=lambda parser: parser.add_argument("--log_dir"))
    assert got.extra.log_dir == "x" and capsys.readouterr().err == ""


def test_an_equals_sign_in_a_value_is_kept():
    assert parse("--gin.X='a=b'").gin_bindings == ("X='a=b'",)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--gin_fil=x", "did you mean --gin_file?"),
        ("--jax_log_compiles=1", "jax reads the environment variable JAX_LOG_COMPILES"),
        ("--verbosit=1", "unrecognized arguments: --verbosit=1"),
        ("--gin.X", "a binding is one word, --gin.NAME=VALUE"),
        ("--process_count=two", "invalid int value: 'two'"),
        ("--dry_run=maybe", "'maybe' is neither true nor false"),
    ],
)
def test_bad_flags_exit_with_the_remedy(word, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(word)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_command_adds_its_own_flags():
    got = parse("--output_dir=x", extra=lambda parser: parser.add_argument("--output_dir"))
    assert got.extra.output_dir == "x"


def test_help_needs_neither_jax_nor_tensorflow():
    code = (
        "import sys, contextlib\nfrom upcycle_jax import model_info\n"
        "with contextlib.suppress(SystemExit):\n    model_info.main(['--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('jax', 'tensorflow', 'flax')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--gin_file FILE" in done.stdout and "--seqio_additional_cache_dirs" in done.stdout


def test_half_a_cluster_is_refused():
    with pytest.raises(
        ValueError,
        match=(
            "needs all of --coordinator_address, --process_count, --process_index; missing:"
            " --process_index"
        ),
    ):
        command.join_processes("train", flags.Flags(coordinator_address="h:1", process_count=2))


def test_a_command_says_our_errors_plainly_and_shows_the_traceback_of_others(
    objects, write, capsys
):
    write("ok.gin", "strict.value = 1")
    assert command.run("x", ["--gin_file=no.gin"], description="", body=lambda *_: 0) == 2
    assert "upcycle_jax.x: error: gin file 'no.gin' is in none of" in capsys.readouterr().err
    assert (
        command.run(
            "x",
            ["--gin_file=ok.gin"],
            description="",
            body=lambda f, loaded: loaded.build("strict")() - 1,
        )
        == 0
    )

    def fails(*_):
        raise ValueError("not raised by the library")

    with pytest.raises(ValueError, match="not raised by the library"):
        command.run("x", ["--gin_file=ok.gin"], description="", body=fails)
