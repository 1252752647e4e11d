"""``down``: ends the jobs, services and clusters of this home's stack, then the stack.

Clusters end the way they always do, by their workflows, confirmed by their cloud; a stopped control plane
is started for that. Only when it cannot be, the local cloud kills every machine that carries our owner
tag; then nothing runs on this machine any more, and machines elsewhere are named for the next ``up``.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx

from embedded.parts import ROOT, WORKER_STOP_S, base_environment
from embedded.supervisor import say
from heliostat.errors import HeliostatError, InfrastructureError, from_problem
from heliostat.models.clusters import ClusterState
from heliostat.models.jobs import JobState
from heliostat.models.services import ServiceState
from runtime.home import Home, end_processes

STUCK_S = 120.0
"""Without any progress for so long, ending by workflow is given up, and machines are killed."""
API_S = 60.0
REASON = "make down"


def down(home: Home, start: Callable[[], int]) -> int:
    """Ends everything of this home. Exit code 0: nothing of it is left on this machine.

    Args:
        start: brings a stopped control plane up, detached; returns its exit code.
    """
    left = ""
    if home.stack_pid() is not None or may_hold_clusters(home):
        try:
            if home.stack_pid() is None:
                say("Clusters may still run; starting the control plane to end them.")
                if start() != 0:
                    raise InfrastructureError("the control plane does not start")
            # From this machine: ``api_url`` may be the outside of a proxy.
            here = home.state()["metrics_urls"]["api"].removesuffix("/metrics")
            await_api(f"{here}/healthz")
            end_resources(here, home.token_file.read_text().strip())
        except (HeliostatError, httpx.HTTPError, OSError) as error:
            left = str(error)
            say(f"The control plane could not end everything: {error}")
    stop(home)
    cut = kill_machines(home)
    if cut:
        say(f"Killed {len(cut)} machines: {', '.join(cut)}")
    if left and not cut:
        say("No machine is left on this host. The next `up` ends machines in other clouds, if any.")
    say(f"Nothing of {home.path} runs on this machine any more.")
    return 2 if left else 0


def await_api(url: str) -> None:
    """A stack that is starting, or whose API is being started again, gets ``API_S`` seconds.

    Raises:
        InfrastructureError: the API does not answer.
    """
    deadline = time.monotonic() + API_S
    with closing(httpx.Client(timeout=5, trust_env=False)) as client:
        while time.monotonic() < deadline:
            try:
                if client.get(url).is_success:
                    return
            except httpx.HTTPError:
                pass  # asked again
            time.sleep(0.2)
    raise InfrastructureError(f"the API does not answer at {url} within {API_S:.0f} s")


def stop(home: Home) -> None:
    """Ends the control plane, supervised or orphaned; returns when its processes are gone."""
    pid = home.stack_pid()
    if pid is not None:
        end_processes([pid], grace_s=WORKER_STOP_S + 35)
    end_processes(home.processes(), grace_s=WORKER_STOP_S)
    state = home.state()
    if state:
        home.write_state(state | {"state": "stopped", "pids": {}})


def end_resources(api_url: str, token: str) -> None:
    """Terminates every job, service and cluster through the API, and returns when all are confirmed.

    Raises:
        InfrastructureError: nothing has moved for ``STUCK_S`` seconds; the message names what is left.
        HeliostatError, httpx.HTTPError: the API refused, or is away.
    """
    asked: set[str] = set()
    before: dict[str, str] = {}
    moved = time.monotonic()
    bearer = {"Authorization": f"Bearer {token}"}
    with closing(httpx.Client(base_url=api_url, headers=bearer, timeout=30, trust_env=False)) as client:
        while True:
            # Those that hold clusters first: one whose cluster is taken away would ask for another.
            left = _holders(client)
            left = left or [("clusters", cluster) for cluster in _unsettled(client, "clusters", ClusterState)]
            if not left and not _holders(client):
                return
            for kind, resource in left:
                if resource["id"] not in asked:
                    say(f"ending {kind.removesuffix('s')} {resource['name']} ({resource['id']})")
                    _checked(client.post(f"/v1/{kind}/{resource['id']}/terminate", json={"reason": REASON}))
                    asked.add(resource["id"])
            now = {r["id"]: f"{r['name']} is {r['state']}: {r.get('waits_for') or r.get('reason')}" for _, r in left}
            if now != before:
                before, moved = now, time.monotonic()
            elif time.monotonic() - moved > STUCK_S:
                raise InfrastructureError(f"no progress for {STUCK_S:.0f} s; {'; '.join(now.values())}")
            time.sleep(0.2)


def _holders(client: httpx.Client) -> list[tuple[str, dict[str, Any]]]:
    jobs = [("jobs", job) for job in _unsettled(client, "jobs", JobState)]
    return jobs + [("services", service) for service in _unsettled(client, "services", ServiceState)]


def _unsettled(
    client: httpx.Client, kind: str, states: type[JobState] | type[ClusterState] | type[ServiceState]
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for state in states:
        cursor: str | None = None
        while not state.settled:
            params = {"state": state.value, "limit": "100"} | ({"cursor": cursor} if cursor else {})
            page = _checked(client.get(f"/v1/{kind}", params=params)).json()
            found += page["items"]
            cursor = page.get("next_cursor")
            if not cursor:
                break
    return found


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise from_problem(answer.json())
    return answer


def may_hold_clusters(home: Home) -> bool:
    """Whether a stopped stack has anything to end, told without starting it: by its records, where they are a file
    of the home, and by its machines on this host."""
    if home.records_db.exists():
        with closing(sqlite3.connect(f"file:{home.records_db}?mode=ro", uri=True, timeout=10)) as records:
            for table in ("jobs", "services", "clusters"):
                try:
                    query = f"SELECT 1 FROM {table} WHERE ended_at IS NULL AND NOT withdrawn LIMIT 1"  # noqa: S608
                    if records.execute(query).fetchone():
                        return True
                except sqlite3.OperationalError:
                    pass  # records of a stack that was never ready
    return bool(local_machines(home, "list"))


def kill_machines(home: Home) -> list[str]:
    """Ends every machine of the local cloud that carries our owner tag; returns their ids when they are gone."""
    return local_machines(home, "end")


def local_machines(home: Home, what: str) -> list[str]:
    """``list`` or ``end``, in a process of its own: this layer knows no cloud."""
    if not home.path.exists():
        return []
    done = subprocess.run(
        [sys.executable, "-m", "clouds.local", what],
        cwd=ROOT,
        env=base_environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InfrastructureError(
            f"the machines of {home.path} could not be listed: {done.stderr.strip()[-2000:]}",
            remedy="Run `make down` again.",
            resource=str(home.path),
        )
    return done.stdout.split()
