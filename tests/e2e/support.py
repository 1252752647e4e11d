"""A real stack in a home of its own, driven as a person drives it: by the command line."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx

from clouds.local.machines import supervisor
from runtime.home import Home, is_alive

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
"""The environment's own commands: its ``bin`` folder, not that of the interpreter it links to."""

QUICK = {
    **{f"HELIOSTAT_{name}_PORT": "0" for name in ("API", "TEMPORAL", "UI", "BUCKET", "METRICS", "SDK_METRICS")},
    "HELIOSTAT_SILENCE_S": "6",
    "HELIOSTAT_MONITOR_INTERVAL_S": "1",
    "HELIOSTAT_REPORT_INTERVAL_S": "1",
    "HELIOSTAT_SWEEP_INTERVAL_S": "15",
    "HELIOSTAT_NEWBORN_GRACE_S": "20",
}

ONE_NODE = {"head_node": {"resources": {"CPU": 1}}, "worker_nodes": []}
"""The smallest cluster that does work."""


def clean_environment() -> dict[str, str]:
    """This process's environment without anything that names a Heliostat or a Temporal."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("HELIOSTAT_", "TEMPORAL_", "DETACH"))}


def until(what: str, ask: Callable[[], T], timeout: float = 60, every: float = 0.2) -> T:
    """The first truthy answer. Fails naming what was awaited and what was seen last."""
    deadline = time.monotonic() + timeout
    while True:
        seen = ask()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout:.0f} s; last seen: {seen!r}")
        time.sleep(every)


class Stack:
    """``home`` must be short: Ray's sockets live below it. ``code``: the checkout to run from; ``commands``: the
    ``bin`` folder of its environment; ``module``: what its `make up` runs."""

    def __init__(
        self,
        home: Path,
        settings: dict[str, str] | None = None,
        code: Path = ROOT,
        *,
        commands: Path = BIN,
        module: str = "embedded.stack",
    ) -> None:
        self.home = Home(home)
        self.code = code
        self._commands, self._module = commands, module
        self.config_dir = home.with_name(home.name + "-config")
        self.env = (
            clean_environment()
            | QUICK
            | (settings or {})
            | {
                "HELIOSTAT_HOME": str(home),
                "XDG_CONFIG_HOME": str(self.config_dir),
                "PATH": f"{commands}:{os.environ['PATH']}",
                "PYTHONDONTWRITEBYTECODE": "1",
            }
        )
        if code != ROOT:
            self.env["PYTHONPATH"] = str(code)

    # --- the stack ------------------------------------------------------------------------------------------

    def command(self, *args: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._commands / "python"), "-m", self._module, *args],
            cwd=self.code, env=self.env, text=True, capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip

    def up(self) -> None:
        done = self.command("up", "--detach")
        assert done.returncode == 0, f"up failed ({done.returncode}):\n{done.stdout}\n{done.stderr}"

    def interrupt(self) -> None:
        """Ctrl-C, and wait for the end of the control plane."""
        pid = self.home.stack_pid()
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        until("the control plane to stop", lambda: not is_alive(pid) and not self.home.processes(), 60)

    def down(self) -> subprocess.CompletedProcess[str]:
        return self.command("down")

    @property
    def state(self) -> dict[str, Any]:
        return self.home.state()

    @property
    def token(self) -> str:
        return self.home.token_file.read_text().strip()

    def pid(self, part: str) -> int:
        return int(self.state["pids"][part])

    def kill(self, part: str) -> None:
        """kill -9, and wait until the supervisor has started it anew."""
        old = self.pid(part)
        os.kill(old, signal.SIGKILL)
        until(f"{part} to be started again", lambda: self.state["pids"].get(part) not in (None, old), 30)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.state['api_url']}/readyz", timeout=5).is_success
        except httpx.HTTPError:
            return False

    # --- the command line -----------------------------------------------------------------------------------

    def cli(
        self, *args: str, timeout: float = 180, env: dict[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self._commands / "python"), "-m", "heliostat", *args],
            cwd=cwd or self.code, env=self.env | {"PYTHONPATH": str(self.code)} | (env or {}), text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False,
        )  # fmt: skip

    def start_cli(self, *args: str, **kwargs: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self._commands / "python"), "-m", "heliostat", *args],
            cwd=self.code, env=self.env | {"PYTHONPATH": str(self.code)}, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs,
        )  # fmt: skip

    def ask(self, *args: str, code: int = 0, **kwargs: Any) -> Any:
        """The answer as data (``-o json``)."""
        done = self.cli(*args, "-o", "json", **kwargs)
        assert done.returncode == code, f"{args}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def submit(self, *entrypoint: str, options: tuple[str, ...] = (), config: dict[str, Any] | None = None) -> str:
        """A job by the command line, on a small cluster of its own unless ``options`` say otherwise; its id."""
        words = ["job", "submit", *options]
        if "--cluster" not in options and "--compute-config" not in options:
            words += ["--compute-config", self.config_file(config or ONE_NODE)]
        done = self.cli(*words, "-o", "json", "--", *entrypoint)
        assert done.returncode == 0, f"submit: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return str(json.loads(done.stdout)["id"])

    def config_file(self, config: dict[str, Any]) -> str:
        path = self.config_dir / f"compute-{abs(hash(json.dumps(config, sort_keys=True)))}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config))
        return str(path)

    def job(self, ref: str) -> dict[str, Any]:
        return dict(self.get(f"/v1/jobs/{ref}"))

    def cluster(self, ref: str) -> dict[str, Any]:
        return dict(self.get(f"/v1/clusters/{ref}"))

    def nodes(self, ref: str) -> list[dict[str, Any]]:
        return list(self.get(f"/v1/clusters/{ref}/nodes", params={"limit": 100})["items"])

    def log(self, ref: str, *more: str) -> str:
        done = self.cli("job", "logs", ref, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def await_job(self, ref: str, *states: str, timeout: float = 120) -> dict[str, Any]:
        """The job once it is in one of the states; fails at once when it is settled in another."""
        settled = {"SUCCEEDED", "FAILED", "TERMINATED"}

        def look() -> dict[str, Any] | None:
            job = self.get(f"/v1/jobs/{ref}")
            if job["state"] in states:
                return job
            assert job["state"] not in settled, f"job {ref} is {job['state']}: {job['reason']}\n{self.story(ref)}"
            return None

        return until(f"job {ref} to be {'/'.join(states)}", look, timeout) or {}

    def await_cluster(self, ref: str, *states: str, timeout: float = 120) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            cluster = self.get(f"/v1/clusters/{ref}")
            if cluster["state"] in states:
                return dict(cluster)
            assert cluster["state"] not in ("TERMINATED", "FAILED"), f"{cluster['state']}: {cluster['reason']}"
            return None

        return until(f"cluster {ref} to be {'/'.join(states)}", look, timeout) or {}

    def story(self, ref: str) -> str:
        kind = "cluster" if ref.startswith(("cl", "clu")) else "job"
        return self.cli(kind, "events", ref).stdout

    # --- the API --------------------------------------------------------------------------------------------

    def get(self, path: str, **kwargs: Any) -> Any:
        """Asks the API; waits over its restarts."""

        def ask() -> httpx.Response | None:
            try:
                answer = httpx.get(self.state["api_url"] + path, headers=self.bearer, timeout=20, **kwargs)
            except httpx.TransportError:
                return None
            return None if answer.status_code == 503 else answer

        answer = until(f"an answer to GET {path}", ask, 60)
        assert answer is not None
        assert answer.is_success, answer.text
        return answer.json()

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def sql(self, query: str, *args: Any) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(f"file:{self.home.records_db}?mode=ro", uri=True, timeout=20)) as db:
            return db.execute(query, args).fetchall()

    # --- Temporal, as its operator sees it ------------------------------------------------------------------

    def temporal(self, *args: str) -> str:
        done = subprocess.run(
            [str(BIN / "temporal"), *args, "--address", self.state["temporal_address"]],
            env=clean_environment() | {"TEMPORAL_CONFIG_FILE": os.devnull},
            text=True, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def history(self, workflow_id: str) -> str:
        """A workflow's events as JSON, with what their payloads hold in clear."""
        text = self.temporal("workflow", "show", "--output", "json", "-w", workflow_id)

        def opened(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {
                key: base64.b64decode(value).decode(errors="replace")
                if key == "data" and isinstance(value, str)
                else value
                for key, value in pairs
            }

        return json.dumps(json.loads(text, object_pairs_hook=opened))

    # --- processes ------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Every living process that carries this home in its environment or command line, pid → command line."""
        return processes_with(str(self.home.path))

    def node_processes(self, machine_id: str | None = None) -> dict[int, str]:
        """What runs on this home's nodes, or on one machine of it, by the mark that every child inherits."""
        mark = f"HELIOSTAT_NODE_DIR={self.home.path}/machines/{machine_id or ''}".encode()
        found = {}
        for pid, environ, argv in _all_processes():
            if any(item.startswith(mark) for item in environ.split(b"\0")):
                found[pid] = argv.replace(b"\0", b" ").decode(errors="replace")
        return found

    def first_process(self, machine_id: str) -> int:
        """The node's first process, with which it ends. By its age: numbers begin anew at 32,768, which Ray's threads
        reach every few minutes, and the lowest may be a replica's."""
        return min(self.node_processes(machine_id), key=lambda pid: supervisor.start_time(pid) or sys.maxsize)

    def agent_pid(self, machine_id: str) -> int | None:
        """The agent proper: the child of the node's first process that runs ``-m agent``."""
        agents = {pid for pid, argv in self.node_processes(machine_id).items() if "-m agent " in argv}
        children = [pid for pid in agents if parent(pid) in agents]
        return children[0] if len(children) == 1 else None

    def await_no_nodes(self, timeout: float = 40) -> None:
        until("no process of a node to be left", lambda: not self.node_processes(), timeout)

    def dispose(self) -> list[str]:
        """Ends everything and tells what ``down`` left behind: processes, short names in /tmp."""
        done = self.down()
        left = [f"down: exit code {done.returncode}\n{done.stderr}"] if done.returncode else []
        left += [f"pid {pid}: {argv[:200]}" for pid, argv in self.processes().items()]
        left += [
            str(link)
            for link in Path("/tmp").glob("hn-*")
            if link.is_symlink() and str(link.readlink()).startswith(f"{self.home.path}/")
        ]
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        return left


def _all_processes() -> list[tuple[int, bytes, bytes]]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and is_alive(int(entry)):
            try:
                environ = Path(f"/proc/{entry}/environ").read_bytes()
                argv = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            found.append((int(entry), environ, argv))
    return found


def processes_with(text: str) -> dict[int, str]:
    """Living processes that have the text in their environment or arguments, pid → command line."""
    needle = text.encode()
    # Not "below": /tmp/h1 must not find /tmp/h10.
    pattern = re.compile(re.escape(needle) + rb"(?![A-Za-z0-9._-])")
    return {
        pid: argv.replace(b"\0", b" ").decode(errors="replace")
        for pid, environ, argv in _all_processes()
        if pattern.search(environ) or pattern.search(argv)
    }


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def utcnow() -> datetime:
    return datetime.now(UTC)


def marker(path: Path, *, then: str = "", before: str = "") -> str:
    """An entry point (a shell line) that appends its run's id to ``path`` when it is executed."""
    return f"{before} echo $RAY_JOB_SUBMISSION_ID $$ >> {path}; {then}".strip()
