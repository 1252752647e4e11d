"""Writes gate files as the agent does, for the tests of the gate."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

TOKEN = b"token-of-the-service"
OLD = b"token-that-is-still-valid"
PROBE = b"token-of-the-agent"


def sha256(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


class GateWriter:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "service_id": "svc_1", "version_id": "sv_1", "enabled": True, "hashes": [sha256(TOKEN), sha256(OLD)],
            "probe_hash": sha256(PROBE), "draining": False, "revision": 1,
        }  # fmt: skip
        self.write()

    def write(self, **changes: Any) -> None:
        """By rename, so that nobody reads half a file."""
        self.content |= changes
        new = self.path.with_suffix(".new")
        new.touch(0o600)
        new.write_text(json.dumps(self.content))
        new.replace(self.path)
