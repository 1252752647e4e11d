"""The contract of ``clouds.contract.balancer.LoadBalancer`` (``tests/clouds/contract/test_balancer.py``) on
ALBs in moto, and where
ALB's load balancing differs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from clouds.aws.balancer import groups as balancer_groups
from clouds.aws.balancer.alb import AwsBalancer
from clouds.aws.balancer.plan import prefix
from clouds.aws.balancer.stamp import APPLIED_TAG, CHANGE_S, WANTED_TAG
from clouds.contract.balancer import Backend
from clouds.contract.errors import BackendsLost, BadConfig, Denied, Outdated
from heliostat.errors import CloudError
from heliostat.models.services import BACKEND_HEADER
from tests.clouds.aws.alb import Alb
from tests.clouds.aws.moto_plus import KNOBS, Fault, elbv2_backends
from tests.clouds.aws.support import REGION, Account
from tests.clouds.balancer_support import SERVICE, World, spec
from tests.clouds.contract.test_balancer import *  # noqa: F403 # the suite, with the world below
from tests.clouds.contract.test_balancer import shares
from tests.clouds.support import OURS

pytestmark = pytest.mark.long  # some thousand calls

ADDRESSES = {"cl_a": "10.0.0.11:8000", "cl_b": "10.0.0.12:8000", "cl_c": "10.0.0.13:8000"}


@dataclass
class AwsWorld:
    account: Account
    balancer: AwsBalancer
    alb: Alb = field(init=False)
    slept: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.alb = Alb(self.account.id, REGION)

    def backend(self, name: str, version: str = "sv_1", weight: int = 100) -> Backend:
        return Backend(id=name, version_id=version, http=ADDRESSES[name], weight=weight)

    def request(self, headers: Mapping[str, str] | None = None, *, status: int = 200) -> tuple[int, str | None]:
        name = next(b.dns_name for b in self.elb.load_balancers.values() if b.name == prefix(SERVICE))
        reached = self.alb.request(f"http://{name}", headers or {})
        names = {address: name for name, address in ADDRESSES.items()}
        return (503, None) if reached is None else (status, names[f"{reached[0]}:{reached[1]}"])

    def set_up(self, name: str, up: bool) -> None:
        (KNOBS.unhealthy.discard if up else KNOBS.unhealthy.add)(ADDRESSES[name])

    def break_down(self) -> None:
        self.of_service.listeners.clear()

    def lose_backends(self) -> None:
        self.elb.tagging_service.untag_resource_using_names(self.of_service.arn, [WANTED_TAG])

    @property
    def elb(self) -> Any:
        return elbv2_backends[self.account.id][REGION]

    @property
    def of_service(self) -> Any:
        return next(b for b in self.elb.load_balancers.values() if b.name == prefix(SERVICE))

    @property
    def groups(self) -> list[str]:
        return sorted(g.name for g in self.elb.target_groups.values())

    def another(self, **options: Any) -> AwsBalancer:
        """The same as another process has it."""
        return AwsBalancer(self.account.config, self.account.shared, look_s=0, **options)


@pytest.fixture
def world(aws_account: Account) -> Iterator[AwsWorld]:
    """Its endpoint is there, without backends."""
    found = AwsWorld(aws_account, AwsBalancer(aws_account.config, aws_account.shared, look_s=0))
    found.balancer.ensure(spec())
    yield found
    KNOBS.unhealthy.clear()


# -- where ALB differs from the suite


def test_backends_get_what_clients_send_and_nothing_else() -> None:
    """ALB does not tell us what it counts; that only health checks are ours is plain: nothing here sends a request."""


def test_counters_are_by_cluster_and_code(world: AwsWorld) -> None:
    """ALB tells health alone."""
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a"), world.backend("cl_b", "sv_2", 0)])
    world.set_up("cl_b", False)
    a, b = world.balancer.counters(SERVICE)
    assert (a.backend_id, a.version_id, a.up, a.requests) == ("cl_a", "sv_1", True, {})
    assert (b.backend_id, b.version_id, b.up, b.requests) == ("cl_b", "sv_2", False, {})
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_a"), world.backend("cl_b", "sv_3", 0)])
    assert [c.version_id for c in world.balancer.counters(SERVICE)] == ["sv_1", "sv_3"]


def test_an_unhealthy_backend_gets_no_traffic(world: AwsWorld) -> None:
    """While another cluster of its version is healthy; a version whose clusters all fail keeps its share."""
    backends = [world.backend("cl_a", "sv_1", 50), world.backend("cl_b", "sv_1", 50), world.backend("cl_c", "sv_2", 50)]
    world.balancer.set_backends(SERVICE, 1, backends)
    world.set_up("cl_a", False)
    assert shares(world, 20) == {"cl_b": 10, "cl_c": 10}
    world.set_up("cl_b", False)
    assert shares(world, 20)["cl_c"] == 10, "ALB does not give a version's share to another"
    world.set_up("cl_a", True)
    assert shares(world, 20) == {"cl_a": 10, "cl_c": 10}


def test_requests_go_by_the_new_weights_as_soon_as_the_call_returns(world: AwsWorld) -> None:
    """Fewer times than in the suite: each is some 20 calls."""
    for revision, name in enumerate(("cl_a", "cl_b", "cl_a"), 1):
        other = "cl_b" if name == "cl_a" else "cl_a"
        world.balancer.set_backends(SERVICE, revision, [world.backend(name, "sv_1"), world.backend(other, "sv_2", 0)])
        assert shares(world, 4) == {name: 4}


# -- beyond it


def test_a_renewed_certificate_is_taken_over(world: AwsWorld) -> None:
    acm = world.account.client("acm")
    arns = [acm.request_certificate(DomainName=f"{n}.acme.example")["CertificateArn"] for n in ("a", "b")]
    old, new = (
        AwsBalancer(
            world.account.config.model_copy(update={"balancer_certificate": arn}), world.account.shared, look_s=0
        )
        for arn in arns
    )
    first = old.ensure(spec("svc_2"))
    assert first.url.startswith("https://")
    seen = new.describe("svc_2")
    assert seen is not None
    assert "certificate differs" in seen.state, "whoever looks after it corrects it"
    assert new.ensure(spec("svc_2"), make=False) == first == new.describe("svc_2")
    elb = world.account.client("elbv2")
    (found,) = elb.describe_load_balancers(Names=[prefix("svc_2")])["LoadBalancers"]
    (listener,) = elb.describe_listeners(LoadBalancerArn=found["LoadBalancerArn"])["Listeners"]
    assert [c["CertificateArn"] for c in listener["Certificates"]] == arns[1:]
    new.remove("svc_2")


def test_the_shape_of_an_alb(world: AwsWorld) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    elb, config = world.account.client("elbv2"), world.account.config
    (found,) = elb.describe_load_balancers()["LoadBalancers"]
    assert (found["Scheme"], found["Type"], found["SecurityGroups"]) == (
        "internet-facing",
        "application",
        config.balancer_security_groups,
    )
    attributes = elb.describe_load_balancer_attributes(LoadBalancerArn=found["LoadBalancerArn"])["Attributes"]
    assert {"Key": "idle_timeout.timeout_seconds", "Value": "4000"} in attributes
    groups = elb.describe_target_groups()["TargetGroups"]
    assert len(groups) == 2
    for group in groups:
        assert (group["TargetType"], group["HealthCheckPath"], group["Matcher"]) == (
            "ip",
            "/-/healthz",
            {"HttpCode": "200"},
        )
        said = elb.describe_target_group_attributes(TargetGroupArn=group["TargetGroupArn"])["Attributes"]
        assert {"Key": "deregistration_delay.timeout_seconds", "Value": "3599"} in said
        assert {"Key": "stickiness.enabled", "Value": "false"} in said
    for arn in [found["LoadBalancerArn"], *(g["TargetGroupArn"] for g in groups)]:
        tags = {t["Key"]: t["Value"] for t in elb.describe_tags(ResourceArns=[arn])["TagDescriptions"][0]["Tags"]}
        assert (tags["heliostat-installation"], tags["heliostat-service"]) == (OURS, SERVICE)
    internal = AwsBalancer(config.model_copy(update={"balancer_internal": True}), world.account.shared)
    internal.ensure(spec("svc_2"))
    assert {b["Scheme"] for b in elb.describe_load_balancers()["LoadBalancers"]} == {"internal", "internet-facing"}


def test_grpc_goes_to_the_grpc_addresses(world: AwsWorld) -> None:
    with pytest.raises(BadConfig, match="TLS"):
        world.balancer.ensure(spec(grpc=True))
    backend = world.backend("cl_a").model_copy(update={"grpc": "10.0.0.12:8000"})  # in this world the address of cl_b
    world.balancer.set_backends(SERVICE, 1, [backend, world.backend("cl_c", "sv_2", 0)])
    grpc = {"content-type": "application/grpc+proto"}
    assert world.request() == (200, "cl_a")
    assert world.request(grpc) == (200, "cl_b")
    assert world.request(grpc | {BACKEND_HEADER: "cl_a"}) == (200, "cl_b")
    assert world.request(grpc | {BACKEND_HEADER: "cl_x"}) == (503, None)
    versions = Counter(g.protocol_version for g in world.elb.target_groups.values())
    assert versions == {"HTTP1": 4, "GRPC": 2}
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_a")])
    assert world.request(grpc) == (200, "cl_a")


def test_an_endpoint_keeps_its_url(world: AwsWorld) -> None:
    first = world.balancer.ensure(spec())
    assert first.url.startswith("http://")
    assert world.another().ensure(spec()) == first == world.balancer.describe(SERVICE)
    assert first.state == "ready"
    assert world.balancer.ensure(spec("svc_2")).url != first.url
    assert world.balancer.describe("svc_3") is None


def test_a_version_that_gets_its_first_traffic_is_healthy_before(world: AwsWorld) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        assert shares(world, 4) == {"cl_a": 4}, "weights have not moved yet"
        if len(waits) == 3:
            world.set_up("cl_b", True)

    now = iter(range(10_000))
    balancer = world.another(sleep=sleep, clock=lambda: float(next(now)) / 10)
    balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    world.set_up("cl_b", False)
    balancer.set_backends(SERVICE, 2, [world.backend("cl_b", "sv_2")])
    assert len(waits) == 3
    assert shares(world, 4) == {"cl_b": 4}
    world.set_up("cl_c", False)  # and for ever: whoever asks for it has asked it himself
    world.another(sleep=waits.append, clock=lambda: float(next(now)) * 10).set_backends(
        SERVICE, 3, [world.backend("cl_c", "sv_3")]
    )
    assert shares(world, 4) == {"cl_c": 4}


def test_a_backend_that_leaves_finishes_its_requests(world: AwsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its groups stay for an hour; a cluster of a version that stays is taken out of the version's group."""
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a"), world.backend("cl_b")])
    all_of_them = world.groups
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_a")])
    assert world.groups == all_of_them
    assert shares(world, 4) == {"cl_a": 4}
    assert world.request({BACKEND_HEADER: "cl_b"}) == (503, None)
    assert [c.backend_id for c in world.balancer.counters(SERVICE)] == ["cl_a"]
    monkeypatch.setattr(balancer_groups, "KEEP_LEFT_S", -1)
    world.balancer.ensure(spec())
    assert len(world.groups) == 2
    world.balancer.set_backends(SERVICE, 3, [world.backend("cl_b")])  # back again
    assert shares(world, 4) == {"cl_b": 4}


