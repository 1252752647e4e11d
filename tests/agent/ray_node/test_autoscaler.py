"""Between Ray's autoscaler and the control plane: counts that are right whatever comes in between."""

from __future__ import annotations

import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.boot import Boot, Ports
from agent.constants import Constants
from agent.events import Events
from agent.head.members import Members
from agent.head.server import Server
from agent.journal import Journal, write_private
from agent.packages import Packages
from agent.ray_node.autoscaler import Scaling, autoscaling_config, write_config
from tests.agent.conftest import free_block

GROUPS = [
    {"name": "small", "resources": {"CPU": 1}, "min_nodes": 0, "max_nodes": 4},
    {"name": "fixed", "resources": {"CPU": 2, "gold": 1}, "labels": {"tier": "gold"}, "min_nodes": 1, "max_nodes": 1},
]


class World:
    """A Scaling, its events, and a control plane that does as it is told when asked to."""

    def __init__(self, folder: Path) -> None:
        self.boot = Boot("http://x", "nd_head", 1, "b", "127.0.0.1", Ports.of(free_block()), folder, Constants())
        self.events = Events(Journal(folder / "events"), "b" * 32, 100)
        self.at = 1000.0
        self.scaling = Scaling(self.boot, self.events, GROUPS, {"small": 0, "fixed": 1}, clock=lambda: self.at)
        self.nodes = [{"id": "f1", "group": "fixed", "state": "RUNNING", "ip": "127.0.0.9"}]
        self.desired = {"small": 0, "fixed": 1}
        self.answer()

    def told(self) -> list[dict[str, Any]]:
        return [f["data"] for f in self.events.pending() if f["kind"] == "desired"]

    def answer(self, acknowledge: bool = True, obey: bool = True) -> None:
        """One report's answer."""
        told = self.events.pending()
        if obey and told:
            self.desired = dict(told[-1]["data"]["desired"])
        if acknowledge:
            self.events.acknowledge([f["id"] for f in told])
        self.headroom = self.scaling.headroom(self.nodes)
        self.scaling.update(self.nodes, dict(self.desired))

    def appears(self, node_id: str, group: str = "small", state: str = "REQUESTED") -> None:
        self.nodes.append({"id": node_id, "group": group, "state": state, "ip": None})
        self.answer()

    def ids(self) -> list[str]:
        return [n["id"] for n in self.scaling.listed()]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_the_head_is_always_listed_with_the_tags_that_ray_needs(world: World) -> None:
    head = world.scaling.listed()[0]
    assert head["id"] == "nd_head"
    assert head["tags"]["ray-node-type"] == "head"
    assert head["tags"]["ray-user-node-type"] == "head"
    assert head["running"] is True


def test_creates_add_up_one_by_one_before_any_node_is_listed(world: World) -> None:
    world.scaling.create("small", 1, "r1")
    world.scaling.create("small", 1, "r2")
    assert [t["desired"]["small"] for t in world.told()] == [1, 2]
    assert all(t["remove"] == [] for t in world.told())


def test_the_same_launch_request_again_counts_once(world: World) -> None:
    world.scaling.create("small", 2, "r1")
    world.scaling.create("small", 2, "r1")
    assert world.scaling.desired["small"] == 2


def test_a_node_that_is_being_replaced_is_not_asked_for_twice(world: World) -> None:
    world.scaling.create("small", 2, "r1")
    world.appears("s1")
    world.appears("s2")
    world.nodes = [n for n in world.nodes if n["id"] != "s1"]  # lost; the control plane replaces it by itself
    world.answer()
    world.scaling.create("small", 1, "r2")
    assert world.scaling.desired["small"] == 2
    assert world.told() == []


def test_launch_requests_are_tied_to_the_next_new_nodes_of_their_group(world: World) -> None:
    world.scaling.create("small", 1, "r1")
    world.scaling.create("small", 1, "r2")
    world.appears("s1")
    world.appears("s2")
    tags = {n["id"]: n["tags"].get("ray-launch-request") for n in world.scaling.listed()}
    assert tags["s1"] == "r1"
    assert tags["s2"] == "r2"
    assert tags["f1"] == ""


def test_never_above_the_maximum(world: World) -> None:
    world.scaling.create("small", 9, "r1")
    assert world.scaling.desired["small"] == 4
    world.scaling.create("fixed", 1, "r2")
    assert world.scaling.desired["fixed"] == 1
    world.scaling.create("unknown", 1, "r3")
    assert world.scaling.desired.keys() == {"small", "fixed"}


