"""A small file of JSON lines that survives a crash at any byte: appended, fsynced, read back at start."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any


class Journal:
    """``append`` returns when the record is on the disk. A torn last line (power cut) is dropped at start.

    Raises OSError when the disk is full or gone; then nothing is recorded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.records: list[dict[str, Any]] = []
        """What the file held at start."""
        if path.exists():
            self._recover()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _recover(self) -> None:
        good = 0
        data = self.path.read_bytes()
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                self.records.append(json.loads(line))
            except ValueError:
                break
            good += len(line)
        if good < len(data):
            os.truncate(self.path, good)

    def append(self, *records: dict[str, Any]) -> None:
        data = b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records)
        with self._lock:
            size = os.fstat(self._fd).st_size
            try:
                written = os.write(self._fd, data)
                if written < len(data):
                    raise OSError(28, f"no space for a record in {self.path.name}")
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, size)  # half a line would hide every record after it
                raise

    def rewrite(self, records: list[dict[str, Any]]) -> None:
        """Replaces the whole file, atomically."""
        fresh = self.path.with_suffix(".new")
        with self._lock:
            with fresh.open("wb") as out:
                os.fchmod(out.fileno(), 0o600)
                for record in records:
                    out.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
                out.flush()
                os.fsync(out.fileno())
            fresh.rename(self.path)
            os.close(self._fd)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)


def write_private(path: Path, text: str) -> None:
    """A 0600 file that others can never read; replaced atomically."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    fresh.rename(path)
