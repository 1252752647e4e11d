"""Jobs on a cron schedule."""

from __future__ import annotations

from heliostat.client.effects import Flow, Stream
from heliostat.client.groups import Group, M, many, one
from heliostat.client.resources import lists
from heliostat.client.resources.uploads import ship_code
from heliostat.client.transport import path_of
from heliostat.errors import InvalidRequest
from heliostat.models.jobs import Job
from heliostat.models.schedules import Schedule, ScheduleConfig

SCHEDULES = "schedules"


class Schedules(Group[M]):
    @one
    def apply(self, config: ScheduleConfig) -> Flow[Schedule]:
        """Creates or updates the schedule named ``job_config.name``. Packs and uploads the code now: apply again after
        you change it."""
        name = config.job_config.name
        if name is None:
            raise InvalidRequest("The schedule has no name.", remedy="Set job_config.name.", field="job_config.name")
        job = yield from ship_code(self._api, config.job_config)
        ready = config.model_copy(update={"job_config": job})
        return (yield from self._api.call("PUT", path_of(SCHEDULES, name), Schedule, body=ready))

    @one
    def get(self, ref: str, *, project: str | None = None) -> Flow[Schedule]:
        return (yield from self._api.call("GET", path_of(SCHEDULES, ref), Schedule, params={"project": project}))

    @many
    def list(
        self, *, name: str | None = None, project: str | None = None, page_size: int = lists.PAGE_SIZE
    ) -> Stream[Schedule]:
        return lists.pages(self._api, path_of(SCHEDULES), Schedule, page_size=page_size, name=name, project=project)

    @one
    def pause(self, ref: str, *, project: str | None = None) -> Flow[Schedule]:
        path, params = path_of(SCHEDULES, ref, "pause"), {"project": project}
        return (yield from self._api.call("POST", path, Schedule, params=params))

    @one
    def resume(self, ref: str, *, project: str | None = None) -> Flow[Schedule]:
        path, params = path_of(SCHEDULES, ref, "resume"), {"project": project}
        return (yield from self._api.call("POST", path, Schedule, params=params))

    @one
    def run(self, ref: str, *, project: str | None = None, idempotency_key: str | None = None) -> Flow[Job]:
        """Starts one job of the schedule now."""
        path, params = path_of(SCHEDULES, ref, "run"), {"project": project}
        return (yield from self._api.call("POST", path, Job, params=params, key=idempotency_key))

    @one
    def delete(self, ref: str, *, project: str | None = None) -> Flow[None]:
        """Deletes the schedule. Its jobs stay."""
        path, params = path_of(SCHEDULES, ref), {"project": project}
        return (yield from self._api.call("DELETE", path, type(None), params=params))
