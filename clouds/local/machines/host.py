"""Facts about this host, and what a machine of it inherits."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from clouds.local.machines import supervisor
from clouds.local.machines.slots import Slot

_KEPT = {"HOME", "LANG", "LANGUAGE", "USER", "LOGNAME", "SHELL", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_DIR"}
_KEPT_ANY_CASE = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"}
_KEPT_SHAPES = re.compile(r"(LC|PIP|UV|OPENBLAS|OMP|MKL|NVPL|CUDA|NVIDIA)_.*|.*_(CERT|CERT_FILE|CERTS|CA_BUNDLE)")
_NEVER = re.compile(r"(HELIOSTAT|TEMPORAL|AWS|GOOGLE|AZURE)_.*|.*(TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|API_?KEY).*")


def environment(python: str, slot: Slot) -> dict[str, str]:
    """A machine's environment: the host's locale, path, proxy, certificate and pip settings, so that pip works in
    runtime environments; what ``python`` needs to be found first; the machine's place. No secret, nothing of ours."""
    env = {name: value for name, value in os.environ.items() if _kept(name)}
    near = f"localhost,127.0.0.1,{slot.ip}"
    for name in ("no_proxy", "NO_PROXY"):  # no proxy reaches what runs on this host
        env[name] = f"{env[name]},{near}" if env.get(name) else near
    return env | {
        "PATH": f"{Path(python).parent}:{os.environ.get('PATH', os.defpath)}",
        "HOME": str(Path.home()),
        "LANG": env.get("LANG", "C.UTF-8"),
        "TMPDIR": "/tmp",  # Ray's sockets need short paths
        "HELIOSTAT_PYTHON": python,
        "HELIOSTAT_NODE_IP": slot.ip,
        "HELIOSTAT_PORT_BASE": str(slot.port_base),
    }


def cpus() -> float:
    return float(len(os.sched_getaffinity(0)))


def _kept(name: str) -> bool:
    wanted = name in _KEPT or name.upper() in _KEPT_ANY_CASE or _KEPT_SHAPES.fullmatch(name) is not None
    return wanted and not _NEVER.fullmatch(name.upper())


def namespaces_work() -> bool:
    try:
        return (
            subprocess.run([*supervisor.NAMESPACE, "true"], capture_output=True, timeout=10, check=False).returncode
            == 0
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def memory_bytes() -> int:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of our container, if we are in one
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        return min(total, int(text))
    return total


def gpus() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
