"""What an operator sees from outside: logs, metrics, traces. Every process sets them up once, first thing.

Metrics are module-level objects, so that activities and routes import and use them; a process serves what
it has counted. Nothing here may ever carry a secret: :func:`hide_secrets` is the last net below the rule that
nobody logs one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import structlog
from opentelemetry import trace
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from temporalio.runtime import PrometheusConfig, Runtime, TelemetryConfig

from runtime.settings import Settings, misspelt

# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────

_READY_BUCKETS = (1, 2, 3, 5, 8, 12, 20, 30, 60, 120, 300, 600, 1800)
_REQUEST_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10, 30)

LAUNCHES = Counter("heliostat_launches", "Machines requested, by cloud and outcome.", ["cloud", "outcome"])
"""``outcome``: ``launched``, or the ``code`` of the CloudError."""
CLUSTER_READY_SECONDS = Histogram(
    "heliostat_cluster_ready_seconds", "From the request for a cluster to RUNNING.", ["cloud"], buckets=_READY_BUCKETS
)
RUNS = Counter("heliostat_runs", "Runs of jobs that ended, by state and cause.", ["state", "cause"])
"""``cause``: a RunCause; empty for success."""
CLUSTERS = Gauge("heliostat_clusters", "Clusters that are not ended, by state.", ["state"])
SWEEP_FOUND = Counter("heliostat_sweep_found", "Machines without an owner that the sweep ended.", ["cloud"])

REQUEST_SECONDS = Histogram(
    "heliostat_api_request_seconds", "HTTP requests answered.", ["method", "route", "status"], buckets=_REQUEST_BUCKETS
)
REPORTS = Counter("heliostat_reports", "Reports of nodes taken in.", ["role"])
COMMANDS_OPEN = Gauge("heliostat_commands_open", "Commands handed to agents or waiting for them.")


class EndpointCounters(Protocol):
    """What a load balancer tells of one backend (``clouds.contract.balancer.BackendCounters``; this layer
    knows no cloud)."""

    @property
    def backend_id(self) -> str: ...

    @property
    def version_id(self) -> str: ...

    @property
    def requests(self) -> Mapping[str, int]: ...

    @property
    def up(self) -> bool: ...


@dataclass(frozen=True)
class _Heard:
    labels: list[str]
    """Id, name and project of the service."""
    counters: list[EndpointCounters]
    versions: dict[str, str]


class EndpointCollector(Collector):
    """``heliostat_endpoint_*``: the load balancers' own counters as last reported, not counted here. So
    they start again when a load balancer does, which Prometheus knows of counters, and go when a backend goes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heard: dict[str, _Heard] = {}
        """By service id: a name is unique only within its project, and may be given again."""

    def set(self, service_id: str, heard: _Heard) -> None:
        with self._lock:
            self._heard[service_id] = heard

    def forget(self, service_id: str) -> None:
        with self._lock:
            self._heard.pop(service_id, None)

    def collect(self) -> Iterator[Metric]:
        """Each set of labels once, whatever names the records gave: a repeated series would make Prometheus refuse the
        whole answer."""
        names = ["service_id", "service", "project", "version", "cluster"]
        sums: Counts[tuple[str, ...]] = Counts()
        is_up: dict[tuple[str, ...], bool] = {}
        with self._lock:
            heard = sorted(self._heard.items())
        for _, of_one in heard:
            for one in of_one.counters:
                labels = (*of_one.labels, of_one.versions.get(one.version_id, one.version_id), one.backend_id)
                is_up[labels] = one.up and is_up.get(labels, True)
                for code, count in sorted(one.requests.items()):
                    sums[*labels, code] += count
        requests = CounterMetricFamily(
            "heliostat_endpoint_requests",
            "Requests that a service's load balancer sent to each cluster, retries included.",
            labels=[*names, "code"],
        )
        up = GaugeMetricFamily(
            "heliostat_endpoint_backend_up",
            "Whether the cluster answers the load balancer's health checks.",
            labels=names,
        )
        for key, count in sums.items():
            requests.add_metric(list(key), count)
        for key, value in is_up.items():
            up.add_metric(list(key), float(value))
        yield requests
        yield up


ENDPOINTS = EndpointCollector()
REGISTRY.register(ENDPOINTS)


def set_endpoint_counters(
    service_id: str,
    counters: Sequence[EndpointCounters],
    *,
    name: str,
    project: str,
    version_names: Mapping[str, str],
) -> None:
    """Serves these counters of one service's load balancer from now on, in place of the last ones.

    Args:
        name, project: of the service, for people.
        version_names: by version id; people know a version by its name.
    """
    ENDPOINTS.set(service_id, _Heard([service_id, name, project], list(counters), dict(version_names)))


