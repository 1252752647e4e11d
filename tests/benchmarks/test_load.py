"""The load notices everything that a server can do wrong, and nothing where nothing is wrong."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from benchmarks.load import Load, main
from benchmarks.load_http import Target
from benchmarks.load_kinds import KINDS, Kind, Plan, pad
from benchmarks.load_report import Failure, Report

ROOT = Path(__file__).resolve().parents[2]
LINGER_0 = struct.pack("ii", 1, 0)
TOKEN = "right"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds by itself takes tenths."""
    for name, seconds in (("SLOW_S", 0.1), ("STREAM_S", 0.4), ("SESSION_S", 0.6)):
        monkeypatch.setattr(f"benchmarks.load_kinds.{name}", seconds)


class Server:
    """Speaks the protocol of the test application over plain sockets, so that it can do everything wrong."""

    def __init__(self, wrong: str = "", share: Callable[[int], bool] = lambda number: True) -> None:
        self.wrong, self._share = wrong, share
        self.number = 0
        self.connections = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, EOFError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return False
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        sent = await reader.readexactly(int(length[1]) if length else 0)
        close = "connection: close" in head.lower()
        self.number += 1
        wrong = self.wrong if self._share(self.number) else ""
        url = urlsplit(head.split()[1])
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if wrong == "hang":
            await asyncio.sleep(60)
        if wrong == "reset" or (wrong == "reset_kept" and not close):
            return self._reset(writer)
        if wrong == "closed":
            return False
        status = int(wrong) if wrong.isdigit() else 200
        if f"authorization: bearer {TOKEN}" not in head.lower():
            status = 401
        text = f"v{self.number}" if wrong == "texts" else "v1"
        body = self._body(url.path, query, sent, text)
        if wrong == "body":
            body = body[:-20] + b"x" + body[-19:]
        if wrong == "nonce":
            body = body.replace(query["nonce"].encode(), b"0" * 16)
        if wrong == "shorter":
            body = body[:-5]
        chunked = url.path == "/stream"
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [] if wrong == "no_id" else ["X-Heliostat-Version: sv_1"]
        lines += ["Transfer-Encoding: chunked"] if chunked else [f"Content-Length: {len(body)}"]
        lines += ["Connection: close"] if close or wrong == "close_said" else []
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        pieces = body.splitlines(keepends=True) if chunked else [body[: len(body) // 2], body[len(body) // 2 :]]
        if wrong == "missing":
            del pieces[len(pieces) // 2]
        for number, piece in enumerate(pieces):
            if number == len(pieces) // 2 and wrong in ("reset_mid", "cut"):
                await writer.drain()
                return self._reset(writer) if wrong == "reset_mid" else False
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
            if chunked and wrong != "at_once":
                await asyncio.sleep(float(query["seconds"]) / len(pieces))
        if chunked:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return not (close or wrong in ("close_said", "closes_idle"))

    @staticmethod
    def _body(path: str, query: dict[str, str], sent: bytes, text: str) -> bytes:
        nonce = query["nonce"]
        if path == "/digest":
            return f"{text} {nonce} {hashlib.sha256(sent).hexdigest()} {len(sent)}\n".encode()
        if path == "/stream":
            count = int(query["chunks"])
            return "".join(f"{text} {nonce} {number}/{count}\n" for number in range(count)).encode()
        assert path in ("/echo", "/slow")
        return f"{text} {nonce} {pad(nonce)}\n".encode()

    @staticmethod
    def _reset(writer: asyncio.StreamWriter) -> bool:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        writer.transport.abort()
        return False


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()


HTTP_KINDS = [kind.name for kind in KINDS if kind.name != "websocket"]
QUICK = Plan().only("get_fresh", "get_kept", "post", "stream")


async def until_seen(load: Load, count: int) -> None:
    """Until so many requests have ended, however."""
    async with asyncio.timeout(60):
        while load.report().ok + load.report().failed < count:
            await asyncio.sleep(0.05)


async def loaded(server: Server, plan: Plan = QUICK, count: int = 12, token: str = TOKEN) -> Report:
    async with serving(server), Load(server.url, token, plan) as load:
        await until_seen(load, count)
    report = load.report()
    assert report.sent == report.ok + report.failed, "every request is accounted for"
    assert report.sent == sum(second.sent for second in report.timeline)
    assert report.ok == sum(second.ok for second in report.timeline)
    assert report.failed == sum(second.failed for second in report.timeline) == len(report.failures)
    return report


async def test_a_good_server_has_no_failure() -> None:
    server = Server()
    report = await loaded(server, Plan().only(*HTTP_KINDS), count=30)
    assert report.failed == 0, report.summary()
    assert all(report.kinds[name].ok for name in HTTP_KINDS), report.summary()
    assert all(kind.p50_ms is not None for kind in report.kinds.values())
    assert report.kinds["stream"].p50_ms > 300  # type: ignore[operator]
    assert [(v.version_id, v.texts, v.ok) for v in report.versions.values()] == [("sv_1", ["v1"], report.ok)]
    assert report.idle_closed == report.closes_said == 0
    fresh = sum(report.kinds[name].sent for name in ("get_fresh", "slow", "stream"))
    # After a moment in which this process stood still, more than are kept are due at once: 12 of them each second.
    more = 4 + 12 * report.late_ms / 1000
    assert fresh + 8 <= server.connections <= fresh + 8 + more, "kept connections are kept"
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(
    ("wrong", "stage", "words"),
    [
        ("reset", "answer", "reset"),
        ("closed", "answer", "before the answer began"),
        ("reset_mid", "body", "reset"),
        ("cut", "body", "middle of the answer"),
        ("body", "content", "wrong body"),
        ("nonce", "content", "wrong body"),
        ("shorter", "content", "wrong body"),
        ("500", "content", "status 500"),
        ("503", "content", "status 503"),
        ("no_id", "content", "no X-Heliostat-Version"),
        ("hang", "answer", "no whole answer within 0.5 s"),
    ],
)
async def test_every_wrong_answer_is_noticed(wrong: str, stage: str, words: str) -> None:
    plan = QUICK.patient(0.5) if wrong == "hang" else QUICK
    report = await loaded(Server(wrong), plan)
    assert report.ok == 0, report.summary()
    assert {failure.kind for failure in report.failures} == {kind.name for kind in plan.kinds}
    # A server that resets may do so before the client has read what came before.
    stages = {"body", "answer"} if wrong == "reset_mid" else {"send", "answer"} if wrong == "reset" else {stage}
    assert {failure.stage for failure in report.failures} <= stages, report.summary()
    assert all(words in failure.error.lower() or words in failure.error for failure in report.failures), (
        report.summary()
    )
    assert all(failure.began == (failure.stage in ("body", "content")) for failure in report.failures)
    assert {f.kind: f.idempotent for f in report.failures}["post"] is False


async def test_one_failure_among_many_is_noticed() -> None:
    report = await loaded(Server("500", share=lambda number: number == 7), count=20)
    assert report.failed == 1, report.summary()
    assert (report.failures[0].status, report.failures[0].version_id) == (500, "sv_1")


@pytest.mark.parametrize("wrong", ["missing", "at_once"])
async def test_streams_that_lack_a_piece_or_come_at_once(wrong: str) -> None:
    report = await loaded(Server(wrong), Plan().only("stream"), count=2)
    assert report.ok == 0, report.summary()


async def test_a_version_that_changes_its_text_is_noticed_unless_it_may() -> None:
    report = await loaded(Server("texts"))
    assert report.ok == 1
    assert all("calls itself" in failure.error for failure in report.failures)
    report = await loaded(Server("texts"), Plan(one_text=False).only("get_fresh"))
    assert report.failed == 0
    assert len(report.texts()) == report.ok


@pytest.mark.long
async def test_kept_connections_closed_at_rest_count_apart_and_those_broken_under_a_request_are_failures() -> None:
    kept = Plan().only("get_kept", "post")
    report = await loaded(Server("close_said"), kept)
    assert (report.failed, report.idle_closed, report.closes_said) == (0, 0, report.ok)
    report = await loaded(Server("closes_idle"), kept, count=30)
    assert report.failed == 0, report.summary()
    assert report.idle_closed > 0, "no request was sent on them"
    report = await loaded(Server("reset_kept", share=lambda number: number % 5 == 0), kept, count=30)
    assert report.failed >= 5, "a request that was sent is not sent again"


async def test_a_wrong_token_fails_and_a_new_one_may_be_set() -> None:
    async with serving(Server()) as server:
        async with Load(server.url, "wrong", QUICK) as load:
            await until_seen(load, 5)
            load.token = TOKEN
            failed = load.report().failed
            await until_seen(load, failed + 20)
        report = load.report()
    assert report.ok
    assert {failure.status for failure in report.failures} == {401}
    assert TOKEN not in repr(Target(server.url, TOKEN)), "a token is no part of a repr"


async def test_nothing_listens() -> None:
    async with serving(Server()) as server:
        pass
    with pytest.raises(ConnectionRefusedError):
        async with Load(server.url, TOKEN, QUICK):
            pass


async def test_a_server_that_goes_away_is_noticed() -> None:
    async with serving(Server()) as server, Load(server.url, TOKEN, Plan().only("get_fresh")) as load:
        await until_seen(load, 3)
        server.wrong = "reset"
        before = load.report()
        await until_seen(load, before.sent + 4)  # those under way may have been answered already
    assert before.failed == 0
    assert load.report().failed >= 4


@pytest.mark.long
async def test_the_rate_is_kept_while_answers_hang() -> None:
    """An open loop: what hangs does not slow it down."""
    async with serving(Server("hang")) as server:
        async with Load(server.url, TOKEN, Plan().only("get_fresh").patient(1.5)) as load:
            await asyncio.sleep(2)
        report = load.report()
    assert 12 <= report.sent <= 17, report.summary()
    assert report.failed == report.sent


async def test_a_fault_of_the_load_itself_ends_it() -> None:
    async def faulty(*_: object) -> tuple[str, str]:
        raise KeyError("ours")

    plan = Plan(kinds=(Kind("faulty", 20, 5, True, faulty),))
    with pytest.raises(KeyError, match="ours"):
        async with serving(Server()) as server, Load(server.url, TOKEN, plan):
            await asyncio.sleep(0.5)


# --- websockets ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def sockets(wrong: str = "") -> AsyncIterator[str]:
    async def handle(connection: ServerConnection) -> None:
        number = 0
        async for message in connection:
            number += 1
            if wrong == "abort" and number == 3:
                connection.transport.abort()
                return
            if wrong == "close" and number == 3:
                await connection.close(1011, "told to")
                return
            await connection.send("v1 other" if wrong == "echo" and number == 3 else f"v1 {message!s}")

    def process(connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(HTTPStatus.FORBIDDEN, "no") if wrong == "refuse" else None

    def answer(connection: ServerConnection, request: Request, response: Response) -> None:
        if wrong != "no_id":
            response.headers["X-Heliostat-Version"] = "sv_1"

    async with serve(handle, "127.0.0.1", 0, process_request=process, process_response=answer) as server:
        yield f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


@pytest.mark.parametrize("wrong", ["", "abort", "close", "echo", "refuse", "no_id"])
async def test_websockets(wrong: str) -> None:
    async with sockets(wrong) as url, Load(url, TOKEN, Plan().only("websocket").at(4)) as load:
        await until_seen(load, 3)
    report = load.report()
    assert (report.failed == 0) == (not wrong), report.summary()
    assert (report.ok == 0) == bool(wrong), report.summary()
    if wrong == "refuse":
        assert {failure.status for failure in report.failures} == {403}


# --- the command line ---------------------------------------------------------------------------------------


def start_cli(url: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load", url, "--token-env", "T", *options],
        cwd=ROOT, env=os.environ | {"T": TOKEN}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("wrong", "code"), [("", 0), ("500", 1)])
async def test_the_command_line(wrong: str, code: int) -> None:
    async with serving(Server(wrong)) as server:
        child = start_cli(server.url, "--seconds", "2.5", "--kinds", "get_fresh,post", "--live", "--json")
        out, err = await asyncio.to_thread(child.communicate, timeout=60)
    assert child.returncode == code, err
    *seconds, last = [json.loads(line) for line in out.splitlines()]
    assert [second["second"] for second in seconds] == list(range(len(seconds)))
    assert len(seconds) >= 2
    report = Report.from_dict(last)
    assert bool(report.failed) == bool(code)
    assert Counter(s["ok"] for s in seconds).total()
    assert TOKEN not in out + err


async def test_a_signal_ends_it_with_its_report() -> None:
    async with serving(Server()) as server:
        child = start_cli(server.url, "--seconds", "600", "--kinds", "get_kept", "--live")
        assert child.stdout is not None
        assert await asyncio.to_thread(child.stdout.readline)
        child.send_signal(signal.SIGINT)
        out, _ = await asyncio.to_thread(child.communicate, timeout=60)
    assert child.returncode == 0
    assert "0 failed" in out


@pytest.mark.parametrize(
    "options", [["--kinds", "nonsense"], ["--seconds", "0"], ["--token-env", "HELIOSTAT_NO_SUCH"], ["--rate", "-1"]]
)
def test_bad_options_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["http://127.0.0.1:1", *options])
    assert options[1] in capsys.readouterr().err or options[0] in ("--seconds", "--rate")


def test_a_failure_says_where_it_was() -> None:
    text = str(Failure("post", 1.5, 0.2, "Broken: gone", "answer", 0, "", False, False))
    assert "post" in text
    assert "Broken: gone [answer, 0.20 s]" in text
