from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agent.channel import Backoff
from agent.facts import Facts
from agent.journal import Journal, write_private


def test_records_survive_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append({"a": 1}, {"a": 2})
    journal.close()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):  # a power cut after any byte
        path.write_bytes(whole[:cut])
        again = Journal(path)
        assert again.records == [{"a": 1}, {"a": 2}][: whole[:cut].count(b"\n")]
        again.append({"a": 3})
        again.close()
        third = Journal(path)
        assert third.records == [*again.records, {"a": 3}]
        third.close()


def test_a_full_disk_leaves_the_journal_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"a": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="no room"):
        journal.append({"a": 2})
    monkeypatch.undo()
    journal.append({"a": 3})
    assert Journal(tmp_path / "j").records == [{"a": 1}, {"a": 3}]


def test_rewrite_replaces_and_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"a": 1}, {"a": 2})
    journal.rewrite([{"a": 2}])
    journal.append({"a": 3})
    assert Journal(tmp_path / "j").records == [{"a": 2}, {"a": 3}]


def test_private_files_are_private_under_any_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_private(tmp_path / "token", "secret")
        Journal(tmp_path / "j").append({})
    finally:
        os.umask(old)
    assert oct((tmp_path / "token").stat().st_mode & 0o777) == "0o600"
    assert oct((tmp_path / "j").stat().st_mode & 0o777) == "0o600"


def test_facts_stay_until_acknowledged_in_order_and_over_restarts(tmp_path: Path) -> None:
    facts = Facts(Journal(tmp_path / "f"), "a" * 32, 100)
    woken: list[int] = []
    facts.wake = lambda: woken.append(1)
    one, two, three = (facts.add("run_ended", run_id=str(n)) for n in range(3))
    assert len(woken) == 3
    assert [f["id"] for f in facts.pending()] == [one, two, three]
    facts.ack([two, "unknown"])
    again = Facts(Journal(tmp_path / "f"), "b" * 32, 100)
    assert [f["id"] for f in again.pending()] == [one, three]
    assert again.add("activity", activity="idle") not in (one, two, three)
    assert again.waits(one)
    assert not again.waits(two)


def test_facts_are_bounded_and_the_superseded_go_first(tmp_path: Path) -> None:
    facts = Facts(Journal(tmp_path / "f"), "a" * 32, 3)
    kept = [facts.add("run_ended", run_id="1")]
    facts.add("activity", activity="busy")
    kept.append(facts.add("node_lost", node_id="n"))
    kept.append(facts.add("run_ended", run_id="2"))
    assert [f["id"] for f in facts.pending()] == kept


def test_the_facts_file_does_not_grow_for_ever(tmp_path: Path) -> None:
    facts = Facts(Journal(tmp_path / "f"), "a" * 32, 100)
    for _ in range(600):
        facts.ack([facts.add("activity", activity="busy")])
    last = facts.add("activity", activity="idle")
    lines = (tmp_path / "f").read_text().splitlines()
    assert len(lines) < 520
    assert json.loads(lines[-1])["fact"]["id"] == last


def test_backoff_doubles_to_its_cap_with_jitter() -> None:
    backoff = Backoff(0.2, 15)
    waits = [backoff.next() for _ in range(12)]
    for n, wait in enumerate(waits):
        most = min(15, 0.2 * 2**n)
        assert most / 2 <= wait <= most
    assert len(set(waits[-4:])) > 1
    backoff.reset()
    assert backoff.next() <= 0.2
