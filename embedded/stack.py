"""The embedded stack: Temporal, the bucket, the API and the worker as processes of this machine.

    python -m embedded.stack up [--detach] | down | status | demo | demo-service | backup [FILE] | restore FILE

Ctrl-C ends the control plane only: clusters and their jobs go on, and the next ``up`` finds them. ``down``
ends them first. All state is in ``HELIOSTAT_HOME``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from embedded.backup import backup, restore
from embedded.demo import demo
from embedded.demo_service import demo_service
from embedded.parts import ROOT, VERSION, WORKER_STOP_S, Layout, migrate, parts, set_retention
from embedded.supervisor import Supervisor, rotate, say, tail
from embedded.teardown import down
from heliostat.errors import HeliostatError, InfrastructureError
from runtime.home import Home, end_processes
from runtime.settings import Settings, misspelt

DETACHED_READY_S = 180.0
"""Start-up of a detached stack on a busy machine, migrations of large records included."""


class Stack:
    """One run of the embedded stack, in this process."""

    def __init__(self, settings: Settings, home: Home) -> None:
        self.home = home
        names = ("api", "temporal", "ui", "bucket", "metrics", "sdk_metrics")
        ports = home.ports(
            {name: getattr(settings, f"{name}_port") for name in names},
            {name for name in names if f"{name}_port" in settings.model_fields_set},
        )
        self.layout = Layout(settings, home, ports)
        self._state, self._pids = "starting", dict[str, int]()
        self._supervisor = Supervisor(self._pids_changed, say)

    async def run(self) -> int:
        """Until SIGINT, SIGTERM or SIGHUP. Returns the exit code."""
        stop = asyncio.Event()
        interrupts = 0

        def interrupted() -> None:
            nonlocal interrupts
            interrupts += 1
            if interrupts == 1:
                say("\nStopping the control plane; clusters and their jobs keep running.")
                stop.set()
            else:
                say("Killing it.")
                self._supervisor.kill_all()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, interrupted)
        code = 0
        try:
            if await _until_stopped(stop, self._start()):
                self._write("ready")
                say(banner(self.home.state()))
                await _until_stopped(stop, self._watch())
        except HeliostatError as error:
            say(f"error: {error}")
            code = error.exit_code
        finally:
            self._write("stopping")
            await self._supervisor.stop()
            end_processes(self.home.processes(), grace_s=5)
            self._pids = {}
            self._write("stopped")
        return code

    async def _start(self) -> None:
        began = time.monotonic()
        self._write("starting")
        await asyncio.to_thread(check_space, self.home)
        made = {part.name: part for part in parts(self.layout)}
        await asyncio.gather(
            self._supervisor.start(made["temporal"], made["bucket"]), asyncio.to_thread(migrate, self.layout)
        )
        await asyncio.gather(
            self._supervisor.start(made["api"], made["worker"]), asyncio.to_thread(set_retention, self.layout)
        )
        say(f"everything is ready ({time.monotonic() - began:.1f} s)")

    async def _watch(self) -> None:
        await asyncio.gather(self._supervisor.watch(), self._supervisor.limit_logs())

    def _pids_changed(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._write(self._state)

    def _write(self, state: str) -> None:
        self._state = state
        pids = {} if state == "stopped" else {"stack": os.getpid(), **self._pids}
        try:
            self.home.write_state(self.layout.state() | {"state": state, "pids": pids, "version": VERSION})
        except OSError as error:  # a full disk must not end what runs
            say(f"{self.home.stack_json} could not be written: {error}")


def check_space(home: Home) -> None:
    """Temporal and SQLite fail in obscure ways on a full disk. Raises InfrastructureError before they do."""
    free = shutil.disk_usage(home.path).free
    if free < 256 * 2**20:
        raise InfrastructureError(
            f"Only {free // 2**20} MiB are free where {home.path} is.",
            remedy="Free some space, or set HELIOSTAT_HOME to a larger disk.",
            resource=str(home.path),
        )


async def _until_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Does the work unless told to stop before it is done; True when it was done."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        for unfinished in (task, stopped):
            unfinished.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


def banner(state: dict[str, Any]) -> str:
    cli = "heliostat" if shutil.which("heliostat") else str(Path(sys.executable).with_name("heliostat"))
    return f"""