def test_a_change_that_was_cut_short(world: AwsWorld) -> None:
    """At each call in turn: nothing of the old traffic is lost, and the repeat does it."""
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    revision = 1
    for action in (
        "CreateTargetGroup",
        "ModifyTargetGroupAttributes",
        "RegisterTargets",
        "CreateRule",
        "ModifyListener",
    ):
        revision += 1
        version = f"sv_{revision}"
        wanted = [world.backend("cl_a"), world.backend("cl_b", version, 100)]
        KNOBS.faults.append(Fault(action, "InternalFailure", 500))
        with pytest.raises(CloudError):
            world.balancer.set_backends(SERVICE, revision, wanted)
        assert world.request()[0] == 200
        endpoint = world.balancer.describe(SERVICE)
        assert endpoint is not None
        assert "not finished" in endpoint.state
        assert world.another().ensure(spec()) == endpoint, "another process may be at it still"
        with pytest.raises(BackendsLost, match="not finished"):
            world.another(now=lambda: time.time() + CHANGE_S).ensure(spec())
        world.another().set_backends(SERVICE, revision, wanted)
        assert shares(world, 4) == {"cl_a": 2, "cl_b": 2}
        revision += 1
        world.balancer.set_backends(SERVICE, revision, [world.backend("cl_a")])


