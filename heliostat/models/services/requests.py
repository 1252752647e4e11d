"""What a caller asks of a service."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from heliostat.models.common import Model, Name
from heliostat.models.services.config import ServiceConfig
from heliostat.models.services.resource import MAX_VERSIONS


class VersionWeight(Model):
    name: Name
    traffic_percent: int = Field(ge=0, le=100)


class ServiceDeploy(Model):
    """One deploy: a new version of one service, or the static weights of several."""

    config: ServiceConfig | None = None
    configs: list[ServiceConfig] = Field(default=[], max_length=MAX_VERSIONS)
    """With ``versions`` only: those of them that are new, each with its ``version_name``."""
    name: Name | None = None
    """Of the service, where no config says it: a change of weights only."""
    project: str | None = None
    """Where no config says it."""
    in_place: bool = False
    """Update the running version on its own clusters: only Serve's config, replica counts or code may differ."""
    canary_percent: int | None = Field(default=None, ge=0, le=100)
    """Stop the rollout at this share until ``rollout promote`` or ``rollout abort``; 100: do not stop."""
    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """Replica capacity that may exist beyond the running version's while two versions do."""
    versions: list[VersionWeight] = Field(default=[], max_length=MAX_VERSIONS)
    """Static weights, which sum to 100. A version with 0, or that is not named, is terminated."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.versions:
            if self.config is not None:
                raise ValueError("with 'versions' the configs stand in 'configs'")
            total = sum(v.traffic_percent for v in self.versions)
            if total != 100:
                raise ValueError(f"versions: traffic_percent sums to {total}; it must be 100")
            names = [v.name for v in self.versions]
            if len(set(names)) != len(names):
                raise ValueError("versions: two have the same name")
            given = [c.version_name for c in self.configs]
            unknown = sorted({str(g) for g in given} - set(names))
            if None in given or unknown or len(set(given)) != len(given):
                raise ValueError("configs: each needs a version_name of its own that stands in 'versions'")
            if self.in_place or self.canary_percent is not None:
                raise ValueError("in_place and canary_percent do not go with 'versions'")
            if self.name is None and not self.configs:
                raise ValueError("name the service, or give a config that does")
        elif self.config is None or self.configs:
            raise ValueError("give one 'config', or 'versions' with 'configs'")
        if self.in_place and self.canary_percent is not None:
            raise ValueError("an update in place has no canary: leave out canary_percent")
        if self.max_surge_percent != 100 and (self.in_place or self.versions):
            how = "an update in place" if self.in_place else "static weights"
            raise ValueError(f"max_surge_percent bounds a rollout; it does not go with {how}")
        return self


class RolloutAction(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    ABORT = "abort"


class RolloutCommand(Model):
    action: RolloutAction
    percent: int | None = Field(default=None, ge=1, le=100)
    """With promote: go to this share and stop there; default 100."""

    @model_validator(mode="after")
    def _to_promote(self) -> Self:
        if self.percent is not None and self.action is not RolloutAction.PROMOTE:
            raise ValueError(f"percent is of promote alone; {self.action} has none")
        return self


class ServiceTerminate(Model):
    reason: str = Field(default="", max_length=500)


class ServiceRollback(Model):
    reason: str = Field(default="", max_length=500)