def test_an_idle_node_is_let_go_at_once_and_once(world: World) -> None:
    world.scaling.create("small", 2, "r1")
    world.appears("s1")
    world.appears("s2")
    world.scaling.terminate(["s1"])
    world.scaling.terminate(["s1"])
    assert world.told() == [{"desired": {"small": 1, "fixed": 1}, "remove": ["s1"]}]
    assert "s1" not in world.ids()
    world.answer()
    assert "s1" not in world.ids()  # still listed by the control plane, gone for Ray
    assert world.scaling.desired["small"] == 1


def test_the_head_the_lost_and_the_unknown_are_not_the_autoscalers_to_end(world: World) -> None:
    assert world.scaling.lost("f1")
    assert not world.scaling.lost("f1")
    world.scaling.terminate(["nd_head", "f1", "nobody"])
    assert world.told() == []
    assert world.scaling.desired == {"small": 0, "fixed": 1}
    assert world.ids() == ["nd_head"]


def test_one_that_its_cloud_takes_back_is_replaced_once_and_its_end_is_no_wish_for_fewer(world: World) -> None:
    world.scaling.create("small", 2, "r1")
    world.appears("s1")
    world.appears("s2")
    world.nodes[1]["leaving"] = True
    world.answer()
    world.scaling.create("small", 1, "r2")  # Ray sees that s1 drains; the control plane's replacement is on its way
    assert world.scaling.desired["small"] == 2
    world.appears("s3")
    world.at += 2
    world.scaling.terminate(["s1"])  # drained and idle
    assert world.told() == [{"desired": {"small": 2, "fixed": 1}, "remove": ["s1"]}]
    assert world.ids() == ["nd_head", "f1", "s2", "s3"]


def test_a_replacement_is_shown_to_ray_after_the_maximum_that_it_needs(world: World) -> None:
    world.nodes[0]["leaving"] = True  # of a group whose maximum is 1
    world.appears("f2", "fixed")
    assert world.headroom == {"fixed": 1}
    assert world.ids() == ["nd_head", "f1"]  # Ray's round may have begun with the old maximum
    world.scaling.create("fixed", 1, "r1")  # and Ray, which sees that f1 drains, may want another one
    assert world.scaling.desired["fixed"] == 1
    world.at += 2
    assert world.ids() == ["nd_head", "f1", "f2"]
    assert world.scaling.listed()[2]["tags"]["ray-launch-request"] == "r1"
    world.nodes[0]["state"] = "TERMINATING"
    world.answer()
    assert world.headroom == {"fixed": 1}  # Ray may have listed it and not have read the maximum yet
    world.at += 11
    world.answer()
    assert world.headroom == {}
    assert world.told() == []


def test_a_group_does_not_fall_below_its_minimum(world: World) -> None:
    world.scaling.terminate(["f1"])
    assert world.told() == [{"desired": {"small": 0, "fixed": 1}, "remove": ["f1"]}]


def test_ray_is_not_told_of_a_drained_node_as_lost(world: World) -> None:
    world.scaling.create("small", 1, "r1")
    world.appears("s1")
    world.scaling.terminate(["s1"])
    assert not world.scaling.lost("s1")


def test_the_control_planes_count_wins_unless_a_newer_one_is_under_way(world: World) -> None:
    world.desired = {"small": 3, "fixed": 1}  # a person raised it
    world.answer()
    assert world.scaling.desired["small"] == 3
    world.scaling.create("small", 4, "r1")
    assert world.scaling.desired["small"] == 4
    world.answer(acknowledge=False, obey=False)  # away, or an old answer
    assert world.scaling.desired["small"] == 4
    world.answer(acknowledge=True, obey=False)  # heard, not yet acted upon
    assert world.scaling.desired["small"] == 4
    world.scaling.create("small", 1, "r1")  # Ray repeats it meanwhile
    assert world.scaling.desired["small"] == 4
    world.at += 11
    world.answer(obey=False)  # it had time enough: it decided otherwise
    assert world.scaling.desired["small"] == 3


def test_a_launch_request_that_nobody_filled_is_forgotten(world: World) -> None:
    world.scaling.create("small", 1, "r1")
    world.answer()
    world.at += 700
    world.answer()
    world.scaling.create("small", 1, "r2")  # Ray gave r1 up; the place is still wanted and vacant
    assert world.scaling.desired["small"] == 1


# -- the provider, as Ray loads it ----------------------------------------------------------------------------------


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    write_private(world.boot.node_dir / "provider-token", "tok")
    server = Server("127.0.0.1", world.boot.ports.agent, "tok", Packages(world.boot), world.scaling)
    yield server
    server.close()


