"""The node's first process. It starts the agent, reaps orphans, and is the machine's power switch: when the agent ends,
however it ends, every process below dies at once, job drivers included (Ray starts them in sessions of their own, so a
process group is not enough).

As PID 1 of a PID namespace it kills the whole namespace. Elsewhere it is a child subreaper and kills its
descendants and every process with this node's directory in its environment. If this process itself is killed, the agent
dies with it (and in a namespace the kernel ends the rest; elsewhere Ray's leader has the same arrangement).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable

from agent import processes
from agent.boot import Boot

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def die_with_parent() -> None:
    """The kernel sends this process SIGKILL when the *thread* that started it ends; call it in the child."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def run(boot: Boot, agent: Callable[[], int]) -> int:
    """Runs ``agent`` in a child and returns its exit code after everything below is dead (128 + n for signal n)."""
    me = os.getpid()
    if me != 1:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)  # no signal may be lost between fork and handler
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_with_parent()
            if os.getppid() != me:
                os._exit(1)  # the parent died before the line above
            signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
            code = agent()
        except BaseException:  # noqa: BLE001 - nothing may return into the parent's stack
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def forward(number: int, _frame: object) -> None:
        try:
            os.kill(child, signal.SIGTERM)
        except ProcessLookupError:
            pass

    for number in wanted:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            break
    code = os.waitstatus_to_exitcode(status)
    if me == 1:
        _kill_namespace()
    else:
        processes.kill_tree(me, boot.mark)
    _remove_session(boot)
    return code if code >= 0 else 128 - code


def _kill_namespace() -> None:
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return  # no other process is left
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _remove_session(boot: Boot) -> None:
    """Ray's session directory is useless without its Ray, and its logs have been shipped."""
    if boot.temp_dir != boot.ray_dir:
        boot.temp_dir.unlink(missing_ok=True)
    shutil.rmtree(boot.ray_dir, ignore_errors=True)
