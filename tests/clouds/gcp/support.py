"""What the tests of the Google Cloud share: its fake, served once for each, and clouds that talk to it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from google.auth.credentials import AnonymousCredentials

from clouds.gcp.account.session import Endpoints, Session
from clouds.gcp.account.throttle import Backoff
from clouds.gcp.machines.compute_engine import GcpMachines
from heliostat.models.clouds import GcpConfig
from tests.clouds.support import OURS, Cloud
from tests.lab.gce import GceFake, Stage, start

ACCOUNT = "heliostat@acme-prod-1.iam.gserviceaccount.com"
PROVIDER = "projects/123456789/locations/global/workloadIdentityPools/heliostat/providers/control-plane"


def config(**fields: Any) -> GcpConfig:
    given = {
        "project": "acme-prod-1",
        "region": "us-central1",
        "zones": ["us-central1-a", "us-central1-b"],
        "workload_identity_provider": PROVIDER,
        "service_account": ACCOUNT,
        "bucket": "acme-heliostat",
    }
    return GcpConfig.model_validate(given | fields)


def session(url: str, **fields: Any) -> Session:
    """As nobody: the fake asks for no token. Waits nowhere."""
    return Session(
        "acme-prod-1",
        config(**fields).service_account,
        AnonymousCredentials(),
        Endpoints.fake(url),
        Backoff(sleep=lambda _s: None),
    )


def machines(url: str, **fields: Any) -> GcpMachines:
    return GcpMachines(config(**fields), session(url, **fields), OURS, poll_s=0.02)


def booting(fake: GceFake, boots: Path) -> None:
    """Each instance of the fake writes a line when it boots, as the start-up script of ``Cloud.spec`` would."""
    lock = threading.Lock()

    def boot(instance: dict[str, Any]) -> None:
        instance["_console"] = "hello from boot\n"
        with lock, boots.open("a") as f:
            f.write("boot\n")

    fake.boot = boot


def served(fake: GceFake) -> str:
    """URL of the fake, at the one server that all tests of this process share: starting one takes a tenth of a
    second."""
    stage, url = _stage()
    stage.fake = fake
    return url


@functools.cache
def _stage() -> tuple[Stage, str]:
    stage = Stage(GceFake())
    return stage, start(stage)[0]


@contextmanager
def gcp_cloud(folder: Path, **fields: Any) -> Iterator[tuple[Cloud, GceFake]]:
    fake = GceFake()
    booting(fake, folder / "boots")
    yield Cloud(machines(served(fake), **fields), folder / "boots"), fake
