from __future__ import annotations

from agent.channel import Backoff


def test_backoff_doubles_to_its_cap_with_jitter() -> None:
    backoff = Backoff(0.2, 15)
    waits = [backoff.next() for _ in range(12)]
    for n, wait in enumerate(waits):
        most = min(15, 0.2 * 2**n)
        assert most / 2 <= wait <= most
    assert len(set(waits[-4:])) > 1
    backoff.reset()
    assert backoff.next() <= 0.2
