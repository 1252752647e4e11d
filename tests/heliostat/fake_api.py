"""A Heliostat API for the client's tests: real HTTP on a free port, the real models, no lifecycle. Tests move the jobs
themselves and make the network misbehave with :attr:`FakeApi.trouble`."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any, cast

import uvicorn
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from heliostat.errors import Conflict, HeliostatError, InvalidRequest, NotFound, Unauthenticated
from heliostat.models.clouds import (
    Check,
    CheckState,
    Cloud,
    CloudCreate,
    CloudSetup,
    Provider,
    SetupFiles,
    Trust,
    Verification,
)
from heliostat.models.clusters import Cluster, ClusterCreate, ClusterState, Node, NodeRole, NodeState, ScaleLimits
from heliostat.models.common import Event, Page, new_id, utcnow
from heliostat.models.compute_configs import ComputeConfig, ComputeConfigCreate, ComputeConfigVersion
from heliostat.models.jobs import Job, JobConfig, JobState, LogChunk, LogPage, Run, RunCause, RunState
from heliostat.models.plans import Plan
from heliostat.models.schedules import Schedule, ScheduleConfig, ScheduleState
from heliostat.models.services import (
    ApplicationConfig,
    QueryToken,
    Rollout,
    RolloutCommand,
    Service,
    ServiceCluster,
    ServiceConfig,
    ServiceDeploy,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
)
from heliostat.models.uploads import Upload, UploadCreate
from heliostat.models.users import Project, ProjectCreate, Role, Token, TokenCreate, User, UserCreate, WhoAmI

TOKEN = "hs-test-token"
Trouble = Callable[[], Response | None]


class FakeApi:
    """``trouble``: what happens to the next calls, in order, before the app sees them: a status code, ``"lost"`` (done,
    but the answer is cut off), or None (nothing)."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.clusters: dict[str, Cluster] = {}
        self.clouds = {
            "local": Cloud(id="cld_1", name="local", provider=Provider.LOCAL, is_default=True, created_at=utcnow())
        }
        self.held: list[str] = []
        self.checks = [Check(name="home", state=CheckState.OK, detail="it can be written")]
        self.configs: list[ComputeConfigVersion] = []
        self.schedules: dict[str, Schedule] = {}
        self.tokens: dict[str, Token] = {}
        self.services: dict[str, Service] = {}
        self.deploys: list[ServiceDeploy] = []
        self.on_deploy: Callable[[str], None] | None = None
        self.on_order: Callable[[str], None] | None = None
        """What an accepted rollback, or order to a rollout, does; None: what is nearest."""
        self.orders: list[tuple[str, Any]] = []
        self.service_logs: dict[str, str] = {}
        self.events: dict[str, list[Event]] = {}
        self.bucket: dict[str, bytes] = {}
        self.bucket_status = 0
        self.on_upload: Callable[[UploadCreate], None] | None = None
        self.logs: dict[str, list[str]] = {}
        self.complete: set[str] = set()
        self.chunk_size = 1024
        self.by_key: dict[str, tuple[bytes, str]] = {}
        self.plan: Plan | None = None
        self.planned_for: list[Any] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.trouble: list[Any] = []
        self.on_request: Callable[[str], None] | None = None
        self.url = ""
        self.app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {k.decode().lower(): v.decode() for k, v in scope["headers"]}
        self.requests.append((scope["method"], scope["path"], headers))
        if self.on_request:
            self.on_request(scope["path"])
        trouble = self.trouble.pop(0) if self.trouble else None
        if trouble is None:
            await self.app(scope, receive, send)
        elif trouble == "lost":

            async def nowhere(message: Any) -> None:
                return None

            await self.app(scope, receive, nowhere)
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"999")]})
            await send({"type": "http.response.body", "body": b"{", "more_body": True})
            raise ConnectionError("lost on purpose")
        else:
            status, more = trouble if isinstance(trouble, tuple) else (trouble, {})
            await Response(b"busy", status_code=status, headers=more)(scope, receive, send)

    def planned(self, request: Any) -> Response:
        """The answer to a dry run."""
        assert self.plan is not None
        self.planned_for.append(request)
        return JSONResponse(self.plan.model_dump(mode="json"))

    def sent(self, method: str, path: str) -> list[dict[str, str]]:
        """Headers of the calls that came in for this route."""
        return [headers for m, p, headers in list(self.requests) if (m, p) == (method, path)]

    def add_job(self, name: str = "train", config: JobConfig | None = None, **fields: Any) -> Job:
        now = utcnow()
        job = Job(
            id=new_id("job"), name=name, project="default",
            config=config or JobConfig(entrypoint="python main.py"), state=fields.pop("state", JobState.STARTING),
            created_by="user:admin", created_at=now, state_since=now, **fields,
        )  # fmt: skip
        self.jobs[job.id] = job
        return job

    def start_run(self, job_id: str) -> Run:
        job = self.jobs[job_id]
        number = len(job.runs) + 1
        run = Run(
            id=f"{job_id}-{number}", number=number, state=RunState.RUNNING, started_at=utcnow(), cluster_id="clu_1"
        )
        self.jobs[job_id] = job.model_copy(
            update={"state": JobState.RUNNING, "runs": [*job.runs, run], "state_since": utcnow()}
        )
        return run

    def end_run(
        self, job_id: str, state: RunState, cause: RunCause | None = None, exit_code: int | None = None
    ) -> None:
        job = self.jobs[job_id]
        update = {"state": state, "cause": cause, "exit_code": exit_code, "ended_at": utcnow()}
        self.jobs[job_id] = job.model_copy(update={"runs": [*job.runs[:-1], job.runs[-1].model_copy(update=update)]})

    def settle(self, job_id: str, state: JobState, reason: str = "") -> None:
        """Settled, and its whole log shipped."""
        self.jobs[job_id] = self.jobs[job_id].model_copy(
            update={"state": state, "reason": reason, "ended_at": utcnow(), "state_since": utcnow()}
        )
        self.complete.add(job_id)

    def log(self, run_id: str, data: bytes) -> None:
        """Ships bytes: the last chunk grows up to ``chunk_size``, then the next one begins."""
        keys = self.logs.setdefault(run_id, [])
        while data:
            if not keys or len(self.bucket[keys[-1]]) >= self.chunk_size:
                end = int(keys[-1].rpartition("/")[2]) + len(self.bucket[keys[-1]]) if keys else 0
                keys.append(f"logs/node/runs/{run_id}.log/{end:020d}")
                self.bucket[keys[-1]] = b""
            room = self.chunk_size - len(self.bucket[keys[-1]])
            self.bucket[keys[-1]] += data[:room]
            data = data[room:]

    def log_page(self, job: Job, run: str | None) -> LogPage:
        chunks = []
        for attempt in job.runs:
            if run is not None and run not in (attempt.id, str(attempt.number)):
                continue
            for key in self.logs.get(attempt.id, []):
                chunks.append(
                    LogChunk(
                        stream=f"runs/{attempt.id}.log", run_id=attempt.id, offset=int(key.rpartition("/")[2]),
                        size=len(self.bucket[key]), url=f"{self.url}/bucket/{key}?signature=x",
                    )
                )  # fmt: skip
        return LogPage(chunks=chunks, complete=job.id in self.complete)

    def add_service(self, name: str = "api", **fields: Any) -> Service:
        now = utcnow()
        token = QueryToken(id="qt_1", token="first-token", created_at=now)
        service = Service(
            id=new_id("svc"), name=name, project="default", cloud="local",
            state=fields.pop("state", ServiceState.STARTING), query_url="http://127.0.0.1:7777",
            query_auth_token=token.token, query_auth_tokens=[token], created_by="user:admin", created_at=now,
            state_since=now, **fields,
        )  # fmt: skip
        self.services[service.id] = service
        return service

    def add_version(self, service_id: str, config: ServiceConfig | None = None, **fields: Any) -> ServiceVersion:
        service, now = self.services[service_id], utcnow()
        number = 1 + max((v.number for v in service.versions), default=0)
        config = config or ServiceConfig(applications=[ApplicationConfig(import_path="m:app")])
        version = ServiceVersion(
            id=new_id("sv"), service_id=service_id, name=config.version_name or f"v{number}", number=number,
            state=fields.pop("state", ServiceVersionState.STARTING), config=config.masked(),
            clusters=[ServiceCluster(cluster_id=f"clu_{number}", state="RUNNING")], created_by="user:admin",
            created_at=now, state_since=now, **fields,
        )  # fmt: skip
        self.change(service_id, versions=[version, *service.versions])
        return version

    def change(self, service_id: str, **fields: Any) -> None:
        service = self.services[service_id]
        self.services[service_id] = service.model_copy(update={"revision": service.revision + 1, **fields})

    def change_version(self, version_id: str, **fields: Any) -> None:
        for service in list(self.services.values()):
            versions = [v.model_copy(update=fields) if v.id == version_id else v for v in service.versions]
            if versions != service.versions:
                self.change(service.id, versions=versions)

    def shift(self, version_id: str, percent: int, state: str = "holding") -> None:
        """The newest version has ``percent``, the one before the rest; at 100 it is the primary and all is done."""
        service = next(s for s in self.services.values() if any(v.id == version_id for v in s.versions))
        before = next((v for v in service.versions if v.weight and v.id != version_id), None)
        self.change_version(
            version_id, weight=percent, target_weight=100, state=ServiceVersionState.RUNNING if percent else "STARTING"
        )
        if before is not None:
            ended = {"state": ServiceVersionState.TERMINATED} if percent == 100 else {}
            self.change_version(before.id, weight=100 - percent, target_weight=0, **ended)
        if percent == 100:
            self.change(service.id, state=ServiceState.RUNNING, primary_version=version_id, rollout=None)
            return
        rollout = Rollout(
            version_id=version_id, from_version_id=before and before.id, percent=percent, steps=[5, 25, 50, 100],
            state=state, since=utcnow(), observed="120 requests, no error",
        )  # fmt: skip
        self.change(service.id, state=ServiceState.ROLLING_OUT, rollout=rollout)

    def find_service(self, ref: str) -> Service:
        found = next((s for s in self.services.values() if ref in (s.id, s.name)), None)
        if found is None:
            raise NotFound(f"There is no service {ref!r}.", remedy="`heliostat service list` shows them.", resource=ref)
        return found

    def find(self, ref: str) -> Job:
        found = self.jobs.get(ref) or next((j for j in reversed(list(self.jobs.values())) if j.name == ref), None)
        if found is None:
            raise NotFound(f"There is no job {ref!r}.", remedy="`heliostat job list` shows them.", resource=ref)
        return found

    def find_cluster(self, ref: str) -> Cluster:
        found = next((c for c in self.clusters.values() if ref in (c.id, c.name)), None)
        if found is None:
            raise NotFound(f"There is no cluster {ref!r}.", remedy="`heliostat cluster list` shows them.", resource=ref)
        return found

    def paged(self, items: list[Any], cursor: str | None, limit: int) -> JSONResponse:
        start = int(cursor or 0)
        more = str(start + limit) if start + limit < len(items) else None
        page: Page[Any] = Page(
            items=[i.model_dump(mode="json") for i in items[start : start + limit]], next_cursor=more
        )
        return JSONResponse(page.model_dump(mode="json"))


