"""What a service's users see when the things around it die: nothing, or what cannot be helped, counted."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from runtime.home import PARTS, is_alive
from tests.e2e.conftest import new_home
from tests.e2e.services import HELD, QUICK, Served, Traffic, nothing_lost
from tests.e2e.support import Stack, until
from tests.e2e.test_services import primary

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEADY = {"steps": [10, 30, 60, 100], "hold_s": 3, "keep_failed_s": 0}


@pytest.fixture(scope="module")
def fragile() -> Iterator[Stack]:
    """One stack for all tests here: what is killed must heal, so that the next test can use it."""
    with new_home("service-kills") as home:
        stack = Stack(home)
        try:
            stack.up()
            yield stack
        finally:
            left = stack.dispose()
        assert not left, left


@pytest.fixture(scope="module")
def echo(fragile: Stack) -> Served:
    """One service for all tests here; each leaves one version of it, at rest."""
    served = Served(fragile, "echo")
    served.deploy("v1")
    return served


def kill_all_of_the_control_plane(stack: Stack) -> None:
    """The supervisor first: it would start the others again."""
    pids = [pid for pid in (stack.home.stack_pid(), *(stack.pid(part) for part in PARTS)) if pid is not None]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until("the control plane to be dead", lambda: not any(is_alive(p) for p in pids), 10)


@pytest.mark.long
def test_the_service_answers_while_the_whole_control_plane_is_dead(echo: Served) -> None:
    """In the middle of a rollout, whose weights stay as they are; afterwards it goes on from what it finds."""
    good = primary(echo)
    with Traffic(echo) as traffic:
        echo.deploy("after-death", wait=False, rollout=HELD)
        echo.until_at(20)
        traffic.await_text("after-death")
        kill_all_of_the_control_plane(echo.stack)
        traffic.await_seconds(10)
        assert traffic.failed == 0
        assert {"after-death", good} <= set(traffic.seconds()[-1]["texts"].values())
        echo.stack.up()
        until("the API", echo.stack.ready, 60)
        assert echo.now["rollout"]["percent"] == 20
        echo.cli("rollout", "promote", echo.name)
        echo.until_rests("after-death")
        traffic.await_seconds(6)
    nothing_lost(traffic, good, "after-death")


@pytest.mark.long
@pytest.mark.parametrize("phase", ["starting", "shifting", "draining"])
@pytest.mark.parametrize("part", ["worker", "api", "temporal"])
def test_a_part_is_killed_in_a_phase_of_a_rollout(echo: Served, part: str, phase: str) -> None:
    good, new = primary(echo), f"{part}-{phase}"
    with Traffic(echo) as traffic:
        echo.deploy(new, wait=False, rollout=STEADY)
        if phase == "starting":
            echo.until("its cluster to start", lambda s: any(v["name"] == new and v["clusters"] for v in s["versions"]))
        elif phase == "shifting":
            echo.until_at(30)
        else:
            echo.until(
                "the old one to be drained",
                lambda s: any(v["name"] == good and v["state"] == "TERMINATING" for v in s["versions"]),
            )
        echo.stack.kill(part)
        echo.until_rests(new)
        traffic.await_seconds(6)
    nothing_lost(traffic, good, new)


def ends_and_comes_again(echo: Served, *roles: str) -> None:
    """kill -9 of its load balancer's processes in these roles, one after the other, and their next life, without
    anybody's doing: the supervisor starts Traefik, the control plane the supervisor."""
    killed = set()
    for role in roles:
        (pid,) = echo.balancer_pids(role)
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)

    def all_live() -> bool:
        now = [echo.balancer_pids(role) for role in roles]
        return all(len(pids) == 1 for pids in now) and not {pid for pids in now for pid in pids} & killed

    until(f"{' and '.join(roles)} to come again", all_live, 40)
    until("an answer", lambda: answers(echo), 20)


def answers(echo: Served, service: dict[str, Any] | None = None) -> bool:
    """``service``: as it was known before the API died."""
    try:
        return echo.ask(service=service).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.long
def test_the_load_balancer_is_killed_with_and_without_a_control_plane(echo: Served) -> None:
    """Requests in that moment are lost; it comes again by itself, at the same URL, by the same weights."""
    url = echo.now["query_url"]
    ends_and_comes_again(echo, "traefik")
    ends_and_comes_again(echo, "supervisor")
    ends_and_comes_again(echo, "supervisor", "traefik")  # nothing of it is left to start the other
    service, folder = echo.now, echo.balancer()
    kill_all_of_the_control_plane(echo.stack)
    (pid,) = echo.balancer_pids("traefik", folder)
    os.kill(pid, signal.SIGKILL)
    until("an answer without any control plane", lambda: answers(echo, service), 40)
    echo.stack.up()
    assert echo.now["query_url"] == url
    good = primary(echo)
    with Traffic(echo) as traffic:
        echo.deploy("after-balancer")
        echo.until_rests("after-balancer")
    nothing_lost(traffic, good, "after-balancer")


@pytest.mark.long
@pytest.mark.parametrize("file", ["backends.json", "routes/routes.yml"])
def test_a_garbled_file_of_the_load_balancer_costs_nothing(echo: Served, file: str) -> None:
    """Traffic goes on by the last good weights, and the next rollout writes it anew."""
    good, new = primary(echo), f"after-{file[0]}"
    with Traffic(echo) as traffic:
        (echo.balancer() / file).write_text("{ this is nothing")
        traffic.await_seconds(3)
        echo.deploy(new)
        echo.until_rests(new)
        traffic.await_seconds(6)
    nothing_lost(traffic, good, new)


@pytest.mark.long
def test_the_head_of_one_of_two_clusters_is_killed(fragile: Stack) -> None:
    """What could be sent again was; what was in flight on it is lost, no more; a replacement comes by itself."""
    served = Served(fragile, "twins")
    served.deploy("v1", cluster_replicas=2)
    try:
        with Traffic(served) as traffic:
            traffic.await_seconds(5)
            victim = served.machines("v1")[0]
            os.kill(fragile.first_process(victim), signal.SIGKILL)

            def replaced(_: object) -> bool:
                machines = served.machines("v1")
                ready = [c for c in served.version("v1")["clusters"] if c["ready"]]
                return len(machines) == 2 and victim not in machines and len(ready) == 2

            served.until("a replacement in the traffic", replaced)
            traffic.await_seconds(6)
        report = traffic.report
        wrong = [f for f in report.failures if f.idempotent and not f.began]
        assert not wrong, report.summary()
        assert report.failed <= 15, report.summary()
        assert report.timeline[-3].failed == 0
    finally:
        served.terminate()


@pytest.mark.long
def test_the_only_head_is_killed_and_the_service_heals(echo: Served) -> None:
    good = primary(echo)
    (machine,) = echo.machines(good)
    os.kill(echo.stack.first_process(machine), signal.SIGKILL)
    until("another head", lambda: (m := echo.machines(good)) and m != [machine], 120)
    until("an answer", lambda: answers(echo), 120)
    echo.until_rests(good)


@pytest.mark.long
def test_ctrl_c_and_up_leave_a_service_alone(echo: Served) -> None:
    good = primary(echo)
    with Traffic(echo) as traffic:
        echo.stack.interrupt()
        assert any("/balancers/" in argv for argv in echo.stack.processes().values()), (
            "the load balancer outlives its control plane"
        )
        traffic.await_seconds(5)
        echo.stack.up()
        echo.deploy("after-up", rollout=QUICK)
        echo.until_rests("after-up")
        traffic.await_seconds(6)
    nothing_lost(traffic, good, "after-up")
