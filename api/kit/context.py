"""What every route works with, typed and frozen: FastAPI gives it to each route as the dependency ``Ctx``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from temporalio.client import Client

from api.kit.callers import Callers
from api.kit.tasks import BackgroundTasks, StartedBatch
from api.kit.temporal import calling
from clouds.contract.bucket import Bucket
from clouds.instance_types import Offer
from clouds.registry import Vendors
from heliostat.errors import Unavailable
from runtime.keys import Keys
from runtime.settings import Settings
from store.database import Database
from store.outbox import Outbox

Offers = Mapping[str, Offer]
"""By provider. A provider without one (the local cloud) has machines without instance types."""


@dataclass(frozen=True)
class Context:
    settings: Settings
    db: Database
    keys: Keys
    temporal: Client
    buckets: Mapping[str, Bucket]
    """By cloud id."""
    bundles: Mapping[str, bytes]
    """The agent's zips that machines may fetch, by sha256."""
    offers: Offers
    vendors: Vendors | None
    """Of the clouds that can be registered; None: registration is refused."""
    callers: Callers
    tasks: BackgroundTasks
    started: StartedBatch

    @classmethod
    def of(
        cls,
        settings: Settings,
        db: Database,
        keys: Keys,
        temporal: Client,
        *,
        buckets: Mapping[str, Bucket],
        bundles: Mapping[str, bytes] | None = None,
        offers: Offers | None = None,
        vendors: Vendors | None = None,
    ) -> Context:
        """With the parts that belong to one API process."""
        tasks = BackgroundTasks()
        return cls(
            settings=settings,
            db=db,
            keys=keys,
            temporal=temporal,
            buckets=buckets,
            bundles={} if bundles is None else bundles,  # live: may be empty now
            offers=offers or {},
            vendors=vendors,
            callers=Callers(db),
            tasks=tasks,
            started=StartedBatch(db, tasks),
        )

    @property
    def outbox(self) -> Outbox:
        return Outbox(self.db, self.temporal, self.settings.task_queue, calling)


async def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(context_of)]


async def _vendors(ctx: Ctx) -> Vendors:
    if ctx.vendors is None:
        raise Unavailable("This API was started without cloud vendors.", remedy="Start it with server.py.")
    return ctx.vendors


FromVendors = Annotated[Vendors, Depends(_vendors)]
