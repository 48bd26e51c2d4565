"""Work on several threads: in order, within the memory, the first failure raised."""

import threading
import time

import pytest

from upcycle_jax.checkpoints import workers


@pytest.fixture
def four_threads(monkeypatch):
    monkeypatch.setattr(workers, "threads", lambda: 4)


@pytest.mark.parametrize("limit, most", [(1, 1), (20, 2), (1000, 4)])
def test_results_come_in_order_within_the_limit(four_threads, limit, most):
    lock, running, seen = threading.Lock(), 0, 0

    def double(item):
        nonlocal running, seen
        with lock:
            running += 1
            seen = max(seen, running)
        time.sleep(0.001 * (item % 3))
        with lock:
            running -= 1
        return 2 * item

    assert list(workers.in_order(double, range(30), lambda item: 10, limit)) == [*range(0, 60, 2)]
    assert seen <= most


def test_what_was_given_counts_until_the_next_is_asked_for(four_threads):
    begun = []
    results = workers.in_order(begun.append, range(5), lambda item: 10, limit=20)
    next(results)
    time.sleep(0.05)
    assert begun == [0, 1]
    next(results)
    time.sleep(0.05)
    assert begun == [0, 1, 2]
    results.close()
    assert begun == [0, 1, 2]


def test_the_first_failure_is_raised_and_nothing_more_begun(four_threads):
    begun = []

    def fail(item):
        begun.append(item)
        if item in (3, 5):
            raise ValueError(f"item {item}")
        return item

    results = workers.in_order(fail, range(1000), lambda item: 10, limit=60)
    with pytest.raises(ValueError, match="item 3"):
        list(results)
    assert max(begun) < 10
