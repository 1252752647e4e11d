"""Puts the gate (``agent.gate``) where Ray Serve's processes find it, before Ray starts on a node of a service."""

from __future__ import annotations

import shutil
from pathlib import Path

from agent.boot import Boot

PACKAGE = "heliostat_serve_gate"
CALLBACK = f"{PACKAGE}:middlewares"
GRPC_GUARD = f"{PACKAGE}.guard_grpc"


def gate_file(boot: Boot) -> Path:
    """What the gate follows; only this agent writes it (``agent.serve.gate``)."""
    return boot.node_dir / "serve" / "gate.json"


def install_gate(boot: Boot) -> None:
    """On every node of a service, before Ray starts there. Repeatable. Raises OSError.

    The copy is complete before it gets its name: a process of Ray's finds all of the package or none of it. A node
    that starts again may have an older agent's copy, which was one file until 2026: it goes."""
    folder = boot.provider_dir
    folder.mkdir(exist_ok=True)
    fresh, old = folder / f"{PACKAGE}.new", folder / f"{PACKAGE}.old"  # no import finds a name with a dot
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(Path(__file__).with_name("gate"), fresh, ignore=shutil.ignore_patterns("__pycache__"))
    target = folder / PACKAGE
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    (folder / f"{PACKAGE}.py").unlink(missing_ok=True)


def gate_environment(boot: Boot) -> dict[str, str]:
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
        "HELIOSTAT_SERVE_GATE": str(gate_file(boot)),
        "HELIOSTAT_SERVE_PORTS": f"{boot.ports.serve_http},{boot.ports.serve_grpc}",
        # Either would send requests past the proxy that has the gate.
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    }