class Door:
    """One listening server for all tests; ``api`` is who answers now."""

    def __init__(self) -> None:
        self.api: FakeApi | None = None
        self.url = ""
        self.app = _app(cast(FakeApi, self))  # once: a new app per test would cost more than the test

    def __getattr__(self, name: str) -> Any:
        return getattr(self.api, name)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert self.api is not None
        await self.api(scope, receive, send)

    def opens_to(self, api: FakeApi) -> FakeApi:
        api.url, api.app = self.url, self.app
        self.api = api
        return api


@contextmanager
def serving() -> Iterator[Door]:
    """Serves on a free port, in a thread."""
    door = Door()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    door.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(door, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    started = threading.Event()

    async def serve() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        started.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(60), "the fake API did not start"
    try:
        yield door
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def _app(api: FakeApi) -> FastAPI:
    app = FastAPI()
    _errors(app)
    _bucket(app, api)
    _jobs(app, api)
    _services(app, api)
    _clusters(app, api)
    _clouds(app, api)
    _rest(app, api)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(HeliostatError)
    async def problem(_: Request, error: HeliostatError) -> JSONResponse:
        return JSONResponse(error.to_problem(), status_code=error.status, media_type="application/problem+json")

    @app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Any:
        if request.url.path.startswith("/v1") and request.headers.get("authorization") != f"Bearer {TOKEN}":
            error = Unauthenticated("This token is unknown, expired or revoked.", remedy="Run `heliostat login`.")
            return JSONResponse(error.to_problem(), status_code=401, media_type="application/problem+json")
        return await call_next(request)


def _bucket(app: FastAPI, api: FakeApi) -> None:
    @app.get("/bucket/{key:path}")
    async def read(key: str, range: str | None = Header(None)) -> Response:
        data = api.bucket.get(key)
        if data is None:
            return Response(status_code=404)
        if range is None:
            return Response(data)
        start = int(range.removeprefix("bytes=").rstrip("-"))
        return Response(data[start:], status_code=206) if start < len(data) else Response(status_code=416)

    @app.put("/bucket/{key:path}")
    async def write(key: str, request: Request) -> Response:
        data = await request.body()
        if api.bucket_status:
            return Response(status_code=api.bucket_status)
        api.bucket[key] = data
        return Response(status_code=200)


def _jobs(app: FastAPI, api: FakeApi) -> None:
    @app.post("/v1/jobs", status_code=201)
    async def submit(config: JobConfig, request: Request, dry_run: bool = False) -> Any:
        if dry_run:
            return api.planned(config)
        key, body = request.headers["idempotency-key"], await request.body()
        if key in api.by_key:
            assert api.by_key[key][0] == body, "the same key with another body"
            return api.jobs[api.by_key[key][1]]
        job = api.add_job(config.name or "unnamed", config.masked())
        api.by_key[key] = (body, job.id)
        return job

    @app.get("/v1/jobs")
    async def listed(
        cursor: str | None = None,
        limit: int = 50,
        state: str | None = None,
        name: str | None = None,
        tag: list[str] = Query([]),
    ) -> Any:
        found = [j for j in reversed(list(api.jobs.values())) if state in (None, j.state) and name in (None, j.name)]
        found = [j for j in found if {f"{k}={v}" for k, v in j.tags.items()} >= set(tag)]
        return api.paged(found, cursor, limit)

    @app.get("/v1/jobs/{ref}")
    async def get(ref: str) -> Job:
        return api.find(ref)

    @app.post("/v1/jobs/{ref}/terminate")
    async def terminate(ref: str) -> Job:
        job = api.find(ref)
        api.settle(job.id, JobState.TERMINATED)
        return api.jobs[job.id]

    @app.get("/v1/jobs/{ref}/events")
    async def events(ref: str, cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(api.events.get(api.find(ref).id, []), cursor, limit)

    @app.get("/v1/jobs/{ref}/logs")
    async def logs(ref: str, run: str | None = None, follow: bool = False) -> LogPage:
        return api.log_page(api.find(ref), run)


def _services(app: FastAPI, api: FakeApi) -> None:
    @app.post("/v1/services", status_code=201)
    async def deploy(body: ServiceDeploy, request: Request) -> Service:
        key, content = request.headers["idempotency-key"], await request.body()
        if key in api.by_key:
            assert api.by_key[key][0] == content, "the same key with another body"
            return api.services[api.by_key[key][1]]
        api.deploys.append(body)
        configs = [body.config] if body.config else body.configs
        name = next((c.name for c in configs if c.name), None) or body.name or ""
        service = next((s for s in api.services.values() if s.name == name), None) or api.add_service(name)
        for config in configs:
            api.add_version(service.id, config)
        api.by_key[key] = (content, service.id)
        if api.on_deploy:
            api.on_deploy(service.id)
        return api.services[service.id]

    @app.get("/v1/services")
    async def listed(
        cursor: str | None = None, limit: int = 50, state: str | None = None, cloud: str | None = None
    ) -> Any:
        found = [s for s in reversed(list(api.services.values())) if state in (None, s.state)]
        found = [s for s in found if cloud in (None, s.cloud)]
        without = {"query_auth_token": None, "query_auth_tokens": [], "versions": []}
        return api.paged([s.model_copy(update=without) for s in found], cursor, limit)

    @app.get("/v1/services/{ref}")
    async def get(ref: str) -> Service:
        return api.find_service(ref)

    @app.get("/v1/services/{ref}/versions")
    async def versions(ref: str, cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(api.find_service(ref).versions, cursor, limit)

    @app.get("/v1/services/{ref}/events")
    async def events(ref: str, cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(api.events.get(api.find_service(ref).id, []), cursor, limit)

    @app.get("/v1/services/{ref}/logs")
    async def logs(ref: str, version: str | None = None, follow: bool = False) -> LogPage:
        service, chunks = api.find_service(ref), []
        for stream, text in api.service_logs.items():
            if version is None or stream.startswith(version):
                api.bucket[f"logs/{stream}"] = text.encode()
                url = f"{api.url}/bucket/logs/{stream}?signature=x"
                chunks.append(LogChunk(stream=stream, offset=0, size=len(text), url=url))
        return LogPage(chunks=chunks, complete=service.state.settled)

    @app.post("/v1/services/{ref}/terminate")
    async def terminate(ref: str) -> Service:
        service = api.find_service(ref)
        api.change(service.id, state=ServiceState.TERMINATED, ended_at=utcnow())
        return api.services[service.id]

    @app.delete("/v1/services/{ref}", status_code=204)
    async def delete(ref: str) -> None:
        service = api.find_service(ref)
        if not service.state.settled:
            raise Conflict(f"Service {service.name} is {service.state}.", remedy="Terminate it first.")
        del api.services[service.id]

    @app.post("/v1/services/{ref}/rollback")
    async def rollback(ref: str) -> Service:
        service = api.find_service(ref)
        api.orders.append(("rollback", None))
        if api.on_order:
            api.on_order(service.id)  # which may leave the records as they are, for a while
        else:
            api.change(service.id, state=ServiceState.ROLLING_BACK)
        return api.services[service.id]

    @app.post("/v1/services/{ref}/rollout")
    async def rollout(ref: str, command: RolloutCommand) -> Service:
        service = api.find_service(ref)
        if service.rollout is None:
            raise Conflict(f"Service {service.name} has no rollout.", remedy="Deploy first.")
        api.orders.append((command.action, command.percent))
        if api.on_order:
            api.on_order(service.id)
        return api.services[service.id]

    @app.post("/v1/services/{ref}/tokens", status_code=201)
    async def add_token(ref: str) -> QueryToken:
        service = api.find_service(ref)
        made = QueryToken(id="qt_2", token="second-token", created_at=utcnow(), primary=False, active=False)
        api.change(service.id, query_auth_tokens=[*service.query_auth_tokens, made])
        return made

    @app.delete("/v1/services/{ref}/tokens", status_code=204)
    async def delete_token(ref: str, id: str | None = None) -> None:
        service = api.find_service(ref)
        gone = id or next(t.id for t in service.query_auth_tokens if t.primary)
        left = [t.model_copy(update={"primary": True}) for t in service.query_auth_tokens if t.id != gone]
        api.change(service.id, query_auth_tokens=left, query_auth_token=left[0].token if left else None)


def _clusters(app: FastAPI, api: FakeApi) -> None:
    @app.post("/v1/clusters", status_code=201)
    async def create(request: ClusterCreate, dry_run: bool = False) -> Any:
        if dry_run:
            return api.planned(request)
        now = utcnow()
        config = request.compute_config if isinstance(request.compute_config, ComputeConfig) else ComputeConfig()
        cluster = Cluster(
            id=new_id("clu"), name=request.name or "cluster-1", project="default", cloud="local", compute_config=config,
            state=ClusterState.STARTING, waits_for="its head", created_by="user:admin", created_at=now, state_since=now,
            tags=request.tags,
        )  # fmt: skip
        api.clusters[cluster.id] = cluster
        return cluster

    @app.get("/v1/clusters")
    async def listed(cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(list(api.clusters.values()), cursor, limit)

    @app.get("/v1/clusters/{ref}")
    async def get(ref: str) -> Cluster:
        return api.find_cluster(ref)

    @app.post("/v1/clusters/{ref}/terminate")
    async def terminate(ref: str) -> Cluster:
        cluster = api.find_cluster(ref)
        api.clusters[cluster.id] = cluster.model_copy(update={"state": ClusterState.TERMINATED, "ended_at": utcnow()})
        return api.clusters[cluster.id]

    @app.patch("/v1/clusters/{ref}/limits")
    async def limits(ref: str, limits: ScaleLimits) -> Cluster:
        return api.find_cluster(ref)

    @app.get("/v1/clusters/{ref}/nodes")
    async def nodes(ref: str, cursor: str | None = None, limit: int = 50) -> Any:
        cluster = api.find_cluster(ref)
        node = Node(
            id="nod_1", cluster_id=cluster.id, role=NodeRole.HEAD, group="head", slot=0, generation=1,
            state=NodeState.RUNNING, created_at=utcnow(), running_at=utcnow() + timedelta(seconds=6),
        )  # fmt: skip
        return api.paged([node], cursor, limit)

    @app.get("/v1/clusters/{ref}/events")
    async def events(ref: str, cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(api.events.get(api.find_cluster(ref).id, []), cursor, limit)


def _clouds(app: FastAPI, api: FakeApi) -> None:
    @app.get("/v1/clouds")
    async def clouds(cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(list(api.clouds.values()), cursor, limit)

    @app.post("/v1/clouds", status_code=201)
    async def register(body: CloudCreate) -> Cloud:
        made = Cloud(
            id=new_id("cld"), name=body.name, provider=body.provider, is_default=body.is_default, config=body.config,
            created_at=utcnow(),
        )  # fmt: skip
        api.clouds[made.name] = made
        return made

    @app.post("/v1/clouds/setup")
    async def setup(body: CloudSetup) -> SetupFiles:
        files = {f"{body.name}.{body.provider}": f"region: {body.region}\n"}
        return SetupFiles(files=files, next_step="Apply it, then heliostat cloud register -f cloud.yaml")

    @app.get("/v1/clouds/trust")
    async def trust() -> Trust:
        return Trust(installation_id="hs-1", external_id="heliostat-1", issuer="https://h", subject="heliostat:1:org")

    def find(ref: str) -> Cloud:
        found = next((c for c in api.clouds.values() if ref in (c.id, c.name)), None)
        if found is None:
            raise NotFound(f"There is no cloud {ref!r}.", resource=ref)
        return found

    @app.get("/v1/clouds/{ref}")
    async def get_cloud(ref: str) -> Cloud:
        return find(ref)

    @app.put("/v1/clouds/{ref}")
    async def update(ref: str, body: CloudCreate, idempotency_key: Annotated[str, Header()]) -> Cloud:
        found = find(ref)
        if found.name != body.name:
            raise InvalidRequest("It can't have another name.", field="name")
        api.clouds[found.name] = found.model_copy(update={"config": body.config})
        return api.clouds[found.name]

    @app.delete("/v1/clouds/{ref}", status_code=204)
    async def delete(ref: str, force: bool = False) -> None:
        if api.held and not force:
            raise Conflict(f"It still holds {api.held}.", remedy="Try again later.", resource=ref)
        if find(ref).is_default:
            raise Conflict("It is the default one.", remedy="Make another one the default first.", resource=ref)
        del api.clouds[find(ref).name]

    @app.post("/v1/clouds/{ref}/default")
    async def set_default(ref: str) -> Cloud:
        name = find(ref).name
        for cloud in list(api.clouds.values()):
            api.clouds[cloud.name] = cloud.model_copy(update={"is_default": cloud.name == name})
        return api.clouds[name]

    @app.post("/v1/clouds/{ref}/verify")
    async def verify(ref: str) -> Verification:
        ok = all(c.state is not CheckState.FAILED for c in api.checks)
        return Verification(cloud_id=find(ref).id, ok=ok, checks=api.checks)


def _rest(app: FastAPI, api: FakeApi) -> None:
    @app.get("/v1/whoami")
    async def whoami() -> WhoAmI:
        return WhoAmI(user="admin", role=Role.ADMIN, organization="acme", projects=["default"], server_version="0.1.0")

    @app.post("/v1/uploads")
    async def upload(request: UploadCreate) -> Upload:
        if api.on_upload:
            api.on_upload(request)
        key = f"uploads/{request.sha256}.zip"
        url = None if key in api.bucket else f"{api.url}/bucket/{key}?signature=x"
        return Upload(uri=f"upload:{request.sha256}", url=url, headers={"x-checked": "yes"}, expires_in_s=60)

    @app.post("/v1/compute-configs", status_code=201)
    async def create_config(request: ComputeConfigCreate) -> ComputeConfigVersion:
        version = 1 + sum(c.name == request.name for c in api.configs)
        made = ComputeConfigVersion(
            id=new_id("cpt"),
            name=request.name,
            version=version,
            config=request.config,
            created_at=utcnow(),
            created_by="user:admin",
        )
        api.configs.append(made)
        return made

    @app.get("/v1/compute-configs")
    async def configs(cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(api.configs, cursor, limit)

    def find_config(ref: str) -> ComputeConfigVersion:
        return next(c for c in reversed(api.configs) if ref in (c.id, c.name, f"{c.name}:{c.version}"))

    @app.get("/v1/compute-configs/{ref}")
    async def config(ref: str) -> ComputeConfigVersion:
        return find_config(ref)

    @app.post("/v1/compute-configs/{ref}/archive")
    async def archive(ref: str) -> ComputeConfigVersion:
        return find_config(ref).model_copy(update={"archived_at": utcnow()})

    @app.put("/v1/schedules/{name}")
    async def apply(name: str, config: ScheduleConfig) -> Schedule:
        now = utcnow()
        api.schedules[name] = Schedule(
            id=new_id("sch"), name=name, project="default", config=config, state=ScheduleState.ENABLED,
            created_by="user:admin", created_at=now, updated_at=now, next_trigger_at=now + timedelta(hours=1),
        )  # fmt: skip
        return api.schedules[name]

    @app.get("/v1/schedules")
    async def schedules(cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(list(api.schedules.values()), cursor, limit)

    @app.get("/v1/schedules/{ref}")
    async def schedule(ref: str) -> Schedule:
        if ref not in api.schedules:
            raise NotFound(
                f"There is no schedule {ref!r}.", remedy="`heliostat schedule list` shows them.", resource=ref
            )
        return api.schedules[ref]

    @app.post("/v1/schedules/{ref}/run", status_code=201)
    async def run(ref: str) -> Job:
        return api.add_job(ref)

    @app.post("/v1/schedules/{ref}/{verb}")
    async def switch(ref: str, verb: str) -> Schedule:
        state = {"pause": ScheduleState.DISABLED, "resume": ScheduleState.ENABLED}[verb]
        api.schedules[ref] = api.schedules[ref].model_copy(update={"state": state})
        return api.schedules[ref]

    @app.delete("/v1/schedules/{ref}", status_code=204)
    async def delete(ref: str) -> None:
        if api.schedules.pop(ref, None) is None:
            raise NotFound(f"There is no schedule {ref!r}.", resource=ref)

    @app.post("/v1/projects", status_code=201)
    async def create_project(request: ProjectCreate) -> Project:
        return Project(id="prj_1", name=request.name, created_at=utcnow())

    @app.get("/v1/projects")
    async def projects(cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged([Project(id="prj_1", name="default", created_at=utcnow())], cursor, limit)

    @app.post("/v1/users", status_code=201)
    async def create_user(request: UserCreate) -> User:
        return User(id="usr_1", name=request.name, role=request.role, projects=request.projects, created_at=utcnow())

    @app.get("/v1/users")
    async def users(cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged([User(id="usr_1", name="admin", role=Role.ADMIN, created_at=utcnow())], cursor, limit)

    @app.post("/v1/tokens", status_code=201)
    async def create_token(request: TokenCreate) -> Token:
        made = Token(id=new_id("tok"), name=request.name, user=request.user or "admin", created_at=utcnow())
        api.tokens[made.id] = made
        return made.model_copy(update={"secret": "hs-made-secret"})

    @app.get("/v1/tokens")
    async def tokens(cursor: str | None = None, limit: int = 50) -> Any:
        return api.paged(list(api.tokens.values()), cursor, limit)

    @app.delete("/v1/tokens/{id}", status_code=204)
    async def revoke(id: str) -> None:
        del api.tokens[id]
