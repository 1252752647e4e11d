"""Open TCP connections of this process, from ``/proc``: a drain waits until there are none."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Address = tuple[str, int]

ESTABLISHED, LISTEN = "01", "0A"
"""States in /proc/net/tcp."""


def connections(ports: Iterable[int], except_from: Address | None = None) -> int:
    """Established TCP connections to these ports of this process; ``except_from``: the remote end of one that does not
    count. Several nodes may share a machine and a port, each on its own address: where this process listens on
    certain addresses of a port only, connections to the other addresses do not count."""
    suffixes = {f":{port:04X}": port for port in ports}
    rows = [row for row in _tcp_rows() if row[1][-5:] in suffixes and row[3] in (ESTABLISHED, LISTEN)]
    own = _own_sockets()
    listening: dict[int, set[str]] = {}
    for row in rows:
        if row[3] == LISTEN and row[9] in own:
            host, port = _address(row[1])
            listening.setdefault(port, set()).add(host)
    found = set()  # by both ends: the kernel gives /proc/net/tcp in pieces, and may list a socket twice
    for row in rows:
        if row[3] == ESTABLISHED:
            host, port = _address(row[1])
            hosts = listening.get(port)
            if (not hosts or host in hosts or hosts & {"0.0.0.0", "::"}) and _address(row[2]) != except_from:  # noqa: S104
                found.add((row[1], row[2]))
    return len(found)


def _tcp_rows() -> list[list[str]]:
    """``sl local remote state queues timer retransmits uid timeout inode …`` of every TCP socket of the machine."""
    rows = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6 has no tcp6
            rows += [line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return rows


def _own_sockets() -> set[str]:
    """Inodes of this process's sockets."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names are all that is needed
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile; one of them is the listing's own
            target = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def _address(text: str) -> Address:
    """``0100007F:1F90`` is 127.0.0.1:8000: words of 32 bits in the machine's byte order. An IPv4 address that is mapped
    into IPv6 becomes IPv4."""
    host, _, port = text.partition(":")
    packed = bytes.fromhex(host)
    if sys.byteorder == "little":
        packed = b"".join(packed[i : i + 4][::-1] for i in range(0, len(packed), 4))
    return _plain(ipaddress.ip_address(packed)), int(port, 16)


def _plain(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)


def peer(client: Any) -> Address | None:
    """``scope["client"]`` in the form of ``_address``; None without one, as on a Unix socket."""
    try:
        return _plain(ipaddress.ip_address(client[0])), int(client[1])
    except (TypeError, ValueError, IndexError):
        return None
