"""The launchers: what they print is what would run, and a run that was cut short is started again.

gcloud, xpk, sbatch, srun and scontrol are stand-ins here that write down how they were called; the
scripts themselves really run.
"""

import os
import pathlib
import shlex
import subprocess
import sys
import types

import pytest

from upcycle_jax import train
from upcycle_jax.config import flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "scripts" / "launch"

# Everything that a shell could spoil: quotes of both kinds, blanks, a dollar, a star, a backslash,
# a newline in a dictionary.
ARGUMENTS = [
    "--gin_file=models/t5_1_1_tiny.gin",
    "--gin.MODEL_DIR='gs://bucket/a b/$HOME/*'",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 512,\n 'targets': 114}",
    '--gin.MIXTURE_OR_TASK_NAME="it\'s"',
    "--gin.RECIPE=@Recipe()",
    "--gin_bindings=X='back\\\\slash & ; | < > ` # ! ~'",
    "--dry_run",
]

POD = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-64"]
XPK = ["--workload=w", "--cluster=c", "--type=v5litepod-64"]


def launch(
    script: str, *words: str, path: pathlib.Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env |= {"PYTHON": sys.executable, **environ}
    if path is not None:
        env["PATH"] = f"{path}:{env['PATH']}"
    return subprocess.run(
        [str(LAUNCH / script), *words],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=120,
    )


def printed_commands(text: str) -> list[list[str]]:
    """The lines of a dry run as words. A quoted newline does not end a command."""
    commands: list[list[str]] = []
    lexer = shlex.shlex(text, posix=True, punctuation_chars="\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " ", True, ""
    current: list[str] = []
    for word in lexer:
        if set(word) == {"\n"}:
            commands.append(current)
            current = []
        else:
            current.append(word)
    return [words for words in [*commands, current] if words]


def library_flags(words: list[str]) -> flags.Flags:
    """What `python -m upcycle_jax.train ...` would understand."""
    return flags.parse("train", words[words.index("upcycle_jax.train") + 1 :], description="")


def inner(words: list[str]) -> list[str]:
    """The words of the shell command in --command=..."""
    (command,) = [
        word.removeprefix("--command=")
        for word in words
        if word.startswith("--command=") and "upcycle_jax.train" in word
    ]
    return shlex.split(command)


EXPECTED = flags.parse("train", ARGUMENTS, description="")


def test_local_prints_one_command_per_process():
    done = launch("local.sh", "--processes=3", "--devices=2", "--dry_run", "train", *ARGUMENTS)
    commands = printed_commands(done.stdout)
    assert done.returncode == 0 and len(commands) == 3
    for index, words in enumerate(commands):
        assert "XLA_FLAGS" in " ".join(words) and "JAX_PLATFORMS=cpu" in words
        parsed = library_flags(words)
        assert (
            parsed.gin_bindings == EXPECTED.gin_bindings
            and parsed.gin_file == EXPECTED.gin_file
            and parsed.dry_run
        )
        assert (parsed.coordinator_address, parsed.process_count, parsed.process_index) == (
            "127.0.0.1:12321",
            3,
            index,
        )


def test_local_gives_each_process_its_own_gpus():
    commands = printed_commands(
        launch("local.sh", "--processes=2", "--gpus=4", "--dry_run", "train").stdout
    )
    assert (
        "CUDA_VISIBLE_DEVICES=0,1,2,3" in commands[0]
        and "CUDA_VISIBLE_DEVICES=4,5,6,7" in commands[1]
    )


def test_the_tpu_pod_launcher_prints_every_step_and_quotes_for_the_remote_shell():
    done = launch("tpu_pod.sh", *POD, "--spot", "--dry_run", "train", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    create, archive, copy, install, start = printed_commands(done.stdout)
    assert (
        create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "pod"]
        and "--spot" in create
    )
    assert archive[0] == "tar" and "scp" in copy and "pip install" in install[-1]
    assert "--worker=all" in start and library_flags(inner(start)) == EXPECTED


def test_the_remote_shell_itself_reads_the_same_words(tmp_path):
    """Not a parser's opinion: a shell runs the printed command, with a stand-in for python."""
    done = launch("tpu_pod.sh", *POD, "--installed", "--dry_run", "train", *ARGUMENTS)
    *_, start = printed_commands(done.stdout)
    home = tmp_path / "home"
    python = home / "upcycle_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
    python.chmod(0o755)
    (command,) = [
        word.removeprefix("--command=") for word in start if word.startswith("--command=")
    ]
    ran = subprocess.run(
        ["bash", "-c", command], cwd=home, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split("\0")[:-1] == ["-m", "upcycle_jax.train", *ARGUMENTS]


def test_gke_prints_an_xpk_workload_that_restarts():
    done = launch(
        "gke_xpk.sh",
        *XPK,
        "--retries=5",
        "--image=gcr.io/me/image",
        "--dry_run",
        "train",
        *ARGUMENTS,
    )
    (words,) = printed_commands(done.stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    assert {
        "--tpu-type=v5litepod-64",
        "--max-restarts=5",
        "--restart-on-user-code-failure",
        "--docker-image=gcr.io/me/image",
    } <= set(words)
    assert library_flags(inner(words)) == EXPECTED


def test_slurm_prints_the_submission_and_the_step():
    done = launch(
        "slurm_gpu.sh",
        "--nodes=2",
        "--gpus_per_node=4",
        "--sbatch=--partition=gpu -A me",
        "--dry_run",
        "train",
        *ARGUMENTS,
    )
    submission, step = printed_commands(done.stdout)
    assert submission[0] == "sbatch" and {
        "--nodes=2",
        "--ntasks-per-node=4",
        "--requeue",
        "--partition=gpu",
        "-A",
        "me",
    } <= set(submission)
    assert submission[-len(ARGUMENTS) :] == ARGUMENTS
    assert (
        step[0] == "srun"
        and library_flags(step).gin_bindings == EXPECTED.gin_bindings
        and library_flags(step).multiprocess_gpu
    )


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("local.sh", ["--proceses=2", "train"], "no option --proceses; there are: processes"),
        ("local.sh", ["nothing"], "there is no command nothing"),
        ("local.sh", [], "name a command of the library"),
        ("tpu_pod.sh", ["--name=pod", "train"], "--zone=... is needed"),
        ("gke_xpk.sh", ["--workload=w", "train"], "--cluster=... is needed"),
    ],
)
def test_wrong_options_are_refused(script, words, message):
    done = launch(script, *words)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("script", ["local.sh", "tpu_pod.sh", "gke_xpk.sh", "slurm_gpu.sh"])
def test_help_shows_the_head_of_the_script(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and "--dry_run" in done.stdout and "set -euo" not in done.stdout


def stand_in(folder: pathlib.Path, name: str, body: str) -> None:
    """A program that appends its words to <name>.calls and then does `body`."""
    script = folder / name
    script.write_text(
        f'#!/bin/bash\nprintf "%s " "$@" >> "{folder}/{name}.calls"; echo >>'
        f' "{folder}/{name}.calls"\n{body}\n'
    )
    script.chmod(0o755)


def calls(folder: pathlib.Path, name: str) -> list[str]:
    return (folder / f"{name}.calls").read_text().splitlines()


def test_a_preempted_pod_is_made_again_and_the_run_goes_on(tmp_path):
    # The first run fails because the pod is preempted; then: deleted, made again, installed, run to
    # the end.
    stand_in(
        tmp_path,
        "gcloud",
        f"""cd {tmp_path}
case "$4" in
    describe) cat state ;;
    create) echo READY > state ;;
    delete) echo ABSENT > state ;;
    ssh)
        if [[ "$*" == *upcycle_jax.train* && ! -e second ]]; then
            touch second; echo PREEMPTED > state; exit 255
        fi ;;
esac""",
    )
    (tmp_path / "state").write_text("READY\n")
    done = launch("tpu_pod.sh", *POD, "--wait=0", "train", path=tmp_path)
    assert done.returncode == 0, done.stderr
    verbs = [line.split()[3] for line in calls(tmp_path, "gcloud")]
    steps = [verb for verb in verbs if verb != "describe"]
    assert steps == ["scp", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh"]


def test_a_command_that_fails_on_a_pod_that_stays_is_tried_a_bounded_number_of_times(tmp_path):
    stand_in(tmp_path, "gcloud", 'case "$4" in describe) echo READY ;; ssh) exit 1 ;; esac')
    done = launch(
        "tpu_pod.sh", *POD, "--wait=0", "--failures=2", "--installed", "train", path=tmp_path
    )
    assert done.returncode == 1 and "3 times" in done.stderr
    assert sum(" ssh " in line for line in calls(tmp_path, "gcloud")) == 3


def test_a_slurm_job_is_queued_again_until_it_is_done_or_cannot_run(tmp_path):
    stand_in(tmp_path, "srun", "exit $SRUN_CODE")
    stand_in(tmp_path, "scontrol", "")
    job = {"SLURM_JOB_ID": "7", "UPCYCLE_JAX_LAUNCHERS": str(LAUNCH)}
    assert (
        launch(
            "slurm_gpu.sh", "--retries=2", "train", path=tmp_path, SRUN_CODE="0", **job
        ).returncode
        == 0
    )
    assert not (tmp_path / "scontrol.calls").exists()
    refused = launch("slurm_gpu.sh", "--retries=2", "train", path=tmp_path, SRUN_CODE="2", **job)
    assert refused.returncode == 2 and not (tmp_path / "scontrol.calls").exists()
    assert (
        launch(
            "slurm_gpu.sh", "--retries=2", "train", path=tmp_path, SRUN_CODE="75", **job
        ).returncode
        == 0
    )
    assert calls(tmp_path, "scontrol") == ["requeue 7 "]
    last = launch(
        "slurm_gpu.sh",
        "--retries=2",
        "train",
        path=tmp_path,
        SRUN_CODE="75",
        SLURM_RESTART_COUNT="2",
        **job,
    )
    assert last.returncode == 75 and len(calls(tmp_path, "scontrol")) == 1


def test_local_starts_all_processes_again_when_one_dies_but_not_for_a_bad_configuration(tmp_path):
    # Process 1 dies at the first start while process 0 would sleep for ever.
    stand_in(
        tmp_path,
        "python-stand-in",
        f"""[[ "$1" == -c ]] && echo 1234 && exit
echo "I am $*"
if [[ ! -e {tmp_path}/died ]]; then
    [[ "$*" == *--process_index=1* ]] && touch {tmp_path}/died && exit 9
    exec sleep 100
fi""",
    )
    program = str(tmp_path / "python-stand-in")
    done = launch("local.sh", "--grace=0", "train", "--gin_file=x", PYTHON=program)
    assert done.returncode == 0, done.stderr
    assert "a process ended with code 9; starting all again (1 of 3)" in done.stderr
    assert done.stdout.count("[0] I am -m upcycle_jax.train --gin_file=x") == 2

    stand_in(tmp_path, "refuses", '[[ "$1" == -c ]] && echo 1234 && exit; exit 2')
    refused = launch("local.sh", "--grace=0", "train", PYTHON=str(tmp_path / "refuses"))
    assert refused.returncode == 2 and "not trying again" in refused.stderr

    stand_in(tmp_path, "fails", '[[ "$1" == -c ]] && echo 1234 && exit; exit 3')
    failed = launch("local.sh", "--grace=0", "--retries=1", "train", PYTHON=str(tmp_path / "fails"))
    assert failed.returncode == 3 and "ended with code 3 after 2 starts" in failed.stderr


@pytest.mark.parametrize(
    ("interrupted", "variable", "code"),
    [("SIGTERM", "75", 75), ("SIGTERM", None, 0), (None, "75", 0)],
)
def test_train_tells_launchers_that_it_was_stopped_early(interrupted, variable, code, monkeypatch):
    class Loaded:
        def build(self, name, **given):
            outcome = types.SimpleNamespace(interrupted=interrupted)
            return lambda files: types.SimpleNamespace(run=lambda dry_run: outcome)

        def has_macro(self, name):
            return False

        def unused(self, other_functions=()):
            return []

        def operative_text(self):
            return ""

    monkeypatch.delenv(train.INTERRUPTED_CODE_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(train.INTERRUPTED_CODE_VARIABLE, variable)
    assert train._run(flags.Flags(), Loaded()) == code
