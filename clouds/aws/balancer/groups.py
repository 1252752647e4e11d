"""Target groups of a service: made, tagged, filled and removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clouds.aws.account.session import AwsSession
from clouds.aws.balancer.plan import HEALTH_PATH, Group, Target, prefix
from clouds.contract.errors import BadConfig, Gone
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig

if TYPE_CHECKING:
    from types_boto3_elbv2.type_defs import CreateTargetGroupInputTypeDef, TargetDescriptionTypeDef

TAGS_AT_ONCE = 20
"""ARNs that one DescribeTags takes."""
SET_UP_TAG = "heliostat-set-up"
"""On a group whose attributes are set: CreateTargetGroup does not take them."""
LEFT_TAG = "heliostat-left-at"
"""On a group that is not wanted any more: since when, in seconds of Unix time."""
KEEP_LEFT_S = 3600
"""Requests may still be under way to a group that has left the rules; it costs nothing meanwhile."""
_ATTRIBUTES = {
    # Who leaves finishes what is under way: 3600 is the most that ELB grants (and moto takes less than it).
    "deregistration_delay.timeout_seconds": "3599",
    "stickiness.enabled": "false",
    "load_balancing.algorithm.type": "round_robin",
}


@dataclass
class Found:
    arn: str
    tags: dict[str, str]

    @property
    def has_left(self) -> bool:
        return LEFT_TAG in self.tags


class Groups:
    """``now``: gives Unix time."""

    def __init__(self, session: AwsSession, config: AwsConfig, now: Callable[[], float]) -> None:
        self._session, self._config, self._now = session, config, now

    def of(self, service_id: str) -> dict[str, Found]:
        """By name. ELB filters neither by prefix of the name nor by tag: all of the region, 400 a call."""
        arns = self.arns(prefix(service_id))
        tags = self.tags(list(arns.values()))
        return {name: Found(arn, tags[arn]) for name, arn in arns.items() if arn in tags}

    def arns(self, beginning: str) -> dict[str, str]:
        all_of_them = self._session.pages("elbv2", "DescribeTargetGroups", "TargetGroups", PageSize=400)
        return {
            g["TargetGroupName"]: g["TargetGroupArn"] for g in all_of_them if g["TargetGroupName"].startswith(beginning)
        }

    def tags(self, arns: list[str]) -> dict[str, dict[str, str]]:
        """Of groups or load balancers, by ARN; one that has just gone is left out."""
        found: dict[str, dict[str, str]] = {}
        for start in range(0, len(arns), TAGS_AT_ONCE):
            some = arns[start : start + TAGS_AT_ONCE]
            try:
                answer = self._session.call("elbv2", "DescribeTags", some[0], ResourceArns=some)
            except Gone:
                for arn in some if len(some) > 1 else []:
                    found |= self.tags([arn])
                continue
            for said in answer["TagDescriptions"]:
                found[said["ResourceArn"]] = {tag["Key"]: tag["Value"] for tag in said["Tags"]}
        return found

    def ensure(self, group: Group, found: Found | None) -> tuple[str, set[Target]]:
        """Creates it, or corrects its tags; registers its targets. Gives its ARN, and the targets that are not its own:
        for ``dismiss``, when no traffic is to go there any more."""
        if found is None:
            found = Found(self._make(group), {})
        if LEFT_TAG in found.tags:
            self._session.call("elbv2", "RemoveTags", group.name, ResourceArns=[found.arn], TagKeys=[LEFT_TAG])
        if SET_UP_TAG not in found.tags:
            attributes = [{"Key": key, "Value": value} for key, value in _ATTRIBUTES.items()]
            self._session.call(
                "elbv2", "ModifyTargetGroupAttributes", group.name, TargetGroupArn=found.arn, Attributes=attributes
            )
        wanted = {**dict(group.tags), SET_UP_TAG: "1"}
        changed = {key: value for key, value in wanted.items() if found.tags.get(key) != value}
        if changed:
            self.tag(found.arn, changed)
        there = self.health(found.arn)
        missing = group.targets - {t for t, state in there.items() if state != "draining"}
        if missing:
            self._session.call(
                "elbv2", "RegisterTargets", group.name, TargetGroupArn=found.arn, Targets=_targets(missing)
            )
        return found.arn, {t for t, state in there.items() if state != "draining"} - group.targets

    def dismiss(self, name: str, arn: str, targets: set[Target]) -> None:
        """Takes them out: they finish what is under way."""
        self._session.call("elbv2", "DeregisterTargets", name, TargetGroupArn=arn, Targets=_targets(targets))

    def health(self, arn: str) -> dict[Target, str]:
        """``initial healthy unhealthy unused draining unavailable``, by (IP, port)."""
        answer = self._session.call("elbv2", "DescribeTargetHealth", arn, TargetGroupArn=arn)
        return {
            (said["Target"]["Id"], int(said["Target"]["Port"])): said["TargetHealth"]["State"]
            for said in answer["TargetHealthDescriptions"]
        }

    def leave(self, name: str, found: Found) -> None:
        """No rule names it any more: it is removed, at a later call, when nothing can be under way to it."""
        left_at = found.tags.get(LEFT_TAG, "")
        if not left_at.isdigit():
            self.tag(found.arn, {LEFT_TAG: str(int(self._now()))})
        elif self._now() - int(left_at) > KEEP_LEFT_S:
            self.remove(name, found.arn)

    def remove(self, name: str, arn: str) -> None:
        try:
            self._session.call("elbv2", "DeleteTargetGroup", name, TargetGroupArn=arn)
        except Gone:
            return

    def tag(self, arn: str, tags: dict[str, str]) -> None:
        listed = [{"Key": key, "Value": value} for key, value in tags.items()]
        self._session.call("elbv2", "AddTags", arn, ResourceArns=[arn], Tags=listed)

    def _make(self, group: Group) -> str:
        _, port = next(iter(group.targets))
        grpc = group.kind == "grpc"
        request: CreateTargetGroupInputTypeDef = {
            "Name": group.name,
            "Protocol": "HTTP",
            "ProtocolVersion": "GRPC" if grpc else "HTTP1",
            "Port": port,
            "VpcId": self._config.vpc_id,
            "TargetType": "ip",
            "HealthCheckProtocol": "HTTP",
            "HealthCheckPath": HEALTH_PATH,
            "HealthCheckIntervalSeconds": 5,
            "HealthCheckTimeoutSeconds": 4,
            "HealthyThresholdCount": 2,
            "UnhealthyThresholdCount": 2,
            # Any answer of gRPC's is one of a proxy that lives: its own health service requires the token.
            "Matcher": {"GrpcCode": "0-99"} if grpc else {"HttpCode": "200"},
            "Tags": [{"Key": key, "Value": value} for key, value in group.tags],
        }
        try:
            answer = self._session.call("elbv2", "CreateTargetGroup", group.name, **request)
            arn: str = answer["TargetGroups"][0]["TargetGroupArn"]
        except BadConfig as e:
            if e.details.get("code") != "DuplicateTargetGroupName":
                raise
            # Another process has made it this moment, or a lost answer did, with other tags.
            arn = self.arns(group.name).get(group.name, "")
            if not arn:
                raise CloudError(f"Target group {group.name} comes and goes.", remedy="Try again.") from e
        return arn


def _targets(targets: set[Target] | frozenset[Target]) -> list[TargetDescriptionTypeDef]:
    return [{"Id": ip, "Port": port} for ip, port in sorted(targets)]
