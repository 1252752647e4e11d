"""Deletes what is older than the retention settings: records, events, logs, uploads, remains of local machines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

import structlog
from temporalio import activity
from temporalio.exceptions import ApplicationError

from clouds.contract.bucket import Bucket, StoredObject
from clouds.contract.machines import Machines
from heliostat.errors import CloudError
from heliostat.models.common import utcnow
from runtime.settings import Settings
from store import retention
from store.database import Database

log = structlog.get_logger(__name__)
T = TypeVar("T")


class RetentionActivities:
    def __init__(
        self,
        db: Database,
        machines: Mapping[str, Machines],
        buckets: Mapping[str, Bucket],
        settings: Settings,
        cloud_names: Mapping[str, str] | None = None,
    ) -> None:
        self._db = db
        self._machines = machines
        self._buckets = buckets
        self._settings = settings
        self._cloud_names = cloud_names or {}

    @activity.defn(name="keep_house")
    async def apply_retention(self) -> dict[str, int]:
        """Counts what was deleted. A cloud that refuses or is out of reach does not stop the others: the error names it
        when they are done."""
        now, settings = utcnow(), self._settings
        counts: dict[str, int] = {}
        failed: dict[str, CloudError] = {}
        await self._delete_records(now, counts)
        await self._prune_machines(counts, failed)
        await self._delete_logs(now - timedelta(days=settings.retention_logs_days), counts, failed)
        await self._delete_uploads(now - timedelta(days=settings.retention_uploads_days), counts, failed)
        if failed:
            why = "; ".join(f"{self._cloud_names.get(id, id)}: {error}" for id, error in failed.items())
            raise ApplicationError(
                f"Retention could not be applied to all clouds: {why}", type="cloud_error", non_retryable=True
            )
        return counts

    async def _delete_records(self, now: datetime, counts: dict[str, int]) -> None:
        settings = self._settings
        while True:
            deleted = await retention.delete_old(
                self._db,
                records_before=now - timedelta(days=settings.retention_records_days),
                events_before=now - timedelta(days=settings.retention_events_days),
            )
            activity.heartbeat()
            for table, number in deleted.items():
                counts[table] = counts.get(table, 0) + number
            if not any(deleted.values()):
                return

    async def _prune_machines(self, counts: dict[str, int], failed: dict[str, CloudError]) -> None:
        older_than_s = max(self._settings.retention_logs_days, 1.0) * 86_400
        for cloud_id, machines in list(self._machines.items()):
            pruned = await self._unless_failed(cloud_id, failed, partial(machines.forget_ended, older_than_s))
            counts["machines"] = counts.get("machines", 0) + len(pruned or [])
            activity.heartbeat()

    async def _delete_logs(self, before: datetime, counts: dict[str, int], failed: dict[str, CloudError]) -> None:
        for cloud_id, cluster_id in await retention.logs_before(self._db, before):
            bucket = self._buckets.get(cloud_id)
            if bucket is not None and cloud_id not in failed:
                logs = partial(_delete, bucket, f"logs/{cluster_id}/", lambda _: True)
                deleted = await self._unless_failed(cloud_id, failed, logs)
                if deleted is not None:
                    counts["log objects"] = counts.get("log objects", 0) + deleted
                    await retention.forget_logs(self._db, [cluster_id])
            activity.heartbeat()

    async def _delete_uploads(self, before: datetime, counts: dict[str, int], failed: dict[str, CloudError]) -> None:
        in_use = await retention.uploads_in_use(self._db)

        def is_old(upload: StoredObject) -> bool:
            digest = upload.key.rsplit("/", 1)[-1].removesuffix(".zip")
            return upload.modified_at < before and digest not in in_use

        for cloud_id, bucket in list(self._buckets.items()):
            if cloud_id not in failed:
                deleted = await self._unless_failed(cloud_id, failed, partial(_delete, bucket, "uploads/", is_old))
                counts["uploads"] = counts.get("uploads", 0) + (deleted or 0)
                activity.heartbeat()

    async def _unless_failed(self, cloud_id: str, failed: dict[str, CloudError], work: Callable[[], T]) -> T | None:
        """What ``work`` gives, on a thread; None, and noted in ``failed``, when the cloud fails."""
        try:
            return await asyncio.to_thread(work)
        except CloudError as e:
            log.error("retention skips a cloud", cloud=self._cloud_names.get(cloud_id, cloud_id), why=str(e))
            failed[cloud_id] = e
            return None


def _delete(bucket: Bucket, prefix: str, which: Callable[[StoredObject], bool]) -> int:
    keys = [o.key for o in bucket.list(prefix) if which(o)]
    bucket.delete(keys)
    return len(keys)
