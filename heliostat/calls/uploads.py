"""Code on its way to the bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from heliostat._flow import Blocking, Flow, Group, M, Send, one
from heliostat._transport import Api, path_of
from heliostat.calls import clusters, compute_configs
from heliostat.errors import InternalError, InvalidRequest, TooLarge, Unavailable
from heliostat.models.jobs import JobConfig
from heliostat.models.uploads import Upload, UploadCreate
from heliostat.packaging import Package, is_remote, pack_module, pack_working_dir

ATTEMPTS = 3
"""Of one upload, each with a fresh URL: an earlier one may expire while a slow line is busy."""


class Uploads(Group[M]):
    @one
    def create(self, request: UploadCreate) -> Flow[Upload]:
        """Asks where to PUT a zip of this hash and size; ``url`` is None when the bucket has it."""
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
        """Packs a directory, uploads it unless the bucket has it; returns what ``JobConfig.working_dir`` then holds.
        ``cloud``, ``project``: of the job that will use it. See ``heliostat.packaging`` for what is packed."""
        return (yield from _upload(self._api, lambda: pack_working_dir(directory, excludes), cloud, project))

    @one
    def module(
        self, module: str | Path, *, excludes: Iterable[str] = (), cloud: str | None = None, project: str | None = None
    ) -> Flow[str]:
        """Likewise for one entry of ``JobConfig.py_modules``: a package's directory or a ``.py`` file."""
        return (yield from _upload(self._api, lambda: pack_module(module, excludes), cloud, project))


def ship_code(api: Api, config: JobConfig) -> Flow[JobConfig]:
    """The config with its local directories uploaded and replaced; what is remote already stays as it is.
    Raises before anything is sent when one of them can't be packed."""
    update: dict[str, object] = {}
    packages: list[Package] = []
    try:
        work: Package | None = None
        if config.working_dir is not None and not is_remote(config.working_dir):
            work = yield Blocking(lambda: pack_working_dir(str(config.working_dir), config.excludes))
            packages.append(work)
        modules: list[str | Package] = []
        for module in config.py_modules:
            if is_remote(module):
                modules.append(module)
                continue
            package: Package = yield Blocking(partial(pack_module, module, config.excludes))
            packages.append(package)
            modules.append(package)
        if not packages:
            return config
        cloud = yield from _cloud_of(api, config)
        if work is not None:
            update["working_dir"] = yield from _ensure(api, work, cloud, config.project)
        if modules:
            uris = []
            for packed in modules:
                uris.append(
                    (yield from _ensure(api, packed, cloud, config.project)) if isinstance(packed, Package) else packed
                )
            update["py_modules"] = uris
    finally:
        for package in packages:
            package.discard()
    return config.model_copy(update=update)


def _cloud_of(api: Api, config: JobConfig) -> Flow[str | None]:
    """The cloud whose bucket the job's nodes can read: where it will run. None: the default one."""
    if config.cloud is not None:
        return config.cloud
    if config.cluster is not None:
        return (yield from clusters.get(api, config.cluster, config.project)).cloud
    if isinstance(config.compute_config, str):
        return (yield from compute_configs.get(api, config.compute_config, config.project)).config.cloud
    return config.compute_config.cloud if config.compute_config else None


def _create(api: Api, request: UploadCreate) -> Flow[Upload]:
    return (yield from api.call("POST", path_of("uploads"), Upload, body=request))


def _upload(api: Api, pack: Callable[[], Package], cloud: str | None, project: str | None) -> Flow[str]:
    package: Package = yield Blocking(pack)
    try:
        return (yield from _ensure(api, package, cloud, project))
    finally:
        package.discard()


def _ensure(api: Api, package: Package, cloud: str | None, project: str | None) -> Flow[str]:
    """The URI of this package in the bucket, put there if need be."""
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
                "The bucket's disk is full: the code could not be uploaded.",
                remedy="Free space where the bucket lies, or lower the retention of logs and uploads; then try again.",
            )
        if status == 413:
            raise TooLarge(
                f"The bucket refused a zip of {package.size} bytes as too large.", remedy="Leave files out with -e."
            )
        if status == 400:
            raise InvalidRequest(
                "The bucket refused the zip: its bytes are not the ones that were announced.",
                remedy="Submit again.",
                field="working_dir",
            )
    raise InternalError(
        f"The bucket answered {status} to an upload.", remedy="Tell the operator; the bucket's log has the reason."
    )
