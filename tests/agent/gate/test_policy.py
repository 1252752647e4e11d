"""The gate file, and the verdict on a token."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from agent.gate import policy as gate_policy
from agent.gate.policy import GateFile, Policy, Verdict, judge
from heliostat.models.services import VERSION_HEADER
from tests.agent.conftest import until
from tests.agent.gate.support import AS_PROBE, BEARER, OLD, PROBE, TOKEN, Asked, GateWriter, answering


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hashes": ["xyz"]}, "a hash is not a SHA-256"),
        ({"hashes": ["ab"]}, "a hash is not a SHA-256"),
        ({"hashes": [7]}, "a hash is not a SHA-256"),
        ({"hashes": None}, "'hashes' is missing or not of type list"),
        ({"enabled": "false"}, "'enabled' is missing or not of type bool"),
        ({"enabled": None}, "'enabled' is missing"),
        ({"draining": 0}, "'draining' is missing or not of type bool"),
        ({"revision": True}, "'revision' is missing or not of type int"),
        ({"version_id": "a\r\nb"}, "is not a valid header value"),
    ],
)
async def test_a_garbled_file_closes_the_gate(writer: GateWriter, change: dict[str, Any], why: str) -> None:
    writer.write(**change)
    asked = Asked(answering(), writer)
    assert await asked(headers=[BEARER]) == 503
    problem = json.loads(asked.body)
    assert problem.keys() == {"type", "title", "status", "code", "detail", "remedy"}
    assert problem["code"] == "unavailable"
    assert why in problem["detail"]
    assert asked.header("content-type") == [b"application/problem+json"]
    assert await asked("/-/healthz") == 200
    assert await asked("/-/heliostat", [AS_PROBE]) == 503
    assert asked.stats.snapshot()["requests"] == 0


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff\xfe", b" " * (2**20 + 1)])
async def test_no_file_or_no_json_closes_the_gate(writer: GateWriter, content: bytes | None) -> None:
    writer.path.unlink()
    if content is not None:
        writer.path.write_bytes(content)
    asked = Asked(answering(), writer)
    assert await asked(headers=[BEARER]) == 503
    assert await asked(headers=[BEARER], type="websocket", extensions={"websocket.http.response": {}}) == 503
    assert await asked("/-/healthz") == 200
    assert not asked.header(VERSION_HEADER)


async def test_environment_that_names_no_file(monkeypatch: pytest.MonkeyPatch, writer: GateWriter) -> None:
    monkeypatch.delenv("HELIOSTAT_SERVE_GATE", raising=False)
    assert GateFile().policy() is None
    monkeypatch.setenv("HELIOSTAT_SERVE_GATE", str(writer.path))
    found = GateFile().policy()
    assert found is not None
    assert found.version_id == "sv_1"


def test_changes_are_seen_soon_and_an_unchanged_file_is_not_read_again(
    writer: GateWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = GateFile(str(writer.path))
    for revision in range(2, 30):
        writer.write(revision=revision)
        until(lambda want=revision: (p := file.policy()) is not None and p.revision == want, 10, "a revision is missed")
        if revision == 4:
            monkeypatch.setattr(gate_policy, "REFRESH_S", 0.0)
    writer.path.rename(writer.path.with_suffix(".away"))
    assert file.policy() is None
    assert "No such file" in file.closed_reason
    writer.write(revision=30)
    monkeypatch.setattr(gate_policy, "SETTLED_NS", -(10**12))
    assert (first := file.policy()) is not None
    monkeypatch.setattr(Policy, "parse", lambda data: pytest.fail("it was read again"))
    assert file.policy() is first


def test_the_look_is_not_taken_at_every_request(writer: GateWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    stat = os.stat

    def look(path: Any, *args: Any, **kw: Any) -> os.stat_result:
        if path == str(writer.path):  # threads of others look at files of their own
            looks.append(1)
        return stat(path, *args, **kw)

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(gate_policy, "REFRESH_S", 3600.0)
    file = GateFile(str(writer.path))
    assert all(file.policy() is not None for _ in range(100))
    assert len(looks) == 1


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([], Verdict.ABSENT),
        ([b""], Verdict.ABSENT),
        ([b"Bearer"], Verdict.ABSENT),
        ([b"Bearer  "], Verdict.ABSENT),
        ([b"Basic dXNlcjpwYXNz"], Verdict.ABSENT),
        ([TOKEN], Verdict.ABSENT),
        ([b"Bearer " + TOKEN], Verdict.PASS),
        ([b"bearer " + TOKEN], Verdict.PASS),
        ([b"BEARER   " + TOKEN + b" "], Verdict.PASS),
        ([b"Bearer " + OLD], Verdict.PASS),
        ([b"Bearer " + PROBE], Verdict.PROBE),
        ([b"Bearer " + TOKEN + b"x"], Verdict.WRONG),
        ([b"Bearer " + TOKEN.upper()], Verdict.WRONG),
        ([b"Bearer " + TOKEN + b", Bearer " + TOKEN], Verdict.WRONG),
        ([b"Bearer \xff\xfe\x00"], Verdict.WRONG),
        ([b"Bearer " + b"a" * 60_000], Verdict.WRONG),
        ([b"Bearer " + TOKEN, b"Bearer " + TOKEN], Verdict.WRONG),
        ([b"Bearer x", b"Bearer " + TOKEN], Verdict.WRONG),
        ([b"Bearer " + PROBE, b"Bearer " + PROBE], Verdict.WRONG),
    ],
)
def test_judgement(writer: GateWriter, values: list[bytes], verdict: Verdict) -> None:
    assert judge(Policy.parse(writer.path.read_bytes()), values) == verdict
    writer.write(enabled=False)
    asked_for_none = verdict if verdict == Verdict.PROBE else Verdict.PASS
    assert judge(Policy.parse(writer.path.read_bytes()), values) == asked_for_none


def test_without_a_probe_hash_nothing_is_a_probe(writer: GateWriter) -> None:
    writer.write(probe_hash="", hashes=[])
    policy = Policy.parse(writer.path.read_bytes())
    assert judge(policy, [b"Bearer " + PROBE]) == Verdict.WRONG