Heliostat {state["version"]} is up.

  API          {state["api_url"]}    docs: {state["api_url"]}/docs
  Temporal UI  {state["ui_url"]}    (for operators; on this machine only)
  Home         {state["home"]}    logs: {state["home"]}/logs
  Token        {state["token_file"]}
               The CLI on this machine finds it by itself when HELIOSTAT_HOME is the same; elsewhere:
               {cli} login --host {state["api_url"]}

  Try          {cli} job submit --wait -- python -c "print('hello')"

Ctrl-C stops the control plane only: clusters and jobs keep running. `make down` ends them too.
"""


def up(settings: Settings, home: Home, *, detach: bool) -> int:
    for name, meant in misspelt(os.environ).items():
        say(f"warning: unknown setting {name}; did you mean {meant}?")
    home.create()
    if detach:
        return _up_detached(home)
    lock = home.try_lock()
    if lock is None:
        return _already_up(home)
    with lock:
        orphans = home.processes()
        if orphans:
            say(f"ending processes of an earlier stack: {', '.join(sorted(orphans.values()))}")
            end_processes(orphans, grace_s=10)
        return asyncio.run(Stack(settings, home).run())


def _already_up(home: Home) -> int:
    say(f"The stack of {home.path} is running already (pid {home.stack_pid()}).")
    say(banner(home.state()))
    return 0


def _up_detached(home: Home) -> int:
    if home.stack_pid() is not None:
        return _already_up(home)
    log = home.logs / "stack.log"
    rotate(log)
    with log.open("ab") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "embedded.stack", "up"],
            cwd=ROOT,
            env=os.environ | {"DETACH": "0"},  # else it would detach from us in turn, and so on for ever
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    deadline, seen = time.monotonic() + DETACHED_READY_S, 0
    while time.monotonic() < deadline:
        ended = child.poll()
        text = log.read_bytes()
        if len(text) > seen and text.endswith(b"\n"):
            say(text[seen:].decode(errors="replace").rstrip("\n"))
            seen = len(text)
        if ended is not None:
            return ended or 2
        state = home.state()
        if state.get("state") == "ready" and state["pids"].get("stack") == child.pid:
            return 0
        time.sleep(0.05)
    end_processes([child.pid], grace_s=WORKER_STOP_S + 35)
    say(f"error: the stack was not ready within {DETACHED_READY_S:.0f} s. It wrote last:\n{tail(log)}")
    return 2


def status(home: Home) -> int:
    """Prints ``stack.json`` with what lives now. Exit code 0: it runs and is ready; 2: not."""
    state, pid = home.state(), home.stack_pid()
    living = {part: found for found, part in home.processes().items()}
    running = "running" if pid and state.get("state") == "ready" else "starting" if pid else "stopped"
    pids = ({"stack": pid} if pid else {}) | living
    print(json.dumps({**state, "home": str(home.path), "state": running, "pids": pids}, indent=2))  # noqa: T201
    return 0 if running == "running" else 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m embedded.stack", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    commands = parser.add_subparsers(dest="command", required=True)
    detached = os.environ.get("DETACH", "") not in ("", "0")
    commands.add_parser("up").add_argument("--detach", action="store_true", default=detached)
    commands.add_parser("down")
    commands.add_parser("status")
    commands.add_parser("demo")
    commands.add_parser("demo-service")
    commands.add_parser("backup").add_argument("file", nargs="?", type=Path)
    commands.add_parser("restore").add_argument("file", type=Path)
    args = parser.parse_args(argv)
    settings = Settings()
    home = Home(settings.home)
    try:
        match args.command:
            case "up":
                return up(settings, home, detach=args.detach)
            case "down":
                return down(home, start=lambda: _up_detached(home))
            case "status":
                return status(home)
            case "demo":
                return demo()
            case "demo-service":
                return demo_service()
            case "backup":
                print(backup(home, args.file))  # noqa: T201
            case "restore":
                aside = restore(home, args.file)
                say(f"restored to {home.path}" + (f"; the previous home is in {aside}" if aside else ""))
        return 0
    except HeliostatError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
