"""The machine's boot data: the boot file and three environment variables."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

from agent.constants import Constants, constants

SOCKET_PATH_MAX = 107
SESSION_SUFFIX = 68
"""``/session_2026-11-23_06-59-16_754805_1234567/sockets/plasma_store``: Ray appends it to its temp dir."""


@dataclass(frozen=True)
class Ports:
    """Fixed ports of one node. With a block of ports each listener of Ray's gets one of them, so that nodes on one
    machine do not collide; without one Ray has its default ports. With a block, worker processes take free ports of the
    system (``--min-worker-port=0``), so 20 ports are enough."""

    base: int | None
    gcs: int
    dashboard: int
    agent: int
    """The agent's own server: packages, and the autoscaler's node provider."""
    serve_http: int
    serve_grpc: int
    """Of Serve's proxy on the head of a service's cluster; on other clusters users run Serve themselves."""

    @classmethod
    def of(cls, base: int | None) -> Ports:
        if base is None:
            return cls(None, gcs=6379, dashboard=8265, agent=8790, serve_http=8000, serve_grpc=9000)
        return cls(base, gcs=base, dashboard=base + 1, agent=base + 11, serve_http=base + 12, serve_grpc=base + 13)

    def options(self, head: bool) -> list[str]:
        if self.base is None:
            return []
        names = ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
                 "metrics-export-port", "node-manager-port", "object-manager-port"]  # fmt: skip
        found = [f"--{name}={self.base + 3 + i}" for i, name in enumerate(names)]
        if head:
            found.append(f"--ray-client-server-port={self.base + 2}")
        return [*found, "--min-worker-port=0", "--max-worker-port=0"]

    def environment(self) -> dict[str, str]:
        if self.base is None:
            return {}
        return {"AUTOSCALER_METRIC_PORT": str(self.base + 9), "DASHBOARD_METRIC_PORT": str(self.base + 10)}


@dataclass(frozen=True)
class Boot:
    api_url: str
    node_id: str
    generation: int
    bootstrap_token: str = field(repr=False)
    ip: str
    ports: Ports
    node_dir: Path
    constants: Constants
    provider: str = ""
    """``aws`` or ``gcp``; "" on the local cloud."""
    ray_version: str = ""
    """Required of Ray on this machine; "": any."""
    ca_file: Path | None = None
    """PEM of the CA that must have signed the API's certificate; None: the system's CAs."""

    @property
    def local(self) -> bool:
        """Several nodes share this machine."""
        return self.ports.base is not None

    @property
    def mark(self) -> str:
        """In the environment of every process of this node, and of no other on this machine."""
        return f"HELIOSTAT_NODE_DIR={self.node_dir}"

    @property
    def ray_dir(self) -> Path:
        """The real folder of Ray's session."""
        return self.node_dir / "ray"

    @property
    def provider_dir(self) -> Path:
        """On the PYTHONPATH of Ray's own processes: the agent's modules that run inside them."""
        return self.node_dir / "provider"

    @property
    def temp_dir(self) -> Path:
        """``ray_dir`` as Ray gets it: a short link if the path is too long for Ray's sockets."""
        if len(str(self.ray_dir)) + SESSION_SUFFIX <= SOCKET_PATH_MAX:
            return self.ray_dir
        short = hashlib.sha256(str(self.node_dir).encode()).hexdigest()[:12]
        return Path("/tmp") / f"hn-{short}"

    def make_dirs(self) -> None:
        self.node_dir.mkdir(parents=True, exist_ok=True)
        self.ray_dir.mkdir(exist_ok=True)
        if self.temp_dir != self.ray_dir:
            self.temp_dir.unlink(missing_ok=True)
            self.temp_dir.symlink_to(self.ray_dir)


def read(path: str) -> Boot:
    """Raises OSError, KeyError or ValueError; none of them holds the token."""
    file = Path(path)
    if not file.exists() and not file.is_absolute():
        file = Path.cwd().parent / path  # the stub starts the agent in the bundle's folder
    raw = json.loads(file.read_text())
    base = os.environ.get("HELIOSTAT_PORT_BASE")
    folder = os.environ.get("HELIOSTAT_NODE_DIR") or raw.get("node_dir") or _default_dir()
    api_url = str(raw["api_url"]).rstrip("/")
    environment = raw.get("environment") or {}
    return Boot(
        api_url=api_url,
        node_id=str(raw["node_id"]),
        generation=int(raw["generation"]),
        bootstrap_token=str(raw["bootstrap_token"]),
        ip=os.environ.get("HELIOSTAT_NODE_IP") or main_ip(api_url),
        ports=Ports.of(int(base) if base else None),
        node_dir=Path(folder).absolute(),
        constants=constants(raw.get("constants") or {}),
        provider=str(environment.get("provider") or ""),
        ray_version=str(environment.get("ray_version") or ""),
        ca_file=file.absolute().with_name("heliostat-ca.pem") if raw.get("ca_sha256") else None,
    )


def _default_dir() -> str:
    standard = Path("/var/lib/heliostat")
    return str(standard) if os.access(standard, os.W_OK) else str(Path.cwd())


def main_ip(api_url: str) -> str:
    """This machine's address on the way to the API. Sends no packet."""
    host = urllib.parse.urlsplit(api_url).hostname or "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return socket.gethostbyname(socket.gethostname())
        return str(probe.getsockname()[0])
