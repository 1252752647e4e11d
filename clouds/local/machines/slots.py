"""Slots for machines on this host: an address, a block of ports, and the guard that reserves them."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from runtime.home import hold_port

PORTS_PER_SLOT = 20
FIRST_PORT = 20_000
"""Above the range that Ray takes for its workers (10002-19999), below the kernel's ephemeral ports (32768 on)."""
SLOTS = 600


@dataclass(frozen=True)
class Slot:
    """Ports ``port_base`` .. ``port_base + 19`` on ``ip`` are the holder's own for as long as ``guard`` is open."""

    number: int
    ip: str
    port_base: int
    guard: socket.socket


def take(start: int, count: int = SLOTS) -> Slot | None:
    """The first free slot of ``count``, searched from ``start`` on; None when all are taken.

    The guard holds the block's first port number (``hold_port``); Ray itself uses TCP only.

    Callers start at a slot of their own (not at 0), so that a slot which has just become free is not given to
    the next machine at once: what is left of the old cluster may still be calling there.
    """
    for i in range(count):
        number = (start + i) % count
        base = FIRST_PORT + number * PORTS_PER_SLOT
        guard = hold_port(base)
        if guard is None:
            continue
        if all(_free(base + offset) for offset in range(PORTS_PER_SLOT)):
            return Slot(number, _address(number), base, guard)
        guard.close()
    return None


def _free(port: int) -> bool:
    """Whether nothing listens on it, on any address: Ray's servers bind all of them."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _address(number: int) -> str:
    """A loopback address of the slot's own, so that Ray takes its nodes for different hosts;
    where the system has only 127.0.0.1 all nodes share that and differ by port."""
    own = f"127.0.{1 + number // 250}.{1 + number % 250}"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((own, 0))
        except OSError:
            return "127.0.0.1"
    return own
