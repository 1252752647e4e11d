"""What a machine runs at first boot, the same few lines on every provider (docs/agent-protocol.md), and
the agent as a content-addressed zip that those lines fetch."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import ssl
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from clouds.boot.stub import STUB
from clouds.contract.errors import BadConfig
from clouds.contract.retained import DEVICES
from heliostat.models.clouds import AwsConfig, GcpConfig, Provider
from heliostat.models.common import Model

AGENT_FOLDER = Path(__file__).resolve().parents[2] / "agent"
MAX_USER_DATA_BYTES = 16 * 1024
"""EC2's limit, the smallest of the providers'."""
RAY_VERSION = "2.60.0"
"""That this release is made and tested for; a cloud's machines must have it."""
CONSOLE_KEPT_S = 900
"""A machine on which no agent began waits so long before it ends itself. It began to wait after
its launch, so that this is past its deadline to register (``SLOW_REGISTER_S`` at most, by default)."""


class NodeEnvironment(Model):
    """What a cloud's machine boots into, as far as it is not the node's own: fixed with the node."""

    provider: Provider
    container_image: str | None = None
    python: str | None = None
    pip_index_url: str | None = None
    ray_version: str = RAY_VERSION

    @classmethod
    def of(cls, provider: Provider, config: AwsConfig | GcpConfig) -> NodeEnvironment:
        return cls(provider=provider, **config.model_dump(include={"container_image", "python", "pip_index_url"}))


_SCRIPT = """\
#!/bin/sh
# Starts Heliostat's agent on this machine.
set -eu
dir="${{HELIOSTAT_NODE_DIR:-/var/lib/heliostat}}"
mkdir -p "$dir"
cd "$dir"
(umask 077; cat > heliostat-boot.json) <<'HELIOSTAT_BOOT'
{boot}
HELIOSTAT_BOOT
cat > heliostat-boot.py <<'HELIOSTAT_STUB'
{stub}HELIOSTAT_STUB
python="${{HELIOSTAT_PYTHON:-python3}}"
# On the local cloud the machine is this process; elsewhere a machine without its agent is only cost.
if [ -n "${{HELIOSTAT_NODE_DIR:-}}" ]; then
    exec "$python" heliostat-boot.py
fi
code=0
"$python" heliostat-boot.py || code=$?
echo "heliostat: the agent ended with exit code $code" >&2
# It never began (75: the lines above; 125 to 127: docker's and the shell's own words). The control plane reads the
# console when the node's deadline passes, and ends the machine then; a machine that is gone has no console.
case $code in 75|125|126|127) sleep {keep_s} ;; esac
shutdown -h now
"""


def user_data(
    api_url: str,
    node_id: str,
    generation: int,
    bootstrap_token: str,
    bundle_sha256: str,
    *,
    environment: NodeEnvironment | None = None,
    ca_sha256: str = "",
    volume_path: str = "",
) -> str:
    """A ``sh`` script, the same bytes for the same arguments, below 16 KiB.

    It writes its arguments to ``heliostat-boot.json`` (0600) under their names here, fetches the bundle and
    executes ``python -m agent <absolute path>/heliostat-boot.json`` in the folder of the unpacked bundle.
    The bootstrap token stands in the script and that file only, never in an argument list.

    Args:
        environment: of a cloud's machine; None: the interpreter that runs the script has Ray (the local cloud).
        ca_sha256: of the PEM that the API's certificate must be signed by (``Bundles.keep_ca``); the machine fetches
            it by this hash, and from then on trusts nothing else; "": what its system trusts.
        volume_path: where the disk that the head keeps is mounted (``clouds.contract.retained``); "": there is none.
    """
    boot: dict[str, object] = {
        "api_url": api_url,
        "node_id": node_id,
        "generation": generation,
        "bootstrap_token": bootstrap_token,
        "bundle_sha256": bundle_sha256,
    }
    if environment is not None:
        boot["environment"] = environment.model_dump(mode="json")
    if ca_sha256:
        boot["ca_sha256"] = ca_sha256
    if volume_path:
        boot["volume"] = {"devices": DEVICES, "path": volume_path}
    script = _SCRIPT.format(boot=json.dumps(boot, sort_keys=True), stub=STUB, keep_s=CONSOLE_KEPT_S)
    if len(script.encode()) >= MAX_USER_DATA_BYTES:
        raise ValueError(f"user-data of node {node_id} has {len(script.encode())} bytes; 16 KiB is the limit")
    return script


@functools.cache
def bundle() -> tuple[str, bytes]:
    """(sha256, zip) of this release's ``agent/`` folder. Deterministic: sorted, dated 1980 and stored, not
    deflated, since zlib's output differs between versions. Read once: a checkout that is updated under a
    running process does not change what that process hands out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(AGENT_FOLDER.rglob("*")):
            inside = path.relative_to(AGENT_FOLDER.parent)
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in inside.parts):
                entry = zipfile.ZipInfo(inside.as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
                entry.create_system = 3
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, path.read_bytes())
    data = buffer.getvalue()
    return hashlib.sha256(data).hexdigest(), data


class Bundles(Mapping[str, bytes]):
    """What machines fetch by its sha256, in a folder: agents, and the API's CA. A machine that was launched before an
    upgrade fetches what its user-data names, so none is ever removed. Several processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self) -> str:
        """Puts this release's bundle there; gives its sha256."""
        sha256, data = bundle()
        self._put(sha256, data)
        return sha256

    def keep_ca(self, pem: Path) -> str:
        """Puts the certificates that nodes are to trust there; gives the file's sha256. Raises BadConfig for a file
        that cannot be read or holds none."""
        try:
            data = pem.read_bytes()
            ssl.create_default_context(cadata=data.decode())
        except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
            raise BadConfig(
                f"The certificates for nodes in {pem} cannot be used: {e}.",
                remedy="Name a PEM file with the CA of the API's certificate, or the certificate itself.",
                field="HELIOSTAT_API_CA_FILE",
            ) from e
        sha256 = hashlib.sha256(data).hexdigest()
        self._put(sha256, data)
        return sha256

    def _put(self, sha256: str, data: bytes) -> None:
        target = self._folder / f"{sha256}.zip"
        if not target.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            fd, part = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            Path(part).rename(target)

    def __getitem__(self, sha256: str) -> bytes:
        path = self._folder / f"{sha256}.zip"
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not path.exists():
            raise KeyError(sha256)
        return path.read_bytes()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self._folder.glob("*.zip"))

    def __len__(self) -> int:
        return sum(1 for _ in self)
