"""Agents without machines or Ray, for load tests: they speak docs/agent-protocol.md to a real API, thousands of
them and of their runs on one event loop. A run is a timer; a node is one task (a head: two)."""

from __future__ import annotations

import asyncio
import json
import random
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from clouds.contract.machines import Machine, MachineSpec
from clouds.fake.machines import Boot, PowerOff
from clouds.fake.serve import FakeServe

PROTOCOL = 1
LONG_POLL_S = 25
WATCH_S = 0.02


@dataclass
class Behaviour:
    """How the agents of a fleet behave; seconds."""

    register_delay_s: float = 0
    ready_delay_s: float = 0
    """From registration (workers: from the head's address) to RAY_READY."""
    run_s: float = 0
    exit_code: int = 0
    run: Callable[[dict[str, Any]], tuple[float, int]] | None = None
    """Seconds and exit code by the arguments of SUBMIT_RUN, instead of the two above."""
    dies_after_s: float | None = None
    """The agent falls silent so long after its registration, as after a power cut."""
    damp_s: float = 2.0
    """A change of activity is reported after it has lasted that long."""
    serve_healthy_s: float = 0
    """From a deploy of Serve until it is healthy."""
    serve_requests_per_s: float = 10
    """That each head of a service says it answers."""


class Ended(Exception):
    """410: this node has been ended or replaced."""


class FakeFleet:
    """All fake agents of one process. The agents of one cluster find each other here, as Ray's nodes would.

    Args:
        client: makes an HTTP client; its base URL is not used. Each agent has its own, as machines have: what a pool of
            many connections costs grows with their square (httpcore looks at each of them at every request).
    """

    def __init__(self, client: Callable[[], httpx.AsyncClient], behaviour: Behaviour | None = None) -> None:
        self.client = client
        self.behaviour = behaviour or Behaviour()
        self.agents: dict[str, FakeAgent] = {}
        """By node id, the living only."""
        self.heads: dict[str, FakeAgent] = {}
        """By cluster id."""
        self.errors: list[Exception] = []
        """Why agents have ended that should not have: the API refused what they said, or a bug. Assert it empty."""
        self._loop = asyncio.get_running_loop()

    def start(self, user_data: str, ip: str = "127.0.0.1") -> FakeAgent:
        """An agent for a machine with this user-data, on the fleet's loop."""
        match = re.search(r"<<'HELIOSTAT_BOOT'\n(.*)\nHELIOSTAT_BOOT\n", user_data)
        if match is None:
            raise ValueError("this is not user-data of clouds.boot.user_data")
        agent = FakeAgent(self, json.loads(match[1]), ip)
        self.agents[agent.node_id] = agent
        return agent

    def boot(self, spec: MachineSpec, machine: Machine) -> PowerOff:
        """The hook for ``FakeMachines(boot=fleet.boot)``; may be called from any thread."""
        made: list[FakeAgent] = []
        self._loop.call_soon_threadsafe(lambda: made.append(self.start(spec.user_data, machine.ip or "127.0.0.1")))

        def power_off() -> None:
            self._loop.call_soon_threadsafe(lambda: made[0].power_off())

        return power_off

    async def watch(self, folder: Path) -> None:
        """Boots the machines that :func:`handed_over` hands over from another process; until cancelled."""
        agents: dict[str, FakeAgent] = {}
        while True:
            for machine_id, boot in _take(folder):
                if boot is not None:
                    agents[machine_id] = self.start(boot["user_data"], boot["ip"])
                elif machine_id in agents:
                    agents.pop(machine_id).power_off()
            await asyncio.sleep(WATCH_S)

    async def stop(self) -> None:
        """Cuts the power of all."""
        agents = list(self.agents.values())
        for agent in agents:
            agent.power_off()
        await asyncio.gather(*(agent.task for agent in agents), return_exceptions=True)


def handed_over(folder: Path) -> Boot:
    """A hook for ``FakeMachines`` whose agents live in another process, which outlives this one: see ``watch``."""
    folder.mkdir(parents=True, exist_ok=True)

    def tell(name: str, value: dict[str, Any]) -> None:
        part = folder / f".{name}"
        part.write_text(json.dumps(value))
        part.rename(folder / name)

    def boot(spec: MachineSpec, machine: Machine) -> PowerOff:
        tell(f"{machine.machine_id}.boot", {"user_data": spec.user_data, "ip": machine.ip})
        return lambda: tell(f"{machine.machine_id}.off", {})

    return boot


