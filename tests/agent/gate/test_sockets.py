from __future__ import annotations

import os
import socket

import pytest

from agent.gate import sockets as gate_sockets
from agent.gate.sockets import connections
from tests.agent.conftest import until


def _listening(host: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen()
    return sock


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_open_connections_are_counted(host: str) -> None:
    try:
        listener = _listening(host)
    except OSError:
        pytest.skip("no IPv6 here")
    port = listener.getsockname()[1]
    # Another test's client that waits for its server on a port thought free may knock here: each count is waited for.
    until(lambda: connections([port]) == 0, why="an idle port counts")
    clients = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(3)]
    until(lambda: connections([port]) == 3, why="those that were not accepted yet do not count")
    ours = {sock.getsockname()[1] for sock in clients}
    served = []
    while len(served) < len(clients):
        sock, peer = listener.accept()
        if peer[1] in ours:
            served.append(sock)
        else:
            sock.close()
    until(lambda: connections([port, 1]) == 3, why="accepted connections do not count")
    until(lambda: connections([port], clients[0].getsockname()[:2]) == 2, why="the one that asks counts")
    assert connections([1]) == 0
    closed = next(sock for sock in served if sock.getpeername()[1] == clients[0].getsockname()[1])
    clients[0].close()
    closed.close()
    until(lambda: connections([port]) == 2, why="a closed connection counts")
    for sock in (*clients, *served, listener):
        sock.close()


def test_another_node_on_the_same_machine_and_port_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    own = _listening("127.0.0.1")
    port = own.getsockname()[1]
    other = _listening("127.0.0.2", port)
    sockets = gate_sockets._own_sockets() - {str(os.fstat(other.fileno()).st_ino)}
    monkeypatch.setattr(gate_sockets, "_own_sockets", lambda: sockets)
    clients = [socket.create_connection((host, port), 5) for host in ("127.0.0.1", "127.0.0.2", "127.0.0.2")]
    until(lambda: connections([port]) == 1, why="those of the other node count")
    for sock in (*clients, own, other):
        sock.close()
