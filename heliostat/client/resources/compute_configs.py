"""Compute configs. They are versioned: created and archived, never edited."""

from __future__ import annotations

from heliostat.client.effects import Flow, Stream
from heliostat.client.groups import Group, M, many, one
from heliostat.client.resources import lists
from heliostat.client.transport import Api, path_of
from heliostat.models.compute_configs import ComputeConfigCreate, ComputeConfigVersion

CONFIGS = "compute-configs"


class ComputeConfigs(Group[M]):
    @one
    def create(
        self, request: ComputeConfigCreate, *, project: str | None = None, idempotency_key: str | None = None
    ) -> Flow[ComputeConfigVersion]:
        """Creates a compute config or, under an existing name, its next version."""
        path, params = path_of(CONFIGS), {"project": project}
        return (
            yield from self._api.call(
                "POST", path, ComputeConfigVersion, params=params, body=request, key=idempotency_key
            )
        )

    @one
    def get(self, ref: str, *, project: str | None = None) -> Flow[ComputeConfigVersion]:
        """``name`` (the newest version), ``name:version`` or id."""
        return (yield from get(self._api, ref, project))

    @many
    def list(
        self,
        *,
        name: str | None = None,
        project: str | None = None,
        archived: bool = False,
        page_size: int = lists.PAGE_SIZE,
    ) -> Stream[ComputeConfigVersion]:
        """Every version of every named config, newest first. ``archived``: includes archived ones."""
        filters = {"name": name, "project": project, "archived": archived or None}
        return lists.pages(self._api, path_of(CONFIGS), ComputeConfigVersion, page_size=page_size, **filters)

    @one
    def archive(self, ref: str, *, project: str | None = None) -> Flow[ComputeConfigVersion]:
        """New clusters can't use it; existing ones keep running. A name without a version archives all of its
        versions."""
        path, params = path_of(CONFIGS, ref, "archive"), {"project": project}
        return (yield from self._api.call("POST", path, ComputeConfigVersion, params=params))


def get(api: Api, ref: str, project: str | None) -> Flow[ComputeConfigVersion]:
    return (yield from api.call("GET", path_of(CONFIGS, ref), ComputeConfigVersion, params={"project": project}))
