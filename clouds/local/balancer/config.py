"""What a local load balancer's Traefik is told: its static configuration, and the routes that it watches.

Both are JSON, which is YAML too. How the routes are made:

    router     a header that names a backend → that backend; any other value of it → nothing (503); all the rest → all
    all        weighted over the versions, by health
    version    its clusters in turn, by health
    backend    one server, with health checks of its own: so requests are counted by cluster

A retry starts from the router again, so it meets another cluster or version. With gRPC the same again, over h2c.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from clouds.contract.balancer import Backend, BackendCounters
from clouds.contract.errors import BadConfig
from clouds.local.balancer.supervisor import ROUTES_PATH
from heliostat.models.services import BACKEND_HEADER

ENTRY_POINT, METRICS = "web", "metrics"
"""Names of the two sockets, by which Traefik takes them over (``LISTEN_FDNAMES``)."""

TRIES, TRIES_TO_CONNECT = 6, 8
"""Of a request whose connection broke (or whose backend itself answered 502, which cannot be told apart); of each of
these, to find a backend that takes the connection. Two clusters of which one is dead: under load each try meets the
dead one with probability 1/2, until the health check has found it; the first of them too, by connections that were
kept and are dead: with 3 tries one PUT of 126 failed on a busy machine."""
MAX_REPLAYED_BODY = 64 * 1024
"""Bytes of a request's body that are kept for another try."""
HEALTH_PATH = "/-/healthz"
HEALTH_INTERVAL, HEALTH_TIMEOUT = "1s", "5s"
"""A dead backend refuses the check and is out within a second. One that only does not answer may be starting other
replicas on a busy machine: with a timeout of 1 s such backends lost their traffic, and their callers got 503."""

