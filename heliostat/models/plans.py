"""The answer to a dry run: what would be created."""

from __future__ import annotations

from heliostat.models.clouds import Market, Provider
from heliostat.models.common import Result
from heliostat.models.compute_configs import ComputeConfig


class PlannedType(Result):
    """A possible instance type of a node."""

    name: str
    """"" where the cloud has no instance types."""
    cpu: int | None = None
    """vCPUs; None, here and below: unknown."""
    memory: int | None = None
    """Bytes."""
    gpu: int | None = None
    accelerator: str = ""
    architecture: str = ""
    usd_per_hour: dict[Market, float] = {}
    """Price of one node by market, as far as the price table has it."""


class PlannedNodes(Result):
    """The head, or one worker group."""

    group: str
    min_nodes: int
    max_nodes: int
    markets: list[Market]
    """In the order in which they are tried; within each the zones, within each zone the types."""
    zones: list[str]
    """Empty: the cloud chooses."""
    types: list[PlannedType]
    """The first one is the first choice; the others are tried when the cloud has no machine of it."""
    usd_per_hour: float | None = None
    """Price of one node of the first choice; None: not in the price table."""
    dearest_usd_per_hour: float | None = None
    """Price of one node of the most expensive choice; None: a type is not in the price table."""


class Plan(Result):
    """The plan of a dry run. Nothing was created."""

    kind: str
    """``cluster`` or ``job``."""
    name: str | None
    project: str
    cloud: str
    provider: Provider
    region: str = ""
    cluster_id: str | None = None
    """Existing cluster that the job would run on; it needs no more nodes."""
    nodes: list[PlannedNodes] = []
    min_nodes: int = 0
    """Including the head."""
    max_nodes: int = 0
    min_usd_per_hour: float | None = None
    """Price with all groups at their minimum, each node of its first choice; None: a price is unknown."""
    max_usd_per_hour: float | None = None
    """Price with all groups at their maximum, each node of its most expensive choice; None: a price is unknown."""
    unpriced: list[str] = []
    """``type market`` pairs that are not in the price table."""
    price_table: str = ""
    """Path of the price table; "": none."""
    compute_config: ComputeConfig
    """The config with types and zones filled in."""
