"""What an ALB does with a request, by what moto was told: rules by priority, weights, health within a group. Turns are
taken where ALB chooses at random, so that shares are exact."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moto.elbv2.models import elbv2_backends

from tests.clouds.aws.moto_plus import KNOBS

Target = tuple[str, int]


@dataclass
class Alb:
    account: str
    region: str
    _credit: Counter[Any] = field(default_factory=Counter)

    def request(self, url: str, headers: Mapping[str, str]) -> Target | None:
        """Where it goes; None: ALB itself answers 503 (or nobody listens)."""
        backend = elbv2_backends[self.account][self.region]
        name = url.partition("://")[2]
        balancer = next((b for b in backend.load_balancers.values() if b.dns_name == name), None)
        listener = next(iter(balancer.listeners.values()), None) if balancer else None
        if listener is None:
            return None
        given = {key.lower(): value for key, value in headers.items()}
        rules = sorted((r for r in listener.rules.values() if not r.is_default), key=lambda r: int(r.priority))
        actions = next((r.actions for r in rules if _matches(r.conditions, given)), listener.default_actions)
        data = actions[0].data
        if data["Type"] != "forward":
            return None
        groups = {g["TargetGroupArn"]: int(g["Weight"]) for g in data["ForwardConfig"]["TargetGroups"]}
        chosen = self._turn(listener.arn, {arn: weight for arn, weight in groups.items() if weight})
        if chosen is None:
            return None
        group = backend.target_groups[chosen]
        targets = [(t["Id"], int(t["Port"])) for t in group.targets.values()]
        healthy = [t for t in targets if f"{t[0]}:{t[1]}" not in KNOBS.unhealthy]
        return self._turn(chosen, dict.fromkeys(healthy or targets, 1))  # none healthy: "fail open"

    def _turn(self, where: str, weights: Mapping[Any, int]) -> Any:
        """Smooth weighted round-robin."""
        if not weights:
            return None
        for name, weight in weights.items():
            self._credit[where, name] += weight
        chosen = max(weights, key=lambda name: self._credit[where, name])
        self._credit[where, chosen] -= sum(weights.values())
        return chosen


def _matches(conditions: list[dict[str, Any]], headers: Mapping[str, str]) -> bool:
    def one(condition: dict[str, Any]) -> bool:
        config = condition["HttpHeaderConfig"]
        value = headers.get(config["HttpHeaderName"].lower())
        return value is not None and any(fnmatch.fnmatch(value.lower(), v.lower()) for v in config["Values"])

    return all(one(condition) for condition in conditions)
