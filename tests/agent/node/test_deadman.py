from __future__ import annotations

from datetime import UTC, datetime, timedelta

from agent.node.deadman import DeadMan


class Clock:
    at = 0.0

    def __call__(self) -> float:
        return self.at


def test_silence_alone_ends_nothing_while_there_is_work() -> None:
    clock = Clock()
    switch = DeadMan(100, clock)
    for clock.at in range(0, 1000, 10):
        assert switch.check(last_contact=0, activity="busy") == ""
    for clock.at in range(1000, 1080, 10):
        assert switch.check(last_contact=0, activity="idle") == ""
    clock.at = 1091
    assert "no work for 101 s" in switch.check(last_contact=0, activity="idle")
    assert switch.check(last_contact=1000, activity="idle") == ""


def test_work_that_cannot_be_seen_keeps_a_silent_machine_for_a_while() -> None:
    clock = Clock()
    switch = DeadMan(100, clock)
    switch.check(0, "idle")
    clock.at = 199
    assert switch.check(0, "unknown") == ""
    clock.at = 200
    assert "did not answer" in switch.check(0, "unknown")


def test_maximum_uptime_ends_it_whatever_it_does() -> None:
    switch = DeadMan(100)
    switch.maximum_uptime_at = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert switch.check(1e12, "busy") == ""
    switch.maximum_uptime_at = (datetime.now(UTC) - timedelta(seconds=1)).isoformat().replace("+00:00", "Z")
    assert "maximum uptime" in switch.check(1e12, "busy")
