"""The processes of a local load balancer: starting its supervisor, asking its Traefik, ending both."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clouds.local.balancer import supervisor as balancer_supervisor
from clouds.local.balancer.files import EndpointRecord, is_held, read
from clouds.local.machines import supervisor
from heliostat.errors import CloudError

ROOT = Path(__file__).resolve().parents[3]
"""Where the supervisor finds its code."""
SUPERVISOR_S = 20.0
"""From its start until it holds its lock; 0.1 s on an idle machine."""
END_S = 10.0
ASK_S = 2.0
"""For one request to Traefik itself."""


def has_routes(record: EndpointRecord, loaded: list[str]) -> bool:
    """Whether Traefik answers on the endpoint's port and has taken these routes up (``balancer_config.routes``)."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(record.host, record.host)  # noqa: S104
    try:
        return all(ask(host, record.port, path, record.service_id)[0] == 418 for path in loaded)
    except CloudError:
        return False


def ask(host: str, port: int, path: str, service_id: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=ASK_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException) as e:
        raise CloudError(
            f"The load balancer of service {service_id} does not answer ({type(e).__name__}).",
            remedy="Its supervisor starts it again; try again.",
            resource=service_id,
        ) from e
    finally:
        connection.close()


def end(folder: Path) -> None:
    """Ends the supervisor, then Traefik: the other way round it would be started again."""
    end_supervisor(folder)
    end_traefik(folder)


def end_supervisor(folder: Path) -> None:
    """Traefik, if it runs, keeps running; the next supervisor adopts it."""
    _end_all(lambda: balancer_supervisor.found(folder, "supervisor"), folder)


def end_traefik(folder: Path) -> None:
    """Ends the Traefiks that there are. A supervisor that lives starts one again."""
    running = balancer_supervisor.found(folder, "traefik")
    _end_all(lambda: [process for process in running if supervisor.lives(process)], folder)


def _end_all(left: Callable[[], Iterable[dict[str, Any]]], folder: Path) -> None:
    deadline = time.monotonic() + END_S
    while processes := list(left()):
        for process in processes:
            supervisor.kill(process)
        if time.monotonic() > deadline:
            raise CloudError(
                f"Process {processes[0]['pid']} of the load balancer {folder.name} does not end by SIGKILL.",
                remedy="It hangs in the kernel, e.g. on a disk that does not answer; the call is safe to repeat.",
                resource=folder.name,
            )
        time.sleep(0.002)


def status(folder: Path) -> dict[str, Any]:
    """``status.json``; {} while the supervisor has not written any, or where it is corrupt: it only tells."""
    try:
        found = json.loads(read(folder / "status.json"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def supervise(folder: Path, traefik: str) -> None:
    """Starts a supervisor, and returns when it holds its lock, or another one does."""
    (folder / "status.json").unlink(missing_ok=True)  # of the last one
    log = os.open(folder / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        started = subprocess.Popen(
            [sys.executable, "-S", "-m", balancer_supervisor.__name__, str(folder), traefik],
            cwd=ROOT,
            env={
                "PATH": os.defpath,
                "PYTHONDONTWRITEBYTECODE": "1",
                balancer_supervisor.MARK: str(folder),
                balancer_supervisor.ROLE: "supervisor",
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # no Ctrl-C of our terminal, no signal to our group
        )
    finally:
        os.close(log)
    deadline = time.monotonic() + SUPERVISOR_S
    started.wait(SUPERVISOR_S)  # the one that forks
    while not is_held(folder / "supervisor.lock"):
        if time.monotonic() > deadline:
            raise CloudError(
                f"The load balancer's supervisor of {folder.name} does not start: "
                f"{read(folder / 'supervisor.log')[-500:]}",
                remedy="The call is safe to repeat.",
                resource=folder.name,
            )
        time.sleep(0.005)
