"""Ray Serve on the head of a service's cluster: submits configs to Serve, watches their status, writes the gate's file,
probes, drains. See docs/agent-protocol.md.

Serve itself (controller, proxy) starts with the first config. From then on it serves without the agent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from agent.boot import Boot
from agent.commands import CommandRefused
from agent.events import Events
from agent.packages import Packages
from agent.ray_node.api import RayApi, RayRefused, RayUnavailable
from agent.serve.config import Deploy, complete_config, immutable_changes, refusal_reason
from agent.serve.gate import Gate, access_of, order_of
from agent.serve.probe import Prober
from agent.serve.proxy import Proxy, ProxyUnavailable, Traffic
from agent.serve.status import mask, missing_deployments, serve_status, significant

log = logging.getLogger("agent.serve.service")
PUT_TIMEOUT_S = 60.0
UNHEALTHY_POLLS = 2
"""This many in a row make a healthy deploy unhealthy."""


class Serve:
    """Handlers may run at the same time, each in a thread of its own."""

    def __init__(self, boot: Boot, service_id: str, ray: RayApi, events: Events, packages: Packages) -> None:
        self._boot, self._constants = boot, boot.constants
        self._ray, self._events, self._packages = ray, events, packages
        self.gate = Gate(boot, service_id)
        self._address = f"{boot.ip}:{boot.ports.serve_http}"
        self._proxy = Proxy(self._address, self.gate.probe_token)
        self.traffic = Traffic(self._proxy, boot.constants, lambda: self._deploy is not None)
        self._lock = threading.Lock()
        self._submitting = threading.Lock()
        """Held while a config is submitted to Serve: one at a time, in the order of the commands."""
        self._last_ticket = 0
        """Of the newest deploy: its order, or a count of the agent's if the control plane sends none."""
        self._puts = 0
        """Grows when a submission starts and when it ends: an answer of Serve's from across that belongs to neither."""
        self._deploy: Deploy | None = None
        """The last one that Serve accepted."""
        self._names: dict[str, set[str]] = {}
        """Deployments that may have replicas here, by application. Serve lists none while it builds an application and
        after a failed build, though the old replicas are still there."""
        self.status: dict[str, Any] | None = None
        """ServeStatus as reported."""
        self._unhealthy_polls = 0
        self._last_answer_at = time.monotonic()
        self._wake = threading.Event()

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        return {"serve_deploy": self.deploy, "serve_probe": self.probe, "serve_gate": self.set_gate,
                "serve_drain": self.drain}  # fmt: skip

    # -- deploy -------------------------------------------------------------------------------------------------

    def deploy(self, args: dict[str, Any]) -> dict[str, Any]:
        """Repeatable. Raises CommandRefused or PackageFailed."""
        order = order_of(args)
        with self._lock:
            ticket = self._last_ticket + 1 if order is None else order
            self._last_ticket = max(self._last_ticket, ticket)
        try:
            deploy = complete_config(self._boot, args, self._packages)
        except (KeyError, TypeError, AttributeError) as error:
            raise CommandRefused(f"this is not a valid Serve config: {type(error).__name__} {error}") from None
        with self._submitting:
            self._check_newest(ticket)
            # Access changes at once. The label of the answers changes only when the new code gives them.
            label = {} if self._deploy else {"version_id": deploy.version_id}
            self.gate.write(order, **access_of(args), draining=False, **label)
            if not deploy.same(self._deploy):
                self._submit(deploy, lambda: self._check_newest(ticket))
        return {"http": self._address, "grpc": self._grpc(deploy)}

    def _grpc(self, deploy: Deploy) -> str:
        return f"{self._boot.ip}:{self._boot.ports.serve_grpc}" if deploy.grpc else ""

    def _check_newest(self, ticket: int) -> None:
        """Raises CommandRefused when a newer ``serve_deploy`` has come."""
        if ticket < self._last_ticket:
            raise CommandRefused("superseded by a newer deploy on this head")

    def _submit(self, deploy: Deploy, check: Callable[[], None]) -> None:
        """Until Serve has it or refuses it; under ``_submitting``. Raises CommandRefused."""
        deadline = time.monotonic() + self._constants.serve_put_s
        pause = 0.5
        while True:
            check()
            try:
                self._try_submit(deploy)
                return
            except RayUnavailable as error:
                reason = str(error)
            except RayRefused as error:
                reason = f"HTTP {error.status}: {refusal_reason(mask(str(error), deploy.secrets))}"
                if error.status < 500 or error.status == 501:
                    raise CommandRefused(f"Serve refuses the config. {reason}") from None
            log.warning("Serve does not accept deploy %s yet: %s", deploy.id or deploy.version_id, reason)
            if time.monotonic() + pause >= deadline:
                raise CommandRefused(
                    f"Serve on this head did not accept the config within {self._constants.serve_put_s:.0f} s; "
                    f"the command may be repeated. {reason}", retryable=True,
                )  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _try_submit(self, deploy: Deploy) -> None:
        """Raises RayUnavailable, RayRefused; CommandRefused for proxy options that can't change."""
        before = self._ray.serve_details()
        if other := immutable_changes(before, deploy.config):
            options = ", ".join(other)
            raise CommandRefused(f"Serve can't change {options} while it runs; deploy a new version, not in place")
        self._remember(before)
        if self._deploy:
            deploy.add_secrets(self._deploy.secrets)
        deploy.surge = {name: set(self._names.get(name, ())) for name in deploy.applications}
        self._put(deploy, before)

    def _put(self, deploy: Deploy, before: dict[str, Any]) -> None:
        """Raises RayUnavailable, RayRefused. When it returns, Serve's status is of this deploy: its controller sets
        each application's time and status before it answers."""
        deploy.before = {n: a.get("last_deployed_time_s") for n, a in before["applications"].items()}
        with self._lock:
            self._puts += 1
        accepted = False
        try:
            self._ray.serve_deploy(deploy.for_serve(), PUT_TIMEOUT_S)
            accepted = True
        finally:
            with self._lock:
                self._puts += 1
                if accepted:
                    self._deploy = deploy
                    self._unhealthy_polls = 0
        log.info("Serve has accepted deploy %s of version %s", deploy.id or "-", deploy.version_id)
        self._wake.set()

    def _remember(self, details: dict[str, Any]) -> None:
        for name, app in details["applications"].items():
            self._names.setdefault(name, set()).update(app.get("deployments") or {})

    # -- status -------------------------------------------------------------------------------------------------

    def watch(self, stop: threading.Event) -> None:
        """Polls Serve until ``stop``, once something is deployed."""
        constants = self._constants
        try:
            self._ray.serve_details()  # a warm-up: the dashboard's first answer takes seconds
        except RayUnavailable as error:
            log.info("Serve does not answer yet: %s", error)
        while not stop.is_set():
            if self._deploy is not None:
                self._poll_safely()
            status = self.status
            settled = status is not None and (status["healthy"] or status["failed"]) and not self._unhealthy_polls
            self._wake.wait(constants.serve_poll_slow_s if settled else constants.serve_poll_fast_s)
            self._wake.clear()

    def _poll_safely(self) -> None:
        """An unexpected answer or a failed write counts as no answer: an end of this thread would end the node, and
        with it a service that works."""
        try:
            self.poll()
        except Exception:
            log.exception("Serve can't be polled")
            self._unavailable()

    def poll(self) -> None:
        """Asks Serve once and reports changes. Raises OSError when the gate's file can't be written."""
        with self._lock:
            deploy, puts = self._deploy, self._puts
        if deploy is None:
            return
        try:
            details = self._ray.serve_details(timeout_s=self._constants.serve_away_s)
        except RayUnavailable as error:
            log.warning("Serve does not answer: %s", error)
            self._unavailable()
            return
        with self._lock:
            if puts != self._puts or puts % 2:
                return
        self._last_answer_at = time.monotonic()
        if missing := missing_deployments(deploy, details):
            self._resubmit_without(deploy, details, missing)
            return
        status = serve_status(deploy, details, self._boot.node_id, (self._address, self._grpc(deploy)))
        if status["healthy"]:
            self._names = {n: set(a["deployments"]) for n, a in status["applications"].items()}
            if self.gate.version_id != deploy.version_id:
                self.gate.write(version_id=deploy.version_id)
        else:
            self._remember(details)
        self._report(status)

    def _resubmit_without(self, deploy: Deploy, details: dict[str, Any], missing: dict[str, set[str]]) -> None:
        """The new code lacks deployments of the old one: submits it again without those, unless a newer deploy is under
        way."""
        if not self._submitting.acquire(blocking=False):
            return
        try:
            if deploy is not self._deploy:
                return
            log.info("submitting deploy %s again without %s, which its code no longer has", deploy.id, missing)
            before, deploy.surge = deploy.surge, {n: deploy.surge[n] - missing.get(n, set()) for n in deploy.surge}
            try:
                self._put(deploy, details)
            except (RayUnavailable, RayRefused) as error:
                deploy.surge = before  # the next poll tries it again
                log.warning("Serve does not accept it: %s", mask(str(error), deploy.secrets)[:500])
        finally:
            self._submitting.release()

    def _unavailable(self) -> None:
        status = self.status
        if status is not None and time.monotonic() - self._last_answer_at > self._constants.serve_away_s:
            self._report(status | {"message": "Ray's dashboard does not answer: this is the last known status"})

    def _report(self, status: dict[str, Any]) -> None:
        """Damped: healthy and failed at once, unhealthy after ``UNHEALTHY_POLLS``."""
        last = self.status
        with self._lock:
            if self._deploy is None or status["deploy"] != self._deploy.id:
                return
        worse = last is not None and last["healthy"] and not status["healthy"] and last["deploy"] == status["deploy"]
        self._unhealthy_polls = self._unhealthy_polls + 1 if worse else 0
        if worse and not status["failed"] and self._unhealthy_polls < UNHEALTHY_POLLS:
            return
        self._unhealthy_polls = 0
        self.status = status
        if last is None or significant(last) != significant(status):
            self._events.add("serve", **status)

    # -- probe --------------------------------------------------------------------------------------------------

    def probe(self, args: dict[str, Any]) -> dict[str, Any]:
        """Ends early when Serve accepts another version or gives this one up."""
        return Prober(args, self.gate.probe_token, self._constants, self._deploy_health, self._secrets).run()

    def _secrets(self) -> list[str]:
        deploy = self._deploy
        return deploy.secrets if deploy is not None else []

    def _deploy_health(self) -> tuple[str, bool, bool, str]:
        with self._lock:
            deploy, status = self._deploy, self.status
        if deploy is None:
            return "", False, False, ""
        if status is None or (status["version_id"], status["deploy"]) != (deploy.version_id, deploy.id):
            return deploy.version_id, False, False, "Serve has just received it"
        return deploy.version_id, bool(status["healthy"]), bool(status["failed"]), str(status["message"])

    # -- gate and drain -----------------------------------------------------------------------------------------

    def set_gate(self, args: dict[str, Any]) -> dict[str, Any]:
        """Raises CommandRefused when the proxy does not follow it in time."""
        revision = self.gate.write(order_of(args), **access_of(args), draining=bool(args.get("draining")))
        deadline = time.monotonic() + self._constants.serve_gate_s
        while self._deploy is not None:  # else the proxy reads the file when it starts
            try:
                seen = self._proxy.statistics(self._constants.serve_traffic_s)["revision"]
                if seen >= revision:
                    break
                reason = f"it follows revision {seen} of {revision}"
            except ProxyUnavailable as error:
                reason = str(error)
            if time.monotonic() >= deadline:
                raise CommandRefused(
                    f"the proxy does not follow the new gate within {self._constants.serve_gate_s:.0f} s: {reason}",
                    retryable=True,
                )
            time.sleep(0.05)
        return {}

    def drain(self, args: dict[str, Any]) -> dict[str, Any]:
        """Waits until no request is under way. Ends early when ``set_gate`` or a deploy cancels the drain, or has
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
