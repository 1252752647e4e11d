"""Load balancers of an AWS account: one ALB for each service."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from clouds.aws.account.session import AwsSession
from clouds.aws.balancer import plan as balancer_plan
from clouds.aws.balancer.groups import Groups
from clouds.aws.balancer.plan import SERVICE_TAG, prefix
from clouds.aws.balancer.rules import Rules
from clouds.aws.balancer.stamp import APPLIED_TAG, WANTED_TAG, Stamp, is_changing
from clouds.contract.balancer import Backend, BackendCounters, Endpoint, EndpointSpec
from clouds.contract.errors import BackendsLost, BadConfig, Gone, Outdated
from clouds.contract.machines import OWNER_TAG
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig

if TYPE_CHECKING:
    from types_boto3_elbv2.type_defs import LoadBalancerTypeDef

REMOVE_S = 30.0
"""ELB takes some seconds to let go of the groups of an ALB that was deleted."""
IDLE_TIMEOUT_S = "4000"
"""Between two bytes of an answer: the most that ALB grants."""


Seen = TypeVar("Seen")


class AwsBalancer:
    """ALBs (``clouds.contract.balancer.LoadBalancer``), with targets by IP address and weights in the listener.

    Where an ALB does less than the contract, since it cannot:

    - A request whose backend does not take it is *not* tried on another one: ALB answers 502. It notices a dead
      backend by its health check, within 10 s; until then that backend's share of the requests fails. Clients retry.
    - Health decides within a version only. When all clusters of a version fail their check, its share goes to them
      still ("fail open"), and not to the other versions; the same for a request that names an unhealthy backend.
    - ``counters`` reports health only: CloudWatch counts by version and class of status, some minutes late. The gates
      count for the canary.
    - Weights are of random choice over many requests, not of turns, and a change reaches all of ALB's own machines
      within a few seconds of the answer.
    - A renewed certificate is one of another ARN in the config; ACM renews its own under the same one.
    - gRPC needs ``balancer_certificate``. A new ALB takes some minutes until it answers: ``state`` says so meanwhile.

    Args:
        config: VPC, subnets, security groups and certificate of the load balancers.
        session: of the same account and region.
        look_s: for so long ``describe`` and ``counters`` give the same answer. They take some 3 and 5 + n calls for n
            backends, and the monitor asks every few seconds.
        healthy_s: how long a version that gets its first traffic may take to pass its health check, before traffic
            moves anyway; two checks, 5 s apart, suffice.
        clock, sleep: in seconds.
        now: Unix time.
    """

    def __init__(
        self,
        config: AwsConfig,
        session: AwsSession,
        *,
        look_s: float = 30.0,
        healthy_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._session, self._now = config, session, now
        self._groups = Groups(session, config, now)
        self._rules = Rules(session, self._groups, config, healthy_s=healthy_s, clock=clock, sleep=sleep)
        self._look_s, self._clock, self._sleep = look_s, clock, sleep
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        self._seen: dict[tuple[str, str], tuple[float, Any]] = {}

    # -- the contract

    def ensure(self, spec: EndpointSpec, *, make: bool = True) -> Endpoint:
        self._check(spec)
        with self._changing(spec.service_id):
            if self._find(spec.service_id) is None:
                if not make:
                    raise _gone(spec.service_id)
                self._make(spec)
            found = self._existing(spec.service_id)
            tags = self._tags(found)
            if tags.get(OWNER_TAG) != spec.installation_id:
                raise BadConfig(
                    f"The endpoint of {spec.service_id} belongs to another installation.", resource=spec.service_id
                )
            if not is_changing(tags, self._now()):
                stamp, backends = self._known(spec.service_id, tags)
                self._apply(found, tags, stamp, backends)
            return self._endpoint(spec.service_id, found, tags)

    def set_backends(self, service_id: str, revision: int, backends: list[Backend]) -> None:
        balancer_plan.check(backends)
        with self._changing(service_id):
            found = self._existing(service_id)
            tags = self._tags(found)
            new, last = Stamp.of(revision, backends, self._now()), Stamp.read(tags.get(WANTED_TAG))
            if last is not None and (revision < last.revision or (revision == last.revision and new != last)):
                raise Outdated.backends(service_id, revision, last.revision)
            arn = found["LoadBalancerArn"]
            self._groups.tag(arn, {WANTED_TAG: str(new)})
            self._apply(found, tags, new, backends)
            self._groups.tag(arn, {APPLIED_TAG: str(new)})

    def counters(self, service_id: str) -> list[BackendCounters]:
        return self._looked("counters", service_id, lambda: self._counters(service_id))

    def describe(self, service_id: str) -> Endpoint | None:
        return self._looked("describe", service_id, lambda: self._described(service_id))

    def remove(self, service_id: str) -> None:
        with self._changing(service_id):
            found = self._find(service_id)
            if found is not None:
                arn = found["LoadBalancerArn"]
                self._session.call("elbv2", "DeleteLoadBalancer", service_id, LoadBalancerArn=arn)
            deadline = self._clock() + REMOVE_S
            for name, arn in self._groups.arns(prefix(service_id)).items():
                self._remove_group(name, arn, deadline)

    def list_owned(self, installation_id: str) -> list[str]:
        balancers = self._session.pages("elbv2", "DescribeLoadBalancers", "LoadBalancers", PageSize=400)
        arns = [b["LoadBalancerArn"] for b in balancers if b["LoadBalancerName"].startswith("hs-")]
        # Groups too: those of a removal that was cut short are all that is left of a service.
        arns += self._groups.arns("hs-").values()
        tagged = self._groups.tags(arns).values()
        return sorted({t[SERVICE_TAG] for t in tagged if t.get(OWNER_TAG) == installation_id and SERVICE_TAG in t})

    # -- making

    def _check(self, spec: EndpointSpec) -> None:
        missing = ""
        if len(self._config.balancer_subnets) < 2:
            missing = "balancer_subnets: an ALB needs two, in two zones"
        elif spec.grpc and self._config.balancer_certificate is None:
            missing = "balancer_certificate: an ALB speaks gRPC over TLS alone"
        if missing:
            raise BadConfig(
                f"Service {spec.service_id} cannot have an endpoint: the cloud's config lacks {missing}.",
                remedy="Add it to the cloud.",
                resource=spec.service_id,
            )

    def _make(self, spec: EndpointSpec) -> None:
        empty = str(Stamp.of(-1, [], self._now()))
        tags = {
            OWNER_TAG: spec.installation_id,
            SERVICE_TAG: spec.service_id,
            "Name": f"heliostat {spec.service_name}",
            WANTED_TAG: empty,
            APPLIED_TAG: empty,
        }
        try:
            self._session.call(
                "elbv2",
                "CreateLoadBalancer",
                spec.service_id,
                Name=prefix(spec.service_id),
                Type="application",
                Scheme="internal" if self._config.balancer_internal else "internet-facing",
                Subnets=self._config.balancer_subnets,
                SecurityGroups=self._config.balancer_security_groups,
                Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
            )
        except BadConfig as e:
            if e.details.get("code") != "DuplicateLoadBalancerName":  # made by another process this moment
                raise

    def _known(self, service_id: str, tags: dict[str, str]) -> tuple[Stamp, list[Backend]]:
        """The backends that it has, as it says itself. Raises BackendsLost."""
        wanted = Stamp.read(tags.get(WANTED_TAG))
        why = ""
        if wanted is None:
            why = f"its tag {WANTED_TAG} is corrupt"
        elif Stamp.read(tags.get(APPLIED_TAG)) != wanted:
            why = f"its change to revision {wanted.revision} is not finished"
        else:
            backends = self._backends(service_id)
            if Stamp.of(wanted.revision, backends, 0) == wanted:
                return wanted, backends
            why = "its target groups are out of date"
        raise BackendsLost(
            f"The load balancer of service {service_id} has lost its backends: {why}.",
            remedy="The service's workflow sets them again by `set_backends`.",
            resource=service_id,
        )

    def _backends(self, service_id: str) -> list[Backend]:
        """By the tags of their groups, in their order. Those that have left are none."""
        tagged = [group.tags for group in self._groups.of(service_id).values() if not group.has_left]
        read = [found for tags in tagged if (found := balancer_plan.read(tags)) is not None]
        return [b for _, b in sorted(dict(read).items())]

    def _apply(self, found: LoadBalancerTypeDef, tags: dict[str, str], stamp: Stamp, backends: list[Backend]) -> None:
        service_id = tags[SERVICE_TAG]
        attributes = [{"Key": "idle_timeout.timeout_seconds", "Value": IDLE_TIMEOUT_S}]
        arn = found["LoadBalancerArn"]

        def still() -> None:
            """Another process may have begun a newer change."""
            now = Stamp.read(self._tags(found).get(WANTED_TAG))
            if now is not None and now != stamp:
                raise Outdated.backends(service_id, stamp.revision, now.revision)

        wanted = balancer_plan.plan(service_id, tags[OWNER_TAG], backends)
        if self._rules.listener(arn) is None:
            self._session.call(
                "elbv2", "ModifyLoadBalancerAttributes", service_id, LoadBalancerArn=arn, Attributes=attributes
            )
        self._rules.apply(service_id, arn, wanted, still)

    def _remove_group(self, name: str, arn: str, deadline: float) -> None:
        while True:
            try:
                self._groups.remove(name, arn)
                return
            except CloudError as e:
                if e.details.get("code") != "ResourceInUse" or self._clock() > deadline:
                    raise
            self._sleep(1.0)

    # -- looking

    def _described(self, service_id: str) -> Endpoint | None:
        found = self._find(service_id)
        return None if found is None else self._endpoint(service_id, found, self._tags(found))

    def _counters(self, service_id: str) -> list[BackendCounters]:
        self._existing(service_id)
        groups = self._groups.of(service_id)
        answer = []
        for b in self._backends(service_id):
            own = groups.get(balancer_plan.group_name(service_id, "http", f"backend {b.id}"))
            states = self._groups.health(own.arn).values() if own is not None else ()
            answer.append(BackendCounters(backend_id=b.id, version_id=b.version_id, up="healthy" in states))
        return answer

    def _endpoint(self, service_id: str, found: LoadBalancerTypeDef, tags: dict[str, str]) -> Endpoint:
        scheme = "https" if self._config.balancer_certificate else "http"
        state: str = found["State"]["Code"]
        wanted = Stamp.read(tags.get(WANTED_TAG))
        if state not in ("active", "active_impaired"):
            state = f"AWS is creating it, which takes some minutes ({state} {found['State'].get('Reason', '')})"
        elif wanted is None:
            state = "its backends are lost"
        elif Stamp.read(tags.get(APPLIED_TAG)) != wanted:
            state = f"its change to revision {wanted.revision} is not finished"
        elif (listener := self._rules.listener(found["LoadBalancerArn"])) is None:
            state = "its listener is missing"
        elif not self._rules.certified(listener):
            state = "its certificate differs from that of the cloud's config"
        else:
            state = "ready"
        return Endpoint(service_id=service_id, url=f"{scheme}://{found['DNSName']}", state=state)

    def _find(self, service_id: str) -> LoadBalancerTypeDef | None:
        try:
            answer = self._session.call("elbv2", "DescribeLoadBalancers", service_id, Names=[prefix(service_id)])
        except Gone:
            return None
        found: LoadBalancerTypeDef = answer["LoadBalancers"][0]
        return found

    def _existing(self, service_id: str) -> LoadBalancerTypeDef:
        found = self._find(service_id)
        if found is None:
            raise _gone(service_id)
        return found

    def _tags(self, found: LoadBalancerTypeDef) -> dict[str, str]:
        arn = found["LoadBalancerArn"]
        return self._groups.tags([arn]).get(arn, {})

    def _changing(self, service_id: str) -> threading.RLock:
        """One change of a service at a time in this process; what was seen of it before is forgotten."""
        for key in [key for key in self._seen if key[1] == service_id]:
            self._seen.pop(key, None)
        return self._locks[service_id]

    def _looked(self, what: str, service_id: str, ask: Callable[[], Seen]) -> Seen:
        seen = self._seen.get((what, service_id))
        if seen is not None and self._clock() - seen[0] < self._look_s:
            answer: Seen = seen[1]
            return answer
        answer = ask()
        self._seen[what, service_id] = self._clock(), answer
        return answer


def _gone(service_id: str) -> Gone:
    return Gone(
        f"Service {service_id} has no load balancer.", remedy="Make it with `ensure` first.", resource=service_id
    )
