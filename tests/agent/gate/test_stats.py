from __future__ import annotations

import pytest

from agent import constants
from agent.gate import stats as gate_stats
from agent.gate import wire
from agent.gate.stats import Stats
from heliostat.models.services import LATENCY_BOUNDS_MS, VERSION_HEADER


def test_bounds_are_everywhere_the_same() -> None:
    assert gate_stats.LATENCY_BOUNDS_MS == constants.LATENCY_BOUNDS_MS == LATENCY_BOUNDS_MS
    assert VERSION_HEADER.lower().encode() == wire.VERSION_HEADER


def test_latency_window_and_oldest() -> None:
    now = [1000.0]
    stats = Stats(lambda: now[0])
    fast, slow, hangs = stats.start(), stats.start(), stats.start()
    now[0] += 0.0005
    fast.answered()
    fast.answered()
    now[0] += 0.0045
    fast.end(error=False)
    fast.end(error=True)
    now[0] += 69.995
    slow.answered()
    counted = stats.snapshot()
    assert counted["buckets"][0] == 1
    assert counted["buckets"][-1] == 1  # slower than the last bound
    assert sum(counted["buckets"]) == 2
    assert (counted["requests"], counted["errors"], counted["ongoing"]) == (1, 0, 2)
    assert counted["oldest_s"] == pytest.approx(70, abs=0.01)
    assert counted["window_s"] == 60
    assert (counted["window_requests"], sum(counted["window_buckets"])) == (0, 1)
    slow.end(error=True)
    hangs.end(error=False)
    counted = stats.snapshot()
    assert (counted["ongoing"], counted["oldest_s"], counted["window_requests"], counted["window_errors"]) == (
        0, 0, 2, 1,
    )  # fmt: skip
    assert counted["buckets"][-1] == 2
    now[0] += 61
    counted = stats.snapshot()
    assert (counted["requests"], counted["window_requests"], sum(counted["window_buckets"])) == (3, 0, 0)
    assert len(counted["window_buckets"]) == len(counted["buckets"])


@pytest.mark.parametrize(("ms", "bucket"), [(0.9, 0), (1.1, 1), (9.9, 5), (10.1, 6), (59_999, 26), (60_001, 27)])
def test_buckets_are_bounded_from_above(ms: float, bucket: int) -> None:
    now = [0.0]
    stats = Stats(lambda: now[0])
    ticket = stats.start()
    now[0] = ms / 1000
    ticket.answered()
    assert stats.snapshot()["buckets"].index(1) == bucket
