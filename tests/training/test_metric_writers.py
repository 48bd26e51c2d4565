"""JSON lines and TensorBoard events, and the console line."""

import json
import subprocess
import sys

import numpy as np

from upcycle_jax.training.metric_writers import MetricWriter, progress_line


def events(folder):
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto import event_pb2

    out = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        out += [event_pb2.Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
    return out


def test_both_forms_hold_the_same_scalars(tmp_path):
    writer = MetricWriter(tmp_path / "train")
    writer.write(10, {"loss": 2.5, "experts/encoder/layers_1/load": np.array([0.25, 0.75])})
    writer.write(20, {"loss": float("nan")})
    writer.close()
    lines = [
        json.loads(line) for line in (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 2.5), (20, None)]
    assert lines[0]["experts/encoder/layers_1/load"] == [0.25, 0.75]
    found = events(tmp_path / "train")
    assert found[0].file_version == "brain.Event:2"
    first = {value.tag: value.simple_value for value in found[1].summary.value}
    assert found[1].step == 10
    assert first == {
        "loss": 2.5,
        "experts/encoder/layers_1/load/min": 0.25,
        "experts/encoder/layers_1/load/max": 0.75,
    }
    assert np.isnan(found[2].summary.value[0].simple_value)


def test_a_resumed_run_appends_and_tells_tensorboard_to_forget(tmp_path):
    for first_step in (0, 4):
        writer = MetricWriter(tmp_path, first_step=first_step)
        writer.write(first_step + 1, {"loss": 1.0})
        writer.close()
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 5]
    starts = [event for event in events(tmp_path) if event.session_log.status]
    assert [event.step for event in starts] == [5]
    assert MetricWriter(tmp_path).has_step(5) and not MetricWriter(tmp_path).has_step(50)


def test_a_line_torn_by_a_kill_takes_no_other_line_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall_time": 1.0, "loss": 3.0}\n{"step": 2, "wall_time": 2.0, "lo')
    writer = MetricWriter(tmp_path, first_step=1)
    assert writer.has_step(1) and not writer.has_step(2)
    for step in (2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    first, torn, *rest = path.read_text().splitlines()
    assert torn == '{"step": 2, "wall_time": 2.0, "lo' and json.loads(first)["loss"] == 3.0
    assert [(row["step"], row["loss"]) for row in map(json.loads, rest)] == [(2, 2.0), (3, 3.0)]


def test_writing_needs_no_tensorflow(tmp_path):
    code = (
        "import sys; from upcycle_jax.training.metric_writers import MetricWriter\n"
        f"MetricWriter({str(tmp_path)!r}).write(1, {{'loss': 1.0}})\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_progress_line_of_images():
    line = progress_line(1, 2, {}, steps_per_second=2.0, tokens_per_second=256, unit="images")
    assert line == "step 1/2 (50%)  2 steps/s  256 images/s  0 s left"


def test_progress_line():
    values = {"loss": 3.41159, "accuracy": 0.412, "learning_rate": 0.01}
    line = progress_line(1200, 20000, values, steps_per_second=8.0, tokens_per_second=52_000)
    assert (
        line
        == "step 1200/20000 (6%)  loss 3.412  accuracy 0.412  learning_rate 0.01  8 steps/s  52k"
        " tokens/s  39 min left"
    )