def forget_endpoint(service_id: str) -> None:
    """The service has ended: its counters are served no more."""
    ENDPOINTS.forget(service_id)


def render_metrics() -> tuple[bytes, str]:
    """All metrics of this process in Prometheus' text format, and its content type."""
    return generate_latest(REGISTRY), CONTENT_TYPE_LATEST


def temporal_runtime(bind_address: str) -> Runtime:
    """The Temporal SDK's own runtime, serving its metrics at ``http://<bind_address>/metrics``. One a process."""
    metrics = PrometheusConfig(bind_address=bind_address, durations_as_seconds=True, counters_total_suffix=True)
    return Runtime(telemetry=TelemetryConfig(metrics=metrics))


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class RequestMetrics:
    """ASGI middleware: counts and times requests by route pattern (never by path: ids would be labels without end).

    A long poll is timed as any other request; its route has its own label.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            REQUEST_SECONDS.labels(scope["method"], route, str(status)).observe(time.perf_counter() - began)


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────────

_MASK = "********"
_SECRET_KEY = re.compile(
    r"(?i)(^|_|-)(token|secret|password|passwd|authorization|api_?key|secret_key|env_vars|cookie)$"
)
_SECRET_TEXT = re.compile(
    r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"
    r"|((?:token|secret|password|api_?key|sig|signature|x-amz-[a-z-]+|x-goog-[a-z-]+)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;}]{6,}"
    r"|(://[^/\s:@]*:)[^@/\s]+(?=@)"
)


def _scrub(value: Any) -> Any:
    if isinstance(value, str):
        return _SECRET_TEXT.sub(lambda m: next(g for g in m.groups() if g is not None) + _MASK, value)
    if isinstance(value, dict):
        return {k: _MASK if isinstance(k, str) and _SECRET_KEY.search(k) else _scrub(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub(v) for v in value]
    return value


def hide_secrets(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Masks values whose key or shape says that they are secret, at any depth, tracebacks included."""
    return cast(MutableMapping[str, Any], _scrub(dict(event)))


def _temporal_context(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Names the resource of a line that the Temporal SDK or a workflow wrote: workflow id = resource id."""
    record = event.get("_record")
    for kind in ("temporal_workflow", "temporal_activity"):
        info = getattr(record, kind, None)
        if isinstance(info, dict):
            event.setdefault("resource", info.get("workflow_id"))
            if info.get("activity_type"):
                event.setdefault("activity", info["activity_type"])
                event.setdefault("attempt", info.get("attempt"))
    return event


def setup_logging(settings: Settings) -> None:
    """Sends structlog and the standard library's logging to stderr in one format, each line scrubbed of secrets.

    The resource's id is a field: ``structlog.contextvars.bind_contextvars(resource=...)``; in workflows and
    activities it is there by itself.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _temporal_context,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        hide_secrets,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    last: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(allow=[]), *shared],
            # Scrubbed again at the end: a foreign record is formatted (args put in) only there.
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, hide_secrets, last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for noisy in ("alembic", "httpx", "httpcore", "sqlalchemy.engine", "aiosqlite", "botocore", "urllib3"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


# ── traces ───────────────────────────────────────────────────────────────────────────────────────────


def setup_tracing(settings: Settings, service: str) -> None:
    """Sends spans to ``otel_endpoint`` (OTLP over HTTP); without one, spans cost nothing and go nowhere."""
    if not settings.otel_endpoint:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    endpoint = settings.otel_endpoint.rstrip("/")
    if not endpoint.endswith("/v1/traces"):
        endpoint += "/v1/traces"
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    trace.set_tracer_provider(provider)


def trace_requests(app: Any, settings: Settings) -> None:
    """Makes each request of the FastAPI ``app`` a span, of which the workflow's and the cloud's are children."""
    if settings.otel_endpoint:
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(app, excluded_urls="/healthz,/readyz,/metrics,/agent/")


Traced = TypeVar("Traced")


class _Traced:
    def __init__(self, target: Any, name: str) -> None:
        self._target, self._name = target, name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self._target, attribute)
        if not callable(value):
            return value

        def call(*args: Any, **kw: Any) -> Any:
            with trace.get_tracer("heliostat").start_as_current_span(f"{self._name}.{attribute}"):
                return value(*args, **kw)

        return call


def traced(target: Traced, name: str, settings: Settings) -> Traced:
    """``target`` with a span around each synchronous method call, e.g. ``local.launch``; unchanged if nobody traces."""
    return cast(Traced, _Traced(target, name)) if settings.otel_endpoint else target


def setup(settings: Settings, service: str) -> None:
    """Logs and traces of one process; call it first."""
    setup_logging(settings)
    for name, meant in misspelt(os.environ).items():
        structlog.get_logger(__name__).warning("there is no such setting", variable=name, probably_meant=meant)
    setup_tracing(settings, service)
