"""A service's cluster: what its head does about Ray Serve. Gives configs to Serve, watches what becomes of them, keeps
the gate's file, probes, drains. See docs/agent-protocol.md.

Serve itself (controller, proxy) starts with the first config. From then on it serves without us.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from agent.boot import Boot
from agent.facts import Facts
from agent.packages import Packages
from agent.ray_node.api import RayApi, RayAway, RayRefused
from agent.runs.submit import Refusal
from agent.serve.config import Deploy, completed, fixed, refusal
from agent.serve.gate import Gate, access_of, order_of
from agent.serve.probe import Prober
from agent.serve.proxy import Proxy, ProxyUnavailable, Traffic
from agent.serve.status import masked, not_there, read, told_by

log = logging.getLogger("agent.serve.service")
PUT_TIMEOUT_S = 60.0
LOOKS_UNHEALTHY = 2
"""So many in a row make a healthy deploy unhealthy."""


class Serve:
    """Handlers may run at the same time, each in a thread of its own."""

    def __init__(self, boot: Boot, service_id: str, ray: RayApi, facts: Facts, packages: Packages) -> None:
        self._boot, self._constants = boot, boot.constants
        self._ray, self._facts, self._packages = ray, facts, packages
        self.gate = Gate(boot, service_id)
        self._address = f"{boot.ip}:{boot.ports.serve_http}"
        self._proxy = Proxy(self._address, self.gate.probe_token)
        self.traffic = Traffic(self._proxy, boot.constants, lambda: self._deploy is not None)
        self._lock = threading.Lock()
        self._giving = threading.Lock()
        """Held while a config is given to Serve: one at a time, in the order of the commands."""
        self._last_ticket = 0
        """The newest deploy's: its order, or a count of our own where the control plane tells none."""
        self._round = 0
        """Counts up when giving begins and when it ends: what Serve said across that is nobody's."""
        self._deploy: Deploy | None = None
        """What Serve took last."""
        self._names: dict[str, set[str]] = {}
        """Deployments that may have replicas here, by application. Serve shows none while it builds an application and
        after a failure to, though the old replicas are there."""
        self.status: dict[str, Any] | None = None
        """ServeStatus as it is told."""
        self._unhealthy_looks = 0
        self._answered_at = time.monotonic()
        self._wake = threading.Event()

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {"serve_deploy": self.deploy, "serve_probe": self.probe, "serve_gate": self.set_gate,
                "serve_drain": self.drain}  # fmt: skip

    # -- deploy -------------------------------------------------------------------------------------------------

    def deploy(self, args: dict[str, Any]) -> dict[str, Any]:
        """Repeatable. Raises Refusal or PackageFailed."""
        order = order_of(args)
        with self._lock:
            ticket = self._last_ticket + 1 if order is None else order
            self._last_ticket = max(self._last_ticket, ticket)
        try:
            deploy = completed(self._boot, args, self._packages)
        except (KeyError, TypeError, AttributeError) as error:
            raise Refusal(f"this is no config of Serve's: {type(error).__name__} {error}") from None
        with self._giving:
            self._newest(ticket)
            # Who is let in changes at once. The label of the answers changes only when the new code gives them.
            label = {} if self._deploy else {"version_id": deploy.version_id}
            self.gate.write(order, **access_of(args), draining=False, **label)
            if not deploy.same(self._deploy):
                self._give(deploy, lambda: self._newest(ticket))
        return {"http": self._address, "grpc": self._grpc(deploy)}

    def _grpc(self, deploy: Deploy) -> str:
        return f"{self._boot.ip}:{self._boot.ports.serve_grpc}" if deploy.grpc else ""

    def _newest(self, ticket: int) -> None:
        """Raises Refusal when a newer ``serve_deploy`` has come."""
        if ticket < self._last_ticket:
            raise Refusal("superseded by a newer deploy on this head")

    def _give(self, deploy: Deploy, check: Callable[[], None]) -> None:
        """Until Serve has it or refuses it; under ``_giving``. Raises Refusal."""
        deadline = time.monotonic() + self._constants.serve_put_s
        pause = 0.5
        while True:
            check()
            try:
                self._try_to_give(deploy)
                return
            except RayAway as error:
                why = str(error)
            except RayRefused as error:
                why = f"HTTP {error.status}: {refusal(masked(str(error), deploy.secrets))}"
                if error.status < 500 or error.status == 501:
                    raise Refusal(f"Serve refuses the config. {why}") from None
            log.warning("Serve does not take deploy %s yet: %s", deploy.id or deploy.version_id, why)
            if time.monotonic() + pause >= deadline:
                raise Refusal(
                    f"Serve on this head did not take the config within {self._constants.serve_put_s:.0f} s; "
                    f"it may be given again. {why}", retryable=True,
                )  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _try_to_give(self, deploy: Deploy) -> None:
        """Raises RayAway, RayRefused; Refusal for options of the proxy's that can't be changed."""
        before = self._ray.serve_details()
        if other := fixed(before, deploy.config):
            raise Refusal(
                f"Serve can't change {', '.join(other)} while it runs; deploy a version of its own, not in place"
            )
        self._remember(before)
        if self._deploy:
            deploy.hide(self._deploy.secrets)
        deploy.surge = {name: set(self._names.get(name, ())) for name in deploy.applications}
        self._put(deploy, before)

    def _put(self, deploy: Deploy, before: dict[str, Any]) -> None:
        """Raises RayAway, RayRefused. When it returns, Serve's answers tell of this deploy: its controller sets each
        application's time and status before it answers."""
        deploy.before = {n: a.get("last_deployed_time_s") for n, a in before["applications"].items()}
        with self._lock:
            self._round += 1
        taken = False
        try:
            self._ray.serve_deploy(deploy.for_serve(), PUT_TIMEOUT_S)
            taken = True
        finally:
            with self._lock:
                self._round += 1
                if taken:
                    self._deploy = deploy
                    self._unhealthy_looks = 0
        log.info("Serve has taken deploy %s of version %s", deploy.id or "-", deploy.version_id)
        self._wake.set()

    def _remember(self, details: dict[str, Any]) -> None:
        for name, app in details["applications"].items():
            self._names.setdefault(name, set()).update(app.get("deployments") or {})

    # -- status -------------------------------------------------------------------------------------------------

    def watch(self, stop: threading.Event) -> None:
        """Looks at Serve until ``stop``; asleep until something is deployed."""
        constants = self._constants
        try:
            self._ray.serve_details()  # for nothing but this: the dashboard's first answer takes it seconds
        except RayAway as error:
            log.info("Serve can't be asked yet: %s", error)
        while not stop.is_set():
            if self._deploy is not None:
                self._look_and_live()
            status = self.status
            settled = status is not None and (status["healthy"] or status["failed"]) and not self._unhealthy_looks
            self._wake.wait(constants.serve_look_slow_s if settled else constants.serve_look_fast_s)
            self._wake.clear()

    def _look_and_live(self) -> None:
        """What can't be understood or written counts as no answer: an end of this thread would end the node, and with
        it a service that serves."""
        try:
            self.look()
        except Exception:
            log.exception("Serve can't be looked at")
            self._away()

    def look(self) -> None:
        """Asks Serve once and tells what has changed. Raises OSError when the gate's file can't be written."""
        with self._lock:
            deploy, at_round = self._deploy, self._round
        if deploy is None:
            return
        try:
            details = self._ray.serve_details(timeout_s=self._constants.serve_away_s)
        except RayAway as error:
            log.warning("Serve can't be asked: %s", error)
            self._away()
            return
        with self._lock:
            if at_round != self._round or at_round % 2:
                return
        self._answered_at = time.monotonic()
        if missing := not_there(deploy, details):
            self._without(deploy, details, missing)
            return
        status = read(deploy, details, self._boot.node_id, (self._address, self._grpc(deploy)))
        if status["healthy"]:
            self._names = {n: set(a["deployments"]) for n, a in status["applications"].items()}
            if self.gate.version_id != deploy.version_id:
                self.gate.write(version_id=deploy.version_id)
        else:
            self._remember(details)
        self._tell(status)

    def _without(self, deploy: Deploy, details: dict[str, Any], missing: dict[str, set[str]]) -> None:
        """The new code has not got all deployments of the old one: given again without those, unless a newer deploy is
        under way."""
        if not self._giving.acquire(blocking=False):
            return
        try:
            if deploy is not self._deploy:
                return
            log.info("deploy %s is given again without %s, which its code has no more", deploy.id, missing)
            before, deploy.surge = deploy.surge, {n: deploy.surge[n] - missing.get(n, set()) for n in deploy.surge}
            try:
                self._put(deploy, details)
            except (RayAway, RayRefused) as error:
                deploy.surge = before  # the next look tries it again
                log.warning("Serve does not take it: %s", masked(str(error), deploy.secrets)[:500])
        finally:
            self._giving.release()

    def _away(self) -> None:
        status = self.status
        if status is not None and time.monotonic() - self._answered_at > self._constants.serve_away_s:
            self._tell(status | {"message": "Ray's dashboard does not answer: this is how it was before"})

    def _tell(self, status: dict[str, Any]) -> None:
        """Damped: healthy and failed at once, unhealthy after ``LOOKS_UNHEALTHY``."""
        told = self.status
        with self._lock:
            if self._deploy is None or status["deploy"] != self._deploy.id:
                return
        worse = told is not None and told["healthy"] and not status["healthy"] and told["deploy"] == status["deploy"]
        self._unhealthy_looks = self._unhealthy_looks + 1 if worse else 0
        if worse and not status["failed"] and self._unhealthy_looks < LOOKS_UNHEALTHY:
            return
        self._unhealthy_looks = 0
        self.status = status
        if told is None or told_by(told) != told_by(status):
            self._facts.add("serve", **status)

    # -- probe --------------------------------------------------------------------------------------------------

    def probe(self, args: dict[str, Any]) -> dict[str, Any]:
        """Ends early when a deploy of another version is taken or Serve gives this one up."""
        return Prober(args, self.gate.probe_token, self._constants, self._judged, self._secrets).run()

    def _secrets(self) -> list[str]:
        deploy = self._deploy
        return deploy.secrets if deploy is not None else []

    def _judged(self) -> tuple[str, bool, bool, str]:
        with self._lock:
            deploy, status = self._deploy, self.status
        if deploy is None:
            return "", False, False, ""
        if status is None or (status["version_id"], status["deploy"]) != (deploy.version_id, deploy.id):
            return deploy.version_id, False, False, "Serve has just been given it"
        return deploy.version_id, bool(status["healthy"]), bool(status["failed"]), str(status["message"])

    # -- gate and drain -----------------------------------------------------------------------------------------

    def set_gate(self, args: dict[str, Any]) -> dict[str, Any]:
        """Raises Refusal when the proxy does not go by it in time."""
        revision = self.gate.write(order_of(args), **access_of(args), draining=bool(args.get("draining")))
        deadline = time.monotonic() + self._constants.serve_gate_s
        while self._deploy is not None:  # else the proxy reads the file when it starts
            try:
                seen = self._proxy.statistics(self._constants.serve_traffic_s)["revision"]
                if seen >= revision:
                    break
                why = f"it follows revision {seen} of {revision}"
            except ProxyUnavailable as error:
                why = str(error)
            if time.monotonic() >= deadline:
                raise Refusal(
                    f"the proxy does not go by the new gate within {self._constants.serve_gate_s:.0f} s: {why}",
                    retryable=True,
                )
            time.sleep(0.05)
        return {}

    def drain(self, args: dict[str, Any]) -> dict[str, Any]:
        """Waits until nothing is under way; ends early when ``set_gate`` or a deploy takes the drain back, or has
        already."""
        constants, began = self._constants, time.monotonic()
        deadline = began + float(args["timeout_s"])
        revision = self.gate.write(order_of(args), draining=True)
        ongoing = connections = 0
        quiet_since: float | None = None
        drained = self._deploy is None  # then there is no proxy
        while not drained and self.gate.draining:
            try:
                seen = self._proxy.statistics(constants.serve_traffic_s)
                ongoing, connections = int(seen["ongoing"]), int(seen["connections"])
                quiet = seen["revision"] >= revision and not ongoing and not connections
            except ProxyUnavailable as error:
                quiet = error.not_listening
                if quiet:
                    ongoing = connections = 0
            at = time.monotonic()
            quiet_since = (quiet_since or at) if quiet else None
            drained = quiet_since is not None and at - quiet_since >= constants.serve_quiet_s
            if at >= deadline:
                break
            time.sleep(0.1)
        return {"drained": drained, "ongoing": ongoing, "connections": connections,
                "seconds": round(time.monotonic() - began, 3)}  # fmt: skip
