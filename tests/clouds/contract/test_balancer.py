"""The contract of ``clouds.contract.balancer.LoadBalancer``, on every implementation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clouds.contract.errors import BackendsLost, BadConfig, Gone, Outdated
from heliostat.models.services import BACKEND_HEADER
from tests.clouds.balancer_support import SERVICE, FakeWorld, Process, World, local_world, processes, spec
from tests.clouds.support import OURS, eventually


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, Process]]:
    with processes("cl_a", "cl_b", "cl_c") as started:
        yield {one.name: one for one in started}


@pytest.fixture(params=["fake", "local"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Its endpoint is there, without backends."""
    if request.param == "fake":
        fake = FakeWorld()
        fake.balancer.ensure(spec())
        yield fake
        return
    with local_world(tmp_path, request.getfixturevalue("backends")) as local:
        local.balancer.ensure(spec())
        yield local


def shares(world: World, count: int) -> Counter[str | None]:
    return Counter(world.request()[1] for _ in range(count))


def test_an_endpoint_keeps_its_url(world: World) -> None:
    first = world.balancer.ensure(spec())
    assert first.service_id == SERVICE
    assert first.url.startswith("http://")
    assert not first.url.endswith("/")
    assert world.balancer.ensure(spec(grpc=True)).url == first.url
    assert eventually(lambda: world.balancer.describe(SERVICE) == first)  # it may be late to answer
    assert first.state == "ready"
    other = world.balancer.ensure(spec("svc_2"))
    assert other.url != first.url
    assert world.balancer.describe("svc_3") is None


def test_many_ensures_at_once(world: World) -> None:
    with ThreadPoolExecutor(8) as pool:
        endpoints = list(pool.map(lambda _: world.balancer.ensure(spec("svc_2")), range(8)))
    assert len({e.url for e in endpoints}) == 1
    assert world.balancer.list_owned(OURS) == [SERVICE, "svc_2"]


def test_without_backends_it_answers_503(world: World) -> None:
    assert world.request() == (503, None)
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    assert world.request() == (200, "cl_a")
    world.balancer.set_backends(SERVICE, 2, [])
    assert world.request() == (503, None)
    world.balancer.set_backends(SERVICE, 3, [world.backend("cl_a", weight=0)])
    assert world.request() == (503, None)


def test_traffic_goes_by_weight(world: World) -> None:
    world.balancer.set_backends(
        SERVICE,
        1,
        [world.backend("cl_a", "sv_1", 75), world.backend("cl_b", "sv_2", 25), world.backend("cl_c", "sv_3", 0)],
    )
    assert shares(world, 200) == {"cl_a": 150, "cl_b": 50}


def test_a_versions_clusters_share_its_weight(world: World) -> None:
    backends = [world.backend("cl_a", "sv_1", 60), world.backend("cl_b", "sv_1", 60), world.backend("cl_c", "sv_2", 40)]
    world.balancer.set_backends(SERVICE, 1, backends)
    assert shares(world, 100) == {"cl_a": 30, "cl_b": 30, "cl_c": 40}


def test_a_cluster_of_a_version_may_have_no_traffic_yet(world: World) -> None:
    backends = [world.backend("cl_a", "sv_1", 60), world.backend("cl_b", "sv_1", 0), world.backend("cl_c", "sv_2", 40)]
    world.balancer.set_backends(SERVICE, 1, backends)
    assert shares(world, 100) == {"cl_a": 60, "cl_c": 40}
    assert world.request({BACKEND_HEADER: "cl_b"}) == (200, "cl_b")


def test_a_request_may_name_its_backend(world: World) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a"), world.backend("cl_b", "sv_2", 0)])
    assert [world.request({BACKEND_HEADER: "cl_b"}) for _ in range(5)] == [(200, "cl_b")] * 5
    assert world.request({BACKEND_HEADER: "cl_a"}) == (200, "cl_a")
    for unknown in ("cl_c", "", "cl_", "cl_bb"):
        assert world.request({BACKEND_HEADER: unknown}) == (503, None)


def test_requests_go_by_the_new_weights_as_soon_as_the_call_returns(world: World) -> None:
    for revision in range(1, 21):
        name = "cl_a" if revision % 2 else "cl_b"
        other = "cl_b" if revision % 2 else "cl_a"
        world.balancer.set_backends(SERVICE, revision, [world.backend(name, "sv_1"), world.backend(other, "sv_2", 0)])
        assert shares(world, 4) == {name: 4}


def test_an_old_revision_changes_nothing_and_is_told(world: World) -> None:
    def refused(revision: int) -> None:
        with pytest.raises(Outdated, match="of revision 5") as caught:
            world.balancer.set_backends(SERVICE, revision, [world.backend("cl_b")])
        assert caught.value.details == {"revision": 5}
        assert caught.value.resource == SERVICE
        assert world.request() == (200, "cl_a")

    world.balancer.set_backends(SERVICE, 5, [world.backend("cl_a")])
    refused(4)
    refused(0)
    refused(5)
    world.balancer.set_backends(SERVICE, 5, [world.backend("cl_a")])  # the answer was lost
    assert world.request() == (200, "cl_a")
    world.balancer.ensure(spec())
    refused(5)
    world.balancer.set_backends(SERVICE, 6, [world.backend("cl_b")])
    assert world.request() == (200, "cl_b")