def test_the_server_wants_its_token(world: World, server: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"http://{server.address}/nodes", headers=headers), timeout=5)
        assert refused.value.code == 401


def test_a_package_is_served_by_its_hash_alone(world: World, server: Server) -> None:
    sha256 = "ab" * 32
    (world.boot.node_dir / "packages" / f"{sha256}.zip").write_bytes(b"zip" * 100_000)
    with urllib.request.urlopen(f"http://{server.address}/packages/{sha256}.zip", timeout=5) as response:
        assert response.read() == b"zip" * 100_000
    for path in ("/packages/" + "cd" * 32 + ".zip", "/packages/../events", "/packages/%2e%2e/provider-token"):
        with socket.create_connection(server._http.server_address, 5) as raw:
            raw.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert raw.recv(100).split()[1] in (b"404", b"401")


def test_the_node_provider_speaks_to_the_agent_alone(world: World, server: Server) -> None:
    pytest.importorskip("ray")
    from agent.ray_node.node_provider import HeliostatNodeProvider

    config = autoscaling_config(world.boot, "test", GROUPS, server.address)
    provider = HeliostatNodeProvider(config["provider"], "test")
    assert provider.non_terminated_nodes({}) == ["nd_head", "f1"]
    assert provider.non_terminated_nodes({"ray-node-type": "worker"}) == ["f1"]
    assert provider.is_running("f1")
    assert provider.internal_ip("f1") == "127.0.0.9"
    tags = {"ray-user-node-type": "small", "ray-launch-request": "r1", "ray-node-type": "worker"}
    provider.create_node_with_resources_and_labels({}, tags, 2, {}, {})
    assert world.told()[-1] == {"desired": {"small": 2, "fixed": 1}, "remove": []}
    world.appears("s1", state="RUNNING")
    provider.terminate_nodes(["s1", "nd_head"])
    assert world.told()[-1] == {"desired": {"small": 1, "fixed": 1}, "remove": ["s1"]}
    assert provider.non_terminated_nodes({}) == ["nd_head", "f1"]
    assert provider.is_terminated("s1")


class _Ray:
    """Ray's node list, with one worker that has just died."""

    def nodes(self) -> list[dict[str, Any]]:
        return [{"node_id": "a", "node_name": "f1", "is_head_node": False, "state": "DEAD",
                 "state_message": "Unexpected termination: health check failed", "resources_total": {}}]  # fmt: skip


def test_a_worker_that_died_is_lost_though_ray_lets_it_go_before_we_looked(world: World) -> None:
    members = Members(_Ray(), world.events, world.scaling, world.boot.constants)  # type: ignore[arg-type]
    server = Server(
        "127.0.0.1",
        world.boot.ports.agent,
        "tok",
        Packages(world.boot),
        world.scaling,
        members.refresh_before_terminate,
    )
    try:
        request = urllib.request.Request(
            f"http://{server.address}/terminate", b'{"ids": ["f1"]}', {"Authorization": "Bearer tok"}, method="POST"
        )
        urllib.request.urlopen(request, timeout=5).close()
    finally:
        server.close()
    assert [(f["kind"], f["data"].get("node_id")) for f in world.events.pending()] == [("node_lost", "f1")]
    assert world.scaling.desired["fixed"] == 1


def validate(path: Path, provider: Path) -> tuple[int, str]:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "agent.ray_node.validate_config", str(path), str(provider)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


@pytest.mark.ray
def test_rays_own_reader_accepts_the_config_and_refuses_bad_ones(world: World, tmp_path: Path) -> None:
    provider = tmp_path / "provider"
    provider.mkdir()
    source = Path(__file__).parents[3] / "agent" / "ray_node" / "node_provider.py"
    (provider / "heliostat_node_provider.py").write_text(source.read_text())
    good = autoscaling_config(world.boot, "test", GROUPS, "127.0.0.1:1")
    path = tmp_path / "as.yaml"
    write_config(path, good)
    assert validate(path, provider)[0] == 0
    missing = {k: v for k, v in good.items() if k != "cluster_synced_files"}
    for bad, word in (
        (missing, "cluster_synced_files"),
        (good | {"provider": {**good["provider"], "module": "nowhere.Provider"}}, "nowhere"),
        (good | {"available_node_types": {"small": good["available_node_types"]["small"]}}, "head"),
    ):
        path.write_text(json.dumps(bad))
        code, reason = validate(path, provider)
        assert code == 1
        assert word in reason, reason