def test_a_lost_answer_of_any_call_is_met_by_the_repeat(world: AwsWorld) -> None:
    for number, action in enumerate(("CreateLoadBalancer", "CreateListener")):
        service = f"svc_lost_{number}"
        KNOBS.faults.append(Fault(action, lost=True))
        with pytest.raises(CloudError):
            world.balancer.ensure(spec(service))
        assert world.balancer.ensure(spec(service)).state == "ready"
    for revision, action in enumerate(("CreateTargetGroup", "CreateRule", "AddTags", "ModifyListener"), 1):
        KNOBS.faults.append(Fault(action, lost=True))
        wanted = [world.backend("cl_a", f"sv_{revision}"), world.backend("cl_b", f"sv_{revision}")]
        with pytest.raises(CloudError):
            world.balancer.set_backends(SERVICE, revision, wanted if revision > 1 else wanted[:1])
        world.balancer.set_backends(SERVICE, revision, wanted if revision > 1 else wanted[:1])
    assert shares(world, 4) == {"cl_a": 2, "cl_b": 2}
    names = [b.name for b in world.elb.load_balancers.values()]
    assert len(names) == len(set(names)) == 3


def test_a_newer_change_by_another_process_wins(world: AwsWorld) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    arn = world.of_service.arn

    def newer(_: float) -> None:
        world.set_up("cl_b", True)
        world.elb.add_tags([arn], [{"Key": WANTED_TAG, "Value": f"9:{'a' * 32}:0"}])

    world.set_up("cl_b", False)
    with pytest.raises(Outdated, match="of revision 9"):
        world.another(sleep=newer).set_backends(SERVICE, 2, [world.backend("cl_b", "sv_2")])
    assert shares(world, 4) == {"cl_a": 4}


