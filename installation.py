"""What both processes of the control plane share: records, keys, and the clouds by id. Only this file, ``server.py``
and ``worker.py`` name a concrete cloud."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clouds.boot.user_data import Bundles
from clouds.contract.balancer import LoadBalancer
from clouds.contract.bucket import Bucket
from clouds.contract.machines import Machines
from clouds.local.balancer.traefik import LocalBalancer
from clouds.local.bucket.bucket import LocalBucket
from clouds.local.machines.processes import LocalMachines
from clouds.local.setup import checks
from clouds.registry import Clouds, OpenCloud, Registered, Vendors, Verify
from clouds.vendors import InstalledVendors
from heliostat.errors import Unavailable
from heliostat.models.clouds import Provider
from runtime import telemetry
from runtime.home import Home, write_private
from runtime.keys import Keys, load_or_create
from runtime.settings import Settings
from store.bootstrap import ensure_first
from store.clouds import living, register_cloud
from store.database import Database, latest_revision


@dataclass(frozen=True)
class Installation:
    settings: Settings
    keys: Keys
    db: Database
    bundles: Bundles
    machines: Mapping[str, Machines]
    """This and the next ones by cloud id; live, see ``clouds.registry``."""
    buckets: Mapping[str, Bucket]
    balancers: Mapping[str, LoadBalancer] = field(default_factory=dict)
    cloud_names: Mapping[str, str] = field(default_factory=dict)
    verifies: Mapping[str, Verify] = field(default_factory=dict)
    vendors: Vendors | None = None


@asynccontextmanager
async def open_installation(settings: Settings) -> AsyncIterator[Installation]:
    """Opens the records and the clouds. The first start makes the first organization and its admin's token, in
    ``<home>/admin.token``; several processes may start at once.

    Raises:
        Unavailable: the records do not answer, or are at another schema than this code's.
    """
    home = Home(settings.home)
    home.create()
    keys = load_or_create(settings.home, settings.secret_key)
    db = Database(settings.records_url)
    try:
        await _require_current_schema(db)
        provider = Provider.FAKE if os.environ.get("HELIOSTAT_FAKE_CLOUD") else Provider.LOCAL
        machines = _machines(provider, settings)
        capabilities = await asyncio.to_thread(machines.capabilities)
        await ensure_first(db, lambda token: write_private(home.token_file, token + "\n"))
        cloud_id = await register_cloud(db, provider.value, provider, capabilities)
        assert cloud_id is not None  # there is an organization now
        own = OpenCloud(
            name=provider.value,
            machines=telemetry.traced(machines, provider.value, settings),
            bucket=LocalBucket(settings.home / "bucket", settings.public_bucket_url, keys.bucket_key()),
            balancer=telemetry.traced(_balancer(provider, settings), provider.value, settings),
            verify=lambda: checks(settings.home, settings.balancer_host, settings.balancer_ports),
        )
        vendors = InstalledVendors(settings, keys)
        clouds = Clouds(lambda: _registered(db), vendors.open, {cloud_id: own})
        await clouds.refresh()
        async with clouds.kept_fresh():
            yield Installation(
                settings=settings,
                keys=keys,
                db=db,
                bundles=Bundles(settings.home / "bundles"),
                machines=clouds.machines,
                buckets=clouds.buckets,
                balancers=clouds.balancers,
                cloud_names=clouds.names,
                verifies=clouds.verifies,
                vendors=vendors,
            )
    finally:
        await db.dispose()


async def _registered(db: Database) -> list[Registered]:
    return [Registered(r.id, r.name, r.organization_id, r.cloud, r.why) for r in await living(db)]


def _machines(provider: Provider, settings: Settings) -> Machines:
    """The machines of this host; with ``HELIOSTAT_FAKE_CLOUD`` set (tests, load), machines that are not real. A
    directory there: their boots are handed over to fake agents in another process."""
    if provider is Provider.FAKE:
        from clouds.fake.agent import handed_over
        from clouds.fake.machines import FakeMachines

        folder = os.environ["HELIOSTAT_FAKE_CLOUD"]
        latency = json.loads(os.environ.get("HELIOSTAT_FAKE_LATENCY", "{}"))  # seconds by method
        return FakeMachines(boot=handed_over(Path(folder)) if "/" in folder else None, latency_s=latency)
    return LocalMachines(settings.home, settings.local_isolation, sys.executable)


def _balancer(provider: Provider, settings: Settings) -> LoadBalancer:
    if provider is Provider.FAKE:
        from clouds.fake.balancer import FakeBalancer

        return FakeBalancer()
    return LocalBalancer(
        settings.home,
        host=settings.balancer_host,
        public_host=settings.balancer_public_host,
        ports=settings.balancer_ports,
        cert_file=settings.balancer_cert_file,
        key_file=settings.balancer_key_file,
    )


async def _require_current_schema(db: Database) -> None:
    there, ours = await db.schema_revision(), latest_revision()
    if there != ours:
        raise Unavailable(
            f"The records are at schema {there or 'none'}; this code needs {ours}.",
            remedy="Run `python -m store.migrate` (`make up` does), or start the code that they belong to.",
        )