ROUTES = ("routes.yml", "spare.yml")
"""The same routes twice, in the order in which Traefik reads them, of which the first count. What Traefik cannot parse
it passes over whole, and goes on by what it has; but an empty file is a good one to it, which routes nothing:
somebody's editor, or a full disk, would end the service.

Traefik may read one before we write both and the other after it, so each has a path of its own that tells it."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_ADDRESS = re.compile(r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):(\d{1,5})")


def static(folder: Path, host: str, port: int, metrics_port: int) -> str:
    """``traefik.yml``, which is read once at start: where it listens, and that it watches ``<folder>/routes``.

    Nothing here limits how long a request, a stream or a connection may last: backends and clients do. Paths go
    through as they came, for routes are not protected by their path.
    """
    as_they_came = ("Slash", "BackSlash", "NullCharacter", "Semicolon", "Percent", "QuestionMark", "Hash")
    config = {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        # A dead backend's health check writes a line a second: the file must not grow for ever.
        # ERROR, for of each part of the spare routes it warns at each change that it has it already.
        "log": {"level": "ERROR", "filePath": str(folder / "traefik.log"), "maxSize": 5, "maxBackups": 1},
        "entryPoints": {
            ENTRY_POINT: {
                "address": f"{host}:{port}",
                "http": {
                    "sanitizePath": False,
                    "encodedCharacters": {f"allowEncoded{what}": True for what in as_they_came},
                },
                "transport": {"respondingTimeouts": {"readTimeout": "0s", "writeTimeout": "0s", "idleTimeout": "180s"}},
            },
            METRICS: {"address": f"127.0.0.1:{metrics_port}"},
        },
        "metrics": {
            "prometheus": {
                "entryPoint": METRICS,
                "addEntryPointsLabels": False,
                "addRoutersLabels": False,
                "addServicesLabels": True,
                "buckets": [0.01, 0.1, 1.0, 10.0],
            }
        },
        "providers": {
            "providersThrottleDuration": "20ms",
            "file": {"directory": str(folder / "routes"), "watch": True},
        },
    }
    return json.dumps(config, indent=1) + "\n"


def routes(backends: list[Backend], *, grpc: bool, certificate: tuple[Path, Path]) -> tuple[dict[str, str], list[str]]:
    """The watched files' texts by name, to be written in this order, and the paths that all answer 418 once Traefik
    goes by exactly these (and by these certificate files as they are now: another path is another text, so that Traefik
    reads them again).

    Raises:
        BadConfig: an id or an address that cannot stand in a rule, one cluster twice, or two weights (but for 0) of one
            version.
    """
    _check(backends)
    services: dict[str, Any] = {"none": {"loadBalancer": {"servers": []}}}
    rules: list[tuple[str, int, str]] = []
    for kind in ("http", "grpc"):
        if kind == "grpc" and not (grpc or any(b.grpc for b in backends)):
            continue
        mine = [b for b in backends if kind == "http" or b.grpc]
        more = "" if kind == "http" else " && HeaderRegexp(`Content-Type`, `^application/grpc`)"
        above = 0 if kind == "http" else 500
        # The only one keeps its traffic whatever a check says: there is nobody who could take it.
        several = sum(1 for b in mine if b.weight) > 1
        for b in mine:
            services[service_name(kind, b)] = {"loadBalancer": _server(kind, b, checked=several and b.weight > 0)}
            rules.append((f"Header(`{BACKEND_HEADER}`, `{b.id}`){more}", 900 + above, service_name(kind, b)))
        rules.append((f"HeaderRegexp(`{BACKEND_HEADER}`, `.*`){more}", 800 + above, "none"))
        weights = {b.version_id: b.weight for b in mine if b.weight}
        for version in weights:
            clusters = [(service_name(kind, b), 1) for b in mine if b.version_id == version and b.weight]
            services[f"{kind}-{version}"] = _weighted(clusters, checked=several)
        if weights:
            versions = [(f"{kind}-{version}", weight) for version, weight in weights.items()]
            services[kind] = _weighted(versions, checked=several)
        rules.append((f"PathPrefix(`/`){more}", 1 + above, kind if weights else "none"))
    tls = dict(zip(("certFile", "keyFile"), map(str, certificate), strict=True))
    changed = [(str(path), path.stat().st_mtime_ns) for path in certificate]
    digest = hashlib.sha256(json.dumps([_dynamic(rules, services, tls, {}), changed]).encode()).hexdigest()
    loaded = {name: f"{ROUTES_PATH}/{digest[:32]}/{name}" for name in ROUTES}
    dynamic = {name: _dynamic(rules, services, tls, {name: path}) for name, path in loaded.items()}
    return {name: json.dumps(d, indent=1) + "\n" for name, d in dynamic.items()}, list(loaded.values())


def _dynamic(
    rules: list[tuple[str, int, str]], services: dict[str, Any], tls: dict[str, str], loaded: dict[str, str]
) -> dict[str, Any]:
    plain = _routers(rules, loaded)
    routers = plain | {f"{name}-tls": router | {"tls": {}} for name, router in plain.items()}
    routers["any"] = {"rule": f"Path(`{ROUTES_PATH}`)", "service": "noop@internal", "entryPoints": [METRICS]}
    return {
        "http": {
            "routers": routers,
            "middlewares": {
                # Where no byte of the request was written to a backend, it is tried again whatever its method is.
                "connect": {"retry": {"attempts": TRIES_TO_CONNECT}},
                # With a status, idempotent ones are also where the connection broke before the answer: 502 is Traefik's
                # own word for it.
                "retry": {"retry": {"attempts": TRIES, "status": ["502"], "maxRequestBodyBytes": MAX_REPLAYED_BODY}},
            },
            "services": services,
            "serversTransports": {
                "backends": {
                    "maxIdleConnsPerHost": 500,
                    # Backends keep idle connections for 75 s and more. Who closes first must be us: a POST on a
                    # connection that the backend closes at that moment would be lost.
                    "forwardingTimeouts": {
                        "dialTimeout": "1s",
                        "idleConnTimeout": "3s",
                        "responseHeaderTimeout": "0s",
                        "readIdleTimeout": "10s",
                        "pingTimeout": "5s",
                    },
                }
            },
        },
        "tls": {"stores": {"default": {"defaultCertificate": tls}}},
    }


def _routers(rules: list[tuple[str, int, str]], loaded: dict[str, str]) -> dict[str, dict[str, Any]]:
    routers: dict[str, dict[str, Any]] = {
        f"r{number}": {"rule": rule, "priority": priority, "service": service, "middlewares": ["retry", "connect"]}
        for number, (rule, priority, service) in enumerate(rules)
    }
    for name, path in loaded.items():
        routers[f"loaded-{name}"] = {"rule": f"Path(`{path}`)", "priority": 10_000, "service": "noop@internal"}  # 418
    # Our question before these routes are there: no backend must see it.
    routers["not-loaded"] = {"rule": f"PathPrefix(`{ROUTES_PATH}`)", "priority": 9_999, "service": "none"}
    return {name: router | {"entryPoints": [ENTRY_POINT]} for name, router in routers.items()}


def service_name(kind: str, backend: Backend) -> str:
    """Of a backend, in Traefik's configuration and (with ``@file``) in its metrics. Also the version's: a cluster that
    is updated in place counts anew."""
    return f"{kind}-{backend.version_id}-{backend.id}"


def counted(metrics: str, backends: list[Backend]) -> list[BackendCounters]:
    """What Traefik's metrics tell of these backends: HTTP and gRPC together."""
    counts: dict[str, dict[str, int]] = {}
    down = set()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name = sample.labels.get("service", "").removesuffix("@file")
            if sample.name == "traefik_service_requests_total":
                codes = counts.setdefault(name, {})
                codes[sample.labels["code"]] = codes.get(sample.labels["code"], 0) + int(sample.value)
            elif sample.name == "traefik_service_server_up" and not sample.value:
                down.add(name)
    answer = []
    for b in backends:
        sums: dict[str, int] = {}
        for kind in ("http", "grpc"):
            for code, count in counts.get(service_name(kind, b), {}).items():
                sums[code] = sums.get(code, 0) + count
        up = service_name("http", b) not in down
        answer.append(BackendCounters(backend_id=b.id, version_id=b.version_id, requests=sums, up=up))
    return answer


