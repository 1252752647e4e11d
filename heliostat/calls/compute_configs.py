"""Compute configs, versioned: created and archived, never edited."""

from __future__ import annotations

from heliostat._flow import Flow, Group, M, Stream, many, one
from heliostat._transport import path_of
from heliostat.calls import lists
from heliostat.models.compute_configs import ComputeConfigCreate, ComputeConfigVersion

CONFIGS = "compute-configs"


class ComputeConfigs(Group[M]):
    @one
    def create(self, request: ComputeConfigCreate, *, idempotency_key: str | None = None) -> Flow[ComputeConfigVersion]:
        """Under an existing name: its next version."""
        return (
            yield from self._api.call("POST", path_of(CONFIGS), ComputeConfigVersion, body=request, key=idempotency_key)
        )

    @one
    def get(self, ref: str) -> Flow[ComputeConfigVersion]:
        """``name`` (the newest version), ``name:version`` or id."""
        return (yield from self._api.call("GET", path_of(CONFIGS, ref), ComputeConfigVersion))

    @many
    def list(
        self, *, name: str | None = None, project: str | None = None, page_size: int = lists.PAGE_SIZE
    ) -> Stream[ComputeConfigVersion]:
        return lists.pages(
            self._api, path_of(CONFIGS), ComputeConfigVersion, page_size=page_size, name=name, project=project
        )

    @one
    def archive(self, ref: str) -> Flow[ComputeConfigVersion]:
        """No new cluster may use it; those that do go on."""
        return (yield from self._api.call("POST", path_of(CONFIGS, ref, "archive"), ComputeConfigVersion))