def test_what_is_garbled_is_lost(world: AwsWorld) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a"), world.backend("cl_b", "sv_2", 0)])
    arn = world.of_service.arn
    for key, value in ((WANTED_TAG, "not ours"), (APPLIED_TAG, "0:abc")):
        world.elb.add_tags([arn], [{"Key": key, "Value": value}])
        with pytest.raises(BackendsLost):
            world.another(now=lambda: time.time() + CHANGE_S).ensure(spec())
        world.balancer.set_backends(SERVICE, 2, [world.backend("cl_a")])
        assert world.balancer.ensure(spec()).state == "ready"
    for group in list(world.elb.target_groups.values()):
        world.elb.tagging_service.untag_resource_using_names(group.arn, ["heliostat-backend"])
    with pytest.raises(BackendsLost, match="target groups"):
        world.balancer.ensure(spec())
    assert world.request() == (200, "cl_a")


def test_nothing_is_left(world: AwsWorld) -> None:
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a"), world.backend("cl_b", "sv_2", 0)])
    KNOBS.faults.append(Fault("DeleteTargetGroup", "InternalFailure", 500))
    with pytest.raises(CloudError):
        world.balancer.remove(SERVICE)
    assert world.balancer.describe(SERVICE) is None
    assert world.balancer.list_owned(OURS) == [SERVICE], "the sweep finds what was left"
    KNOBS.faults.append(Fault("DeleteTargetGroup", "ResourceInUse", times=2))
    slept: list[float] = []
    world.another(sleep=slept.append).remove(SERVICE)
    assert len(slept) == 2
    assert world.groups == []
    assert world.balancer.list_owned(OURS) == []


def test_what_no_alb_can_have(world: AwsWorld) -> None:
    ten = [Backend(id=f"cl_{i}", version_id=f"sv_{i}", http=f"10.0.0.{i}:80", weight=1) for i in range(1, 11)]
    for backends, words in (
        (ten, "supports 5 at most"),
        ([world.backend("cl_a", weight=1000)], "takes 999"),
        ([world.backend("cl_a"), world.backend("cl_a")], "is there twice"),
        ([world.backend("cl_a"), world.backend("cl_b", weight=5)], "has weight 5"),
        ([Backend(id="cl*", version_id="sv_1", http="10.0.0.1:80", weight=1)], "has an invalid id"),
        ([Backend(id="cl_a", version_id="sv_1", http="host:80", weight=1)], "IPv4:port"),
    ):
        with pytest.raises(BadConfig, match=words):
            world.balancer.set_backends(SERVICE, 1, backends)
    world.balancer.set_backends(SERVICE, 1, [b.model_copy(update={"weight": 0}) for b in ten])
    assert world.request() == (503, None)
    without = world.account.config.model_copy(update={"balancer_subnets": []})
    with pytest.raises(BadConfig, match="balancer_subnets"):
        AwsBalancer(without, world.account.shared).ensure(spec())


def test_a_look_costs_nothing_for_a_while(world: AwsWorld) -> None:
    now = [0.0]
    balancer = AwsBalancer(world.account.config, world.account.shared, clock=lambda: now[0])
    balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    since = len(KNOBS.calls)
    first = balancer.describe(SERVICE), balancer.counters(SERVICE)
    asked = Counter(c["Action"] for c in KNOBS.calls[since:])
    assert asked.total() <= 11, asked
    for _ in range(10):
        assert (balancer.describe(SERVICE), balancer.counters(SERVICE)) == first
    assert len(KNOBS.calls) - since == asked.total()
    balancer.set_backends(SERVICE, 2, [world.backend("cl_a"), world.backend("cl_b")])
    assert len(balancer.counters(SERVICE)) == 2, "what is changed here is seen at once"
    now[0] += 31
    world.break_down()
    endpoint = balancer.describe(SERVICE)
    assert endpoint is not None
    assert "listener" in endpoint.state


def test_a_missing_right_is_named(world: AwsWorld) -> None:
    KNOBS.faults.append(Fault("CreateTargetGroup", "AccessDenied", 403, "no"))
    with pytest.raises(Denied, match="elasticloadbalancing:CreateTargetGroup") as caught:
        world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
    assert '"Action": "elasticloadbalancing:CreateTargetGroup"' in caught.value.remedy


def test_the_suites_world_is_ours(world: World) -> None:
    assert isinstance(world, AwsWorld)
