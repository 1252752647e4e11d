"""Every setting of the server processes, read once where a process starts and passed down."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

SLOW_REGISTER_S = 900.0
"""Boot, docker, and an image of 10 GB at some 25 MB/s, which is what one gets of a registry on a small machine; or
the packages of a Python with Ray."""


class Settings(BaseSettings):
    """Environment variables ``HELIOSTAT_<NAME>``. Temporal's address, TLS and API key are not here: they come
    by ``temporalio.envconfig`` (``TEMPORAL_ADDRESS``, ``TEMPORAL_API_KEY``, ``TEMPORAL_TLS_*``, profiles)."""

    model_config = SettingsConfigDict(env_prefix="HELIOSTAT_", extra="ignore")

    home: Path = Field(default_factory=lambda: Path.home() / ".heliostat")
    """All state of the embedded stack."""
    database_url: str = ""
    """SQLAlchemy URL; default: SQLite file ``records.db`` in ``home``. Two or more APIs need PostgreSQL."""
    api_host: str = "127.0.0.1"
    api_port: int = 8700
    """0: any free one."""
    api_url: str = ""
    """How users and nodes reach the API; default: ``http://<api_host>:<api_port>``."""
    api_ca_file: Path | None = None
    """PEM file: whom the certificate of ``api_url`` must be signed by (or that certificate itself), for nodes' agents,
    which then trust nobody else; default: whom their system trusts."""
    api_processes: int = 1
    """How many APIs share the records; more than 1 refuses to start on SQLite."""
    temporal_port: int = 7233
    ui_port: int = 8233
    bucket_port: int = 8701
    bucket_url: str = ""
    """The local cloud's bucket; default: ``http://127.0.0.1:<bucket_port>``."""
    bucket_host: str = "127.0.0.1"
    """Where the local cloud's bucket listens."""
    bucket_quota_bytes: int = 0
    """The local bucket takes no more than this, as if its disk were full; 0: the disk's own limit."""
    metrics_host: str = "127.0.0.1"
    """Where the worker's two metrics endpoints listen."""
    metrics_port: int = 0
    """The worker's Prometheus endpoint; 0: any free one (it is in stack.json)."""
    sdk_metrics_port: int = 0
    """The same for the metrics of the Temporal SDK in the worker."""
    task_queue: str = "heliostat"
    secret_key: str = ""
    """Base64 of 32 bytes from which every key is derived; default: ``secret.key`` (0600) in ``home``, made at
    first start."""

    report_interval_s: float = 2.0
    """How often a head reports when nothing changes."""
    silence_s: float = 20.0
    """The monitor asks the cloud about a head that sends nothing for this long while the API receives."""
    monitor_interval_s: float = 2.0
    sweep_interval_s: float = 300.0
    newborn_grace_s: float = 120.0
    """The sweep spares a machine younger than this."""
    deadman_s: float = 1800.0
    """A node without contact to us and without work for this long stops itself."""

    head_start_timeout_s: float = 300.0
    worker_start_timeout_s: float = 300.0
    """From a node's first call until Ray runs there; and where ``register_timeout_s`` does not hold, from its launch to
    that call."""
    register_timeout_s: float | None = None
    """From a machine's launch to its agent's first call. Default: ``SLOW_REGISTER_S`` on a cloud whose machines make
    what Ray runs in when they boot (they pull ``container_image``, or install Ray), unless one of the two above is
    set; elsewhere those two."""
    capacity_timeout_s: float = 900.0
    """How long a cluster waits for machines that its cloud does not have."""
    infrastructure_retry_s: float = 3600.0
    """How long a job is tried again after failures of the infrastructure."""

    prices: Path | None = None
    """CSV file of what machines cost, for dry runs (``runtime/prices.py``); default: ``prices.csv`` in ``home``, if
    there is one."""

    upload_max_bytes: int = 2 * 2**30
    retention_logs_days: float = 30
    retention_uploads_days: float = 30
    retention_records_days: float = 90
    retention_events_days: float = 90
    temporal_retention_days: float = 7

    worker_versioning: str = ""
    """Build id: turns on Temporal's Worker Deployment Versioning for this worker; empty: patches and replay gate."""
    worker_sandbox: bool = False
    """Runs workflows in Temporal's sandbox, which catches what is not deterministic. Every replay of a saved history
    does, and some tests of each kind; in production it would cost each workflow 215 KB instead of
    56 KB and 28 ms of CPU instead of 10 ms (measured, JobWorkflow)."""
    worker_max_cached_workflows: int = 5000
    worker_threads: int = 256
    """Of activities that call a cloud: each waits in a thread of its own, so one that is slow holds up no other."""
    worker_shutdown_s: float = 20.0
    """How long a worker that is stopped lets running activities finish; what does not is tried again elsewhere."""
    log_format: str = "text"
    """``text`` or ``json``."""
    log_level: str = "INFO"
    otel_endpoint: str = ""
    """OTLP/HTTP endpoint for traces; empty: none."""

    aws_endpoint_url: str = ""
    """For every service of every AWS cloud, instead of AWS's own addresses: for tests, and for private endpoints."""
    gcp_endpoint_url: str = ""
    """The same for Google's: Compute Engine, Cloud Storage, STS and IAM Credentials."""

    local_isolation: str = "auto"
    """``namespace``, ``process`` or ``auto`` (namespaces where the kernel lets an ordinary user make one)."""

    balancer_host: str = "127.0.0.1"
    """Where the local cloud's load balancers listen. This, the two below and whether there is a certificate hold for
    services that are new: a URL stays the same for the service's life."""
    balancer_public_host: str = ""
    """How people call that host; default: ``balancer_host``, or this machine's name if that is any address."""
    balancer_ports: str = Field(default="", pattern=r"^(\d{1,5}-\d{1,5})?$")
    """``first-last``: ports that services get, e.g. what a firewall lets through; default: free ones from 61000 on."""
    balancer_cert_file: Path | None = None
    """PEM file, with its chain: services' URLs are ``https://``. Without, TLS works on the same port with a certificate
    that we sign ourselves."""
    balancer_key_file: Path | None = None

    @property
    def records_url(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.home / 'records.db'}"

    @property
    def public_api_url(self) -> str:
        """How users and nodes reach the API."""
        return self.api_url or f"http://{self.api_host}:{self.api_port}"

    @property
    def public_bucket_url(self) -> str:
        """How users and nodes reach the local cloud's bucket."""
        return self.bucket_url or f"http://127.0.0.1:{self.bucket_port}"


def misspelt(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables whose names are almost those of settings → the one that is probably meant. The others belong to
    the client, to nodes and to the parts of a stack."""
    names = [f"HELIOSTAT_{name.upper()}" for name in Settings.model_fields]
    ours = [name for name in environ if name.startswith("HELIOSTAT_") and name not in names]
    near = {name: difflib.get_close_matches(name, names, n=1, cutoff=0.9) for name in ours}
    return {name: found[0] for name, found in near.items() if found}
