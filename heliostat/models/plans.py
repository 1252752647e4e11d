"""What would be made: the answer to a dry run."""

from __future__ import annotations

from heliostat.models.clouds import Market, Provider
from heliostat.models.common import Result
from heliostat.models.compute_configs import ComputeConfig


class PlannedType(Result):
    """An instance type that a node may be."""

    name: str
    """"" where the cloud has no instance types."""
    cpu: int | None = None
    """vCPUs; None, here and below: not known."""
    memory: int | None = None
    """Bytes."""
    gpu: int | None = None
    accelerator: str = ""
    architecture: str = ""
    usd_per_hour: dict[Market, float] = {}
    """Of one node, by the markets of its group that the price table knows."""


class PlannedNodes(Result):
    """The head, or one worker group."""

    group: str
    min_nodes: int
    max_nodes: int
    markets: list[Market]
    """In the order in which they are tried; then, within each, the zones, and within each of those the types."""
    zones: list[str]
    """Empty: wherever the cloud puts it."""
    types: list[PlannedType]
    """The first one is the choice, the others are tried where the cloud has no machine of it."""
    usd_per_hour: float | None = None
    """Of one node of the first choice; None: not in the price table."""
    dearest_usd_per_hour: float | None = None
    """Of one node, if everything else is out of stock; None: some type is not in the price table."""


class Plan(Result):
    """Nothing was made."""

    kind: str
    """``cluster`` or ``job``."""
    name: str | None
    project: str
    cloud: str
    provider: Provider
    region: str = ""
    cluster_id: str | None = None
    """The existing cluster that the job would run on: it needs no more nodes."""
    nodes: list[PlannedNodes] = []
    min_nodes: int = 0
    """With the head."""
    max_nodes: int = 0
    min_usd_per_hour: float | None = None
    """All at their minimum, each of its first choice; None: some price is not known."""
    max_usd_per_hour: float | None = None
    """All at their maximum, each the dearest that it may be; None likewise."""
    unpriced: list[str] = []
    """``type market`` that the price table does not have."""
    price_table: str = ""
    """Its path; "": there is none."""
    compute_config: ComputeConfig
    """As it would be carried out: types and zones filled in."""
