"""The projection of a workflow's state: events and rows for the records, the page and the search attribute for
Temporal's UI. While the records are unreachable, nothing is lost: the next write carries it all again."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import datetime
from typing import NamedTuple

from temporalio import workflow
from temporalio.exceptions import FailureError

with workflow.unsafe.imports_passed_through():
    from activities.records import Recorded
    from heliostat.models.common import Event, EventLevel
    from runtime.messages.common import STATE, SYSTEM
    from workflows import ids, policies
    from workflows.entity.alarm import Deadline


class Batch(NamedTuple):
    """What one write carries."""

    events: list[Event]
    changed: list[str]
    """Ids of rows of their own: nodes of a cluster, versions of a service."""


class Recorder:
    def __init__(self, resource_id: str, *, shown: str, dirty: bool = False) -> None:
        """``shown``: the state that the search attribute has; "" where it is not known. ``dirty``: write at once."""
        self.dirty = dirty
        """There is something to write."""
        self.changed: dict[str, None] = {}
        self.failures = 0
        """Writes in a row that failed."""
        self.retry_at: datetime | None = None
        self._resource_id = resource_id
        self._events: list[Event] = []
        self._shown = shown

    def event(self, kind: str, message: str, *, level: EventLevel = EventLevel.INFO, actor: str = "") -> None:
        self.dirty = True
        self._events.append(
            Event(
                id="",
                resource_id=self._resource_id,
                at=workflow.now(),
                level=level,
                kind=kind,
                actor=actor or SYSTEM,
                message=message,
            )
        )

    def touch(self, row_id: str) -> None:
        """This row goes along with the next write."""
        self.changed[row_id] = None
        self.dirty = True

    @property
    def held(self) -> bool:
        """The last write failed, and its back-off is not over."""
        return self.retry_at is not None and workflow.now() < self.retry_at

    def deadline(self) -> Deadline | None:
        return (self.retry_at, "write the records again") if self.retry_at is not None else None

    def take(self, revision: int) -> Batch:
        """All pending changes, under this revision. Give the batch to ``write``."""
        self.dirty = False
        batch = Batch(self._events, list(self.changed))
        self._events, self.changed = [], {}
        for index, event in enumerate(batch.events):
            event.id = ids.event_id(self._resource_id, revision, index)
        return batch

    def show(self, state: str, details: str) -> None:
        """In Temporal's UI: the page, and the state that lists are filtered by."""
        workflow.set_current_details(details)
        if self._shown != state:
            self._shown = str(state)
            workflow.upsert_search_attributes([STATE.value_set(str(state))])

    async def write(self, batch: Batch, activity: Awaitable[Recorded]) -> Recorded | None:
        """Awaits the local activity that writes this batch. None: the records are unreachable, and the batch goes
        along with the next write, under a greater revision."""
        try:
            recorded = await activity
        except FailureError:  # see policies.RECORD
            self.dirty = True
            self.changed = {**dict.fromkeys(batch.changed), **self.changed}
            self._events = batch.events + self._events
            self.failures += 1
            wait = policies.rewrite_after(self.failures)
            self.retry_at = workflow.now() + wait
            workflow.logger.error("records unreachable, next write in %d s", wait.total_seconds())
            return None
        self.retry_at, self.failures = None, 0
        return recorded
