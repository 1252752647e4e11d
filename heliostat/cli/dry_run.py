"""The text of a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heliostat.cli.output import facts, table

if TYPE_CHECKING:
    from heliostat.models.plans import Plan, PlannedNodes, PlannedType

COLUMNS = ["NODES", "MIN", "MAX", "MARKET", "USD/H EACH", "ZONES", "INSTANCE TYPES"]


def text(plan: Plan) -> str:
    where = f"{plan.cloud} ({plan.provider}{f', {plan.region}' if plan.region else ''})"
    called = f"{plan.kind.capitalize()} {plan.name}" if plan.name else f"A {plan.kind}"
    title = f"{called} in project {plan.project} on cloud {where} can be created. Nothing was created."
    if plan.cluster_id is not None:
        return f"{title}\n\nIt would run on cluster {plan.cluster_id} and needs no more nodes."
    rows = [
        (n.group, n.min_nodes, n.max_nodes, " then ".join(n.markets), _each(n), " then ".join(n.zones), _types(n))
        for n in plan.nodes
    ]
    lines = facts(
        [
            ("Retained", plan.compute_config.head_node.keeps),
            ("Total", f"{_span(plan.min_nodes, plan.max_nodes, '')} nodes"),
            ("Price", _price(plan)),
            ("No price for", ", ".join(plan.unpriced)),
        ]
    )
    return f"{title}\n\n{table(COLUMNS, rows, empty='')}\n\n{lines}"


def _price(plan: Plan) -> str:
    if not plan.price_table:
        return "unknown: there is no price table (HELIOSTAT_PRICES)"
    if plan.min_usd_per_hour is None and plan.max_usd_per_hour is None:
        return "unknown"
    if plan.max_usd_per_hour is None:
        return f"{plan.min_usd_per_hour:.2f} USD an hour at least; maximum unknown"
    if plan.min_usd_per_hour is None:
        return f"{plan.max_usd_per_hour:.2f} USD an hour at most"
    return f"{_span(plan.min_usd_per_hour, plan.max_usd_per_hour, '.2f')} USD an hour"


def _each(nodes: PlannedNodes) -> str:
    first, dearest = nodes.usd_per_hour, nodes.dearest_usd_per_hour
    if first is None:
        return "?"
    return _span(first, first if dearest is None else dearest, ".4f") + ("?" if dearest is None else "")


def _span(low: float, high: float, form: str) -> str:
    return format(low, form) if low == high else f"{low:{form}} to {high:{form}}"


def _types(nodes: PlannedNodes) -> str:
    first, *more = nodes.types
    others = ", ".join(t.name for t in more)
    return _type(first) + (f"; then {others}" if others else "")


def _type(kind: PlannedType) -> str:
    """``g5.xlarge (4 CPUs, 16 GiB, 1 A10G)``, as far as it is known."""
    has = [f"{kind.cpu} CPUs"] if kind.cpu else []
    has += [f"{kind.memory / 2**30:g} GiB"] if kind.memory else []
    has += [f"{kind.gpu} {kind.accelerator or 'GPUs'}"] if kind.gpu else []
    known = f" ({', '.join(has)})" if has else ""
    return (kind.name or "any machine") + known
