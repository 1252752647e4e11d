"""The lab ends with whoever started it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid

import pytest

from tests.e2e.support import ROOT, is_alive, processes_with, until
from tests.lab import namespaces

pytestmark = pytest.mark.skipif(
    bool(namespaces.missing()), reason=f"NOT RUN, the lab can't be built on this machine: {namespaces.missing()}"
)

BOOT = """
import sys, time
from tests.lab import network
from tests.lab.host import Host, Identity
network.build()
host = Host(Identity("aws", "i-1", "10.77.16.4", "us-west-2a", "m6i.large", b"#!/bin/sh\\nsetsid sleep 1000\\n"), print)
while "sleep 1000" not in host.processes().values():
    time.sleep(0.02)
print("booted", flush=True)
time.sleep(1000)
"""

STARTER = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'tests.lab', *sys.argv[1:]])"


@pytest.mark.parametrize("victim", ["the lab", "who started it"])
def test_nothing_outlives_a_lab_that_is_killed(victim: str) -> None:
    mark = f"lab-{uuid.uuid4().hex}"
    python = [sys.executable, *(["-m", "tests.lab"] if victim == "the lab" else ["-c", STARTER])]
    process = subprocess.Popen(
        [*python, sys.executable, "-c", BOOT, mark], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "booted\n"
    inside = [pid for pid, argv in processes_with(mark).items() if "unshare" not in argv]
    # Who started it is outside, and may have the highest number of all.
    outside = os.readlink("/proc/self/ns/net")
    namespace = [name for pid in inside if (name := os.readlink(f"/proc/{pid}/ns/net")) != outside][-1]
    assert len(in_network(namespace)) >= 2
    hosts = [pid for pid, argv in processes_with("i-1").items() if "host_init.sh" in argv]
    assert hosts

    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    # A host's own end is seen last: its parent has gone, and whoever takes it over reaps it when it comes to that.
    until(
        "all to be gone",
        lambda: not in_network(namespace) and not processes_with(mark) and not any(map(is_alive, hosts)),
    )


def in_network(namespace: str) -> list[int]:
    """Processes of that network namespace."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            if os.readlink(f"/proc/{pid}/ns/net") == namespace:
                found.append(pid)
        except OSError:
            continue
    return found
