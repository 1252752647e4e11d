"""Keeps the parts of the embedded stack alive: starts them, starts them again when they die, stops them in order.

Each part is a process in a session of its own, so that Ctrl-C at a terminal reaches the supervisor alone and a
dead supervisor takes nobody along. It owns no state but files in its home: kill -9 of any part is healed here,
kill -9 of the supervisor by the next start, which ends what was left (``Home.processes``).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from heliostat.errors import InfrastructureError

LOGS_KEPT = 5
LOG_MAX_BYTES = 64 * 2**20
START_TRIES = 3
"""Deaths before it was ever ready that a part is forgiven; then the start as a whole fails."""
STEADY_S = 60.0
"""A part that lived so long starts its back-off anew."""
MAX_BACKOFF_S = 30.0

Say = Callable[[str], None]


class PartFailed(InfrastructureError):
    """A part does not come up; the message ends with what it wrote last."""

    code = "part_failed"


@dataclass
class Part:
    """One process of the stack. ``is_ready`` never raises; ``stop_s`` = grace between SIGTERM and SIGKILL."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log: Path
    cwd: Path
    is_ready: Callable[[], Awaitable[bool]]
    ready_s: float = 60.0
    stop_s: float = 10.0
    process: asyncio.subprocess.Process | None = None
    deaths: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.returncode is None else None


class Supervisor:
    """Runs parts until told to stop.

    Args:
        changed: called whenever a pid changes, with all of them (part → pid).
        say: one line for the person at the terminal.
    """

    def __init__(self, changed: Callable[[dict[str, int]], None], say: Say) -> None:
        self._changed = changed
        self._say = say
        self._parts: list[Part] = []
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    async def start(self, *parts: Part) -> None:
        """Starts them at once and returns when all are ready.

        Raises:
            PartFailed: one died ``START_TRIES`` times, or was not ready within its ``ready_s``.
        """
        began = time.monotonic()
        for part in parts:
            rotate(part.log)
            self._parts.append(part)
            self._watchers[part.name] = asyncio.create_task(self._run(part), name=part.name)
        await asyncio.gather(*(self._await_ready(part, began) for part in parts))

    async def watch(self) -> None:
        """Returns only by an exception: a watcher that ended is a bug."""
        done, _ = await asyncio.wait(self._watchers.values(), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Ends the parts, last started first, each gracefully while it can; what does not end is killed."""
        self._stopping = True
        for part in reversed(self._parts):
            self._watchers[part.name].cancel()
            await asyncio.gather(self._watchers[part.name], return_exceptions=True)
            if part.process is None or part.process.returncode is not None:
                continue
            self._say(f"stopping {part.name}")
            part.process.terminate()
            try:
                await asyncio.wait_for(part.process.wait(), part.stop_s)
            except TimeoutError:
                self._say(f"{part.name} did not end within {part.stop_s:.0f} s and is killed")
                part.process.kill()
                await part.process.wait()
            self._tell()

    def kill_all(self) -> None:
        """Kills every part: the second Ctrl-C."""
        for part in self._parts:
            if part.pid is not None:
                os.kill(part.pid, signal.SIGKILL)

    async def _run(self, part: Part) -> None:
        """One part's whole life: start, wait for its end, pause, again."""
        pause = 0.2
        while True:
            born = time.monotonic()
            try:
                part.process = await _spawn(part)
            except OSError as error:  # its log cannot be opened, no process can be made: this may pass
                self._say(f"{part.name} cannot be started: {error}; again in {pause:.1f} s")
                await asyncio.sleep(pause)
                pause = min(pause * 2, MAX_BACKOFF_S)
                continue
            self._tell()
            code = await part.process.wait()
            part.deaths += 1
            if time.monotonic() - born > STEADY_S:
                pause = 0.2
            if part.ready.is_set():
                how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
                self._say(f"{part.name} ended {how}; it restarts in {pause:.1f} s ({part.log})")
            elif part.deaths >= START_TRIES:
                return  # _await_ready tells
            await asyncio.sleep(pause)
            pause = min(pause * 2, MAX_BACKOFF_S)

    async def _await_ready(self, part: Part, began: float) -> None:
        last_word, pause = began, 0.05
        while True:
            answers = await part.is_ready()
            spent = time.monotonic() - began
            if self._watchers[part.name].done():  # whatever answers there, it is not this part
                self._watchers[part.name].result()
                raise PartFailed(
                    f"{part.name} does not start: it ended {part.deaths} times. It wrote last:\n{tail(part.log)}",
                    remedy=f"The full log is in {part.log}.",
                    resource=part.name,
                )
            if answers:
                break
            if spent > part.ready_s:
                raise PartFailed(
                    f"{part.name} runs but was not ready within {part.ready_s:.0f} s. It wrote last:\n{tail(part.log)}",
                    remedy=f"The full log is in {part.log}.",
                    resource=part.name,
                )
            if time.monotonic() - last_word > 5:
                last_word = time.monotonic()
                self._say(f"waiting for {part.name}, {spent:.0f} s so far")
            await asyncio.sleep(pause)
            pause = min(pause * 1.3, 0.5)
        part.ready.set()
        self._say(f"{part.name} is ready ({time.monotonic() - began:.1f} s)")

    def _tell(self) -> None:
        self._changed({part.name: part.pid for part in self._parts if part.pid is not None})

    async def limit_logs(self) -> None:
        """Keeps logs of long-lived parts bounded. They are opened for appending, so cutting them is safe."""
        while True:
            await asyncio.sleep(60)
            for part in self._parts:
                try:
                    if part.log.stat().st_size > LOG_MAX_BYTES:
                        await asyncio.to_thread(shutil.copyfile, part.log, part.log.with_name(part.log.name + ".1"))
                        os.truncate(part.log, 0)
                except OSError as error:  # somebody has removed it, or the disk is full: no reason to end what runs
                    self._say(f"{part.log} could not be cut: {error}")


async def _spawn(part: Part) -> asyncio.subprocess.Process:
    with part.log.open("ab") as log:
        try:
            return await asyncio.create_subprocess_exec(
                *part.argv,
                cwd=part.cwd,
                env=part.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise PartFailed(
                f"{part.name} cannot be started: not found: {part.argv[0]}.",
                remedy="Run `make setup`.",
                resource=part.name,
            ) from error


def rotate(log: Path) -> None:
    """``api.log`` → ``api.log.1`` → … → ``api.log.5`` → gone."""
    for number in range(LOGS_KEPT, 0, -1):
        older = log.with_name(f"{log.name}.{number}")
        newer = log.with_name(f"{log.name}.{number - 1}") if number > 1 else log
        if newer.exists():
            newer.replace(older)


def tail(log: Path, lines: int = 20) -> str:
    try:
        text = log.read_bytes()[-16_384:].decode(errors="replace")
    except FileNotFoundError:
        return "(nothing)"
    return "\n".join(text.splitlines()[-lines:]) or "(nothing)"


def say(line: str) -> None:
    """A line for the person who waits. stderr: stdout holds answers."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
