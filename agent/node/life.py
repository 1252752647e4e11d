"""A node's life: register, start Ray, serve until somebody or something ends it, end everything."""

from __future__ import annotations

import logging
import platform
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.boot import Boot
from agent.channel import Away, Backoff, Channel, Gone, Refused
from agent.constants import PROTOCOL
from agent.facts import Facts
from agent.journal import Journal
from agent.logs import LogShipper
from agent.node.deadman import DeadMan
from agent.node.notices import Notice, Notices
from agent.node.reporter import Reporter
from agent.ray_node.process import DRAINED, RayFailed, RayNode, accepts

if TYPE_CHECKING:
    from agent.head.life import Head

log = logging.getLogger("agent.node.life")
FINAL = (400, 401, 403, 409, 422)
"""Answers to ``register`` that no repetition changes."""
SIGNALLED = "told to end by a signal"


class End(Exception):
    """This node's life is over. ``kind``: the fact that tells it ("" for none); ``grace``: Ray may end in order;
    ``told_last``: only then is it told, for who hears it ends the machine."""

    def __init__(self, reason: str, kind: str = "", grace: bool = True, told_last: bool = False) -> None:
        self.reason, self.kind, self.grace, self.told_last = reason, kind, grace, told_last
        super().__init__(reason)


class Node:
    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.boot_id = secrets.token_hex(16)
        self.channel = Channel(boot.api_url, boot.ca_file)
        self.stop = threading.Event()
        """Ends all threads."""
        self.end: End | None = None
        self._wake = threading.Event()
        self.facts = Facts(Journal(boot.node_dir / "facts.journal"), self.boot_id, boot.constants.facts_max)
        self.logs = LogShipper(self.channel, boot.constants)
        self.log_file = boot.node_dir / "agent.log"
        self.config: dict[str, Any] = {}
        self.ray_up = False
        self.head: Head | None = None
        self._ray: RayNode | None = None
        self.notices = Notices(boot.provider, boot.constants, self._announced) if boot.provider else None

    # -- life ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Returns the exit code: 0 when it was told to end, 1 when it failed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        ray: RayNode | None = None
        try:
            self.config = self._register()
            self._ray = ray = RayNode(self.boot, self.config)
            self.deadman = DeadMan(float(self.config["deadman_s"]))
            self.deadman.maximum_uptime_at = self.config.get("maximum_uptime_at")
            if self.is_head:
                from agent.head.life import Head  # a third of all imports, and no worker's business

                self.head = Head(self, ray)
            self.reporter = Reporter(
                self.channel, self.facts, self.boot.constants, self.boot_id,
                float(self.config.get("report_interval_s") or 2.0), self._snapshot, self._answer,
                self._again, self.gone,
            )  # fmt: skip
            self.logs.add("node/agent.log", self.log_file)
            if self.boot.provider:
                self.logs.add("node/startup.log", self.boot.node_dir / "startup.log")
            self.logs.watch_session(lambda: ray.logs_dir)
            self.thread("report", self.reporter.run, self.stop)
            self.thread("logs", self.logs.run, self.stop)
            self._check_ray()
            if self.notices:
                for source in self.notices.sources:
                    self.thread("notices", self.notices.watch, source, self.stop)
            if self.head:
                self.head.start()
            else:
                ray.start(self.log_file, head_address=self._head_address())
            self._live(ray)
        except End as end:
            self.finish(end)
        except RayFailed as error:
            self.finish(End(str(error), "node_failed"))
        except Exception as error:
            log.exception("the agent failed")
            self.finish(End(f"the agent failed: {type(error).__name__}; see node/agent.log", "node_failed"))
        return self._close(ray)

    def _check_ray(self) -> None:
        """Raises RayFailed: nodes of two versions form no cluster, and the control plane is made for one."""
        found, wanted = _ray_version(), self.boot.ray_version
        if wanted and found != wanted:
            has = f"has Ray {found}" if found else "has no Ray"
            raise RayFailed(
                f"this machine's Python ({sys.executable}) {has}; the control plane is made for Ray {wanted}: change "
                "the cloud's container_image or python, or its machines' image"
            )

    @property
    def is_head(self) -> bool:
        return self.config.get("role") == "head"

    def finish(self, end: End) -> None:
        """The first reason counts. Callable from any thread."""
        if self.end is None:
            self.end = end
        self._wake.set()

    def _signalled(self, *_: object) -> None:
        """Touches no lock: the main thread, which this interrupts, may hold it. ``pause`` looks often enough."""
        if self.end is None:
            self.end = End(SIGNALLED)

    def _announced(self, notice: Notice) -> None:
        """The control plane first, for it has a machine to launch; then Ray. A head is not drained: what runs there
        may go on until it is taken."""
        self.facts.add("spot_notice", kind=notice.kind, deadline=notice.deadline, reason=notice.reason)
        if self.is_head or self._ray is None or self.end is not None:
            return
        try:
            refused = self._ray.drain(notice.reason, notice.left_s())
        except (RayFailed, OSError) as error:
            refused = str(error)
        if refused:
            log.warning("Ray was not told that this node will be gone: %s", refused)
        else:
            log.info("Ray drains this node")

    def gone(self, error: Exception) -> None:
        """The channel says 410, or something that no repetition heals."""
        if isinstance(error, Gone):
            self.finish(End(f"the control plane has ended this node: {error}", grace=False))
        else:
            log.error("unexpected", exc_info=error)
            self.finish(End(f"the agent failed: {type(error).__name__}; see node/agent.log", "node_failed"))

    def thread(self, name: str, target: Callable[..., None], *args: Any) -> None:
        def guarded() -> None:
            try:
                target(*args)
            except Exception as error:  # noqa: BLE001 - a thread that dies unseen is a node that lies
                self.gone(error)

        threading.Thread(target=guarded, name=name, daemon=True).start()

    def pause(self, seconds: float) -> None:
        """Raises End if this node's life is over."""
        deadline = time.monotonic() + seconds
        while self.end is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._wake.wait(min(left, 0.25))
        raise self.end

    def _live(self, ray: RayNode) -> None:
        """The main thread until the end: Ray's leader and the dead-man switch."""
        drained_at = 0.0
        while True:
            self.pause(0.25)
            ended = ray.ended()
            if ended == DRAINED and not self.is_head:
                # Ray's autoscaler let this worker go: the control plane ends it. Or its head is gone.
                drained_at = drained_at or time.monotonic()
                self.ray_up = False
                if time.monotonic() - drained_at >= self.boot.constants.idle_drain_grace_s:
                    notice = self.notices.last if self.notices else None
                    raise End(notice.reason if notice else ended, "stopping")
            elif ended:
                raise End(self.why(ended), "node_failed")
            elif not self.is_head:
                self.ray_up = ray.up
                notice = self.notices.last if self.notices else None
                left = notice.left_s() if notice else None
                if notice and left is not None and left <= self.boot.constants.leave_before_s:
                    raise End(notice.reason, "stopping", told_last=True)
            activity = self.head.activity.state if self.head else ("busy" if self.ray_up else "idle")
            over = self.deadman.check(self.channel.last_contact, activity)
            if over:
                raise End(over, "stopping")

    def why(self, ended: str) -> str:
        """Ray's own words beside the exit code, as far as it printed any."""
        try:
            tail = self.log_file.read_bytes()[-6000:].decode(errors="replace").splitlines()
        except OSError:
            return ended
        said = [line.strip() for line in tail if "Error" in line or "exited unexpectedly" in line]
        return f"{ended}: {said[-1][:400]}" if said else ended

    def _close(self, ray: RayNode | None) -> int:
        end = self.end or End("ended")
        if end.reason == SIGNALLED and self.notices and (notice := self.notices.look()):
            # The system goes down, and the cloud has said why: the cluster need not find out by silence.
            end = End(notice.reason, "node_lost" if self.is_head else "stopping")
        log.info("ending: %s", end.reason)
        if end.kind and not end.told_last:
            self._tell_end(end)
        if ray is not None:
            ray.stop(self.boot.constants.ray_stop_s if end.grace else 0)
        if end.kind and end.told_last:
            self._tell_end(end)
        self.stop.set()
        if self.channel.token and end.grace:
            self.logs.flush(self.boot.constants.final_flush_s)
        # Our end is the machine's: on the local cloud init kills all below it, elsewhere the start-up script that
        # runs us goes on to `shutdown -h now`.
        return 1 if end.kind == "node_failed" else 0

    def _tell_end(self, end: End) -> None:
        self.facts.add(end.kind, reason=end.reason)
        try:
            if self.channel.token:
                self.reporter.report(timeout_s=3.0)
        except (Away, Refused, Gone, AttributeError) as error:
            log.warning("the last report was not heard: %s", error)

    # -- control plane ------------------------------------------------------------------------------------------

    def _register(self) -> dict[str, Any]:
        boot = self.boot
        body = {
            "protocol": PROTOCOL, "node_id": boot.node_id, "generation": boot.generation,
            "bootstrap_token": boot.bootstrap_token, "ip": boot.ip, "hostname": socket.gethostname(),
            "boot_id": self.boot_id, "ray_version": _ray_version(), "python_version": platform.python_version(),
        }  # fmt: skip
        backoff = Backoff(boot.constants.backoff_base_s, boot.constants.backoff_cap_s)
        deadline = time.monotonic() + boot.constants.register_timeout_s
        while True:
            try:
                config: dict[str, Any] = self.channel.call("POST", "/register", body)
            except Gone as error:
                raise End(f"the control plane has ended this node: {error}", grace=False) from None
            except (Away, Refused) as error:
                if isinstance(error, Refused) and error.status in FINAL:
                    raise End(f"registration refused: {error}", grace=False) from None
                if time.monotonic() > deadline:
                    raise End(f"nobody answered for {boot.constants.register_timeout_s:.0f} s: {error}") from None
                wait = backoff.next()
                log.warning("not registered yet, again in %.1f s: %s", wait, error)
                self.pause(wait)
            else:
                self.channel.token = config["node_token"]
                self.channel.last_contact = time.monotonic()
                log.info("registered as %s %s of %s (%s)", config["role"], boot.node_id, config["cluster_id"], boot.ip)
                return config

    def _again(self) -> None:
        """Our token is not accepted any more (the records were restored, say): this process may ask for another."""
        token, self.channel.token = self.channel.token, ""
        try:
            self._register()
        except End as end:
            self.channel.token = token
            log.warning("%s", end.reason)  # the dead-man switch ends this node if it stays so

    def _head_address(self) -> str:
        """Waits for the head's address and for its GCS to listen there; both machines boot meanwhile."""
        backoff = Backoff(self.boot.constants.backoff_base_s, self.boot.constants.backoff_cap_s)
        # How long the head's machine may boot is the control plane's to say, which ends us with the cluster.
        deadline = time.monotonic() + self.boot.constants.register_timeout_s
        address = ""
        while True:
            try:
                known = address
                address = str(self.channel.call("GET", "/head?wait=5", timeout_s=20)["gcs_address"])
                if not known:
                    deadline = time.monotonic() + self.boot.constants.head_ready_timeout_s
            except Gone as error:
                raise End(f"the control plane has ended this node: {error}", grace=False) from None
            except Away:
                self.pause(backoff.next())
            except Refused as error:
                if error.status != 404:
                    self.pause(backoff.next())
            asked = time.monotonic()
            while address and time.monotonic() - asked < 20:  # then ask again: the head may have been replaced
                if accepts(address):
                    return address
                self.pause(self.boot.constants.ready_poll_s)
            if time.monotonic() > deadline:
                where = f"its GCS at {address} does not listen" if address else "it has not told its address"
                raise End(f"the cluster's head is not up: {where}", "node_failed")
            self.pause(0)

    def _snapshot(self) -> dict[str, Any]:
        said: dict[str, Any] = {"ray_up": self.ray_up, "log_bytes_pending": self.logs.pending()}
        return said | self.head.snapshot() if self.head else said

    def _answer(self, answer: dict[str, Any]) -> None:
        self.logs.following(bool(answer.get("follow")))  # protocol 0 has none
        if "maximum_uptime_at" in answer:
            self.deadman.maximum_uptime_at = answer["maximum_uptime_at"]
        if self.head:
            self.head.heard(answer)


def _ray_version() -> str:
    """As ``importlib.metadata`` says it, which takes 0.1 s to import: of that only the file's name is needed."""
    for folder in sys.path:
        for found in Path(folder or ".").glob("ray-[0-9]*.dist-info"):
            return found.name.removeprefix("ray-").removesuffix(".dist-info")
    return ""
