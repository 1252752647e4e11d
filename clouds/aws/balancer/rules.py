"""Applies a plan to an ALB's listener and its rules. At every moment a request finds a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clouds.aws.account.session import AwsSession
from clouds.aws.balancer.groups import Groups
from clouds.aws.balancer.plan import (
    GRPC,
    MAX_GROUPS,
    Conditions,
    Forward,
    Plan,
    actions_for,
    conditions_for,
    conditions_of,
    forward_of,
)
from clouds.contract.errors import Gone
from heliostat.models.clouds import AwsConfig

if TYPE_CHECKING:
    from types_boto3_elbv2.type_defs import ListenerTypeDef

LOOK_S = 1.0
"""Between two looks at a group's health."""


class Rules:
    def __init__(
        self,
        session: AwsSession,
        groups: Groups,
        config: AwsConfig,
        *,
        healthy_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._session, self._groups, self._config = session, groups, config
        self._healthy_s, self._clock, self._sleep = healthy_s, clock, sleep

    def listener(self, balancer: str) -> ListenerTypeDef | None:
        port = 443 if self._config.balancer_certificate else 80
        try:
            listeners = self._session.pages("elbv2", "DescribeListeners", "Listeners", LoadBalancerArn=balancer)
            return next((found for found in listeners if found["Port"] == port), None)
        except Gone:
            return None

    def certified(self, listener: ListenerTypeDef) -> bool:
        """It shows the config's certificate, where there is one."""
        wanted = self._config.balancer_certificate
        return wanted is None or wanted in [c.get("CertificateArn") for c in listener.get("Certificates", [])]

    def apply(self, service_id: str, balancer: str, plan: Plan, still: Callable[[], None]) -> None:
        """In this order: groups and their targets; rules that name a backend; health of what gets its first traffic;
        weights; and only then what is not wanted any more.

        Args:
            still: raises when the plan is outdated; asked just before traffic moves.
        """
        found = self._groups.of(service_id)
        arns = {name: group.arn for name, group in found.items()}
        strangers = {}
        for name, group in plan.groups.items():
            arns[name], strangers[name] = self._groups.ensure(group, found.get(name))
        listener = self.listener(balancer) or self._listen(balancer)
        if not self.certified(listener):
            certificates = [{"CertificateArn": self._config.balancer_certificate}]
            which = listener["ListenerArn"]
            self._session.call("elbv2", "ModifyListener", which, ListenerArn=which, Certificates=certificates)
        listener_arn = listener["ListenerArn"]
        rules = self._session.pages("elbv2", "DescribeRules", "Rules", listener_arn, ListenerArn=listener_arn)
        there = {conditions_of(rule): rule for rule in rules if not rule["IsDefault"]}
        taken = {int(rule["Priority"]) for rule in there.values()}
        moves: list[tuple[Forward, Forward, Callable[[Forward], None]]] = []
        for conditions, (priorities, wanted) in plan.rules.items():
            rule = there.get(conditions)
            if rule is None:
                priority = next(p for p in priorities if p not in taken)
                taken.add(priority)
                self._make_rule(listener_arn, conditions, priority, wanted, arns)
            elif priorities.start == GRPC:
                moves.append((forward_of(rule["Actions"]), wanted, self._rule_setter(rule["RuleArn"], arns)))
            elif forward_of(rule["Actions"]) != tuple(sorted(wanted)):
                self._rule_setter(rule["RuleArn"], arns)(wanted)
        moves.append((forward_of(listener["DefaultActions"]), plan.default, self._listener_setter(listener_arn, arns)))
        for now, wanted, put in moves:
            self._move(now, tuple(sorted(wanted)), put, arns, still)
        for conditions, rule in there.items():
            if conditions not in plan.rules:
                self._session.call("elbv2", "DeleteRule", listener_arn, RuleArn=rule["RuleArn"])
        for name, targets in strangers.items():
            if targets:
                self._groups.dismiss(name, arns[name], targets)
        for name in found.keys() - plan.groups.keys():
            self._groups.leave(name, found[name])

    def _move(
        self,
        now: Forward,
        wanted: Forward,
        put: Callable[[Forward], None],
        arns: dict[str, str],
        still: Callable[[], None],
    ) -> None:
        """From the weights that there are to those wanted. A group is checked for health only when a rule names it, so
        one that gets its first traffic is named without any first."""
        if now == wanted:
            return
        weights = dict(now)
        first = [name for name, weight in wanted if weight and not weights.get(name)]
        joined = {name: 0 for name, _ in wanted} | weights
        still()
        if first and any(weights.values()) and len(joined) <= MAX_GROUPS:
            if joined != weights:
                put(tuple(sorted(joined.items())))
            self._wait_for_health([arns[name] for name in first])
            still()
        put(wanted)

    def _wait_for_health(self, groups: list[str]) -> None:
        """Until each has a healthy target, or the time is over: whether to go on is for the caller of ``set_backends``,
        who has asked each backend himself."""
        deadline = self._clock() + self._healthy_s
        while not all("healthy" in self._groups.health(arn).values() for arn in groups):
            if self._clock() > deadline:
                return
            self._sleep(LOOK_S)

    def _listen(self, balancer: str) -> ListenerTypeDef:
        certificate = self._config.balancer_certificate
        how: dict[str, Any] = {"Protocol": "HTTP", "Port": 80}
        if certificate is not None:
            how = {"Protocol": "HTTPS", "Port": 443, "Certificates": [{"CertificateArn": certificate}]}
        answer = self._session.call(
            "elbv2", "CreateListener", balancer, LoadBalancerArn=balancer, DefaultActions=actions_for((), {}), **how
        )
        made: ListenerTypeDef = answer["Listeners"][0]
        return made

    def _make_rule(
        self, listener: str, conditions: Conditions, priority: int, forward: Forward, arns: dict[str, str]
    ) -> None:
        self._session.call(
            "elbv2",
            "CreateRule",
            listener,
            ListenerArn=listener,
            Priority=priority,
            Conditions=conditions_for(conditions),
            Actions=actions_for(forward, arns),
        )

    def _rule_setter(self, rule: str, arns: dict[str, str]) -> Callable[[Forward], None]:
        return lambda forward: self._set("ModifyRule", forward, arns, "Actions", RuleArn=rule)

    def _listener_setter(self, listener: str, arns: dict[str, str]) -> Callable[[Forward], None]:
        return lambda forward: self._set("ModifyListener", forward, arns, "DefaultActions", ListenerArn=listener)

    def _set(self, operation: str, forward: Forward, arns: dict[str, str], field: str, **which: str) -> None:
        self._session.call(
            "elbv2", operation, next(iter(which.values())), **which, **{field: actions_for(forward, arns)}
        )
