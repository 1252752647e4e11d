"""The contract of ``clouds.contract.balancer.LoadBalancer`` (``tests/clouds/contract/test_balancer.py``) on
the fake's load
balancing, and where Google's differs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from clouds.contract.balancer import Backend
from clouds.contract.errors import BadConfig, Denied
from clouds.contract.machines import MachineState
from clouds.gcp.balancer.load_balancing import GcpBalancer
from clouds.gcp.balancer.url_map import base
from heliostat.errors import CloudError
from heliostat.models.services import BACKEND_HEADER
from tests.clouds.balancer_support import SERVICE, World, spec
from tests.clouds.contract.test_balancer import *  # noqa: F403 # the suite, with the world below
from tests.clouds.contract.test_balancer import shares
from tests.clouds.gcp.support import config, machines, served, session
from tests.clouds.support import OURS, Cloud
from tests.lab.gce import GceFake

pytestmark = pytest.mark.long  # some thousand calls


@dataclass
class GceWorld:
    """Three machines, each with a Serve proxy at port 8000, and the fake's traffic."""

    fake: GceFake
    balancer: GcpBalancer
    addresses: dict[str, str]
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)

    def backend(self, name: str, version: str = "sv_1", weight: int = 100) -> Backend:
        return Backend(id=name, version_id=version, http=self.addresses[name], weight=weight)

    def request(self, headers: Mapping[str, str] | None = None, *, status: int = 200) -> tuple[int, str | None]:
        address = self.fake.resources["regions/us-central1", "addresses", base(SERVICE)]["address"]
        reached = self.fake.traffic.request(f"http://{address}", headers or {})
        names = {address: name for name, address in self.addresses.items()}
        return (503, None) if reached is None else (status, names[reached])

    def set_up(self, name: str, up: bool) -> None:
        down = self.fake.traffic.down
        (down.discard if up else down.add)(self.addresses[name])

    def break_down(self) -> None:
        self._drop("forwardingRules")
        self._drop("targetHttpProxies")

    def lose_backends(self) -> None:
        self.url_map()["description"] = "{garbled"

    def url_map(self) -> dict[str, Any]:
        return self.fake.resources["regions/us-central1", "urlMaps", base(SERVICE)]

    def parts(self, kind: str = "") -> list[str]:
        return sorted(f"{k[1]}/{k[2]}" for k in self.fake.resources if k[1] != "instances" and kind in k[1])

    def _drop(self, collection: str) -> None:
        del self.fake.resources["regions/us-central1", collection, base(SERVICE)]


def balancer(url: str, **fields: Any) -> GcpBalancer:
    return GcpBalancer(config(**fields), session(url, **fields), poll_s=0.01, health_wait_s=0.05, propagation_s=0)


@pytest.fixture
def google() -> tuple[GceFake, str]:
    fake = GceFake(op_s=0)
    return fake, served(fake)


@pytest.fixture
def world(google: tuple[GceFake, str], tmp_path: Any) -> GceWorld:
    fake, url = google
    cloud = Cloud(machines(url), tmp_path / "boots")
    addresses = {}
    for i, name in enumerate(("cl_a", "cl_b", "cl_c")):
        zone = cloud.machines.capabilities().zones[i % 2]
        machine = cloud.machines.launch(cloud.spec(cluster_id=name, zone=zone))
        assert machine.state is MachineState.RUNNING
        addresses[name] = f"{machine.ip}:8000"
    found = GceWorld(fake, balancer(url), addresses)
    found.balancer.ensure(spec())
    return found


# -- where Google's differ


def test_an_endpoint_keeps_its_url(world: GceWorld, google: tuple[GceFake, str]) -> None:
    """gRPC needs a certificate."""
    with pytest.raises(BadConfig, match="certificate"):
        world.balancer.ensure(spec(grpc=True))
    certificate = "projects/acme-prod-1/regions/us-central1/sslCertificates/wild"
    secure = balancer(google[1], balancer_certificates=[certificate])
    first = secure.ensure(spec("svc_2", grpc=True))
    assert first.url.startswith("https://")
    assert secure.ensure(spec("svc_2")) == first == secure.describe("svc_2")
    assert first.state == "ready"
    assert secure.ensure(spec("svc_3")).url != first.url
    proxy = world.fake.resources["regions/us-central1", "targetHttpsProxies", base("svc_2")]
    assert proxy["sslCertificates"] == [f"https://www.googleapis.com/compute/v1/{certificate}"]
    secure.remove("svc_2")
    assert secure.describe("svc_2") is None


