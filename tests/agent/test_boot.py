from __future__ import annotations

from agent.boot import Ports


def test_ports_of_a_node_are_its_own() -> None:
    ports = Ports.of(20000)
    fixed_ones = [int(o.rpartition("=")[2]) for o in ports.options(head=True)]
    taken = [ports.gcs, ports.dashboard, ports.agent, *fixed_ones, *map(int, ports.environment().values())]
    assert {ports.serve_http, ports.serve_grpc}.isdisjoint(taken)
    assert {ports.serve_http, ports.serve_grpc} == {20012, 20013}
    assert (Ports.of(None).serve_http, Ports.of(None).serve_grpc) == (8000, 9000)
