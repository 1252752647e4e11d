"""A service of a real stack, driven by the command line, and a load on it in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from benchmarks.load_report import Report
from benchmarks.services import config
from clouds.local.balancer import supervisor as balancer_supervisor
from tests.e2e.support import ROOT, Stack, clean_environment, until

READY_S = 240.0
"""From a deploy to what it was to come to, on a machine that does much else."""
QUICK = {"steps": [20, 50, 100], "hold_s": 1, "keep_failed_s": 0}
HELD = {"steps": [20, 100], "hold_s": 600, "keep_failed_s": 0}
"""Stays at its first step until it is told otherwise."""


class Served:
    """One service by name."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.stack, self.name = stack, name

    # --- commands -------------------------------------------------------------------------------------------

    def file(self, version: str, *, more: dict[str, Any] | None = None, **options: Any) -> str:
        """A service.yaml of the test application; ``options``: see ``benchmarks.services.config``."""
        made = config(version, name=self.name, **({"rollout": QUICK} | options)) | (more or {})
        path = self.stack.config_dir / f"service-{self.name}-{version}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(made))  # JSON is YAML
        return str(path)

    def deploy(
        self, version: str, *flags: str, code: int = 0, wait: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        words = ["service", "deploy", "-f", self.file(version, **options), *flags, *(["--wait"] if wait else [])]
        done = self.stack.cli(*words, timeout=READY_S)
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.story()}"
        return done

    def cli(self, *words: str, code: int = 0, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        done = self.stack.cli("service", *words, **kwargs)
        assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def terminate(self) -> None:
        self.cli("terminate", self.name, "--wait", timeout=READY_S)

    # --- looks ----------------------------------------------------------------------------------------------

    @property
    def now(self) -> dict[str, Any]:
        return dict(self.stack.get(f"/v1/services/{self.name}"))

    def version(self, name: str) -> dict[str, Any]:
        """The newest of that name."""
        found = [v for v in self.now["versions"] if v["name"] == name]
        assert found, f"no version {name} in {[v['name'] for v in self.now['versions']]}"
        return dict(max(found, key=lambda v: v["number"]))

    def story(self) -> str:
        return self.stack.cli("service", "events", self.name).stdout

    def until(self, what: str, ask: Any, timeout: float = READY_S) -> Any:
        """The first truthy ``ask(service)``; tells the service's story where there is none."""
        try:
            return until(what, lambda: ask(self.now), timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story()}") from None

    def until_at(self, percent: int) -> None:
        self.until(
            f"the new version at {percent} %", lambda s: s["rollout"] is not None and s["rollout"]["percent"] == percent
        )

    def until_rests(self, primary: str) -> None:
        """Until this version serves alone and every other one has ended."""

        def rests(service: dict[str, Any]) -> bool:
            alive = [v["name"] for v in service["versions"] if v["state"] != "TERMINATED"]
            return service["state"] == "RUNNING" and service["rollout"] is None and alive == [primary]

        self.until(f"{primary} alone", rests)

    def machines(self, version: str) -> list[str]:
        """Of the heads of its clusters."""
        return [
            node["machine_id"]
            for cluster in self.version(version)["clusters"]
            for node in self.stack.nodes(cluster["cluster_id"])
            if node["role"] == "head" and node["state"] == "RUNNING"
        ]

    # --- requests -------------------------------------------------------------------------------------------

    def ask(
        self, path: str = "/", token: str | None = "", service: dict[str, Any] | None = None, **kwargs: Any
    ) -> httpx.Response:
        """One request. ``token``: "" the service's own, None: none; ``service``: as known, instead of as it is now."""
        service = service or self.now
        bearer = service["query_auth_token"] if token == "" else token
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        return httpx.get(service["query_url"] + path, headers=headers, timeout=30, trust_env=False, **kwargs)

    def balancer(self) -> Path:
        """The folder of its load balancer."""
        return self.stack.home.path / "balancers" / str(self.now["id"])

    def balancer_processes(self) -> dict[int, str]:
        """Its supervisor and its Traefik, pid → command line."""
        mark = f"/balancers/{self.now['id']}"
        return {pid: argv for pid, argv in self.stack.processes().items() if mark in argv}

    def balancer_pids(self, role: str, folder: Path | None = None) -> list[int]:
        """Of those processes the living ones in that role, ``supervisor`` or ``traefik``: by their environment, since
        the supervisor's command line names Traefik too. ``folder``: ``balancer()``, as known before the API died."""
        return [process["pid"] for process in balancer_supervisor.found(folder or self.balancer(), role)]


class Traffic:
    """``benchmarks.load`` on a service, while the ``with`` lasts; then its ``report``. Every answer is looked at."""

    def __init__(self, served: Served, *flags: str) -> None:
        service = served.now
        self._words = [
            sys.executable, "-m", "benchmarks.load", service["query_url"], "--token-env", "SERVICE_TOKEN",
            "--seconds", "1500", "--live", "--json", *flags,
        ]  # fmt: skip
        self._env = clean_environment() | {"SERVICE_TOKEN": service["query_auth_token"] or ""}
        self._out = Path(tempfile.mkstemp(prefix="e2e-load-")[1])
        self.report = Report()

    def __enter__(self) -> Self:
        with self._out.open("wb") as out:
            self._child = subprocess.Popen(
                self._words, cwd=ROOT, env=self._env, stdout=out, stderr=subprocess.PIPE, text=True
            )
        until("the load's first second", self._begun, 60)
        return self

    def _begun(self) -> bool:
        assert self._child.poll() is None, self._child.communicate()[1]
        return len(self.seconds()) >= 2

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._child.poll() is None:
            os.kill(self._child.pid, signal.SIGINT)
        _, said = self._child.communicate(timeout=90)
        lines = self._lines()
        self._out.unlink()
        if error is None:
            assert lines, said
            assert "kinds" in lines[-1], said
            self.report = Report.from_dict(lines[-1])

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._out.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def seconds(self) -> list[dict[str, Any]]:
        """Those that are over: ``second``, ``sent``, ``ok``, ``failed``, ``versions``, ``texts``."""
        return [line for line in self._lines() if "kinds" not in line]

    @property
    def failed(self) -> int:
        return sum(second["failed"] for second in self.seconds())

    def await_text(self, text: str, timeout: float = 60) -> None:
        """Until a version that calls itself so has answered."""
        until(f"an answer of {text}", lambda: text in self.seconds()[-1]["texts"].values(), timeout)

    def await_seconds(self, count: int, timeout: float = 120) -> None:
        """So many seconds of load from now on."""
        goal = len(self.seconds()) + count
        until(f"{count} s of load", lambda: len(self.seconds()) >= goal, timeout)


def nothing_lost(traffic: Traffic, *texts: str) -> None:
    """No request failed, and these versions are those that answered."""
    report = traffic.report
    assert report.failed == 0, report.summary()
    assert all(kind.ok for kind in report.kinds.values()), report.summary()
    assert report.texts() == set(texts), report.summary()
