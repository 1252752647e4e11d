from __future__ import annotations

import os
from pathlib import Path

import pytest

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
    with pytest.raises(OSError, match="no space"):
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
