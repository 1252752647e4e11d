"""Logs, metrics and traces as they come out of a process."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client import REGISTRY

from clouds.contract.balancer import BackendCounters
from embedded.parts import ROOT
from runtime.telemetry import RequestMetrics, forget_endpoint, hide_secrets, render_metrics, set_endpoint_counters
from tests.embedded.conftest import StackUnderTest, eventually

SECRETS = ["helio_Zq8vXw0aaaaaaaaaaaa", "hunter2hunter2", "deadbeefcafebabe0123"]

LOGGING = """
import logging, sys, structlog
from runtime.settings import Settings
from runtime.telemetry import setup
token, password, signature = sys.stdin.read().split()
setup(Settings(log_format=sys.argv[1]), "test")
log = structlog.get_logger("ours")
structlog.contextvars.bind_contextvars(resource="job_1")
log.info("by key", token=token, nested={"env_vars": {"A": password}, "list": [{"api_key": signature}]})
log.warning(f"in text: Authorization: Bearer {token} password={password}")
log.info("a URL", url=f"http://127.0.0.1:1/objects/x?expires=1&signature={signature}&n=1")
logging.getLogger("theirs").warning("dsn %s", f"postgresql://user:{password}@host/db")
try:
    raise ValueError(f"token={token}")
except ValueError:
    log.exception("with a traceback")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_gets_into_a_log(form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGGING, form],
        cwd=ROOT,
        input=" ".join(SECRETS),
        capture_output=True,
        text=True,
        check=True,
    )
    text = done.stderr
    assert not [secret for secret in SECRETS if secret in text], text
    assert text.count("********") >= 7
    assert "expires=1" in text
    assert "postgresql://user:" in text
    assert text.count("job_1") >= 5, "each line names its resource"
    if form == "json":
        lines = [json.loads(line) for line in text.splitlines()]
        assert [line["event"] for line in lines][:1] == ["by key"]
        assert lines[0]["nested"]["list"] == [{"api_key": "********"}]
        assert "ValueError" in lines[-1]["exception"]


def test_what_is_no_secret_is_left_alone() -> None:
    event = {"event": "the token was refused", "tokens": 3, "keyboard": "x", "node": "nd_1", "path": "/v1/tokens"}
    assert hide_secrets(None, "", dict(event)) == event


