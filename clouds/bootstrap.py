"""What a machine runs at first boot, the same few lines on every provider (docs/agent-protocol.md), and
the agent as a content-addressed zip that those lines fetch."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

AGENT_FOLDER = Path(__file__).resolve().parent.parent / "agent"
MAX_USER_DATA_BYTES = 16 * 1024
"""EC2's limit, the smallest of the providers'."""

_STUB = '''\
"""Fetches the agent, checks it, unpacks it and becomes it. Standard library only."""
import fcntl, hashlib, http.client, io, json, os, random, shutil, sys, time, urllib.request, zipfile

GIVE_UP_S = 1800  # a machine whose control plane never answers must end, not cost money for ever

here = os.getcwd()
boot_file = os.path.join(here, "heliostat-boot.json")
with open(boot_file) as f:
    boot = json.load(f)
sha256 = boot["bundle_sha256"]
url = boot["api_url"].rstrip("/") + "/agent/v1/bundle/" + sha256
target = os.path.join(here, "agent-" + sha256[:12])
give_up, delay = time.monotonic() + GIVE_UP_S, 0.2


def fetch():
    with urllib.request.urlopen(url, timeout=30) as answer:
        data = answer.read()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError("the bundle's sha256 is " + found + ", not " + sha256)
    return data


with open("heliostat-boot.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # a start-up script may run twice at once; only one unpacks
    while not os.path.isdir(target):
        try:
            data = fetch()
        except (OSError, ValueError, http.client.HTTPException) as e:
            print("heliostat: no agent from", url, "yet:", e, file=sys.stderr, flush=True)
            if time.monotonic() > give_up:
                sys.exit("heliostat: giving up after %d s" % GIVE_UP_S)
            time.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, 15)
            continue
        part = target + ".part"
        shutil.rmtree(part, ignore_errors=True)  # of a start that was cut off
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            z.extractall(part)
        os.rename(part, target)

os.chdir(target)
os.execv(sys.executable, [sys.executable, "-m", "agent", boot_file])
'''

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
"$python" heliostat-boot.py || echo "heliostat: the agent ended with exit code $?" >&2
shutdown -h now
"""


def user_data(api_url: str, node_id: str, generation: int, bootstrap_token: str, bundle_sha256: str) -> str:
    """A ``sh`` script, the same bytes for the same arguments, below 16 KiB.

    It writes its arguments to ``heliostat-boot.json`` (0600) under their names here, fetches the bundle and
    executes ``python -m agent <absolute path>/heliostat-boot.json`` in the folder of the unpacked bundle.
    The bootstrap token stands in the script and that file only, never in an argument list.
    """
    boot = {
        "api_url": api_url,
        "node_id": node_id,
        "generation": generation,
        "bootstrap_token": bootstrap_token,
        "bundle_sha256": bundle_sha256,
    }
    script = _SCRIPT.format(boot=json.dumps(boot, sort_keys=True), stub=_STUB)
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
    """Agents by sha256, in a folder. A machine that was launched before an upgrade fetches the bundle whose hash is
    in its user-data, so none is ever removed. Several processes may share the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self) -> str:
        """Puts this release's bundle there; gives its sha256."""
        sha256, data = bundle()
        target = self._folder / f"{sha256}.zip"
        if not target.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            fd, part = tempfile.mkstemp(dir=self._folder)
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            Path(part).rename(target)
        return sha256

    def __getitem__(self, sha256: str) -> bytes:
        path = self._folder / f"{sha256}.zip"
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not path.exists():
            raise KeyError(sha256)
        return path.read_bytes()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self._folder.glob("*.zip"))

    def __len__(self) -> int:
        return sum(1 for _ in self)