def test_an_unhealthy_backend_gets_no_traffic(world: World) -> None:
    """A version whose clusters are all down keeps its share, and answers 503."""
    backends = [world.backend("cl_a", "sv_1", 50), world.backend("cl_b", "sv_1", 50), world.backend("cl_c", "sv_2", 50)]
    world.balancer.set_backends(SERVICE, 1, backends)
    world.set_up("cl_a", False)
    assert shares(world, 20) == {"cl_b": 10, "cl_c": 10}
    world.set_up("cl_b", False)
    assert shares(world, 20) == {None: 10, "cl_c": 10}
    assert world.request({BACKEND_HEADER: "cl_a"}) == (503, None)
    assert [c.up for c in world.balancer.counters(SERVICE)] == [False, False, True]
    world.set_up("cl_a", True)
    assert shares(world, 20) == {"cl_a": 10, "cl_c": 10}


def test_counters_are_by_cluster_and_code(world: World) -> None:
    """Google counts elsewhere, and late."""
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_b"), world.backend("cl_a", "sv_2", 0)])
    world.request()
    told = [(c.backend_id, c.version_id, c.up, c.requests) for c in world.balancer.counters(SERVICE)]
    assert told == [("cl_b", "sv_1", True, {}), ("cl_a", "sv_2", True, {})]


def test_backends_get_what_clients_send_and_nothing_else(world: World) -> None:
    """See above: there are no counts."""
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    assert world.request() == (200, "cl_a")


# -- of its own


def test_what_is_no_longer_needed_goes_with_the_change_after(world: GceWorld) -> None:
    """Requests may be under way at what has just been left."""
    empty = world.parts()
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    one = world.parts()
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_b")])
    assert set(one) < set(world.parts()), "cl_a's are there still"
    world.balancer.set_backends(SERVICE, 3, [world.backend("cl_b", weight=50)])
    assert len(world.parts()) == len(one)
    world.balancer.set_backends(SERVICE, 4, [])
    world.balancer.set_backends(SERVICE, 5, [])
    assert world.parts() == empty
    world.balancer.remove(SERVICE)
    assert world.parts() == []


def test_a_weight_alone_is_one_change(world: GceWorld) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a", "sv_1", 90), world.backend("cl_b", "sv_2", 10)])
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_a", "sv_1", 80), world.backend("cl_b", "sv_2", 20)])
    before = Counter(world.fake.calls)
    world.balancer.set_backends(SERVICE, 3, [world.backend("cl_a", "sv_1", 70), world.backend("cl_b", "sv_2", 30)])
    changes = {
        name: n for name, n in (world.fake.calls - before).items() if not name.startswith(("get", "list", "agg"))
    }
    assert changes == {"patch urlMaps": 1}
    before = Counter(world.fake.calls)
    world.balancer.describe(SERVICE)
    assert (world.fake.calls - before).total() == 3


def test_how_requests_are_sent(world: GceWorld) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a", "sv_1", 5000), world.backend("cl_b", "sv_2", 10)])
    (matcher,) = world.url_map()["pathMatchers"]
    *_, safe, last = matcher["routeRules"]
    assert [m["headerMatches"][0]["exactMatch"] for m in safe["matchRules"]] == [
        "GET",
        "HEAD",
        "OPTIONS",
        "PUT",
        "DELETE",
    ]
    assert "gateway-error" in safe["routeAction"]["retryPolicy"]["retryConditions"], "a broken connection is one"
    assert last["routeAction"]["retryPolicy"]["retryConditions"] == ["connect-failure", "refused-stream"]
    assert sorted(w["weight"] for w in last["routeAction"]["weightedBackendServices"]) == [2, 1000], "Google's maximum"
    services = [r for key, r in world.fake.resources.items() if key[1] == "backendServices"]
    assert {(s["protocol"], s["loadBalancingScheme"], s["timeoutSec"]) for s in services} == {
        ("HTTP", "EXTERNAL_MANAGED", 86400)
    }
    assert len(json.dumps(world.url_map()["description"])) < 1024