def test_a_workflows_line_names_its_workflow() -> None:
    code = (
        "import logging; from runtime.settings import Settings; from runtime.telemetry import setup;"
        "setup(Settings(log_format='json'), 'x');"
        "logging.getLogger('temporalio.activity').warning('slow',"
        " extra={'temporal_activity': {'workflow_id': 'cl_1', 'activity_type': 'launch_node', 'attempt': 2}})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stderr)
    assert (line["resource"], line["activity"], line["attempt"]) == ("cl_1", "launch_node", 2)


async def test_requests_are_counted_by_route_not_by_path() -> None:
    class Route:
        path = "/v1/test/{id}"

    async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        scope["route"] = Route()
        await send({"type": "http.response.start", "status": 404})

    async def nothing(*_: Any) -> Any:
        return {}

    labels = {"method": "GET", "route": "/v1/test/{id}", "status": "404"}
    for number in range(3):
        await RequestMetrics(app)({"type": "http", "method": "GET", "path": f"/v1/test/{number}"}, nothing, nothing)
    assert REGISTRY.get_sample_value("heliostat_api_request_seconds_count", labels) == 3
    assert b"/v1/test/{id}" in render_metrics()[0]


@pytest.fixture
def collector() -> Iterator[tuple[str, Callable[[], list[Span]]]]:
    """Takes OTLP over HTTP; gives its address and what came."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            spans.extend(s for r in request.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", lambda: list(spans)
    server.shutdown()
    thread.join()


@pytest.mark.long
def test_a_trace_goes_from_the_request_to_the_cloud_call(
    make_stack: Callable[..., StackUnderTest], collector: tuple[str, Callable[[], list[Span]]]
) -> None:
    url, spans = collector
    stack = make_stack(HELIOSTAT_OTEL_ENDPOINT=url, OTEL_BSP_SCHEDULE_DELAY="200").up()
    stack.api("POST", "/v1/clusters", json={"name": "traced"}).raise_for_status()

    def chain() -> list[str]:
        by_id = {span.span_id: span for span in spans()}
        span = next((s for s in by_id.values() if s.name == "fake.launch"), None)
        names = []
        while span is not None:
            names.append(span.name)
            span = by_id.get(span.parent_span_id)
        return names if names and "POST" in names[-1] else []

    names = eventually(chain)
    assert names[0] == "fake.launch"
    assert "RunActivity:launch_node" in names
    assert "StartWorkflow:ClusterWorkflow" in names
    assert names[-1] == "POST /v1/clusters"


def test_a_load_balancers_counters_are_served_as_last_heard() -> None:
    def sample(name: str, **labels: str) -> float | None:
        known = {"service_id": "svc_1", "service": "shop", "project": "default"}
        return REGISTRY.get_sample_value(f"heliostat_endpoint_{name}", known | labels)

    def hear(*counters: BackendCounters, **versions: str) -> None:
        set_endpoint_counters("svc_1", counters, name="shop", project="default", version_names=versions)

    hear(
        BackendCounters(backend_id="cl_1", version_id="sv_1", requests={"200": 17, "502": 1}),
        BackendCounters(backend_id="cl_2", version_id="sv_2", up=False),
        sv_1="v1",
    )
    assert sample("requests_total", version="v1", cluster="cl_1", code="200") == 17
    assert sample("requests_total", version="v1", cluster="cl_1", code="502") == 1
    assert sample("backend_up", version="v1", cluster="cl_1") == 1
    assert sample("backend_up", version="sv_2", cluster="cl_2") == 0, "a version without a name has its id"
    # The load balancer has started anew, and one backend is gone.
    hear(BackendCounters(backend_id="cl_1", version_id="sv_1", requests={"200": 2}))
    assert sample("requests_total", version="sv_1", cluster="cl_1", code="200") == 2
    assert sample("requests_total", version="v1", cluster="cl_1", code="200") is None
    assert sample("backend_up", version="sv_2", cluster="cl_2") is None
    assert b'heliostat_endpoint_backend_up{cluster="cl_1",project="default",service="shop",' in render_metrics()[0]
    forget_endpoint("svc_1")
    assert b"shop" not in render_metrics()[0]


def test_services_and_versions_of_the_same_name_are_told_apart_or_added_up() -> None:
    """Two projects' services of one name; and in one of them two versions of one name on one cluster."""
    one = BackendCounters(backend_id="cl_1", version_id="sv_1", requests={"200": 3})
    same = BackendCounters(backend_id="cl_1", version_id="sv_2", requests={"200": 4, "404": 1}, up=False)
    set_endpoint_counters("svc_1", [one, same], name="shop", project="a", version_names={"sv_1": "v", "sv_2": "v"})
    set_endpoint_counters("svc_2", [one], name="shop", project="b", version_names={"sv_1": "v"})
    try:
        lines = [line for line in render_metrics()[0].decode().splitlines() if 'service="shop"' in line]
        assert len({line.rpartition(" ")[0] for line in lines}) == len(lines) == 5, "no series twice"
        labels = {"service": "shop", "version": "v", "cluster": "cl_1"}
        first, second = (
            labels | {"service_id": "svc_1", "project": "a"},
            labels | {"service_id": "svc_2", "project": "b"},
        )
        counted = "heliostat_endpoint_requests_total"
        assert REGISTRY.get_sample_value(counted, first | {"code": "200"}) == 7
        assert REGISTRY.get_sample_value(counted, second | {"code": "200"}) == 3
        assert REGISTRY.get_sample_value("heliostat_endpoint_backend_up", first) == 0
        assert REGISTRY.get_sample_value("heliostat_endpoint_backend_up", second) == 1
        forget_endpoint("svc_1")
        assert REGISTRY.get_sample_value(counted, second | {"code": "200"}) == 3
    finally:
        forget_endpoint("svc_1")
        forget_endpoint("svc_2")
