"""The gate's file: which tokens pass, which version answers, whether the head drains."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from typing import Any

from agent.boot import Boot
from agent.gate_install import gate_file
from agent.journal import write_private


class Gate:
    """Writes the file. Every change has a higher ``revision``, by which the proxy reports which one it follows. It
    starts at 0 with the agent's process, for no proxy outlives that."""

    def __init__(self, boot: Boot, service_id: str) -> None:
        self.probe_token = secrets.token_hex(32)
        self._file = gate_file(boot)
        self._file.parent.mkdir(mode=0o700, exist_ok=True)
        self._lock = threading.Lock()
        self._order = -1
        """Of the newest command so far."""
        self._content: dict[str, Any] = {
            "service_id": service_id, "version_id": "", "enabled": True, "hashes": [],
            "probe_hash": hashlib.sha256(self.probe_token.encode()).hexdigest(), "draining": False, "revision": 0,
        }  # fmt: skip

    def write(self, order: int | None = None, **changes: Any) -> int:
        """``version_id enabled hashes draining``; what is not named stays. Returns the revision. Raises OSError.

        Args:
            order: of the command that changes it. Commands run in threads of their own, some for minutes: when a newer
                one has come already, an older one changes ``version_id`` only.
        """
        with self._lock:
            if order is not None and order < self._order:
                changes = {name: value for name, value in changes.items() if name == "version_id"}
            if not changes:
                return int(self._content["revision"])
            content = self._content | changes | {"revision": self._content["revision"] + 1}
            write_private(self._file, json.dumps(content))
            self._content = content
            if order is not None:
                self._order = max(self._order, order)
            return int(content["revision"])

    @property
    def draining(self) -> bool:
        return bool(self._content["draining"])

    @property
    def version_id(self) -> str:
        """The label of the answers."""
        return str(self._content["version_id"])


def order_of(args: dict[str, Any]) -> int | None:
    """The commands of one service grow by it; None: from a control plane that does not count them."""
    order = args.get("order")
    return None if order is None else int(order)


def access_of(args: dict[str, Any]) -> dict[str, Any]:
    """A command's ``gate``, for ``Gate.write``. A command without one lets nobody in."""
    gate = args.get("gate") or {}
    return {"enabled": bool(gate.get("enabled", True)), "hashes": [str(h) for h in gate.get("hashes") or []]}
