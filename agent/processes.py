"""Finds and kills processes by ``/proc``. Never by name: other nodes and other users' Ray run on the same machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path

PROC = Path("/proc")


def pids() -> list[int]:
    return [int(name) for name in os.listdir(PROC) if name.isdigit()]  # noqa: PTH208 - half the time of iterdir


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/<pid>/stat`` from the state on; None: gone."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()  # the name may hold spaces and parentheses


def alive(pid: int) -> bool:
    """Exists and is not a zombie."""
    stat = _stat(pid)
    return stat is not None and stat[0] not in "ZX"


def descendants(root: int) -> list[int]:
    """All living descendants of ``root``."""
    children: dict[int, list[int]] = {}
    states: dict[int, str] = {}
    for pid in pids():
        stat = _stat(pid)
        if stat is not None:
            children.setdefault(int(stat[1]), []).append(pid)
            states[pid] = stat[0]
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        queue.extend(below)
        found.extend(pid for pid in below if states[pid] not in "ZX")
    return found


def with_environ(*entries: str) -> Iterator[int]:
    """Living processes that were started with all of these ``NAME=value`` in their environment (as far as this process
    may read it)."""
    needles = [b"\0" + entry.encode() + b"\0" for entry in entries]
    for pid in pids():
        try:
            environ = b"\0" + (PROC / str(pid) / "environ").read_bytes()
        except OSError:
            continue  # it has ended, or is another user's
        if all(needle in environ for needle in needles):
            yield pid


def command(pid: int) -> str:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def named_child(root: int, name: str) -> int | None:
    """The descendant of ``root`` whose short name (``comm``) is ``name``."""
    for pid in descendants(root):
        try:
            if (PROC / str(pid) / "comm").read_text().strip() == name:
                return pid
        except OSError:
            continue
    return None


def kill(victims: Collection[int]) -> None:
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 0 and (stat := _stat(pid)) is not None:
        pid = int(stat[1])
        found.add(pid)
    return found


def kill_tree(root: int, entry: str, timeout_s: float = 10.0) -> list[int]:
    """Kills all descendants of ``root`` and every process with ``entry`` in its environment, and repeats it until none
    is left, for processes fork meanwhile. Spares itself and its ancestors: the local cloud's supervisor has the node's
    id in its environment too. Returns those that are still alive after ``timeout_s``."""
    spared = {root, os.getpid(), *ancestors(os.getpid())}
    deadline = time.monotonic() + timeout_s
    while True:
        victims = {pid for pid in {*descendants(root), *with_environ(entry)} - spared if alive(pid)}
        if not victims or time.monotonic() > deadline:
            return sorted(victims)
        kill(victims)
        reap(spared)
        time.sleep(0.005)


def reap(spared: Collection[int] = ()) -> None:
    """Reaps ended children without waiting; never those in ``spared``, whose owner waits for them."""
    for pid in pids():
        stat = _stat(pid)
        if stat is not None and stat[0] == "Z" and int(stat[1]) == os.getpid() and pid not in spared:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass
