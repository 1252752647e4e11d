"""Requests to services."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from heliostat.models.common import Model, Name
from heliostat.models.services.config import ServiceConfig
from heliostat.models.services.resource import MAX_VERSIONS


class VersionWeight(Model):
    """Static weight of one version."""

    name: Name
    traffic_percent: int = Field(ge=0, le=100)


class ServiceDeploy(Model):
    """One deploy: a new version of one service, or the static weights of several."""

    config: ServiceConfig | None = None
    """Config of the new version."""
    configs: list[ServiceConfig] = Field(default=[], max_length=MAX_VERSIONS)
    """Only with ``versions``: the configs of the new ones among them, each with its ``version_name``."""
    name: Name | None = None
    """Name of the service, if no config has it: for a change of weights only."""
    project: str | None = None
    """Project of the service, if no config has it."""
    in_place: bool = False
    """Update the running version on its own clusters: only Serve's config, replica counts or code can differ."""
    canary_percent: int | None = Field(default=None, ge=0, le=100)
    """Percentage at which the rollout pauses until ``rollout promote`` or ``rollout abort``; 100: no pause."""
    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """Extra replica capacity while two versions run, in percent of the running version's."""
    versions: list[VersionWeight] = Field(default=[], max_length=MAX_VERSIONS)
    """Static weights that sum to 100. Versions with 0, and versions that are not listed, are terminated."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.versions:
            if self.config is not None:
                raise ValueError("with 'versions', put the configs into 'configs'")
            total = sum(v.traffic_percent for v in self.versions)
            if total != 100:
                raise ValueError(f"versions: traffic_percent sums to {total}; it must be 100")
            names = [v.name for v in self.versions]
            if len(set(names)) != len(names):
                raise ValueError("versions: two have the same name")
            given = [c.version_name for c in self.configs]
            unknown = sorted({str(g) for g in given} - set(names))
            if None in given or unknown or len(set(given)) != len(given):
                raise ValueError("configs: each needs its own version_name from 'versions'")
            if self.in_place or self.canary_percent is not None:
                raise ValueError("in_place and canary_percent can't be combined with 'versions'")
            if self.name is None and not self.configs:
                raise ValueError("set name, or a config with a name")
        elif self.config is None or self.configs:
            raise ValueError("set one 'config', or 'versions' with 'configs'")
        if self.in_place and self.canary_percent is not None:
            raise ValueError("an in-place update has no canary: remove canary_percent")
        if self.max_surge_percent != 100 and (self.in_place or self.versions):
            how = "an in-place update" if self.in_place else "static weights"
            raise ValueError(f"max_surge_percent can't be combined with {how}")
        return self


class RolloutAction(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    ABORT = "abort"


class RolloutCommand(Model):
    action: RolloutAction
    percent: int | None = Field(default=None, ge=1, le=100)
    """With promote: percentage for the new version, where it then pauses. Default: 100."""

    @model_validator(mode="after")
    def _to_promote(self) -> Self:
        if self.percent is not None and self.action is not RolloutAction.PROMOTE:
            raise ValueError(f"percent works with promote only, not with {self.action}")
        return self


class ServiceTerminate(Model):
    reason: str = Field(default="", max_length=500)


class ServiceRollback(Model):
    reason: str = Field(default="", max_length=500)
