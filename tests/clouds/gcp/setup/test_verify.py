"""``cloud verify`` of Google Cloud: nothing wrong is all OK, and each thing that is wrong is its own line."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from clouds.gcp.account import oidc
from clouds.gcp.account.oidc import Issuer
from clouds.gcp.account.session import Endpoints, Session, Sessions
from clouds.gcp.setup import rights
from clouds.gcp.setup.verify import checks
from heliostat.models.clouds import Check, CheckState
from heliostat.models.common import utcnow
from tests.clouds.gcp.support import ACCOUNT, PROVIDER, config, served
from tests.clouds.support import OURS
from tests.lab import gce_project
from tests.lab.gce import GceFake

API = "https://heliostat.acme.example"
NODES = "heliostat-node@acme-prod-1.iam.gserviceaccount.com"
long = pytest.mark.long


class World:
    """A project whose provider trusts us, with what the template makes."""

    def __init__(self, pem: bytes) -> None:
        self.fake = GceFake()
        self.fake.images |= {"debian-12-arm64"}
        gce_project.furnish(self.fake)
        self.issuer = Issuer(API, pem)
        auth = self.fake.auth
        auth.jwks, auth.issuer, auth.organization = self.issuer.jwks(), self.issuer.url, "org_1"
        auth.audience = f"//iam.googleapis.com/{PROVIDER}"
        auth.add_account(ACCOUNT)
        auth.add_account(NODES)
        self.url = served(self.fake)

    def session(self, issuer: Issuer | None = None, organization: str = "org_1", **fields: Any) -> Session:
        sessions = Sessions(issuer or self.issuer, OURS, Endpoints.fake(self.url))
        return sessions.get(config(**fields), organization)

    def lines(self, session: Session | None = None, api_url: str = API, **fields: Any) -> dict[str, Check]:
        given = {"node_service_account": NODES} | fields
        found = checks(session or self.session(**given), config(**given), installation_id=OURS, api_url=api_url)
        assert len({check.name for check in found}) == len(found), "one line for each thing"
        for check in found:
            assert check.detail or check.state is CheckState.OK, check
            assert check.remedy or check.state is not CheckState.FAILED, check
            assert "eyJ" not in check.model_dump_json(), "no token"
        return {check.name: check for check in found}

    def resource(self, collection: str, name: str) -> dict[str, Any]:
        return next(r for key, r in self.fake.resources.items() if key[1:] == (collection, name))

    def without(self, collection: str, name: str) -> None:
        del self.fake.resources[next(key for key in self.fake.resources if key[1:] == (collection, name))]


@pytest.fixture(scope="module")
def pem() -> bytes:
    return oidc.new_key()


@pytest.fixture
def world(pem: bytes) -> World:
    return World(pem)


def wrong(found: dict[str, Check]) -> set[str]:
    return {name for name, check in found.items() if check.state is not CheckState.OK}


def test_nothing_wrong(world: World) -> None:
    found = world.lines()
    assert not wrong(found)
    assert {f"right {permission}" for permission in rights.of_machines(config(node_service_account=NODES))} <= set(
        found
    )
    assert {"token exchange", "service account", "clock", "zone us-central1-b", "quota CPUS", "image"} <= set(found)
    assert world.fake.storage.objects == {}, "the probe is gone"
    assert not [key for key in world.fake.resources if key[1] == "instances"]


@pytest.mark.parametrize(
    ("change", "line", "words", "remedy"),
    [
        ({"audience": "//iam.googleapis.com/other"}, "token exchange", "invalid_target", "pool and its provider"),
        ({"organization": "org_other"}, "token exchange", "attribute condition", "condition"),
        ({"issuer": "https://somebody.else"}, "token exchange", "issuer", "public URL"),
        ({"jwks": {"keys": []}}, "token exchange", "kid", "keys"),
        ({"accounts": {}}, "service account", "getAccessToken", "workloadIdentityUser"),
    ],
)
def test_who_is_not_trusted_is_told_why(
    world: World, change: dict[str, Any], line: str, words: str, remedy: str
) -> None:
    for name, value in change.items():
        setattr(world.fake.auth, name, value)
    found = world.lines()
    assert found[line].state is CheckState.FAILED
    assert words in found[line].detail
    assert remedy in found[line].remedy
    if line == "service account":
        assert found["token exchange"].state is CheckState.OK
    for behind in ("permissions", "bucket", "image"):
        assert found[behind].state is CheckState.SKIPPED


@long
def test_a_trust_that_ended_meanwhile_is_told_though_a_token_is_still_good(world: World) -> None:
    session = world.session()
    assert world.lines(session)["token exchange"].state is CheckState.OK
    world.fake.auth.organization = "org_2"
    assert world.lines(session)["token exchange"].state is CheckState.FAILED
    world.fake.auth.organization = "org_1"
    assert world.lines(session)["token exchange"].state is CheckState.OK


def test_clocks(world: World, pem: bytes) -> None:
    found = world.lines(world.session(Issuer(API, pem, clock=lambda: time.time() - 3600)))
    assert "stale" in found["token exchange"].detail
    assert "NTP" in found["token exchange"].remedy
    late = checks(
        world.session(),
        config(),
        installation_id=OURS,
        api_url=API,
        now=lambda: utcnow() + timedelta(seconds=90),
    )
    assert next(c for c in late if c.name == "clock").state is CheckState.WARNING


@pytest.mark.parametrize(
    "permission",
    ["compute.instances.create", "compute.regionUrlMaps.update", "compute.instances.setServiceAccount"],
)
def test_a_permission_that_is_missing_is_named(world: World, permission: str) -> None:
    world.fake.auth.lacking = {permission}
    found = world.lines()
    assert wrong(found) == {f"right {permission}"}
    assert found[f"right {permission}"].state is CheckState.FAILED
    assert f"--add-permissions={permission}" in found[f"right {permission}"].remedy


@long
def test_permissions_that_not_all_need(world: World) -> None:
    world.fake.auth.lacking = {*rights.of_balancers(), "compute.routers.list"}
    found = world.lines()
    assert wrong(found) == {"permissions of load balancers", "right compute.routers.list"}
    assert {found[name].state for name in wrong(found)} == {CheckState.SKIPPED}
    world.fake.auth.lacking = {"compute.instances.setServiceAccount"}
    assert not wrong(world.lines(node_service_account=None))
    world.fake.auth.lacking = {rights.ACT_AS}
    found = world.lines()
    assert wrong(found) == {f"right {rights.ACT_AS}"}
    assert "roles/iam.serviceAccountUser" in found[f"right {rights.ACT_AS}"].remedy
    del world.fake.auth.accounts[NODES]
    assert wrong(world.lines()) == {f"right {rights.ACT_AS}"}


@long
def test_what_may_not_be_looked_at_fails_nothing(world: World) -> None:
    world.fake.fail("denied", "get", times=99)
    world.fake.fail("denied", "list", times=99)
    found = world.lines()
    assert not [check for check in found.values() if check.state is CheckState.FAILED and check.name != "image"]
    assert found["firewall"].state is CheckState.SKIPPED
    assert "compute.firewalls.list" in found["firewall"].remedy


@long
def test_another_project_than_the_accounts(world: World) -> None:
    found = world.lines(project="acme-prod-2")
    assert found["permissions"].state is CheckState.FAILED
    assert "does not have permission" in found["permissions"].detail


def test_regions_and_zones(world: World) -> None:
    found = world.lines(region="us-cental1", zones=["us-cental1-a"])
    assert found["region"].state is CheckState.FAILED
    assert "us-cental1" in found["region"].detail
    found = world.lines(zones=["us-central1-a", "us-central1-q"])
    assert found["zone us-central1-q"].state is CheckState.FAILED
    assert "us-central1-c" in found["zone us-central1-q"].detail


@pytest.mark.parametrize(("offered", "state"), [({"us-central1-b"}, CheckState.WARNING), (set(), CheckState.FAILED)])
def test_a_type_that_a_zone_does_not_offer(world: World, offered: set[str], state: CheckState) -> None:
    world.fake.machine_types = lambda zone, _name: zone in offered
    found = world.lines()["machine type e2-standard-4"]
    assert found.state is state
    assert "us-central1-a" in found.detail


@long
def test_types_and_images(world: World) -> None:
    found = world.lines(instance_type="e2-standard-4", instance_types=["n2-standard-4"])
    assert "none of the cloud's instance types" in found["machine type e2-standard-4"].detail
    found = world.lines(image="projects/debian-cloud/global/images/family/debian-99")
    assert "no image" in found["image"].detail
    found = world.lines(image="projects/debian-cloud/global/images/debian-12-arm64")
    assert "arm64" in found["image"].detail
    assert "not a valid image path" in world.lines(image="debian-12")["image"].detail
    found = world.lines(gpu_image="projects/acme-prod-1/global/images/no-such")
    assert wrong(found) == {"image of GPU machines"}
    assert found["image of GPU machines"].state is CheckState.WARNING


@long
def test_quotas(world: World) -> None:
    world.fake.quotas |= {"CPUS": (24.0, 22.0)}
    found = world.lines()
    assert wrong(found) == {"quota CPUS"}
    assert "22 of 24" in found["quota CPUS"].detail
    world.fake.quotas = {"CPUS": (24.0, 8.0)}
    assert "room for 4" in world.lines()["quota CPUS"].detail


def test_a_subnetwork_without_a_way_out(world: World) -> None:
    world.without("routers", "router")
    found = world.lines()
    assert wrong(found) == {"way out"}
    assert "no route to the control plane" in found["way out"].detail
    private = world.lines(api_url="https://10.1.2.3")
    assert private["way out"].state is CheckState.WARNING
    assert world.lines(external_ip=True)["way out"].state is CheckState.OK


@long
def test_subnetworks(world: World) -> None:
    assert "none of that name" in world.lines(subnetwork="other")["subnetwork other"].detail
    elsewhere = "projects/acme-prod-1/regions/europe-west4/subnetworks/default"
    assert "europe-west4" in world.lines(subnetwork=elsewhere)[f"subnetwork {elsewhere}"].detail
    assert "not of other" in world.lines(network="other")["subnetwork default"].detail
    world.resource("subnetworks", "default")["privateIpGoogleAccess"] = False
    assert wrong(world.lines()) == {"Private Google Access"}
    router = world.resource("routers", "router")
    one = {"sourceSubnetworkIpRangesToNat": "LIST_OF_SUBNETWORKS", "subnetworks": [{"name": "x/subnetworks/another"}]}
    router["nats"] = [{"name": "nat", **one}]
    assert world.lines()["way out"].state is CheckState.FAILED
    one["subnetworks"] = [{"name": "x/subnetworks/default"}]
    router["nats"] = [{"name": "nat", **one}]
    assert world.lines()["way out"].state is CheckState.OK


@long
def test_firewalls(world: World) -> None:
    internal = world.resource("firewalls", "internal")
    internal["targetTags"] = ["another"]
    found = world.lines()
    assert wrong(found) == {"machines among themselves"}
    assert "10.128.0.0/20" in found["machines among themselves"].remedy
    assert not wrong(world.lines(network_tags=["another"]))
    internal |= {"targetTags": [], "allowed": [{"IPProtocol": "tcp", "ports": ["1-1000", "1002-65535"]}]}
    assert wrong(world.lines()) == {"machines among themselves"}
    internal |= {"allowed": [{"IPProtocol": "all"}], "sourceRanges": [], "sourceTags": ["ours"]}
    assert not wrong(world.lines(network_tags=["ours"]))
    internal |= {"sourceRanges": ["0.0.0.0/0"]}
    assert wrong(world.lines()) == {"machines from outside"}
    internal |= {"sourceRanges": ["10.0.0.0/8"]}
    world.resource("firewalls", "serve")["sourceRanges"] = ["35.191.0.0/16", "130.211.0.0/22"]
    world.resource("firewalls", "internal")["sourceRanges"] = ["10.128.0.0/20"]
    found = world.lines()
    assert wrong(found) == {"load balancers to machines"}
    assert "10.129.0.0/23" in found["load balancers to machines"].detail
    world.without("subnetworks", "proxies")
    assert wrong(world.lines()) == {"proxy-only subnetwork"}


@pytest.mark.parametrize(
    ("spoil", "line", "state", "words"),
    [
        (lambda s: setattr(s, "bucket", "another"), "bucket", CheckState.FAILED, "no bucket"),
        (lambda s: setattr(s, "project_number", "999"), "bucket", CheckState.WARNING, "of project 999"),
        (lambda s: setattr(s, "location", "EUROPE-WEST4"), "bucket", CheckState.WARNING, "europe-west4"),
        (lambda s: setattr(s, "location", "US"), "bucket", CheckState.OK, "in us"),
    ],
)
def test_buckets(world: World, spoil: Callable[[Any], None], line: str, state: CheckState, words: str) -> None:
    spoil(world.fake.storage)
    found = world.lines()
    assert found[line].state is state
    assert words in found[line].detail
    assert found["bucket write"].state is (CheckState.SKIPPED if state is CheckState.FAILED else CheckState.OK)


@long
def test_a_bucket_that_may_not_be_written(world: World) -> None:
    world.fake.storage.faults = [403, 403]
    found = world.lines()
    assert found["bucket"].state is CheckState.SKIPPED
    assert found["bucket write"].state is CheckState.FAILED
    assert found["bucket delete"].state is CheckState.SKIPPED


@long
def test_certificates(world: World) -> None:
    other = "projects/acme-prod-1/regions/europe-west4/sslCertificates/c"
    ours = "projects/acme-prod-1/regions/us-central1/sslCertificates/c"
    assert "region us-central1" in world.lines(balancer_certificates=[other])["certificate c"].detail
    assert "none of that name" in world.lines(balancer_certificates=[ours])["certificate c"].detail
    key = ("regions/us-central1", "sslCertificates", "c")
    world.fake.resources[key] = {"name": "c", "managed": {"status": "PROVISIONING"}}
    assert "PROVISIONING" in world.lines(balancer_certificates=[ours])["certificate c"].detail
    world.fake.resources[key] = {"name": "c", "managed": {"status": "ACTIVE"}, "expireTime": "2027-01-01T00:00:00Z"}
    assert not wrong(world.lines(balancer_certificates=[ours]))
