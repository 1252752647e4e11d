"""Which ports a service's load balancer gets, once for its life."""

from __future__ import annotations

import errno
import json
import socket
from pathlib import Path

from clouds.contract.errors import BadConfig, QuotaExceeded
from clouds.local.balancer.files import endpoints
from runtime.home import free_port


def choose(home: Path, root: Path, host: str, ports: str) -> tuple[int, int]:
    """The endpoint's port on ``host`` and that of its metrics on loopback, neither of them another one's of this home,
    running or not; of one whose file cannot be read only the ports that it has open are known. To be called under the
    lock of all of ``root``'s balancers.

    Args:
        ports: ``first-last`` for the endpoint's; empty: above those that outgoing connections draw from.

    Raises:
        QuotaExceeded: all of ``ports`` are taken.
        BadConfig: this machine has no such address, or this user may not open such a port.
    """
    taken = set()
    for record in endpoints(root):
        taken |= {record.port, record.metrics_port}
    stack = home / "stack.json"
    if stack.exists():
        taken |= set(json.loads(stack.read_text()).get("ports", {}).values())
    metrics_port = free_port(taken)
    taken.add(metrics_port)
    if not ports:
        while not is_free(host, port := free_port(taken)):
            pass
        return port, metrics_port
    first, _, last = ports.partition("-")
    for port in range(int(first), int(last) + 1):
        if port not in taken and is_free(host, port):
            return port, metrics_port
    raise QuotaExceeded(
        f"All ports of {ports} are taken: none is left for another service's load balancer.",
        remedy="End services that are not needed, or widen HELIOSTAT_BALANCER_PORTS.",
    )


def is_free(host: str, port: int) -> bool:
    """Whether a load balancer could listen there now. Raises BadConfig when this user never could."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as e:
        if e.errno == errno.EADDRINUSE:
            return False
        raise BadConfig(
            f"A load balancer cannot listen at {host}, port {port}: {e.strerror}.",
            remedy="Set HELIOSTAT_BALANCER_HOST to an address of this machine, and HELIOSTAT_BALANCER_PORTS to ports "
            "that this user may open.",
        ) from e
    return True