def _take(folder: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """What was handed over since the last look, each once; None: the power goes. A machine's boot comes first."""
    taken: list[tuple[str, dict[str, Any] | None]] = []
    for path in sorted(folder.glob("fake-*")):  # .boot sorts before .off
        taken.append((path.stem, json.loads(path.read_text()) if path.suffix == ".boot" else None))
        path.unlink()
    return taken


@dataclass
class _Run:
    timer: asyncio.TimerHandle
    since: float


@dataclass
class FakeAgent:
    """One node. Its life is ``task``, which ends without error when the node is ended."""

    fleet: FakeFleet
    boot: dict[str, Any]
    ip: str
    config: dict[str, Any] = field(default_factory=dict)
    """``NodeConfigAnswer`` once registered."""
    nodes: list[dict[str, Any]] = field(default_factory=list)
    """Heads: what the last report's answer said of the workers."""
    workers: set[str] = field(default_factory=set)
    """Heads: node ids that are alive in "Ray's" eyes."""
    ended_runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    fenced: bool = False
    desired: dict[str, int] | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Heads: the worker groups and their bounds, by the last report's answer."""

    def __post_init__(self) -> None:
        self.node_id: str = self.boot["node_id"]
        self.boot_id = uuid.uuid4().hex
        self.runs: dict[str, _Run] = {}
        self._url = self.boot["api_url"].rstrip("/") + "/agent/v1"
        self._journal: dict[str, dict[str, Any]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._fact_number = self._seq = 0
        self._news = asyncio.Event()
        self._ray_up = False
        self._activity, self._activity_since = "unknown", _now()
        self._damping: asyncio.TimerHandle | None = None
        how = self.fleet.behaviour
        self.serve = FakeServe(
            f"{self.ip}:8000",
            how.serve_healthy_s,
            how.serve_requests_per_s,
            lambda status: self.tell("serve", **status),
        )
        self.task = asyncio.get_running_loop().create_task(self._live(), name=f"fake agent {self.node_id}")

    @property
    def is_head(self) -> bool:
        return bool(self.config) and self.config["role"] == "head"

    def tell(self, kind: str, **data: Any) -> None:
        """A fact for the control plane; it is repeated until it is safe."""
        self._fact_number += 1
        fact_id = f"{self.boot_id[:8]}-{self._fact_number}"
        self._facts[fact_id] = {"id": fact_id, "kind": kind, "at": _now(), "data": data}
        self._news.set()

    def power_off(self) -> None:
        """A power cut: nothing more is said; what ran here is gone. The head notices a worker's."""
        self.task.cancel()

    # -- its life

    async def _live(self) -> None:
        how = self.fleet.behaviour
        try:
            await asyncio.sleep(how.register_delay_s)
            async with self.fleet.client() as self._http, asyncio.timeout(None) as life:
                await self._register()
                if how.dies_after_s is not None:
                    life.reschedule(asyncio.get_running_loop().time() + how.dies_after_s)
                await (self._live_as_head() if self.is_head else self._live_as_worker())
        except* (Ended, TimeoutError, asyncio.CancelledError):
            pass  # each is the end of a machine, not an error
        except* Exception as e:  # noqa: BLE001  no caller awaits an agent: the fleet's owner must see it
            self.fleet.errors.extend(e.exceptions)
        finally:
            self._dark()

    async def _register(self) -> None:
        body = {
            "protocol": PROTOCOL,
            "node_id": self.node_id,
            "generation": self.boot["generation"],
            "bootstrap_token": self.boot["bootstrap_token"],
            "ip": self.ip,
            "boot_id": self.boot_id,
            "ray_version": "0.0.0-fake",
        }
        self.config = (await self._call("POST", "/register", json=body)).json()

    async def _live_as_head(self) -> None:
        self.fleet.heads[self.config["cluster_id"]] = self
        asyncio.get_running_loop().call_later(self.fleet.behaviour.ready_delay_s, self._ray_ready)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._report())
            both.create_task(self._command())

    def _ray_ready(self) -> None:
        self._ray_up = True
        self.tell("ray_ready", gcs_address=f"{self.ip}:6379", ray_version="0.0.0-fake")
        self._activity_changed()

    async def _live_as_worker(self) -> None:
        while (await self._call("GET", "/head?wait=20", quiet=(404,))).status_code != 200:
            pass
        await asyncio.sleep(self.fleet.behaviour.ready_delay_s)
        self._ray_up = True
        if (head := self.fleet.heads.get(self.config["cluster_id"])) is not None:
            head.workers.add(self.node_id)
            head.tell("ray_ready", node_id=self.node_id)
        await self._report()

    def _dark(self) -> None:
        for run in self.runs.values():
            run.timer.cancel()
        if self._damping is not None:
            self._damping.cancel()
        self.serve.stop()
        if self.fleet.agents.get(self.node_id) is self:
            del self.fleet.agents[self.node_id]
        head = self.fleet.heads.get(self.config.get("cluster_id", ""))
        if head is self:
            del self.fleet.heads[self.config["cluster_id"]]
        elif head is not None and self.node_id in head.workers:
            head.workers.discard(self.node_id)
            if any(n["id"] == self.node_id and n["state"] == "RUNNING" for n in head.nodes):
                head.tell("node_lost", node_id=self.node_id, reason="the fake worker has fallen silent")

    # -- reports

    async def _report(self) -> None:
        while True:
            self._news.clear()
            self._seq += 1
            report = {
                "protocol": PROTOCOL,
                "seq": self._seq,
                "sent_at": _now(),
                "boot_id": self.boot_id,
                "ray_up": self._ray_up,
                "activity": self._activity,
                "activity_since": self._activity_since,
                "gcs_address": f"{self.ip}:6379" if self.is_head else "",
                "workers_alive": sorted(self.workers),
                "facts": list(self._facts.values()),
                "serve": self.serve.traffic(),
            }
            answer = (await self._call("POST", "/report", json=report)).json()
            for fact_id in answer["acked"]:
                self._facts.pop(fact_id, None)
            if self.is_head:
                self.nodes, self.desired = answer.get("nodes") or [], answer.get("desired")
                self.groups = answer.get("groups") or []
            with suppress(TimeoutError):
                async with asyncio.timeout(answer["interval_s"]):
                    await self._news.wait()

    def _activity_changed(self) -> None:
        """Tells busy at once and idle when it has held: a head with one short run after another stays busy."""
        if self._damping is not None:
            self._damping.cancel()
        now = "busy" if self.runs else "idle"
        if now != self._activity:
            delay = 0 if now == "busy" else self.fleet.behaviour.damp_s
            self._damping = asyncio.get_running_loop().call_later(delay, self._tell_activity, now)

    def _tell_activity(self, activity: str) -> None:
        self._activity, self._activity_since = activity, _now()
        self.tell("activity", activity=activity, since=self._activity_since, reason=f"{len(self.runs)} runs")

    # -- commands

    async def _command(self) -> None:
        while True:
            found = (await self._call("GET", f"/commands?wait={LONG_POLL_S}")).json()["commands"]
            await asyncio.gather(*(self._carry_out(command) for command in found))

    async def _carry_out(self, command: dict[str, Any]) -> None:
        if command["id"] not in self._journal:
            serves = command["kind"].startswith("serve_")
            self._journal[command["id"]] = (
                self.serve.result(command) if serves else self._result(command["kind"], command["args"])
            )
        result = self._journal[command["id"]]
        await self._call("POST", f"/commands/{command['id']}/result", json=result, quiet=(404,))

    def _result(self, kind: str, args: dict[str, Any]) -> dict[str, Any]:
        if kind == "submit_run":
            if self.fenced:
                return {"ok": False, "error": "This head is fenced and takes no run."}
            if args["run_id"] not in self.runs and args["run_id"] not in self.ended_runs:
                self._start(args)
            return {"ok": True, "result": {"accepted": True}}
        if kind == "stop_run":
            run_id = args["run_id"]
            if run_id in self.runs:
                self._end(run_id, "STOPPED", None, "Job was intentionally stopped.")
            self.ended_runs.setdefault(run_id, {"status": "UNKNOWN", "exit_code": None})  # and never starts afterwards
            return {"ok": True, "result": self.ended_runs[run_id]}
        if kind in ("fence", "unfence"):
            self.fenced = kind == "fence"
            return {"ok": True, "result": {"activity": "busy" if self.runs else "idle", "reason": "fake"}}
        return {"ok": False, "error": f"The fake agent does not know the command {kind}."}

    def _start(self, args: dict[str, Any]) -> None:
        how, loop = self.fleet.behaviour, asyncio.get_running_loop()
        seconds, exit_code = how.run(args) if how.run is not None else (how.run_s, how.exit_code)
        run_id, limit = args["run_id"], args.get("timeout_s")
        if limit is not None and seconds > limit:
            timer = loop.call_later(limit, self._end, run_id, "FAILED", None, "timed out", True)
        else:
            status, message = ("FAILED", f"exit code {exit_code}") if exit_code else ("SUCCEEDED", "")
            timer = loop.call_later(seconds, self._end, run_id, status, exit_code, message)
        self.runs[run_id] = _Run(timer, loop.time())
        self.tell("run_running", run_id=run_id)
        self._activity_changed()

    def _end(self, run_id: str, status: str, exit_code: int | None, message: str, timed_out: bool = False) -> None:
        self.runs.pop(run_id).timer.cancel()
        self.ended_runs[run_id] = {"status": status, "exit_code": exit_code}
        data = {"status": status, "exit_code": exit_code, "message": message, "timed_out": timed_out}
        self.tell("run_ended", run_id=run_id, error="", **data)
        self._activity_changed()

    # -- HTTP

    async def _call(self, method: str, path: str, *, json: Any = None, quiet: tuple[int, ...] = ()) -> httpx.Response:
        """Until it is answered: 2xx or one of ``quiet``. Raises Ended on 410."""
        delay = 0.1
        while True:
            token = self.config.get("node_token")
            headers = {"authorization": f"Bearer {token}"} if token else {}
            try:
                answer = await self._http.request(
                    method, self._url + path, json=json, headers=headers, timeout=LONG_POLL_S + 15
                )
            except httpx.TransportError:
                answer = None  # the API is away: agents wait for it
            if answer is not None:
                if answer.is_success or answer.status_code in quiet:
                    return answer
                if answer.status_code == 410:
                    raise Ended
                if answer.status_code == 422:
                    raise RuntimeError(f"the API refuses what the fake agent says: {path} {answer.text}")
                if answer.status_code == 401 and path != "/register":
                    await self._register()
            await asyncio.sleep(delay * random.uniform(0.5, 1))
            delay = min(delay * 2, 5)


def _now() -> str:
    return datetime.now(UTC).isoformat()
