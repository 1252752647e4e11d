"""Dry runs: what a request would create, and its cost per hour by the operator's price table. Nothing is created."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import Query
from fastapi.responses import JSONResponse

from api.kit.context import Context
from clouds.instance_types import Offer
from heliostat.models.clouds import Cloud, Market
from heliostat.models.compute_configs import ComputeConfig, NodeConfig
from heliostat.models.plans import Plan, PlannedNodes, PlannedType
from runtime import prices
from runtime.prices import Prices

PLANNED: dict[int | str, dict[str, Any]] = {
    200: {"model": Plan, "description": "With `dry_run`: what would be created. Nothing is."}
}
"""For a route's ``responses``."""

DryRun = Annotated[
    bool, Query(description="Checks everything and answers what would be created (200, a Plan); creates nothing.")
]


def answer(made: Plan) -> JSONResponse:
    return JSONResponse(made.model_dump(mode="json"))


def plan(
    ctx: Context, kind: str, name: str | None, project: str, config: ComputeConfig, cloud: Cloud, cluster_id: str | None
) -> Plan:
    """``config``: placed (``api.compute_configs.placement``). ``cluster_id``: of the existing one that would
    be used. Raises
    Unavailable when there is a price table that can't be read."""
    table = prices.load(ctx.settings)
    offer: Offer | None = ctx.offers.get(cloud.provider)
    region = cloud.config.region if cloud.config is not None else ""
    made = Plan(
        kind=kind,
        name=name,
        project=project,
        cloud=cloud.name,
        provider=cloud.provider,
        region=region,
        cluster_id=cluster_id,
        price_table=str(table.path or ""),
        compute_config=config,
    )
    if cluster_id is not None:
        return made
    zones = config.zones or []
    made.nodes = [_nodes("head", 1, 1, Market.ON_DEMAND, config.head_node, zones, cloud, region, offer, table)]
    for group in config.worker_nodes:
        bounds = (group.min_nodes, group.max_nodes)
        made.nodes.append(_nodes(group.name, *bounds, group.market_type, group, zones, cloud, region, offer, table))
    made.min_nodes = sum(n.min_nodes for n in made.nodes)
    made.max_nodes = sum(n.max_nodes for n in made.nodes)
    made.min_usd_per_hour = _total([(n.min_nodes, n.usd_per_hour) for n in made.nodes])
    made.max_usd_per_hour = _total([(n.max_nodes, n.dearest_usd_per_hour) for n in made.nodes])
    if table.path is not None:
        made.unpriced = sorted(
            {f"{t.name} {m}" for n in made.nodes for t in n.types for m in n.markets if m not in t.usd_per_hour}
        )
    return made


def _nodes(
    group: str,
    least: int,
    most: int,
    market: Market,
    node: NodeConfig,
    zones: list[str],
    cloud: Cloud,
    region: str,
    offer: Offer | None,
    table: Prices,
) -> PlannedNodes:
    markets: list[Market] = [Market.SPOT, Market.ON_DEMAND] if market is Market.PREFER_SPOT else [market]
    names = [node.instance_type] if node.instance_type else node.instance_types
    names = names or (cloud.capabilities.instance_types or [""])[:1]
    types = [_type(name, node, markets, cloud.provider, region, offer, table) for name in names]
    priced = [t.usd_per_hour.get(m) for t in types for m in markets]
    known = [usd for usd in priced if usd is not None]
    return PlannedNodes(
        group=group,
        min_nodes=least,
        max_nodes=most,
        markets=markets,
        zones=zones,
        types=types,
        usd_per_hour=types[0].usd_per_hour.get(markets[0]),
        dearest_usd_per_hour=max(known) if len(known) == len(priced) else None,
    )


def _type(
    name: str, node: NodeConfig, markets: list[Market], provider: str, region: str, offer: Offer | None, table: Prices
) -> PlannedType:
    costs = {m: table.of(provider, region, name, m) for m in markets}
    usd = {m: cost for m, cost in costs.items() if cost is not None}
    instance_type = offer.catalogue.types.get(name) if offer is not None else None
    if instance_type is None:
        need = node.required_resources
        required = {"cpu": need.CPU, "memory": need.memory, "gpu": need.GPU} if need else {}
        return PlannedType(name=name, usd_per_hour=usd, **required)
    return PlannedType(
        name=name,
        cpu=instance_type.cpu,
        memory=instance_type.memory,
        gpu=instance_type.gpu,
        accelerator=instance_type.accelerator,
        architecture=instance_type.architecture,
        usd_per_hour=usd,
    )


def _total(parts: list[tuple[int, float | None]]) -> float | None:
    """A count of 0 needs no price."""
    found = [None if usd is None and count else count * (usd or 0.0) for count, usd in parts]
    return None if None in found else round(math.fsum(f for f in found if f is not None), 6)
