"""A cloud: one place that machines come from."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from heliostat.models.common import Result


class Provider(StrEnum):
    LOCAL = "local"
    AWS = "aws"
    GCP = "gcp"
    FAKE = "fake"


class Market(StrEnum):
    ON_DEMAND = "ON_DEMAND"
    SPOT = "SPOT"
    PREFER_SPOT = "PREFER_SPOT"


class Capabilities(Result):
    """What a cloud can do, written down when it is registered, so that the API refuses what can't fit
    without knowing any provider."""

    markets: list[Market] = [Market.ON_DEMAND]
    zones: list[str] = []
    instance_types: list[str] | None = None
    """None: any; else the only ones."""
    max_cpu_per_node: float | None = None
    max_memory_per_node: int | None = None
    """Bytes."""
    max_gpu_per_node: int = 0


class Cloud(Result):
    id: str
    name: str
    provider: Provider
    is_default: bool = False
    capabilities: Capabilities = Field(default_factory=Capabilities)
    created_at: datetime
