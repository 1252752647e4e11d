"""Where a node may be launched, and which of these placements have no machines at present. Pure."""

from __future__ import annotations

from datetime import datetime

from heliostat.models.clouds import Market
from heliostat.models.common import Result
from heliostat.models.compute_configs import ComputeConfig, HeadNodeConfig, NodeConfig
from workflows import policies


class Placement(Result):
    """Where and how one machine may be launched."""

    zone: str | None = None
    market: Market = Market.ON_DEMAND
    instance_type: str | None = None
    kept: bool = False
    """For a head with retained resources: what a zone lacks for it, it may have for other nodes."""

    @property
    def key(self) -> str:
        return f"{self.market}/{self.zone or ''}/{self.instance_type or ''}{'/kept' if self.kept else ''}"

    def __str__(self) -> str:
        where = f" in {self.zone}" if self.zone else ""
        return f"{self.instance_type or 'a machine'}{where} ({self.market})"


class Shortage(Result):
    """A placement that had no machine at its last launch."""

    times: int = 0
    """In a row; launches that ran at the same time count as one."""
    since: datetime
    until: datetime
    """Other placements are tried before that."""
    final: bool = False
    """It never has one: waiting does not help."""


def placements(config: ComputeConfig, node: NodeConfig, retained_zone: str | None) -> list[Placement]:
    """In the configured order: each zone with each type, and all of that again for the market to fall back to.

    Args:
        retained_zone: of a head, where its retained resources are; "" where only the cloud knows.
    """
    wanted = getattr(node, "market_type", Market.ON_DEMAND)
    markets = [Market.SPOT, Market.ON_DEMAND] if wanted == Market.PREFER_SPOT else [wanted]
    zones: list[str | None] = [*config.zones] if config.zones else [None]
    kept = isinstance(node, HeadNodeConfig) and bool(node.keeps)
    if kept and retained_zone:
        zones = [retained_zone]
    types: list[str | None] = [*node.instance_types] if node.instance_types else [node.instance_type]
    return [Placement(zone=z, market=m, instance_type=t, kept=kept) for m in markets for z in zones for t in types]


def add_shortage(
    shortages: dict[str, Shortage], places: list[Placement], launched_at: datetime, now: datetime, *, final: bool
) -> bool:
    """A launch that began at ``launched_at`` found no machine in any of these. False: that is known already, from a
    launch that ran at the same time."""
    added = False
    for place in places:
        old = shortages.get(place.key)
        if old is not None and old.since >= launched_at:
            continue
        times = (old.times if old is not None else 0) + 1
        until = now + policies.cool_down(times)
        shortages[place.key] = Shortage(times=times, since=now, until=until, final=final)
        added = True
    return added


def choose(shortages: dict[str, Shortage], places: list[Placement], now: datetime) -> tuple[Placement, datetime | None]:
    """The first placement without a shortage, so that the best one is used again after its cool-down. If all are short:
    the one that was tried least often, and the time of the next try where it is in the future."""
    for place in places:
        known = shortages.get(place.key)
        if known is None or (known.until <= now and not known.final):
            return place, None
    hopeful = [p for p in places if not shortages[p.key].final] or places
    place = min(hopeful, key=lambda p: shortages[p.key].times)
    known = shortages[place.key]
    at = known.since + policies.backoff(known.times)
    return place, at if at > now else None


def unobtainable(shortages: dict[str, Shortage], places: list[Placement]) -> bool:
    """None of them will ever have a machine."""
    known = [shortages.get(place.key) for place in places]
    return all(shortage is not None and shortage.final for shortage in known)
