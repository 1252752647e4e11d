"""Uploads of code to the bucket of a cloud."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heliostat.client.effects import Blocking, Flow, Send
from heliostat.client.groups import Group, M, one
from heliostat.client.packaging import Package, is_remote, pack_module, pack_working_dir
from heliostat.client.resources import clusters, compute_configs
from heliostat.client.transport import Api, path_of
from heliostat.errors import InternalError, InvalidRequest, NotFound, TooLarge, Unavailable
from heliostat.models.compute_configs import DEFAULT_CPU, DEFAULT_GPU
from heliostat.models.jobs import JobConfig
from heliostat.models.services import ApplicationConfig, Service, ServiceConfig
from heliostat.models.uploads import Upload, UploadCreate

ATTEMPTS = 3
"""Of one upload, each with a new URL: a URL may expire during a slow upload."""


class Uploads(Group[M]):
    @one
    def create(self, request: UploadCreate) -> Flow[Upload]:
        """Returns where to PUT a zip of this hash and size; ``url`` is None when the bucket has it."""
        return (yield from _create(self._api, request))

    @one
    def working_dir(
        self,
        directory: str | Path,
        *,
        excludes: Iterable[str] = (),
        cloud: str | None = None,
        project: str | None = None,
    ) -> Flow[str]:
        """Packs a directory and uploads it unless the bucket has it. Returns the value for ``JobConfig.working_dir``.
        ``cloud``, ``project``: of the job that will use it. ``heliostat.client.packaging`` describes the zip."""
        return (yield from _upload(self._api, lambda: pack_working_dir(directory, excludes), cloud, project))

    @one
    def module(
        self, module: str | Path, *, excludes: Iterable[str] = (), cloud: str | None = None, project: str | None = None
    ) -> Flow[str]:
        """The same for one entry of ``JobConfig.py_modules``: a package's directory or a ``.py`` file."""
        return (yield from _upload(self._api, lambda: pack_module(module, excludes), cloud, project))


def ship_code(api: Api, config: JobConfig) -> Flow[JobConfig]:
    """The config with its local directories uploaded and replaced by their URIs. Raises before it sends anything when
    one of them can't be packed."""
    places = _places(config.working_dir, config.py_modules, config.excludes)
    packages = _Packages()
    try:
        yield from packages.pack(places)
        if not packages.made:
            return config
        cloud = yield from _cloud_of(api, config)
        uris = yield from packages.send(api, places, cloud, config.project)
    finally:
        packages.discard()
    return config.model_copy(update=_replaced(config.working_dir, config.py_modules, config.excludes, uris))


def check_code(config: JobConfig) -> Flow[JobConfig]:
    """The config without its local directories, after packing them: it raises what ``ship_code`` would."""
    places = _places(config.working_dir, config.py_modules, config.excludes)
    packages = _Packages()
    try:
        yield from packages.pack(places)
    finally:
        packages.discard()
    if not places:
        return config
    remote = config.working_dir if config.working_dir and is_remote(config.working_dir) else None
    modules = [module for module in config.py_modules if is_remote(module)]
    return config.model_copy(update={"working_dir": remote, "py_modules": modules, "excludes": []})


def ship_services(api: Api, configs: Sequence[ServiceConfig]) -> Flow[list[ServiceConfig]]:
    """The same for the versions of one deploy and the runtime environments of their applications. Packs each directory
    once, also when several applications name it."""
    packages = _Packages()
    ready = []
    try:
        for config in configs:
            yield from packages.pack(service_places(config))
        for config in configs:
            places = service_places(config)
            if not any(place in packages.made for place in places):
                ready.append(config)
                continue
            cloud = yield from _cloud_of(api, config)
            if cloud is None:
                cloud = yield from _cloud_of_service(api, config)
            uris = yield from packages.send(api, places, cloud, config.project)
            ready.append(_shipped(config, uris))
    finally:
        packages.discard()
    return ready


def service_places(config: ServiceConfig) -> list[Code]:
    """The local directories and modules of a service and its applications."""
    places = _places(config.working_dir, config.py_modules, config.excludes)
    for app in config.applications:
        places += _places(*_environment(app, config))
    return places


@dataclass(frozen=True)
class Code:
    """A directory or module on this machine, with its excludes."""

    path: str
    excludes: tuple[str, ...]
    module: bool

    def pack(self) -> Package:
        return (pack_module if self.module else pack_working_dir)(self.path, self.excludes)


class _Packages:
    """The zips of one submission, until they are sent."""

    def __init__(self) -> None:
        self.made: dict[Code, Package] = {}

    def pack(self, places: Iterable[Code]) -> Flow[None]:
        for place in places:
            if place not in self.made:
                self.made[place] = yield Blocking(place.pack)

    def send(self, api: Api, places: Iterable[Code], cloud: str | None, project: str | None) -> Flow[dict[Code, str]]:
        """The URI of each; uploads each zip once."""
        uris: dict[str, str] = {}
        for place in places:
            package = self.made[place]
            if package.sha256 not in uris:
                uris[package.sha256] = yield from _ensure(api, package, cloud, project)
        return {place: uris[self.made[place].sha256] for place in places}

    def discard(self) -> None:
        for package in self.made.values():
            package.discard()


