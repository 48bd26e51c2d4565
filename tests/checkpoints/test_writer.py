"""Writing a checkpoint piece by piece: what it restores to, and what a kill, a full disk or a wrong
call leave behind.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from upcycle_jax import trees
from upcycle_jax.checkpoints import CheckpointManager, create_checkpoint, open_checkpoint
from upcycle_jax.checkpoints.storage import choose_chunks
from upcycle_jax.partitioning import Partitioner
from upcycle_jax.trees import LeafSpec, Role

EXPERT = "target/encoder/layers_1/mlp/expert/wi_0/kernel"
SPECS = {
    EXPERT: LeafSpec((4, 6, 10), np.dtype(np.float32), role=Role.EXPERT),
    "target/token_embedder/embedding": LeafSpec((16, 6), np.dtype(ml_dtypes.bfloat16)),
    "state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/v_row": LeafSpec(
        (4, 6), np.dtype(np.float32), role=Role.EXPERT
    ),
    "state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/m": LeafSpec(
        (1,), np.dtype(np.float32), role=Role.EXPERT
    ),
}


def values(seed=0):
    """Random values, except for the unused slot, which is zero like every fresh state."""
    rng = np.random.default_rng(seed)
    out = {name: rng.normal(size=spec.shape).astype(spec.dtype) for name, spec in SPECS.items()}
    return out | {
        "state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/m": np.zeros((1,), np.float32)
    }


def begin(path, *, specs=SPECS, step=5, metadata=None, **options):
    return create_checkpoint(
        path, specs, step=step, metadata=metadata or {"recipe": "copy"}, **options
    )


def write_all(writer, content):
    for name, value in content.items():
        writer.write(name, None, value)


def test_restores_through_orbax_through_the_manager_and_through_the_reader(tmp_path):
    with begin(tmp_path / "checkpoint_5") as writer:
        write_all(writer, values())
        assert writer.finalize() == tmp_path / "checkpoint_5"
    expected = values() | {"state/step": np.asarray(5, np.int32)}
    plain = trees.flatten(ocp.PyTreeCheckpointer().restore(tmp_path / "checkpoint_5" / "state"))
    reader = open_checkpoint(tmp_path)
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 5
        assert manager.metadata(5) == {"recipe": "copy"}
        shardings = dict.fromkeys(expected, Partitioner().replicated)
        managed = trees.flatten(manager.restore(5, reader.specs(), shardings))
    for name, value in expected.items():
        for restored in (plain[name], managed[name], reader.read(name)):
            np.testing.assert_array_equal(np.asarray(restored), value, err_msg=name)
            assert restored.dtype == value.dtype
    assert reader.metadata() == {"recipe": "copy"}
    assert sorted(path.name for path in (tmp_path / "checkpoint_5").iterdir()) == [
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
        "state",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_5"]


def test_tree_metadata_reads_without_arrays(tmp_path):
    with begin(tmp_path / "checkpoint_5") as writer:
        write_all(writer, values())
        writer.finalize()
    metadata = trees.flatten(
        ocp.PyTreeCheckpointer().metadata(tmp_path / "checkpoint_5" / "state").item_metadata.tree
    )
    assert {name: tuple(leaf.shape) for name, leaf in metadata.items()} == {
        name: s.shape for name, s in SPECS.items()
    } | {"state/step": ()}


def test_one_chunk_per_expert_and_writing_them_apart(tmp_path):
    content = values()
    with begin(tmp_path / "checkpoint_5") as writer:
        assert writer.layout(EXPERT).chunks == (1, 6, 10)
        assert writer.layout(
            "state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/v_row"
        ).chunks == (1, 6)
        for expert in (2, 0, 3, 1):
            writer.write(EXPERT, (slice(expert, expert + 1),), content[EXPERT][expert : expert + 1])
        writer.flush()
        assert writer.is_written(EXPERT)
        write_all(writer, {name: value for name, value in content.items() if name != EXPERT})
        writer.finalize()
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read(EXPERT), content[EXPERT])


@pytest.mark.parametrize("compress", [True, False])
def test_large_leaves_are_cut_into_chunks(tmp_path, compress):
    value = np.random.default_rng(0).normal(size=(33, 70)).astype(np.float32)
    specs = {"target/w": LeafSpec(value.shape, value.dtype)}
    with begin(
        tmp_path / "checkpoint_5", specs=specs, chunk_bytes=1000, compress=compress
    ) as writer:
        pieces = list(writer.pieces("target/w"))
        assert (
            sum(np.prod([part.stop - part.start for part in piece]) for piece in pieces)
            == value.size
        )
        assert all(
            np.prod([part.stop - part.start for part in piece]) * 4 <= 1000 for piece in pieces
        )
        for piece in pieces:
            writer.write("target/w", piece, value[piece])
        writer.finalize()
    np.testing.assert_array_equal(open_checkpoint(tmp_path).read("target/w"), value)


def test_choose_chunks():
    assert choose_chunks((32128, 512), 4, leading=0, limit=16 << 20) == (8032, 512)
    assert choose_chunks((8, 4, 4), 4, leading=1, limit=1 << 20) == (1, 4, 4)
    assert choose_chunks((), 4, leading=0, limit=1) == ()
    assert choose_chunks((3,), 4, leading=0, limit=1) == (1,)


def test_wrong_pieces_are_refused(tmp_path):
    content = values()
    with begin(tmp_path / "checkpoint_5") as writer:
        with pytest.raises(KeyError, match="target/other is not among the 5 leaves"):
            writer.write("target/other", None, np.ones(2))
        with pytest.raises(
            ValueError, match=rf"{EXPERT}: float64\[4, 6, 10\] given for float32\[4, 6, 10\]"
        ):
            writer.write(EXPERT, None, content[EXPERT].astype(np.float64))
        with pytest.raises(ValueError, match=r"float32\[4, 6, 10\] given for float32\[1, 6, 10\]"):
            writer.write(EXPERT, (slice(0, 1),), content[EXPERT])
        with pytest.raises(
            ValueError, match=r"slice 0:3 cuts through the stored chunks \(1, 6, 10\)"
        ):
            writer.write(EXPERT, (slice(0, 1), slice(0, 3)), content[EXPERT][:1, :3])
        with pytest.raises(
            ValueError,
            match=r"lacks 4 of 5 leaves: .*kernel/v_row \(4 chunks\), .*wi_0/kernel \(4 chunks\)",
        ):
            writer.finalize()
    with pytest.raises(ValueError, match="would share one stored name"):
        begin(
            tmp_path / "checkpoint_6",
            specs={"target/a.b": SPECS[EXPERT], "target/a/b": SPECS[EXPERT]},
        )


def test_nothing_appears_before_the_end(tmp_path):
    writer = begin(tmp_path / "checkpoint_5")
    write_all(writer, values())
    writer.flush()
    assert not (tmp_path / "checkpoint_5").exists()
    with pytest.raises(
        FileNotFoundError, match=r"beside it lies checkpoint_5\.partial, a save that did not finish"
    ):
        open_checkpoint(tmp_path / "checkpoint_5")
    with pytest.raises(ValueError, match="is a half-written checkpoint"):
        open_checkpoint(tmp_path / "checkpoint_5.partial")
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() is None
    writer.close()


def test_resuming_keeps_what_is_there(tmp_path):
    content = values()
    with begin(tmp_path / "checkpoint_5") as writer:
        assert not writer.resumed
        writer.write(EXPERT, (slice(1, 3),), content[EXPERT][1:3])
        writer.flush()
    with begin(tmp_path / "checkpoint_5") as writer:
        assert writer.resumed
        assert [writer.is_written(EXPERT, (slice(e, e + 1),)) for e in range(4)] == [
            False,
            True,
            True,
            False,
        ]
        assert not writer.is_written(EXPERT)
        assert writer.missing()[EXPERT] == 2
        for expert in (0, 3):
            writer.write(EXPERT, (slice(expert, expert + 1),), content[EXPERT][expert : expert + 1])
        write_all(writer, {name: value for name, value in content.items() if name != EXPERT})
        writer.finalize()
    for name, value in content.items():
        np.testing.assert_array_equal(open_checkpoint(tmp_path).read(name), value)


def test_resuming_over_the_scratch_file_of_a_killed_write(tmp_path):
    """A longer leftover of the manifest must not end up behind the next, shorter one."""
    with begin(tmp_path / "checkpoint_5"):
        pass
    state = tmp_path / "checkpoint_5.partial" / "state"
    (state / "manifest.ocdbt.__lock").write_bytes(
        (state / "manifest.ocdbt").read_bytes() + b"x" * 5000
    )
    with begin(tmp_path / "checkpoint_5"):
        pass  # The step is written in one commit: the scratch file becomes the manifest.
    with begin(tmp_path / "checkpoint_5") as writer:
        assert writer.is_written("state/step")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metadata": {"recipe": "noise"}},
            r"another metadata \(recipe\): run the command that began it",
        ),
        ({"step": 6}, r"another step \(5 then, 6 now\)"),
        ({"specs": {EXPERT: SPECS[EXPERT]}}, r"another leaves \(state/param_states"),
        ({"compress": False}, "another leaves"),
    ],
)
def test_another_conversion_does_not_resume_it(tmp_path, change, message):
    begin(tmp_path / "checkpoint_5").close()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / "checkpoint_5", **change)
    assert sorted(tmp_path.rglob("*")) == before
    with begin(tmp_path / "checkpoint_5") as writer:  # The refused call gave its lock back.
        assert writer.resumed


def test_two_processes_do_not_write_the_same_checkpoint(tmp_path):
    with (
        begin(tmp_path / "checkpoint_5"),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        begin(tmp_path / "checkpoint_5")


def test_an_existing_output_is_left_alone(tmp_path):
    with begin(tmp_path / "checkpoint_5") as writer:
        write_all(writer, values())
        writer.finalize()
    with pytest.raises(FileExistsError, match="exists already: nothing was changed"):
        begin(tmp_path / "checkpoint_5")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="exists already"):
        begin(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_5", "file"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path):
    with begin(tmp_path / "checkpoint_5") as writer:
        write_all(writer, values())
        (tmp_path / "checkpoint_5").mkdir()
        with pytest.raises(
            FileExistsError,
            match=r"appeared meanwhile: the finished work is kept in .*checkpoint_5\.partial",
        ):
            writer.finalize()
    (tmp_path / "checkpoint_5").rmdir()
    with begin(tmp_path / "checkpoint_5") as writer:
        writer.finalize()
    assert open_checkpoint(tmp_path).step == 5


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*checkpoint_5.partial: .*Nothing was written"):
        begin(tmp_path / "file" / "checkpoint_5")
    with pytest.raises(
        ValueError,
        match="gs://bucket/checkpoint_5: a checkpoint is assembled on a local file system",
    ):
        begin("gs://bucket/checkpoint_5")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError, match="Nothing was written"):
        begin(tmp_path / "checkpoint_5")


def test_foreign_partial_folders_are_not_touched(tmp_path):
    (tmp_path / "checkpoint_5.partial" / "state").mkdir(parents=True)
    with pytest.raises(ValueError, match="was not begun by this writer: remove it"):
        begin(tmp_path / "checkpoint_5")


def test_discard(tmp_path):
    with begin(tmp_path / "checkpoint_5") as writer:
        writer.discard()
    assert not list(tmp_path.iterdir())


CHILD = textwrap.dedent("""
    import resource, sys
    import numpy as np
    from upcycle_jax.checkpoints import create_checkpoint
    from upcycle_jax.trees import LeafSpec, Role
    output, limit = sys.argv[1], int(sys.argv[2])
    spec = LeafSpec((4, 256, 256), np.dtype(np.float32), role=Role.EXPERT)
    specs = {f"target/layer_{i}/expert/w": spec for i in range(12)}
    print("start", flush=True)
    try:
        bounds = {"pending_bytes": 1 << 20}
        with create_checkpoint(output, specs, step=3, metadata={"seed": 1}, **bounds) as writer:
            if limit:
                import signal
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            for layer, name in enumerate(specs):
                for expert in range(4):
                    index = (slice(expert, expert + 1),)
                    if not writer.is_written(name, index):
                        rng = np.random.default_rng([layer, expert])
                        writer.write(name, index, rng.random((1, 256, 256), np.float32))
            writer.finalize()
    except OSError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(3)
    """)


def run_child(output, *, limit=0, kill_after=None):
    """Runs the conversion in its own process; kills it (-9) some seconds after it began. Returns
    (exit status, its output).
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", CHILD, str(output), str(limit)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline().strip() == "start"
    if kill_after is not None:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    text = process.communicate(timeout=120)[0]
    return process.returncode, text


