"""The newest report of every node, written in batches."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import structlog

from api.agents.fleet import CallingNode
from heliostat.errors import Unavailable
from heliostat.models.agents import ReportRequest
from heliostat.models.clusters import NodeRole
from heliostat.models.common import utcnow
from runtime.telemetry import REPORTS
from store.database import Database
from store.reports import StoredReport, write_reports

log = structlog.get_logger(__name__)

FLUSH_S = 0.5
BEAT_S = 1.0
"""How often we note, without any report, that we can receive reports; must stay well below HEARING_GAP_S."""


@dataclass
class Reports:
    """One transaction for all, together with the note that this API can receive reports."""

    db: Database
    _pending: dict[str, StoredReport] = field(default_factory=dict)
    _wrote_at: float = -1e9

    def add(self, node: CallingNode, body: ReportRequest) -> None:
        REPORTS.labels(role=node.role).inc()
        self._pending[node.id] = StoredReport(
            node_id=node.id,
            cluster_id=node.cluster_id,
            is_head=node.role == NodeRole.HEAD,
            seq=body.seq,
            activity=body.activity,
            doc=body.model_dump(mode="json", exclude={"facts", "seq", "activity", "protocol"}),
            at=utcnow(),
        )

    async def run(self) -> None:
        """Until cancelled. While the records are unreachable, the newest reports wait and nothing notes that this API
        can receive any: silence counts from zero afterwards."""
        failing = False
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                if self._pending or time.monotonic() - self._wrote_at >= BEAT_S:
                    await self.flush()
                failing = False
            except Unavailable as e:
                if not failing:
                    log.warning("reports are not written", error=str(e))
                failing = True

    async def flush(self) -> None:
        taken, self._pending = self._pending, {}
        try:
            async with self.db.begin() as conn:
                await write_reports(conn, list(taken.values()), utcnow())
        except BaseException:
            self._pending = {**taken, **self._pending}
            raise
        self._wrote_at = time.monotonic()
