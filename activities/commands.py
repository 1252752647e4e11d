"""Commands to a cluster's head: written to the records here, fetched by the agent's long poll, and answered to the API,
which completes the activity. The control plane never connects to a node."""

from __future__ import annotations

from typing import Any

from temporalio import activity
from temporalio.exceptions import ApplicationError

from heliostat.models.agents import CommandKind
from heliostat.models.common import Model
from store.commands import put_command
from store.database import Database


class CommandRequest(Model):
    """``id`` is stable over retries: the agent executes it once. ``args`` hold no secret, only references."""

    id: str
    cluster_id: str
    node_id: str
    kind: CommandKind
    args: dict[str, Any] = {}


class CommandActivities:
    def __init__(self, db: Database) -> None:
        self._db = db

    @activity.defn
    async def run_command(self, command: CommandRequest) -> dict[str, Any]:
        """Completed asynchronously, by the API, when the agent reports the command's result. Fails with type
        ``command_failed`` (final) when the agent could not execute it."""
        stored = await put_command(
            self._db,
            command.id,
            command.cluster_id,
            command.node_id,
            command.kind,
            command.args,
            activity.info().task_token,
        )
        if stored is None:
            activity.raise_complete_async()
        if not stored.get("ok"):
            raise ApplicationError(
                str(stored.get("error") or "the agent gave no reason"),
                type="command_failed",
                non_retryable=not stored.get("retryable"),
            )
        return dict(stored.get("result") or {})