def check_child_output(folder):
    reader = open_checkpoint(folder)
    for layer in range(12):
        for expert in range(4):
            value = reader.read(f"target/layer_{layer}/expert/w", (slice(expert, expert + 1),))
            np.testing.assert_array_equal(
                value, np.random.default_rng([layer, expert]).random((1, 256, 256), np.float32)
            )


def test_killed_at_random_points_the_same_command_finishes_it(tmp_path):
    """Whatever the moment of the kill: nothing at the output path, or all of it; and the rerun is
    bit-equal.
    """
    output = tmp_path / "checkpoint_3"
    moments = random.Random(0)
    for _ in range(5):
        run_child(output, kill_after=moments.uniform(0, 0.25))
        if output.exists():
            break
        assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint_3.partial"}
    if not output.exists():
        assert run_child(output)[0] == 0
    check_child_output(output)
    assert not (tmp_path / "checkpoint_3.partial").exists()
    assert not (output / "resume.json").exists()
    left = [
        path for path in output.rglob("*") if path.name.endswith("lock") or path.suffix == ".tmp"
    ]
    assert not left  # Neither locks nor data of writes that the kill cut short.


def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch):
    """A limit on file size stands in for a full disk: both surface as a failed write inside the
    storage library.
    """
    output = tmp_path / "checkpoint_3"
    status, text = run_child(output, limit=100_000)
    assert status == 3
    assert "cannot write" in text
    assert "What was written so far is kept" in text
    assert not output.exists()
    assert json.loads((tmp_path / "checkpoint_3.partial" / "resume.json").read_text())[
        "metadata"
    ] == {"seed": 1}
    monkeypatch.setattr(sys, "argv", ["child", str(output), "0"])
    exec(compile(CHILD, "child", "exec"), {})  # Nothing limits it now: no process of its own.
    check_child_output(output)
