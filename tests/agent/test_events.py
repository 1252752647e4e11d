from __future__ import annotations

import json
from pathlib import Path

from agent.events import Events
from agent.journal import Journal


def test_facts_stay_until_acknowledged_in_order_and_over_restarts(tmp_path: Path) -> None:
    events = Events(Journal(tmp_path / "f"), "a" * 32, 100)
    woken: list[int] = []
    events.on_new = lambda: woken.append(1)
    one, two, three = (events.add("run_ended", run_id=str(n)) for n in range(3))
    assert len(woken) == 3
    assert [f["id"] for f in events.pending()] == [one, two, three]
    events.acknowledge([two, "unknown"])
    again = Events(Journal(tmp_path / "f"), "b" * 32, 100)
    assert [f["id"] for f in again.pending()] == [one, three]
    assert again.add("activity", activity="idle") not in (one, two, three)
    assert again.is_pending(one)
    assert not again.is_pending(two)


def test_facts_are_bounded_and_the_superseded_go_first(tmp_path: Path) -> None:
    events = Events(Journal(tmp_path / "f"), "a" * 32, 3)
    kept = [events.add("run_ended", run_id="1")]
    events.add("activity", activity="busy")
    kept.append(events.add("node_lost", node_id="n"))
    kept.append(events.add("run_ended", run_id="2"))
    assert [f["id"] for f in events.pending()] == kept


def test_the_facts_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    events = Events(Journal(tmp_path / "f"), "a" * 32, 100)
    for _ in range(600):
        events.acknowledge([events.add("activity", activity="busy")])
    last = events.add("activity", activity="idle")
    lines = (tmp_path / "f").read_text().splitlines()
    assert len(lines) < 520
    assert json.loads(lines[-1])["fact"]["id"] == last
