"""Memory limits of hosts: one cgroup for each, of version 1 or 2, whichever this machine has."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

_BASE = Path("/sys/fs/cgroup")
_PREFIX = "heliostat-lab-"


def _controller() -> tuple[Path, str] | None:
    """Where a cgroup for memory can be made, and the file that limits it; None: nowhere."""
    if (_BASE / "memory" / "cgroup.procs").exists():
        return _BASE / "memory", "memory.limit_in_bytes"
    listed = _BASE / "cgroup.subtree_control"
    if listed.exists() and "memory" in listed.read_text().split():
        return _BASE, "memory.max"
    return None


def sweep() -> None:
    """Removes what labs that were killed have left: empty cgroups, which no namespace takes along."""
    found = _controller()
    for folder in found[0].glob(f"{_PREFIX}*") if found else []:
        with contextlib.suppress(OSError):  # it has processes, or is gone
            if time.time() - folder.stat().st_mtime > 60:  # a younger one may be about to get some
                folder.rmdir()


def make(name: str, memory: int) -> Path | None:
    found = _controller()
    if found is None:
        return None
    folder = found[0] / f"{_PREFIX}{name}"
    folder.mkdir()
    limit(folder, memory)
    return folder


def limit(folder: Path, memory: int) -> None:
    """Bytes. Raises OSError where the processes have more and nothing can be reclaimed."""
    found = _controller()
    assert found is not None
    (folder / found[1]).write_text(str(memory))


def remove(folder: Path, within_s: float = 5) -> None:
    """Once its last process is gone."""
    until = time.monotonic() + within_s
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