def _places(working_dir: str | None, py_modules: Sequence[str], excludes: Sequence[str]) -> list[Code]:
    """Those of these that are on this machine."""
    work = [Code(working_dir, tuple(excludes), module=False)] if working_dir and not is_remote(working_dir) else []
    return work + [Code(m, tuple(excludes), module=True) for m in py_modules if not is_remote(m)]


def _replaced(
    working_dir: str | None, py_modules: Sequence[str], excludes: Sequence[str], uris: Mapping[Code, str]
) -> dict[str, object]:
    """The fields that name local code, with URIs for paths."""
    update: dict[str, object] = {}
    work = Code(working_dir or "", tuple(excludes), module=False)
    if work in uris:
        update["working_dir"] = uris[work]
    modules = [uris.get(Code(m, tuple(excludes), module=True), m) for m in py_modules]
    if modules != list(py_modules):
        update["py_modules"] = modules
    return update


def _environment(app: ApplicationConfig, config: ServiceConfig) -> tuple[str | None, list[str], list[str]]:
    """``working_dir``, ``py_modules`` and ``excludes`` of an application; the service's excludes apply too."""
    env = app.runtime_env
    work, modules, excludes = env.get("working_dir"), env.get("py_modules") or [], env.get("excludes") or []
    where = f"applications: {app.name}: runtime_env"
    if not isinstance(work, str | None):
        raise InvalidRequest(f"{where}.working_dir is not a string.", remedy="Name a directory or the URL of a zip.")
    for name, value in (("py_modules", modules), ("excludes", excludes)):
        if not isinstance(value, list) or any(not isinstance(item, str) for item in value):
            raise InvalidRequest(f"{where}.{name} is not a list of strings.", remedy="Write one per line.")
    return work, modules, [*config.excludes, *excludes]


def _shipped(config: ServiceConfig, uris: Mapping[Code, str]) -> ServiceConfig:
    apps = []
    for app in config.applications:
        update = _replaced(*_environment(app, config), uris)
        if update:  # its excludes are applied by now
            env = {k: v for k, v in app.runtime_env.items() if k != "excludes"} | update
            app = app.model_copy(update={"runtime_env": env})
        apps.append(app)
    own = _replaced(config.working_dir, config.py_modules, config.excludes, uris)
    return config.model_copy(update={**own, "applications": apps})


def _cloud_of(api: Api, config: JobConfig | ServiceConfig) -> Flow[str | None]:
    """The cloud where it will run, whose bucket its nodes can read. None: the default cloud."""
    if config.cloud is not None:
        return config.cloud
    if isinstance(config, JobConfig) and config.cluster is not None:
        return (yield from clusters.get(api, config.cluster, config.project)).cloud
    if isinstance(config.compute_config, str):
        try:
            return (yield from compute_configs.get(api, config.compute_config, config.project)).config.cloud
        except NotFound:
            if config.compute_config not in (DEFAULT_CPU, DEFAULT_GPU):
                raise
            return None  # every cloud has it
    return config.compute_config.cloud if config.compute_config else None


def _cloud_of_service(api: Api, config: ServiceConfig) -> Flow[str | None]:
    """The cloud of the service, for a version that names none. None: the service does not exist yet."""
    if config.name is None:
        return None
    try:
        params = {"project": config.project}
        return (yield from api.call("GET", path_of("services", config.name), Service, params=params)).cloud
    except NotFound:
        return None


def _create(api: Api, request: UploadCreate) -> Flow[Upload]:
    return (yield from api.call("POST", path_of("uploads"), Upload, body=request))


def _upload(api: Api, pack: Callable[[], Package], cloud: str | None, project: str | None) -> Flow[str]:
    package: Package = yield Blocking(pack)
    try:
        return (yield from _ensure(api, package, cloud, project))
    finally:
        package.discard()


def _ensure(api: Api, package: Package, cloud: str | None, project: str | None) -> Flow[str]:
    """The URI of this package in the bucket, uploaded if necessary."""
    where = {"cloud": cloud, "project": project}
    fields = {"sha256": package.sha256, "size": package.size} | {k: v for k, v in where.items() if v is not None}
    status = 0
    for _ in range(ATTEMPTS):
        upload = yield from _create(api, UploadCreate.model_validate(fields))
        if upload.url is None:
            return upload.uri
        headers = {"Content-Length": str(package.size), "Content-Type": "application/zip", **upload.headers}
        response = yield from api.put(Send("PUT", upload.url, headers, file=package.path))
        if response.is_success:
            return upload.uri
        status = response.status_code
        if status == 507:
            raise Unavailable(
                "The code can't be uploaded: the disk of the bucket is full.",
                remedy="Free space there, or shorten the retention of logs and uploads; then try again.",
            )
        if status == 413:
            raise TooLarge(
                f"The bucket refused a zip of {package.size} bytes as too large.", remedy="Exclude files with -e."
            )
        if status == 400:
            raise InvalidRequest(
                "The bucket refused the zip: its content does not match its hash.",
                remedy="Submit again.",
                field="working_dir",
            )
    raise InternalError(
        f"The bucket answered {status} to an upload.", remedy="Ask the operator; the log of the bucket has the reason."
    )
