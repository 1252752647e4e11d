"""Serve's proxy on this head as the agent sees it: our gate inside it, the file that the gate goes by, its counters.

The gate is a module of its own that runs in Serve's processes (``serve_gate.py``). It is installed before Ray starts,
for the proxy's process inherits its environment from Ray. What it lets through stands in a file that only this agent
writes; what it has seen it tells at ``/-/heliostat`` to who has the probe token, and that is this agent alone.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.boot import Boot
from agent.channel import Http
from agent.constants import Constants
from agent.journal import write_private

log = logging.getLogger("agent.serve.service")
MODULE = "heliostat_serve_gate"
CALLBACK = f"{MODULE}:middlewares"
GRPC_GUARD = f"{MODULE}.guard_grpc"
STATUS_PATH = "/-/heliostat"


class ProxyAway(Exception):
    """The proxy did not answer, or not with its counters. ``nobody``: nothing listens at its port, so that nothing can
    be under way there either."""

    def __init__(self, message: str, nobody: bool = False) -> None:
        self.nobody = nobody
        super().__init__(message)


def gate_file(boot: Boot) -> Path:
    return boot.node_dir / "serve" / "gate.json"


def install_gate(boot: Boot) -> None:
    """On every node, before Ray starts there. Raises OSError."""
    boot.provider_dir.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).parents[1] / "serve_gate.py", boot.provider_dir / f"{MODULE}.py")


def gate_environment(boot: Boot) -> dict[str, str]:
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
        "HELIOSTAT_SERVE_GATE": str(gate_file(boot)),
        "HELIOSTAT_SERVE_PORTS": f"{boot.ports.serve_http},{boot.ports.serve_grpc}",
        # Either would take the traffic past the proxy that our gate is in.
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    }


class Gate:
    """The gate's file. Every change has a higher ``revision``, by which the proxy tells which one it goes by; it begins
    with the agent's process, which no proxy outlives."""

    def __init__(self, boot: Boot, service_id: str) -> None:
        self.probe_token = secrets.token_hex(32)
        self._file = gate_file(boot)
        self._file.parent.mkdir(mode=0o700, exist_ok=True)
        self._lock = threading.Lock()
        self._order = -1
        """Of the newest command that was heard."""
        self._says: dict[str, Any] = {
            "service_id": service_id, "version_id": "", "enabled": True, "hashes": [],
            "probe_hash": hashlib.sha256(self.probe_token.encode()).hexdigest(), "draining": False, "revision": 0,
        }  # fmt: skip

    def write(self, order: int | None = None, **changes: Any) -> int:
        """``version_id enabled hashes draining``; what is not named stays. Returns the revision. Raises OSError.

        Args:
            order: of the command that says so. What a command says that was given before another one which was heard
                already is old, but for ``version_id``: each runs in a thread of its own, and some take minutes.
        """
        with self._lock:
            if order is not None and order < self._order:
                changes = {name: value for name, value in changes.items() if name == "version_id"}
            if not changes:
                return int(self._says["revision"])
            says = self._says | changes | {"revision": self._says["revision"] + 1}
            write_private(self._file, json.dumps(says))
            self._says = says
            if order is not None:
                self._order = max(self._order, order)
            return int(says["revision"])

    @property
    def draining(self) -> bool:
        return bool(self._says["draining"])

    @property
    def version_id(self) -> str:
        """What answers are labelled with."""
        return str(self._says["version_id"])


def order_of(args: dict[str, Any]) -> int | None:
    """Commands of one service grow by it; None: from a control plane that does not count them."""
    order = args.get("order")
    return None if order is None else int(order)


def given_gate(args: dict[str, Any]) -> dict[str, Any]:
    """What a command's ``gate`` says, for ``Gate.write``. Without one nobody gets in."""
    gate = args.get("gate") or {}
    return {"enabled": bool(gate.get("enabled", True)), "hashes": [str(h) for h in gate.get("hashes") or []]}


class Proxy:
    """Asks this head's proxy; from any thread."""

    def __init__(self, address: str, token: str) -> None:
        self._http = Http(f"http://{address}")
        self._headers = {"Authorization": f"Bearer {token}"}

    def ask(self, timeout_s: float) -> dict[str, Any]:
        """``ServeTraffic`` and ``revision``. Raises ProxyAway."""
        try:
            status, raw = self._http.request("GET", STATUS_PATH, None, self._headers, timeout_s)
        except ConnectionRefusedError:
            raise ProxyAway("nothing listens at the proxy's port", nobody=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise ProxyAway(f"the proxy does not answer: {error!r}") from None
        if status != 200:
            raise ProxyAway(f"the proxy answers HTTP {status}")
        try:
            answer = json.loads(raw)
            int(answer["revision"])
        except (ValueError, TypeError, KeyError):
            raise ProxyAway("the proxy's answer is not its gate's") from None
        return dict(answer)


class Traffic:
    """The proxy's counters for the reports, asked by a thread of their own: no report waits for them."""

    def __init__(self, proxy: Proxy, constants: Constants, deployed: Callable[[], bool]) -> None:
        self._proxy, self._constants, self._deployed = proxy, constants, deployed
        self.last: dict[str, Any] | None = None
        """ServeTraffic; None as long as nothing is deployed."""

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``."""
        while not stop.wait(self._constants.serve_traffic_s):
            if self._deployed():
                self.look()

    def look(self) -> None:
        try:
            seen = self._proxy.ask(self._constants.serve_traffic_s)
        except ProxyAway as error:
            log.debug("%s", error)
            self.last = (self.last or {}) | {"alive": False}
        else:
            del seen["revision"]
            self.last = seen | {"alive": True}