def test_backends_get_what_clients_send_and_nothing_else(world: World) -> None:
    """Health checks and our own questions to the load balancer do not count as requests."""
    for revision in range(1, 11):
        world.balancer.set_backends(SERVICE, revision, [world.backend("cl_a", weight=revision)])
        world.request()
        world.balancer.ensure(spec())
    assert [c.requests for c in world.balancer.counters(SERVICE)] == [{"200": 10}]


def test_counters_are_by_cluster_and_code(world: World) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a"), world.backend("cl_b", "sv_2", 0)])
    for _ in range(7):
        world.request()
    for _ in range(3):
        world.request(status=500)
    world.request({BACKEND_HEADER: "cl_b"}, status=404)
    world.request({BACKEND_HEADER: "cl_z"})
    a, b = world.balancer.counters(SERVICE)
    assert (a.backend_id, a.version_id, a.up, a.requests) == ("cl_a", "sv_1", True, {"200": 7, "500": 3})
    assert (b.backend_id, b.version_id, b.up, b.requests) == ("cl_b", "sv_2", True, {"404": 1})
    # Updated in place, the cluster counts for its new version; what is unchanged counts on.
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_a"), world.backend("cl_b", "sv_3", 0)])
    world.request()
    world.request({BACKEND_HEADER: "cl_b"})
    a, b = world.balancer.counters(SERVICE)
    assert a.requests == {"200": 8, "500": 3}
    assert (b.version_id, b.requests) == ("sv_3", {"200": 1})


def test_an_unhealthy_backend_gets_no_traffic(world: World) -> None:
    backends = [world.backend("cl_a", "sv_1", 50), world.backend("cl_b", "sv_1", 50), world.backend("cl_c", "sv_2", 50)]
    world.balancer.set_backends(SERVICE, 1, backends)
    world.set_up("cl_a", False)
    assert shares(world, 20) == {"cl_b": 10, "cl_c": 10}
    world.set_up("cl_b", False)
    assert shares(world, 20) == {"cl_c": 20}
    assert world.request({BACKEND_HEADER: "cl_a"}) == (503, None)
    world.set_up("cl_c", False)
    assert world.request() == (503, None)
    world.set_up("cl_a", True)
    assert shares(world, 20) == {"cl_a": 20}


def state(world: World) -> str:
    found = world.balancer.describe(SERVICE)
    assert found is not None
    return found.state


def test_one_that_broke_down_says_so_and_is_mended(world: World) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    before = world.balancer.describe(SERVICE)
    world.break_down()
    assert state(world) != "ready"
    assert world.balancer.ensure(spec(), make=False) == before
    assert eventually(lambda: world.balancer.describe(SERVICE) == before)
    assert world.request() == (200, "cl_a")


def test_one_that_lost_its_backends_goes_on_and_is_told_them_anew(world: World) -> None:
    world.balancer.set_backends(SERVICE, 7, [world.backend("cl_a")])
    world.lose_backends()
    assert state(world) != "ready"
    with pytest.raises(BackendsLost):
        world.balancer.ensure(spec())
    assert world.request() == (200, "cl_a"), "it has not taken them for none"
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_b")])
    assert eventually(lambda: state(world) == "ready")
    assert world.request() == (200, "cl_b")


def test_mending_makes_none(world: World) -> None:
    world.balancer.remove(SERVICE)
    with pytest.raises(Gone):
        world.balancer.ensure(spec(), make=False)
    assert world.balancer.describe(SERVICE) is None
    assert world.balancer.list_owned(OURS) == []


def test_what_is_not_there_is_gone(world: World) -> None:
    for service_id in ("svc_none", SERVICE):
        world.balancer.remove(service_id)
        world.balancer.remove(service_id)
        with pytest.raises(Gone):
            world.balancer.set_backends(service_id, 1, [])
        with pytest.raises(Gone):
            world.balancer.counters(service_id)
        assert world.balancer.describe(service_id) is None
    assert world.balancer.list_owned(OURS) == []


def test_a_removed_endpoint_may_be_made_anew(world: World) -> None:
    world.balancer.set_backends(SERVICE, 7, [world.backend("cl_a")])
    world.balancer.remove(SERVICE)
    world.balancer.ensure(spec())
    assert world.request() == (503, None)
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_b")])
    assert world.request() == (200, "cl_b")


def test_list_owned_is_ours_only(world: World) -> None:
    world.balancer.ensure(spec("svc_2", installation_id="another"))
    assert world.balancer.list_owned(OURS) == [SERVICE]
    assert world.balancer.list_owned("another") == ["svc_2"]
    assert world.balancer.list_owned("nobody") == []
    with pytest.raises(BadConfig, match="another installation"):
        world.balancer.ensure(spec("svc_2"))
