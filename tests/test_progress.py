"""What a meter says of the work that is left."""

import pytest

from upcycle_jax import progress
from upcycle_jax.progress import Meter


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets: `clock[0] = 3.0`."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_second_with_rate_and_time_left(clock):
    """2 of 8 MiB in 4 s: 512 KiB a second, 12 s for the rest."""
    lines = []
    meter = Meter(8 << 20, lines.append)
    meter.add(1 << 20, "a")
    clock[0] = 4.0
    meter.add(1 << 20, "b")
    assert lines == ["25.0%  written 2.0 MiB of 8.0 MiB, 512.0 KiB/s, 12 s left: b"]
    meter.finish("; and now the rest")
    assert lines[-1] == "written 2.0 MiB in 4.0 s; and now the rest"


def test_what_was_done_before_does_not_count_for_the_rate(clock):
    """60 of 100 steps were there; 20 more in 40 s leave 40 s for the last 20."""
    meter = Meter(100, verb="trained", unit="steps", done=60)
    assert meter.text() == "60.0%  trained 60 steps of 100 steps"
    clock[0] = 40.0
    meter.reach(80)
    assert meter.text() == "80.0%  trained 80 steps of 100 steps, 0.5 steps/s, 40 s left"
