"""Code on its way to the bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from heliostat._flow import Blocking, Flow, Group, M, Send, one
from heliostat._transport import Api, path_of
from heliostat.errors import InternalError, InvalidRequest, TooLarge, Unavailable
from heliostat.models.compute_configs import ComputeConfig
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
        self, directory: str | Path, *, excludes: Iterable[str] = (), cloud: str | None = None
    ) -> Flow[str]:
        """Packs a directory, uploads it unless the bucket has it; returns what ``JobConfig.working_dir`` then holds.
        See ``heliostat.packaging`` for what is packed and what is refused."""
        return (yield from _upload(self._api, lambda: pack_working_dir(directory, excludes), cloud))

    @one
    def module(self, module: str | Path, *, excludes: Iterable[str] = (), cloud: str | None = None) -> Flow[str]:
        """Likewise for one entry of ``JobConfig.py_modules``: a package's directory or a ``.py`` file."""
        return (yield from _upload(self._api, lambda: pack_module(module, excludes), cloud))


def ship_code(api: Api, config: JobConfig) -> Flow[JobConfig]:
    """The config with its local directories uploaded and replaced; what is remote already stays as it is.
    Raises before anything is sent when one of them can't be packed."""
    cloud = config.cloud
    if cloud is None and isinstance(config.compute_config, ComputeConfig):
        cloud = config.compute_config.cloud
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
        if work is not None:
            update["working_dir"] = yield from _ensure(api, work, cloud)
        if packages and modules:
            uris = []
            for packed in modules:
                uris.append((yield from _ensure(api, packed, cloud)) if isinstance(packed, Package) else packed)
            update["py_modules"] = uris
    finally:
        for package in packages:
            package.discard()
    return config.model_copy(update=update) if update else config


def _create(api: Api, request: UploadCreate) -> Flow[Upload]:
    return (yield from api.call("POST", path_of("uploads"), Upload, body=request))


def _upload(api: Api, pack: Callable[[], Package], cloud: str | None) -> Flow[str]:
    package: Package = yield Blocking(pack)
    try:
        return (yield from _ensure(api, package, cloud))
    finally:
        package.discard()


def _ensure(api: Api, package: Package, cloud: str | None) -> Flow[str]:
    """The URI of this package in the bucket, put there if need be."""
    fields = {"sha256": package.sha256, "size": package.size} | ({"cloud": cloud} if cloud else {})
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
