"""``down`` when the control plane can't be started any more: the machines of this host still end."""

from __future__ import annotations

import socket
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from clouds.contract.machines import MachineSpec, MachineState
from clouds.local.machines.processes import LocalMachines
from embedded.demo import _demo
from embedded.teardown import may_hold_clusters
from heliostat.errors import InfrastructureError
from heliostat.models.clusters import NodeRole
from runtime.home import Home
from runtime.keys import load_or_create
from tests.embedded.conftest import StackUnderTest


def launch(machines: LocalMachines, installation_id: str) -> str:
    spec = MachineSpec(
        token=str(uuid.uuid4()),
        cluster_id="cl_1",
        node_id="nd_1",
        generation=1,
        role=NodeRole.HEAD,
        installation_id=installation_id,
        user_data="#!/bin/sh\nexec sleep 1000\n",
    )
    return machines.launch(spec).machine_id


@pytest.mark.long
def test_machines_of_a_dead_control_plane_are_ended(make_stack: Callable[..., StackUnderTest]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        stack = make_stack(HELIOSTAT_FAKE_CLOUD="", HELIOSTAT_API_PORT=str(other.getsockname()[1]))
        stack.home.create()
        machines = LocalMachines(stack.home.path, "auto", sys.executable)
        mine = launch(machines, load_or_create(stack.home.path).installation_id())
        another_installations = launch(machines, "hs-another")
        try:
            assert may_hold_clusters(stack.home)
            done = stack.run("down", check=False)
            assert done.returncode == 2
            assert "is taken by another program" in done.stderr
            assert f"Killed 1 machines: {mine}" in done.stderr
            states = {m.machine_id: m.state for m in machines.describe([mine, another_installations])}
            assert states == {mine: MachineState.GONE, another_installations: MachineState.RUNNING}
            assert not may_hold_clusters(stack.home)
        finally:
            machines.terminate([another_installations])


def test_the_demo_does_not_end_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path)
    monkeypatch.setattr("embedded.demo.may_hold_clusters", lambda _: True)
    with pytest.raises(InfrastructureError, match="the demo would end them"):
        _demo(home, lambda *_: 0)
    assert not home.stack_json.exists()
