"""The parent of one local machine, for the machine's whole life. A program of its own, standard library only:
it outlives the process that launched the machine, also one with other code.

    python -I -S supervisor.py <machine dir> <lock fd> <guard fd> <namespace|process> <place as JSON>

Files in the machine's directory, each written once and atomically, tell its story:

    machine.json  request, tags, time                      by the launcher, with the directory
    stop          the machine must not run (any more)      by terminate
    started       supervisor's pid, address, ports         the machine has been powered: never again
    power         pid whose SIGKILL is the power cut
    ended         when, exit code, why

The lock (``lock fd``) is held from before ``started`` until the end, so of any number of launchers one
supervisor boots it. If this process is killed the kernel kills the machine with it.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMESPACE = ["unshare", "--user", "--map-current-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def step(name: str) -> None:
    """Marks a point at which a crash must leave everything in order; the tests crash there."""


def write_once(path: Path, value: dict[str, Any]) -> None:
    """Whole and durable, or not at all."""
    fd, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    with os.fdopen(fd, "w") as f:
        json.dump(value, f)
        f.flush()
        os.fsync(f.fileno())
    Path(part).rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return value


def identity(pid: int) -> dict[str, Any]:
    """Names one process for ever: pids come again, also with the same start time after a reboot."""
    return {"pid": pid, "start": start_time(pid), "boot": _boot_id()}


def lives(who: dict[str, Any] | None) -> bool:
    """Whether that very process runs. A zombie does not: nobody may be there to reap it."""
    return (
        who is not None
        and who["start"] is not None
        and who["boot"] == _boot_id()
        and start_time(who["pid"]) == who["start"]
    )


def kill(who: dict[str, Any] | None) -> None:
    """SIGKILL to that very process, or to none."""
    if who is None:
        return
    try:
        fd = os.pidfd_open(who["pid"])
    except ProcessLookupError:
        return
    try:
        if lives(who):  # asked after the pidfd is open: from here on the pid cannot become another's unseen
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # ended meanwhile
    finally:
        os.close(fd)


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of ``pid``; None if there is no such process, or but a zombie."""
    stat = _stat(pid)
    return None if stat is None or stat[0] in "ZX" else int(stat[19])


def strays(machine_id: str) -> list[dict[str, Any]]:
    """The processes with this machine's mark in their environment, the supervisor not among them. One that is just
    given another program to run (execve) shows no environment for a quarter of a millisecond: missed, it would live
    on after the machine's end. So those that show none are looked at again, for 15 ms at most."""
    mark = f"HELIOSTAT_MACHINE_ID={machine_id}".encode()
    found = []
    left = list(_pids())
    for pause in (0.0, 0.001, 0.002, 0.004, 0.008):
        time.sleep(pause)
        looked_at, left = left, []
        for pid in looked_at:
            try:
                environ = _environ(pid)
            except OSError:
                continue  # ended, or another user's
            if not environ:
                left.append(pid)
            elif mark in environ.split(b"\0") and start_time(pid) is not None:
                found.append(identity(pid))
        if not left:
            break
    return found


def clean(machine: Path) -> None:
    """Removes what an ended machine leaves: its user-data, its node directory, and the short name in /tmp that the
    agent made for a folder of it (Ray's sockets allow no long path). What cannot be removed (folders that the
    user's program made read-only) stays: it must not keep the machine from ending."""
    for link in Path("/tmp").glob("hn-*"):
        with contextlib.suppress(FileNotFoundError):  # of another machine that ends at the same moment
            if link.is_symlink() and machine / "node" in link.readlink().parents:
                link.unlink()
    shutil.rmtree(machine / "node", ignore_errors=True)
    (machine / "user-data").unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    machine, lock_fd, guard_fd, isolation = Path(argv[0]), int(argv[1]), int(argv[2]), argv[3]
    place = json.loads(argv[4])
    told, tell = os.pipe()
    if os.fork():
        os.close(tell)
        os._exit(0 if os.read(told, 1) else 1)  # the launcher waits for this process only
    os.close(told)
    os.setsid()
    for fd in (lock_fd, guard_fd):
        os.set_inheritable(fd, False)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the machine come to us, to be ended with it
    step("forked")
    if (machine / "started").exists():
        os._exit(1)
    write_once(machine / "started", {**identity(os.getpid()), **place, "isolation": isolation, "at": time.time()})
    step("started")
    os.write(tell, b"1")
    os.close(tell)
    if (machine / "stop").exists():
        _end(machine, None)
        return
    me = os.getpid()

    def die_with_supervisor() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != me:
            os._exit(1)

    command = [*(NAMESPACE if isolation == "namespace" else []), "sh", str(machine / "user-data")]
    power = subprocess.Popen(
        command,
        cwd=machine / "node",
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_supervisor,  # safe: this program has one thread
        start_new_session=True,
    )
    step("spawned")
    write_once(machine / "power", identity(power.pid))
    step("powered")
    # terminate writes `stop` first and looks for `power` then; we do the reverse. One of the two sees the other.
    if (machine / "stop").exists():
        power.kill()
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == power.pid:
            break
    step("down")
    _end_descendants()
    _end(machine, os.waitstatus_to_exitcode(status))


def _end(machine: Path, exit_code: int | None) -> None:
    clean(machine)
    step("cleaned")
    stop = read(machine / "stop")
    if stop is not None:
        reason = stop["reason"]
    elif exit_code is not None and exit_code < 0:
        reason = f"killed by signal {-exit_code}"
    else:
        reason = f"its startup program ended with exit code {exit_code}"
    write_once(machine / "ended", {"at": time.time(), "exit_code": exit_code, "reason": reason})


def _end_descendants() -> None:
    """Ends all that is left below this process. Each round kills what it sees; what was forked meanwhile comes
    to us as the subreaper, and is seen in the next."""
    pause = 0.005
    while True:
        stats = {pid: stat for pid in _pids() if (stat := _stat(pid)) is not None}
        below = {os.getpid()}
        while more := {pid for pid, stat in stats.items() if int(stat[1]) in below} - below:
            below |= more
        below.remove(os.getpid())
        if not below:
            return
        for pid in below:
            kill({"pid": pid, "start": int(stats[pid][19]), "boot": _boot_id()})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(pause)
        pause = min(pause * 2, 1)  # one that hangs in the kernel may take its time


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208


def _environ(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third (state) on: the second is a name that may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


if __name__ == "__main__":
    main(sys.argv[1:])