def test_grpc_goes_to_the_grpc_address(google: tuple[GceFake, str], world: GceWorld) -> None:
    secure = balancer(
        google[1], balancer_certificates=["projects/acme-prod-1/regions/us-central1/sslCertificates/wild"]
    )
    endpoint = secure.ensure(spec("svc_2", grpc=True))
    ip = world.addresses["cl_a"].partition(":")[0]
    backend = Backend(id="cl_a", version_id="sv_1", http=f"{ip}:8000", grpc=f"{ip}:9000", weight=10)
    secure.set_backends("svc_2", 1, [backend])
    grpc = {"content-type": "application/grpc+proto"}
    assert world.fake.traffic.request(endpoint.url, grpc) == f"{ip}:9000"
    assert world.fake.traffic.request(endpoint.url, {}) == f"{ip}:8000"
    assert world.fake.traffic.request(endpoint.url, grpc | {BACKEND_HEADER: "cl_a"}) == f"{ip}:9000"
    assert world.fake.traffic.request(endpoint.url, {BACKEND_HEADER: "cl_a"}) == f"{ip}:8000"
    assert world.fake.traffic.request(endpoint.url, grpc | {BACKEND_HEADER: "cl_b"}) is None
    secure.remove("svc_2")


def test_a_backend_whose_machine_is_gone_takes_nothing(world: GceWorld) -> None:
    gone = Backend(id="cl_a", version_id="sv_1", http="10.99.0.1:8000", weight=100)
    world.balancer.set_backends(SERVICE, 1, [gone, world.backend("cl_b", "sv_1", 100)])
    assert shares(world, 4) == {"cl_b": 4}
    assert world.request({BACKEND_HEADER: "cl_a"}) == (503, None)
    assert [c.up for c in world.balancer.counters(SERVICE)] == [False, True]


def test_two_at_once_the_greater_revision_stays(world: GceWorld) -> None:
    names = ("cl_a", "cl_b", "cl_c")

    def change(revision: int) -> None:
        try:
            world.balancer.set_backends(SERVICE, revision, [world.backend(names[revision % 3])])
        except CloudError:
            pass  # an older one, or one that was overtaken too often: its activity asks again

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(1, 9)))
    change(9)
    assert world.request() == (200, names[0])
    assert json.loads(world.url_map()["description"])["revision"] == 9


@pytest.mark.parametrize("step", range(0, 12, 2))
def test_a_call_that_broke_off_is_made_good(world: GceWorld, step: int) -> None:
    """Its calls fail from the given one on; the next one does the rest."""
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    wanted = [world.backend("cl_b", "sv_2", 60), world.backend("cl_c", "sv_1", 40)]
    world.fake.faults.append(_After(step))
    with pytest.raises(CloudError):
        world.balancer.set_backends(SERVICE, 2, wanted)
    world.fake.heal()
    world.balancer.set_backends(SERVICE, 2, wanted)
    assert shares(world, 10) == {"cl_b": 6, "cl_c": 4}
    world.fake.faults.append(_After(step))
    with pytest.raises(CloudError):
        world.balancer.remove(SERVICE)
    world.fake.heal()
    world.balancer.remove(SERVICE)
    assert world.parts() == []
    assert world.balancer.list_owned(OURS) == []


def test_a_half_removed_endpoint_is_found(world: GceWorld) -> None:
    for collection in ("forwardingRules", "targetHttpProxies", "urlMaps", "addresses"):
        world._drop(collection)
    assert world.balancer.describe(SERVICE) is None
    assert world.balancer.list_owned(OURS) == [SERVICE]
    world.balancer.remove(SERVICE)
    assert world.parts() == []


def test_a_missing_right_is_named(world: GceWorld) -> None:
    world.fake.fail("denied", "get", permission="compute.urlMaps.get", times=3)
    with pytest.raises(Denied, match=r"compute\.urlMaps\.get"):
        world.balancer.describe(SERVICE)


class _After:
    """A fault (``gce_state.Fault``) that lets so many calls pass."""

    kind, method, zone, error, permission = "503", "*", None, ("", 0, ""), ""

    def __init__(self, passes: int) -> None:
        self._left = passes

    @property
    def times(self) -> float:
        self._left -= 1
        return 1 if self._left < 0 else 0

    @times.setter
    def times(self, _value: float) -> None:
        pass
