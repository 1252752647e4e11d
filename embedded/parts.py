"""What the embedded stack is made of: each part's command line, environment, and how it tells that it is ready."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from embedded.supervisor import Part, say
from heliostat.errors import InfrastructureError
from runtime.home import Home
from runtime.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
"""The checkout or image that this code runs from."""

VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

SEARCH_ATTRIBUTES = ("HeliostatKind", "HeliostatState", "HeliostatProject", "HeliostatName")
"""``runtime.messages.common.SEARCH_ATTRIBUTES`` by name (a test compares): importing the SDK for them would double the
supervisor's start-up and memory."""

TEMPORAL = str(Path(sys.executable).with_name("temporal"))

WORKER_STOP_S = 25.0
"""More than the worker's own grace (``settings.worker_shutdown_s``), which ends first."""


class Layout:
    """Where each part of one stack listens; fixed while it runs."""

    def __init__(self, settings: Settings, home: Home, ports: dict[str, int]) -> None:
        self.settings = settings
        self.home = home
        self.ports = ports
        # "any address" is no address to call
        near = "127.0.0.1" if settings.api_host in ("0.0.0.0", "::", "") else settings.api_host  # noqa: S104
        self.api_here = f"http://{near}:{ports['api']}"
        self.api_url = settings.api_url or self.api_here
        self.bucket_url = settings.bucket_url or f"http://127.0.0.1:{ports['bucket']}"
        self.temporal_address = f"127.0.0.1:{ports['temporal']}"
        self.ui_url = f"http://127.0.0.1:{ports['ui']}"

    def state(self) -> dict[str, Any]:
        """The lasting part of ``stack.json``."""
        return {
            "home": str(self.home.path),
            "api_url": self.api_url,
            "temporal_address": self.temporal_address,
            "ui_url": self.ui_url,
            "bucket_url": self.bucket_url,
            "metrics_urls": {
                "api": f"{self.api_here}/metrics",
                "worker": f"http://127.0.0.1:{self.ports['metrics']}/metrics",
                "worker_sdk": f"http://127.0.0.1:{self.ports['sdk_metrics']}/metrics",
            },
            "token_file": str(self.home.token_file),
            "ports": self.ports,
        }

    def environment(self, part: str) -> dict[str, str]:
        return base_environment(self.home) | {
            "TEMPORAL_ADDRESS": self.temporal_address,
            "HELIOSTAT_PART": part,
            "HELIOSTAT_API_PORT": str(self.ports["api"]),
            "HELIOSTAT_API_URL": self.api_url,
            "HELIOSTAT_TEMPORAL_PORT": str(self.ports["temporal"]),
            "HELIOSTAT_UI_PORT": str(self.ports["ui"]),
            "HELIOSTAT_BUCKET_PORT": str(self.ports["bucket"]),
            "HELIOSTAT_BUCKET_URL": self.bucket_url,
            "HELIOSTAT_METRICS_PORT": str(self.ports["metrics"]),
            "HELIOSTAT_SDK_METRICS_PORT": str(self.ports["sdk_metrics"]),
        }


def base_environment(home: Home) -> dict[str, str]:
    """Ours, but Temporal is the embedded one, whatever profile the operator has for other Temporals."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TEMPORAL_")}
    return env | {
        "PATH": f"{Path(sys.executable).parent}:{env.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "TEMPORAL_CONFIG_FILE": os.devnull,
        "HELIOSTAT_HOME": str(home.path),
    }


def parts(layout: Layout) -> list[Part]:
    """In the order of their start; stopped the other way round."""
    python = sys.executable
    bucket, worker = f"http://127.0.0.1:{layout.ports['bucket']}", layout.state()["metrics_urls"]["worker"]
    return [
        _part(layout, "temporal", temporal_argv(layout), _answers(f"{layout.ui_url}/api/v1/namespaces/default")),
        _part(layout, "bucket", [python, "-m", "clouds.local.bucket.server"], _answers(f"{bucket}/healthz")),
        _part(layout, "api", [python, "server.py"], _answers(f"{layout.api_here}/readyz")),
        # People wait for the API's answers, nobody for a workflow's next step: the worker gives way.
        _part(layout, "worker", ["nice", "-n", "5", python, "worker.py"], _answers(worker), stop_s=WORKER_STOP_S),
    ]


def _part(
    layout: Layout, name: str, argv: list[str], is_ready: Callable[[], Awaitable[bool]], stop_s: float = 10
) -> Part:
    log = layout.home.logs / f"{name}.log"
    return Part(name, argv, layout.environment(name), log, ROOT, is_ready, stop_s=stop_s)


def temporal_argv(layout: Layout) -> list[str]:
    """The dev server on one SQLite file, on loopback. Its two costly settings are measured: WAL halves
    the cost of a commit, and the poll rate takes task dispatch from 37 to 3 ms."""
    return [
        TEMPORAL,
        "server",
        "start-dev",
        *("--db-filename", str(layout.home.temporal_db)),
        *("--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL"),
        *("--dynamic-config-value", "history.transferProcessorMaxPollRPS=1000"),
        *("--dynamic-config-value", "system.forceSearchAttributesCacheRefreshOnRead=true"),
        *(arg for name in SEARCH_ATTRIBUTES for arg in ("--search-attribute", f"{name}=Keyword")),
        *("--ip", "127.0.0.1", "--port", str(layout.ports["temporal"])),
        *("--ui-ip", "127.0.0.1", "--ui-port", str(layout.ports["ui"]), "--ui-disable-news-fetch"),
        *("--log-level", "warn", "--log-format", "json" if layout.settings.log_format == "json" else "text"),
    ]


def _answers(url: str) -> Callable[[], Awaitable[bool]]:
    """Asks a part of this machine; 2xx = ready."""
    # No proxy of the environment: it does not know our loopback.
    client = httpx.AsyncClient(trust_env=False, timeout=2)

    async def ask() -> bool:
        try:
            return (await client.get(url)).is_success
        except httpx.HTTPError:
            return False

    return ask


def set_retention(layout: Layout) -> None:
    """How long the embedded Temporal keeps ended workflows; elsewhere that is the namespace owner's to decide.

    Raises:
        InfrastructureError: Temporal did not take it.
    """
    hours = max(24, round(layout.settings.temporal_retention_days * 24))  # the server's own minimum is a day
    address = ("--address", layout.temporal_address, "--namespace", "default")
    done = subprocess.run(
        [TEMPORAL, "operator", "namespace", "update", "--retention", f"{hours}h", *address],
        env=layout.environment("retention"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InfrastructureError(
            f"Temporal rejected the retention of {hours} h: {done.stderr.strip()}",
            remedy="Change HELIOSTAT_TEMPORAL_RETENTION_DAYS.",
            resource="temporal",
        )


def migrate(layout: Layout) -> None:
    """Brings the records to this code's schema; the command saves them first (``<home>/backups``).

    Raises:
        InfrastructureError: it failed; the records are as they were.
    """
    done = subprocess.run(
        [sys.executable, "-m", "store.migrate"],
        cwd=ROOT,
        env=layout.environment("migrate"),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InfrastructureError(
            f"the records of {layout.home.path} could not be migrated; they are unchanged:\n{done.stderr[-4000:]}",
            remedy="Go back to the previous version, or report this; a copy is in the home's backups.",
            resource=str(layout.home.path),
        )
    say(done.stdout.strip())
