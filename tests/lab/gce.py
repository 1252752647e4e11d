"""Google Cloud as one HTTP server: Compute Engine here, its load balancing in ``gce_balancer``, Cloud Storage, STS and
IAM beside it. The real google-cloud-compute talks to it over plain HTTP: ``with serving(Stage(GceFake())) as url``."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from tests.lab import gce_balancer, gce_disks, gce_project, gce_types, gcp_auth, gcs
from tests.lab.gce_filter import Refused, Resource, fingerprint, public
from tests.lab.gce_state import QUOTA, STOCKOUT, Fault, GceState, Key, Operation

_SCOPED = re.compile(r"(?P<scope>global|(?:zones|regions)/[\w-]+)/(?P<rest>.+)")
_LABEL = re.compile(r"[a-z0-9_-]{0,63}")
MAX_METADATA_BYTES = 256 * 1024
POLICY = (
    "Constraint constraints/compute.requireShieldedVm violated for project projects/acme-prod-1. Secure Boot is not "
    "enabled in the 'shielded_instance_config' field. See "
    "https://cloud.google.com/resource-manager/docs/organization-policy/org-policy-constraints for more information."
)


class GceFake(GceState):
    """One project of one region. Its fields are knobs and may be turned at any time; ``fail`` counts calls."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.auth = gcp_auth.Auth()
        self.storage = gcs.Storage()
        self.traffic = gce_balancer.Traffic(self)

    def fail(self, kind: str, method: str = "*", *, times: float = 1, **fields: Any) -> None:
        """See ``gce_state.Fault``."""
        self.faults.append(Fault(kind, method, times=times, **fields))

    def heal(self) -> None:
        self.faults.clear()

    def answer(self, method: str, path: str, query: dict[str, str], body: Resource) -> Resource:
        """One call of the REST API. Raises Refused."""
        self.advance()
        if path.startswith("aggregated/"):
            return self._aggregated(path.removeprefix("aggregated/"), query)
        if method == "GET" and (told := gce_project.told(self, path)) is not None:
            self.calls[f"get {told[0]}"] += 1
            if (f := self.fault(("429", "503", "denied"), "get", None)) is not None:
                raise _refusal(f, told[0], "get")
            return told[1]
        scoped = _SCOPED.fullmatch(path)
        if scoped is None:
            raise Refused(404, "notFound", f"no such path: {path}")
        scope, (collection, *more) = scoped["scope"], scoped["rest"].split("/")
        place = scope.partition("/")[2]
        known = {self.region, *self.zones, ""}
        if place not in known:
            raise Refused(400, "invalid", f"Invalid value for field '{scope[:-1]}': '{place}'. Unknown zone.")
        plain = {"GET": "get" if more else "list", "POST": "insert"}
        verb = more[1] if len(more) > 1 else plain.get(method, method.lower())
        self.calls[f"{verb} {collection}"] += 1
        if (f := self.fault(("429", "503", "denied", "policy"), verb, place)) is not None:
            raise _refusal(f, collection, verb)
        if collection == "operations":
            return self._operation(more[0]).shown
        request_id = query.get("requestId", "")
        op = self.replay(path, request_id)
        if op is None:
            key = (scope, collection, more[0] if more else str(body.get("name", "")))
            answered = self._do(verb, key, body, query, path, request_id)
            if not isinstance(answered, Operation):
                return answered
            op = answered
        if self.fault(("lost",), verb, place) is not None:
            raise Refused(502, "backendError", "The server encountered a temporary error.")
        return op.shown

    def _do(
        self, verb: str, key: Key, body: Resource, query: dict[str, str], path: str, request_id: str
    ) -> Operation | Resource:
        scope, collection, name = key
        if verb == "list" and collection == "machineTypes":
            offered = [t for t in gce_types.listed() if self.machine_types(scope.partition("/")[2], t["name"])]
            return self._page(collection, offered, query)
        if verb == "list":
            return self._page(collection, [r for _, r in self.found(collection, scope, query.get("filter", ""))], query)
        if verb == "get":
            return public(gce_disks.shown(self, key, self.held(key)))
        if verb == "serialPort":
            contents = self.held(key)["_console"] if self.console is None else self.console(name)
            return {"contents": contents, "start": "0", "next": str(len(contents))}
        given = {"path": path, "request_id": request_id}
        if verb == "insert":
            if key in self.resources:
                raise Refused(409, "alreadyExists", f"The resource '{'/'.join(key)}' already exists")
            if collection == "instances":
                return self._insert_instance(key, body, given)
            gce_balancer.check(self, collection, body)
            self.resources[key] = gce_balancer.made(self, key, body)
            return self.operate("insert", key, **given)
        found = self.held(key)
        if verb == "delete":
            gce_balancer.check_unused(self, key)
            gce_disks.check_unused(self, key)
            if collection == "instances":
                found["status"] = "STOPPING"
                self.power_off(name)
                return self.operate("delete", key, takes_s=self.delete_s, apply=lambda: self.remove(key), **given)
            self.remove(key)
            return self.operate("delete", key, **given)
        if verb == "setLabels":
            if body.get("labelFingerprint") != found["labelFingerprint"]:
                raise Refused(412, "conditionNotMet", "Labels fingerprint either invalid or labels have changed")
            found |= {"labels": body.get("labels", {}), "labelFingerprint": fingerprint(body.get("labels"))}
            return self.operate("setLabels", key, **given)
        return gce_balancer.changed(self, verb, key, found, body, given)

    def _insert_instance(self, key: Key, body: Resource, given: dict[str, str]) -> Operation:
        zone = key[0].partition("/")[2]
        self._check_instance(zone, body)
        gce_disks.check(self, zone, body)
        short = self.fault(("stockout", "quota"), "insert", zone)
        if short is not None:
            return self.operate("insert", key, error=STOCKOUT if short.kind == "stockout" else QUOTA, **given)
        late = self.fault(("late",), "insert", zone)
        self.add_instance(key, gce_disks.make(self, key, body))
        if late is None:
            return self.operate("insert", key, apply=lambda: self.started(key), **given)
        op = self.operate("insert", key, error=late.error, **given)
        self.resources.pop(key)  # Google removes what an operation that fails has made
        return op

    def _check_instance(self, zone: str, body: Resource) -> None:
        def invalid(field: str, why: str) -> Refused:
            return Refused(400, "invalid", f"Invalid value for field 'resource.{field}': {why}")

        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", body["name"]):
            raise invalid("name", f"'{body['name']}'. Must be a match of regex.")
        machine_type = body["machineType"].rpartition("/")[2]
        if f"zones/{zone}/" not in body["machineType"] or not self.machine_types(zone, machine_type):
            raise invalid(
                "machineType",
                f"'{body['machineType']}'. Machine type with name '{machine_type}' does not exist in zone '{zone}'.",
            )
        for name, value in body.get("labels", {}).items():
            if not (re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", name) and _LABEL.fullmatch(value)):
                raise invalid("labels", f"'{name}: {value}'. Label keys and values have small letters only.")
        for item in body.get("metadata", {}).get("items", []):
            if len(item["value"].encode()) > MAX_METADATA_BYTES:
                raise Refused(413, "uploadTooLarge", f"Metadata value of {item['key']} is too large.")
        image = body["disks"][0]["initializeParams"]["sourceImage"].rpartition("/")[2]
        if image not in self.images:
            raise Refused(404, "notFound", f"The resource 'projects/x/global/images/{image}' was not found")
        subnetwork = body["networkInterfaces"][0]["subnetwork"].rpartition("/")[2]
        if subnetwork not in self.subnetworks:
            raise invalid(
                "networkInterfaces[0].subnetwork", f"'{subnetwork}'. The referenced resource cannot be found."
            )
        scheduling = body.get("scheduling", {})
        spot = scheduling.get("provisioningModel") == "SPOT"
        if spot and (scheduling.get("automaticRestart", True) or scheduling.get("onHostMaintenance") != "TERMINATE"):
            raise invalid("scheduling", "Spot machines are neither restarted nor migrated.")
        if "maxRunDuration" in scheduling and "instanceTerminationAction" not in scheduling:
            raise invalid("scheduling", "You must specify an instance termination action with maxRunDuration.")

    def _operation(self, name: str) -> Operation:
        try:
            return self.operations[name]
        except KeyError:
            raise Refused(404, "notFound", f"The resource '{name}' was not found") from None

    def _aggregated(self, collection: str, query: dict[str, str]) -> Resource:
        self.calls[f"aggregatedList {collection}"] += 1
        if (f := self.fault(("429", "503", "denied"), "aggregatedList", None)) is not None:
            raise _refusal(f, collection, "list")
        rows = list(self.found(collection, None, query.get("filter", "")))
        size, start = int(query.get("maxResults", 500)), int(query.get("pageToken", 0))
        items: dict[str, Any] = {
            f"zones/{zone}": {"warning": {"code": "NO_RESULTS_ON_PAGE", "message": "none"}} for zone in self.zones
        }
        for scope, r in rows[start : start + size]:
            items[scope] = {collection: [*items.get(scope, {}).get(collection, []), r]}
        page: Resource = {"kind": f"compute#{collection[:-1]}AggregatedList", "items": items}
        return page | ({"nextPageToken": str(start + size)} if len(rows) > start + size else {})

    def _page(self, collection: str, rows: list[Resource], query: dict[str, str]) -> Resource:
        size, start = int(query.get("maxResults", 500)), int(query.get("pageToken", 0))
        page: Resource = {"kind": f"compute#{collection[:-1]}List", "items": rows[start : start + size]}
        return page | ({"nextPageToken": str(start + size)} if len(rows) > start + size else {})


def _refusal(f: Fault, collection: str, verb: str) -> Refused:
    if f.kind == "denied":
        permission = f.permission or f"compute.{collection}.{'create' if verb == 'insert' else verb}"
        return Refused(403, "forbidden", f"Required '{permission}' permission for 'projects/acme-prod-1/x'")
    if f.kind == "policy":
        return Refused(412, "conditionNotMet", POLICY)
    if f.kind == "429":
        return Refused(429, "rateLimitExceeded", "Quota exceeded for quota metric 'Queries'.")
    return Refused(503, "backendError", "The service is currently unavailable.")


@dataclass
class Stage:
    """What the server plays; another fake may be put there.

    ``tick_s``: time passes by itself so often; else when somebody asks. ``loop``: the server's, for who changes the
    fake while it serves (``asyncio.run_coroutine_threadsafe``)."""

    fake: GceFake
    tick_s: float | None = None
    loop: asyncio.AbstractEventLoop | None = None


def create_app(stage: Stage) -> FastAPI:
    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        stage.loop = asyncio.get_running_loop()
        ticks = None if stage.tick_s is None else asyncio.create_task(_tick(stage, stage.tick_s))
        yield
        if ticks is not None:
            ticks.cancel()

    app = FastAPI(lifespan=life)

    @app.exception_handler(Refused)
    async def refused(_request: Request, e: Refused) -> JSONResponse:
        return JSONResponse(e.body(), e.status)

    @app.api_route("/compute/v1/projects/{project}/{path:path}", methods=["GET", "POST", "PATCH", "PUT", "DELETE"])
    async def compute(request: Request, project: str, path: str) -> Resource:
        fake = stage.fake
        fake.auth.check(request)
        if project != fake.project and not (project in gce_project.PUBLIC and path.startswith("global/images/")):
            raise Refused(404, "notFound", f"The resource 'projects/{project}' was not found")
        raw = await request.body()
        body = await request.json() if raw else {}
        if path.endswith("/wait"):
            path = path.removesuffix("/wait")
            while fake.answer("GET", path, {}, {})["status"] != "DONE":
                await asyncio.sleep(0.01)
            return fake.answer("GET", path, {}, {})
        return fake.answer(request.method, path, dict(request.query_params), body)

    gcp_auth.routes(app, lambda: stage.fake.auth)
    gcs.routes(app, lambda: stage.fake.storage, lambda: stage.fake.auth)
    return app


async def _tick(stage: Stage, every_s: float) -> None:
    while True:
        stage.fake.advance()
        await asyncio.sleep(every_s)


def start(stage: Stage, host: str = "127.0.0.1", port: int = 0) -> tuple[str, Callable[[], None]]:
    """The stage's fake, by default on a free port of this machine: its URL, and what stops it. Ends with the process
    at the latest."""
    config = uvicorn.Config(create_app(stage), host=host, port=port, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the fake did not start"
        time.sleep(0.005)

    def stop() -> None:
        server.should_exit = True
        thread.join()

    return f"http://{host}:{server.servers[0].sockets[0].getsockname()[1]}", stop


@contextmanager
def serving(stage: Stage) -> Iterator[str]:
    """The same, until the block ends."""
    url, stop = start(stage)
    try:
        yield url
    finally:
        stop()
