"""A steady load on a service that looks at every single answer: status, whole body, version, no reset, no cut.

    async with Load(url, token) as load:
        …
    report = load.report()

    python -m benchmarks.load URL --token-env NAME --seconds 60 [--kinds get_kept,post] [--live] [--json]

An open loop: each kind's requests start on time whether the earlier ones are answered or not. Nothing is retried.
On the command line it exits with 1 when a request failed; SIGINT and SIGTERM end it early, with its report.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import ssl
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import h11
from websockets.exceptions import InvalidStatus, WebSocketException

from benchmarks.load_example import EXAMPLE_PLAN
from benchmarks.load_http import Broken, Progress, Target
from benchmarks.load_kinds import KINDS, Kind, Plan, Sender, WrongAnswer
from benchmarks.load_report import Failure, Report, Second, Tally
from heliostat.models.services import VERSION_HEADER

EXPECTED = (OSError, EOFError, Broken, WrongAnswer, h11.RemoteProtocolError, WebSocketException)
"""What a bad server can cause. Anything else is a fault of the load itself and ends it."""
MOST_S = 86_400.0


class Load:
    """Runs from ``async with``'s begin to its end; then waits for what is under way, each within its own time limit.

    Args:
        url: of the service; paths are appended.
        token: for ``Authorization: Bearer``; may be replaced at any time by assigning to ``token``.
        cafile: certificates to trust at ``https://``.
        headers: sent with every request, such as the one that names a backend.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        plan: Plan | None = None,
        *,
        cafile: str = "",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.plan = plan or Plan()
        target = Target(url, token, cafile, headers)
        self._sender = Sender(target, self.plan.version_header, target.tls)
        self._tally = Tally([kind.name for kind in self.plan.kinds])
        self._texts: dict[str, str] = {}
        self._began, self._began_at = 0.0, datetime.now(UTC)
        self._ended: float | None = None
        self._sending: list[asyncio.Task[None]] = []
        self._open: set[asyncio.Task[None]] = set()
        self._fault: BaseException | None = None

    async def __aenter__(self) -> Self:
        await self._sender.fill()
        self._began, self._began_at = time.monotonic(), datetime.now(UTC)
        self._sending = [asyncio.create_task(self._send(kind)) for kind in self.plan.kinds]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        if error is not None:
            for task in self._open:
                task.cancel()
        if self._open:
            await asyncio.gather(*self._open, return_exceptions=True)
        self._ended = self.elapsed
        self._sender.close()
        if self._fault is not None and error is None:
            raise self._fault

    @property
    def elapsed(self) -> float:
        """Seconds since the load's start."""
        return time.monotonic() - self._began if self._ended is None else self._ended

    def at(self, moment: datetime) -> float:
        """The same of a moment that somebody else on this machine has noted."""
        return (moment - self._began_at).total_seconds()

    @property
    def token(self) -> str:
        return self._sender.target.token

    @token.setter
    def token(self, value: str) -> None:
        was = self._sender.target
        self._sender.target = Target(was.url, value, was.cafile, was.headers)
        self._sender.close()  # kept connections carry the old one's header

    @property
    def failures(self) -> list[Failure]:
        """Those so far."""
        return self._tally.failures

    def versions(self) -> set[str]:
        """Ids of the versions that have answered so far (texts where answers carry no id)."""
        return set(self._tally.versions)

    def texts(self) -> dict[str, str]:
        """Version id → how its application called itself first."""
        return dict(self._texts)

    def second(self, number: int) -> Second:
        """What was seen in the second that began ``number`` seconds after the start."""
        return self._tally.seconds.get(number) or Second(number)

    def report(self) -> Report:
        """At any time; whole when the load has ended."""
        self._tally.idle_closed, self._tally.closes_said = self._sender.idle_closed, self._sender.closes_said
        return self._tally.report(self._began_at.isoformat(), self.elapsed)

    async def _send(self, kind: Kind) -> None:
        """Kinds begin at different moments of their beat, else all would come together."""
        period = 1 / kind.per_s
        due = self._began + period * (self.plan.kinds.index(kind) + 1) / (len(self.plan.kinds) + 1)
        while self._fault is None:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            self._tally.sent(kind.name, due - self._began, now - due)
            task = asyncio.create_task(self._one(kind, due))
            self._open.add(task)
            task.add_done_callback(self._done)
            due += period

    def _done(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._fault = self._fault or fault

    async def _one(self, kind: Kind, due: float) -> None:
        progress = Progress()
        try:
            async with asyncio.timeout(kind.timeout_s):
                version_id, text = await kind.call(self._sender, secrets.token_hex(8), progress)
            self._same_text(version_id, text)
        except TimeoutError:
            self._failed(kind, due, progress, f"no whole answer within {kind.timeout_s:g} s")
        except InvalidStatus as error:
            head = error.response.headers
            progress.stage, progress.status = "content", error.response.status_code
            progress.version_id = head.get(VERSION_HEADER, "")
            self._failed(kind, due, progress, f"no websocket: status {error.response.status_code}")
        except EXPECTED as error:
            self._failed(kind, due, progress, f"{type(error).__name__}: {error}"[:500])
        else:
            now = time.monotonic()
            self._tally.ok(kind.name, now - self._began, due - self._began, version_id, text)

    def _same_text(self, version_id: str, text: str) -> None:
        if not text:
            return
        known = self._texts.setdefault(version_id, text)
        if self.plan.one_text and self.plan.version_header and known != text:
            raise WrongAnswer(f"{version_id} calls itself {text!r}, and {known!r} before")

    def _failed(self, kind: Kind, due: float, progress: Progress, error: str) -> None:
        now = time.monotonic()
        failure = Failure(
            kind.name,
            round(due - self._began, 3),
            round(now - due, 3),
            error,
            progress.stage,
            progress.status,
            progress.version_id,
            progress.began,
            kind.idempotent,
        )
        self._tally.failed(failure, now - self._began)


async def run(url: str, token: str, plan: Plan, seconds: float, *, cafile: str = "", live: bool = False) -> Report:
    """A load of so many seconds, or until SIGINT or SIGTERM. ``live``: prints every second as a line of JSON."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Load(url, token, plan, cafile=cafile) as load:
        shown = 0
        while not stop.is_set() and load.elapsed < seconds:
            try:
                await asyncio.wait_for(stop.wait(), min(max(shown + 1.05 - load.elapsed, 0.05), seconds))
            except TimeoutError:
                pass
            while live and shown < int(load.elapsed):
                print(json.dumps(asdict(load.second(shown)) | {"texts": load.texts()}), flush=True)
                shown += 1
    return load.report()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="of the service: query_url")
    parser.add_argument("--token-env", metavar="NAME", help="the environment variable that holds the token")
    parser.add_argument("--seconds", type=float, default=60, help="default 60; at most a day")
    parser.add_argument("--rate", type=float, default=1, help="times the usual rate")
    parser.add_argument("--kinds", default="", help=f"of {','.join(k.name for k in KINDS)}; default: all")
    parser.add_argument("--example", action="store_true", help="for examples/serve_model, not the test application")
    parser.add_argument("--in-place", action="store_true", help="one version id may have several texts")
    parser.add_argument("--no-version-header", action="store_true", help="for servers without a gate of ours")
    parser.add_argument("--cafile", default="", help="certificates to trust")
    parser.add_argument("--live", action="store_true", help="a line of JSON every second")
    parser.add_argument("--json", action="store_true", help="the report as JSON, as the last line")
    args = parser.parse_args(argv)
    if not 0 < args.seconds <= MOST_S or args.rate <= 0:
        parser.error(f"--seconds is above 0 and at most {MOST_S:.0f}, --rate above 0")
    token = os.environ.get(args.token_env, "") if args.token_env else ""
    if args.token_env and not token:
        parser.error(f"there is no {args.token_env} in the environment, or it is empty")
    plan = replace(
        EXAMPLE_PLAN if args.example else Plan(),
        version_header=not args.no_version_header,
        one_text=not args.in_place,
    ).at(args.rate)
    try:
        plan = plan.only(*args.kinds.split(",")) if args.kinds else plan
        made = asyncio.run(run(args.url, token, plan, args.seconds, cafile=args.cafile, live=args.live))
    except ValueError as error:
        parser.error(str(error))
    except (OSError, ssl.SSLError) as error:
        print(f"error: {args.url} can't be reached: {error}", file=sys.stderr)
        return 2
    print(json.dumps(made.to_dict()) if args.json else made.summary(), flush=True)
    return 1 if made.failed or not made.ok else 0


if __name__ == "__main__":
    sys.exit(main())