def _server(kind: str, backend: Backend, *, checked: bool) -> dict[str, Any]:
    address = _ADDRESS.fullmatch(backend.http)
    assert address is not None  # _check
    server: dict[str, Any] = {
        "servers": [{"url": f"http://{backend.http}" if kind == "http" else f"h2c://{backend.grpc}"}],
        "serversTransport": "backends",
    }
    if checked:
        # Of gRPC too: its own health service wants the token.
        server["healthCheck"] = {
            "path": HEALTH_PATH,
            "scheme": "http",
            "port": int(address[2]),
            "interval": HEALTH_INTERVAL,
            "timeout": HEALTH_TIMEOUT,
            "followRedirects": False,
        }
    return server


def _weighted(services: list[tuple[str, int]], *, checked: bool) -> dict[str, Any]:
    weighted: dict[str, Any] = {"services": [{"name": name, "weight": weight} for name, weight in services]}
    if checked:
        weighted["healthCheck"] = {}
    return {"weighted": weighted}


def _check(backends: list[Backend]) -> None:
    weights: dict[str, int] = {}
    seen = set()
    for b in backends:
        wrong = ""
        if not _ID.fullmatch(b.id) or not _ID.fullmatch(b.version_id):
            wrong = "has an invalid id"
        elif not _ADDRESS.fullmatch(b.http) or (b.grpc and not _ADDRESS.fullmatch(b.grpc)):
            wrong = f"has no address of the form ip:port: {b.http!r}, {b.grpc!r}"
        elif b.id in seen:
            wrong = "is there twice"
        elif b.weight and weights.setdefault(b.version_id, b.weight) != b.weight:
            wrong = f"has weight {b.weight}; another one of its version has {weights[b.version_id]}"
        if wrong:
            raise BadConfig(f"Backend {b.id!r} of version {b.version_id!r} {wrong}.", resource=b.id)
        seen.add(b.id)
