"""Load balancers of the ``local`` cloud: for each service one Traefik with a port of its own, below a supervisor of
its own. Both are data plane: they run on when the control plane ends."""

from __future__ import annotations

import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clouds.contract.balancer import Backend, BackendCounters, Endpoint, EndpointSpec
from clouds.contract.errors import BackendsLost, BadConfig, Gone, Outdated
from clouds.local.balancer import config as balancer_config
from clouds.local.balancer import ports as balancer_ports
from clouds.local.balancer import process as balancer_process
from clouds.local.balancer.files import (
    CorruptFile,
    DesiredBackends,
    EndpointRecord,
    disk,
    endpoints,
    is_held,
    load,
    locked,
    read,
)
from clouds.local.balancer.tls import Certificate
from clouds.local.machines import supervisor
from heliostat.errors import CloudError
from runtime.home import write_private

START_S = 30.0
"""From the start of the supervisor to the first request by the wanted routes; 0.4 s on an idle machine."""
RELOAD_S = 10.0
"""A Traefik that runs for longer than this and does not take the routes up has lost sight of their folder, and is
started again; 0.02 s on an idle machine."""
PORT_S = 2.0
"""For so long a port may stay taken, e.g. by a Traefik that ends."""


class LocalBalancer:
    """Endpoints as Traefiks of this user on this host (``clouds.contract.balancer.LoadBalancer``).

    Args:
        home: holds ``balancers/<service id>/``.
        host: where endpoints listen, of services that are new.
        public_host: how people call that host; default: ``host``, or this machine's name if that is any address.
        ports: ``first-last`` to take ports from; empty: free ones above those of outgoing connections.
        cert_file, key_file: PEM files for TLS; with them URLs are ``https://``. Without, TLS works on the same port
            with a certificate that we sign ourselves.
        traefik: the program; default: the one beside this Python.
    """

    def __init__(
        self,
        home: Path,
        *,
        host: str = "127.0.0.1",
        public_host: str = "",
        ports: str = "",
        cert_file: Path | None = None,
        key_file: Path | None = None,
        traefik: str = "",
    ) -> None:
        self._home = home.resolve()
        self._root = self._home / "balancers"
        self._host = host
        anywhere = host in ("0.0.0.0", "::")  # noqa: S104
        self._public_host = public_host or (socket.gethostname() if anywhere else host)
        self._range = ports
        self._certificate = Certificate(cert_file, key_file, self._root, self._public_host)
        self._traefik = traefik or str(Path(sys.executable).with_name("traefik"))

    # -- the contract

    def ensure(self, spec: EndpointSpec, *, make: bool = True) -> Endpoint:
        folder = self._folder(spec.service_id)
        with disk(folder):
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(self._root / "lock"):
                self._certificate.ready()
                if not folder.exists():
                    if not make:
                        raise _gone(spec.service_id)
                    self._make(spec, folder)
            with locked(folder / "lock") if make else self._held(spec.service_id, folder):
                record = self._record(folder)
                if record.installation_id != spec.installation_id:
                    raise BadConfig(
                        f"The endpoint of {spec.service_id} belongs to another installation.", resource=spec.service_id
                    )
                if record.grpc != spec.grpc:
                    record = record.model_copy(update={"grpc": spec.grpc})
                    write_private(folder / "endpoint.json", record.model_dump_json(indent=1))
                self._reconcile(folder, record, self._wanted(folder))
        return Endpoint(service_id=record.service_id, url=record.url)

    def set_backends(self, service_id: str, revision: int, backends: list[Backend]) -> None:
        folder = self._existing(service_id)
        with disk(folder), self._held(service_id, folder):
            record = self._record(folder)
            try:
                last = self._wanted(folder)
            except BackendsLost:
                last = DesiredBackends()  # this call says it anew
            new = DesiredBackends(revision=revision, backends=backends)
            if revision < last.revision or (revision == last.revision and new != last):
                raise Outdated.backends(service_id, revision, last.revision)
            self._routes(record, new)  # refuses what cannot be, before it is written down
            if new != last:
                write_private(folder / "backends.json", new.model_dump_json(indent=1))
            self._reconcile(folder, record, new)

    def counters(self, service_id: str) -> list[BackendCounters]:
        folder = self._existing(service_id)
        with disk(folder):
            record, wanted = self._record(folder), self._wanted(folder)
        _, text = balancer_process.ask("127.0.0.1", record.metrics_port, "/metrics", service_id)
        return balancer_config.counted(text, wanted.backends)

    def describe(self, service_id: str) -> Endpoint | None:
        folder = self._folder(service_id)
        if not folder.exists():
            return None
        with disk(folder):
            try:
                record = self._record(folder)
            except FileNotFoundError:
                if folder.exists():
                    raise
                return None  # removed in between
            return Endpoint(service_id=service_id, url=record.url, state=self._state(folder, record))

    def remove(self, service_id: str) -> None:
        folder = self._folder(service_id)
        trash = self._root / f".trash-{service_id}"
        with disk(folder):
            if trash.exists():  # of a remove that was cut short
                shutil.rmtree(trash)
            if not folder.exists():
                return
            try:
                with self._held(service_id, folder):
                    balancer_process.end(folder)
                    folder.rename(trash)
            except Gone:
                return
            shutil.rmtree(trash)

    def list_owned(self, installation_id: str) -> list[str]:
        return [record.service_id for record in endpoints(self._root) if record.installation_id == installation_id]

    # -- making

    def _make(self, spec: EndpointSpec, folder: Path) -> None:
        """The folder, whole at once; under the lock of all, so that no two get the same port."""
        port, metrics_port = balancer_ports.choose(self._home, self._root, self._host, self._range)
        scheme = "https" if self._certificate.given else "http"
        public = f"[{self._public_host}]" if ":" in self._public_host else self._public_host
        record = EndpointRecord(
            service_id=spec.service_id,
            service_name=spec.service_name,
            installation_id=spec.installation_id,
            host=self._host,
            port=port,
            metrics_port=metrics_port,
            url=f"{scheme}://{public}:{port}",
            grpc=spec.grpc,
        )
        part = self._root / f".part-{spec.service_id}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(mode=0o700)
        write_private(part / "endpoint.json", record.model_dump_json(indent=1))
        # From the first on, so that one that is missing is known to be lost.
        write_private(part / "backends.json", DesiredBackends().model_dump_json(indent=1))
        part.rename(folder)

    def _routes(self, record: EndpointRecord, wanted: DesiredBackends) -> tuple[dict[str, str], list[str]]:
        return balancer_config.routes(wanted.backends, grpc=record.grpc, certificate=self._certificate.files)

    def _static(self, folder: Path, record: EndpointRecord) -> str:
        return balancer_config.static(folder, record.host, record.port, record.metrics_port)

    # -- running

    def _state(self, folder: Path, record: EndpointRecord) -> str:
        try:
            texts, loaded = self._routes(record, self._wanted(folder))
        except BackendsLost as e:
            return str(e)
        except FileNotFoundError as e:
            return f"its certificate is missing: {e.filename}"
        if not balancer_process.has_routes(record, loaded):
            problem = str(balancer_process.status(folder).get("problem") or "")
            return problem or "its load balancer does not run, or has old routes"
        if not is_held(folder / "supervisor.lock"):
            return "its supervisor does not run"
        # What runs has read them already; the next one to be started would not find them.
        routed = all(read(folder / "routes" / name) == text for name, text in texts.items())
        if not routed or read(folder / "traefik.yml") != self._static(folder, record):
            return "its files are out of date"
        return "ready"

    def _reconcile(self, folder: Path, record: EndpointRecord, wanted: DesiredBackends) -> None:
        """Returns when requests go by ``wanted``: writes what is not as it should be, starts what does not run. Under
        the service's lock. A Traefik that runs keeps its static configuration until it is started again: newer code
        of ours is no reason to cut streams."""
        texts, loaded = self._routes(record, wanted)
        static = self._static(folder, record)
        if read(folder / "traefik.yml") != static:
            write_private(folder / "traefik.yml", static)
        blind = not (folder / "routes").is_dir()
        (folder / "routes").mkdir(mode=0o700, exist_ok=True)
        if any(read(folder / "routes" / name) != text for name, text in texts.items()):
            self._publish(folder, texts)
        if blind:  # a Traefik that runs watches the folder that was there before
            balancer_process.end_traefik(folder)
        began = changed = time.monotonic()
        restarted = replaced = False
        while True:
            if not is_held(folder / "supervisor.lock"):
                balancer_process.supervise(folder, self._traefik)
            elif balancer_process.has_routes(record, loaded):
                return
            now, status = time.monotonic(), balancer_process.status(folder)
            runs = supervisor.lives(status.get("traefik"))
            if not runs:
                changed = now
                if "port" in status and now - began > PORT_S:
                    raise BadConfig(
                        f"The load balancer of service {record.service_id} cannot listen: {status['problem']}.",
                        remedy=f"End the program that has it (`ss -ltnp 'sport = :{status['port']}'` names it); "
                        "the load balancer takes the port over by itself.",
                        resource=record.service_id,
                    )
                if status.get("problem") and "port" not in status and not replaced:
                    # The supervisor starts the program that it was given: of an older release, which may be gone.
                    balancer_process.end_supervisor(folder)
                    replaced = True
            elif now - changed > RELOAD_S and not restarted:
                self._publish(folder, texts)
                balancer_process.end_traefik(folder)
                restarted, changed = True, now
            if now - began > START_S:
                raise CloudError(
                    f"The load balancer of service {record.service_id} has not loaded its routes after {START_S:.0f} s"
                    f"{': ' + status['problem'] if status.get('problem') else ''}.",
                    remedy=f"See {folder}/traefik.log and {folder}/output.log; the call is safe to repeat.",
                    resource=record.service_id,
                )
            time.sleep(0.005 if now - began < 0.5 else 0.05)

    def _publish(self, folder: Path, texts: dict[str, str]) -> None:
        """Traefik sees the old routes or the new ones, whole: they are written outside of what it watches."""
        for name, text in texts.items():
            write_private(folder / "routes.new", text)
            (folder / "routes.new").replace(folder / "routes" / name)

    # -- files

    def _folder(self, service_id: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", service_id):
            # Nor a path that leads out of the folder.
            raise BadConfig(f"{service_id!r} is not a valid service id.", resource=service_id)
        return self._root / service_id

    def _existing(self, service_id: str) -> Path:
        folder = self._folder(service_id)
        if not folder.is_dir():
            raise _gone(service_id)
        return folder

    @contextmanager
    def _held(self, service_id: str, folder: Path) -> Iterator[None]:
        """The service's lock. Raises Gone when the endpoint is removed meanwhile."""
        try:
            with locked(folder / "lock"):
                yield
        except (FileNotFoundError, NotADirectoryError):
            if folder.exists():
                raise
            raise _gone(service_id) from None

    def _record(self, folder: Path) -> EndpointRecord:
        return load(EndpointRecord, folder / "endpoint.json")

    def _wanted(self, folder: Path) -> DesiredBackends:
        """Raises BackendsLost, and FileNotFoundError when the endpoint is removed meanwhile."""
        path = folder / "backends.json"
        try:
            return load(DesiredBackends, path)
        except (CorruptFile, FileNotFoundError) as e:
            if not folder.exists():
                raise
            raise BackendsLost(
                f"{path} is {'not there' if isinstance(e, FileNotFoundError) else 'not what we wrote'}.",
                remedy="The service's workflow writes it again by `set_backends`.",
                resource=folder.name,
            ) from None


def _gone(service_id: str) -> Gone:
    return Gone(
        f"Service {service_id} has no load balancer.", remedy="Make it with `ensure` first.", resource=service_id
    )
