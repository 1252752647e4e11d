"""Who gets through: the gate file as it is now, and the verdict on a request.

The agent writes the file that ``HELIOSTAT_SERVE_GATE`` names::

    {"service_id", "version_id", "enabled": bool, "hashes": [sha256 hex], "probe_hash": sha256 hex, "draining": bool,
     "revision": int}

A change takes effect within ``REFRESH_S``. Without a valid file the gate answers everything but Serve's health check
with 503.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

log = logging.getLogger("ray.serve.heliostat")
"""Below Serve's own logger: its lines are in Serve's proxy log."""

FILE = "HELIOSTAT_SERVE_GATE"
REFRESH_S = 0.1
"""Between checks of the file; one costs about 2 µs."""
FILE_MAX_BYTES = 2**20
SETTLED_NS = 1_000_000_000
"""A file younger than this is read again: within one tick of the clock its signature may not show a change."""


@dataclass(frozen=True)
class Policy:
    """One version of the gate file."""

    service_id: str
    version_id: str
    enabled: bool
    """False: requests need no token."""
    hashes: tuple[bytes, ...]
    probe_hash: bytes
    """Empty: no request is a probe."""
    draining: bool
    revision: int

    @classmethod
    def parse(cls, data: bytes) -> Policy:
        """Raises ValueError: what is wrong, without repeating the content."""
        try:
            raw = json.loads(data)
        except ValueError:
            raise ValueError("it is not JSON") from None
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        for name, kind in (("service_id", str), ("version_id", str), ("enabled", bool), ("hashes", list),
                           ("probe_hash", str), ("draining", bool), ("revision", int)):  # fmt: skip
            if type(raw.get(name)) is not kind:
                raise ValueError(f"{name!r} is missing or not of type {kind.__name__}")
        if not (raw["version_id"].isascii() and raw["version_id"].isprintable()):
            raise ValueError("'version_id' is not a valid header value")
        return cls(
            service_id=raw["service_id"], version_id=raw["version_id"], enabled=raw["enabled"],
            hashes=tuple(_digest(h) for h in raw["hashes"]),
            probe_hash=_digest(raw["probe_hash"]) if raw["probe_hash"] else b"",
            draining=raw["draining"], revision=raw["revision"],
        )  # fmt: skip


def _digest(text: object) -> bytes:
    try:
        digest = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ValueError("a hash is not a SHA-256 in hex")
    return digest


class GateFile:
    """The current policy. Not for use by several threads."""

    def __init__(self, path: str | None = None) -> None:
        """``path`` None: the one that the environment names, read on first use."""
        self._path = path
        self._next_refresh = float("-inf")
        self._signature: tuple[int, ...] | None = None
        self._policy: Policy | None = None
        self.closed_reason = ""
        """Why there is no policy."""
        self.draining_since: float | None = None

    def policy(self) -> Policy | None:
        now = time.monotonic()
        if now >= self._next_refresh:
            self._next_refresh = now + REFRESH_S
            self._refresh()
        return self._policy

    def _refresh(self) -> None:
        path = self._path if self._path is not None else os.environ.get(FILE, "")
        if not path:
            self._close(f"{FILE} is not set")
            return
        try:
            found = os.stat(path)  # noqa: PTH116 - Path costs more than the call itself
            signature = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
            if signature == self._signature:
                return
            with Path(path).open("rb") as f:
                data = f.read(FILE_MAX_BYTES + 1)
            if len(data) > FILE_MAX_BYTES:
                raise ValueError("it is too large")
            policy = Policy.parse(data)
        except OSError as e:
            self._close(f"the gate file can't be read ({e.strerror})")
        except ValueError as e:
            self._close(f"the gate file is invalid: {e}")
        else:
            settled = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_NS
            self._signature = signature if settled else None
            if policy != self._policy:
                log.info("gate: revision %d, token %s, draining %s", policy.revision,
                         "required" if policy.enabled else "not required", policy.draining)  # fmt: skip
            self._policy, self.closed_reason = policy, ""
            if not policy.draining:
                self.draining_since = None
            elif self.draining_since is None:
                self.draining_since = time.monotonic()

    def _close(self, reason: str) -> None:
        if self._policy is not None or self.closed_reason != reason:
            log.error("gate: answering 503 to every request: %s", reason)
        self._policy, self._signature, self.closed_reason, self.draining_since = None, None, reason, None


GATE_FILE = GateFile()
"""Of this process."""


class Verdict(Enum):
    PASS = "pass"
    PROBE = "probe"
    ABSENT = "absent"
    """No bearer token: no header, an empty token, or another scheme."""
    WRONG = "wrong"
    """An invalid bearer token, or several ``Authorization`` headers: it is unclear which one counts."""
    NOT_THE_AGENT = "not_the_agent"
    """A request for the statistics with another token than the agent's."""


def judge(policy: Policy, authorization: Sequence[bytes]) -> Verdict:
    """``authorization``: the values of all headers of that name. Takes as long for a right token as for a wrong one."""
    if len(authorization) > 1:
        return Verdict.WRONG if policy.enabled else Verdict.PASS
    scheme, _, token = authorization[0].strip().partition(b" ") if authorization else (b"", b"", b"")
    token = token.strip()
    if scheme.lower() != b"bearer" or not token:
        return Verdict.ABSENT if policy.enabled else Verdict.PASS
    digest = hashlib.sha256(token).digest()
    if hmac.compare_digest(digest, policy.probe_hash):
        return Verdict.PROBE
    valid = False
    for known in policy.hashes:
        valid |= hmac.compare_digest(digest, known)
    return Verdict.PASS if valid or not policy.enabled else Verdict.WRONG
