"""What of the local load balancer may be killed or broken, and what its callers see of that."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from clouds.contract.errors import BadConfig, Denied, QuotaExceeded
from clouds.local.balancer import traefik as balancer_module
from clouds.local.balancer.config import ROUTES
from clouds.local.balancer.files import disk
from clouds.local.balancer.traefik import LocalBalancer
from heliostat.errors import CloudError
from tests.clouds.balancer_support import SERVICE, LocalWorld, Process, local_world, processes, spec
from tests.clouds.support import OURS, eventually


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, Process]]:
    with processes("cl_a", "cl_b") as started:
        yield {one.name: one for one in started}


@pytest.fixture
def world(backends: dict[str, Process], tmp_path: Path) -> Iterator[LocalWorld]:
    """Two clusters of one version."""
    with local_world(tmp_path, backends) as local:
        local.balancer.ensure(spec())
        local.balancer.set_backends(SERVICE, 1, [local.backend("cl_a"), local.backend("cl_b")])
        yield local


class Load:
    """Requests at a fixed rate, each on its own task."""

    def __init__(self, url: str, method: str, *, keep_alive: bool = True) -> None:
        self.answers: Counter[str] = Counter()
        """By status, or by kind of the failure."""
        self.under_way = self.begun = 0
        self._url, self._method, self._stop = url, method, asyncio.Event()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0)
        self._client = httpx.AsyncClient(limits=limits, timeout=30)

    async def run(self, during: Callable[[], object], *, rate: float = 50) -> None:
        """``during`` happens, on a thread, after the first 20 requests; the load ends 100 answers after it."""
        tasks: set[asyncio.Task[None]] = set()
        done: asyncio.Future[object] | None = None
        until = 0
        while done is None or not done.done() or sum(self.answers.values()) < until:
            task = asyncio.create_task(self._one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await asyncio.sleep(1 / rate)
            if done is None and sum(self.answers.values()) >= 20:
                done = asyncio.get_running_loop().run_in_executor(None, during)
            if done is not None and done.done() and not until:
                until = sum(self.answers.values()) + 100
        await asyncio.gather(*tasks)
        await done
        await self._client.aclose()

    async def _one(self) -> None:
        self.under_way += 1
        self.begun += 1
        content = b"x" * 100 if self._method in ("POST", "PUT") else None
        try:
            what = str((await self._client.request(self._method, self._url, content=content)).status_code)
        except httpx.HTTPError as e:
            what = type(e).__name__
        self.under_way -= 1
        self.answers[what] += 1


@pytest.mark.parametrize("method", ["GET", "POST", pytest.param("PUT", marks=pytest.mark.long)])
async def test_a_backend_is_killed_under_load(world: LocalWorld, method: str) -> None:
    """Each request takes 0.1 s, so some are under way."""
    load = Load(f"{world.url}/slow?0.1", method)
    under_way = 0

    def kill() -> None:
        """A request may begin or be answered while the kill is waited for: counted is what can have met it."""
        nonlocal under_way
        begun, before = load.begun, load.under_way  # in this order: one that begins in between counts twice, not never
        world.backends["cl_b"].kill()
        under_way = before + load.begun - begun

    try:
        await load.run(kill)
    finally:
        world.backends["cl_b"].start()
    failed = sum(load.answers.values()) - load.answers["200"]
    if method == "POST":
        assert set(load.answers) <= {"200", "502"}
        assert failed <= under_way, load.answers
    else:
        assert failed == 0, load.answers


async def test_traefik_is_killed_under_load(world: LocalWorld) -> None:
    """New connections wait for the next one; it is never seen without its routes. What can fail are connections that
    exist at that moment: at 50 requests/s of some ms, measured 0 to 2."""
    (before,) = world.pids("traefik")
    load = Load(f"{world.url}/x", "GET", keep_alive=False)
    under_way = 0

    def kill() -> None:
        nonlocal under_way
        begun, already = load.begun, load.under_way
        world.kill("traefik")
        eventually(lambda: world.pids("traefik") not in ([], [before]))
        # Until its supervisor is given a processor to see that it is dead, more connect to the socket that stays.
        under_way = already + load.begun - begun
        eventually(lambda: world.request() == (200, "cl_a"))

    await load.run(kill)
    assert "404" not in load.answers
    assert "ConnectError" not in load.answers, "refused"
    failed = sum(load.answers.values()) - load.answers["200"]
    assert failed <= under_way + 10, load.answers


@pytest.mark.long
async def test_a_supervisor_is_killed_under_load(world: LocalWorld) -> None:
    """Nobody notices; `ensure` gives Traefik a new one, and that one starts the next Traefik."""
    traefik = world.pids("traefik")
    (keeper,) = world.pids("supervisor")

    def kill() -> None:
        world.kill("supervisor")
        found = world.balancer.describe(SERVICE)
        assert found is not None
        assert found.state == "its supervisor does not run"
        world.balancer.ensure(spec())
        assert world.pids("traefik") == traefik
        assert len(world.pids("supervisor")) == 1
        assert world.pids("supervisor") != [keeper]

    load = Load(f"{world.url}/x", "GET")
    await load.run(kill)
    assert set(load.answers) == {"200"}
    world.kill("traefik")
    eventually(lambda: world.pids("traefik") not in ([], traefik))
    world.balancer.ensure(spec())
    assert world.request()[0] == 200
    assert len(world.pids("traefik")) == len(world.pids("supervisor")) == 1


@pytest.mark.parametrize("by", ["ensure", "set_backends"])
def test_both_are_killed(world: LocalWorld, by: str) -> None:
    url = world.url
    world.kill("supervisor")
    world.kill("traefik")

    def refused() -> bool:
        """Traefik's socket closes with its last thread, which may end a moment after the first, by which it is gone."""
        try:
            world.request()
        except httpx.ConnectError:
            return True
        except httpx.TransportError:
            return False
        return False

    assert eventually(refused)
    found = world.balancer.describe(SERVICE)
    assert found is not None
    assert found.state != "ready"
    with pytest.raises(CloudError, match="does not answer"):
        world.balancer.counters(SERVICE)
    if by == "ensure":
        assert world.balancer.ensure(spec()).url == url
    else:
        world.balancer.set_backends(SERVICE, 2, [world.backend("cl_b")])
    assert world.request()[0] == 200


@pytest.mark.parametrize("with_restart", [False, True])
def test_garbled_routes_are_written_anew(world: LocalWorld, with_restart: bool) -> None:
    (world.folder / "routes" / "routes.yml").write_text("{")
    if with_restart:
        world.kill("supervisor")
        world.kill("traefik")
    world.balancer.ensure(spec())
    assert world.request()[0] == 200
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_b")])
    assert world.request() == (200, "cl_b")


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("damage", ["", "{", None], ids=["empty", "garbled", "removed"])
def test_no_request_fails_by_a_damaged_file(world: LocalWorld, name: str, damage: str | None) -> None:
    """In the seconds before somebody looks after it."""
    path = world.folder / "routes" / name
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert world.request()[0] == 200
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_b")])
    assert world.request() == (200, "cl_b")


def test_routes_of_which_traefik_has_read_only_the_last_file_do_not_count(
    world: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads one after the other, and both may have been written in between: the old first with the new last, until
    it has heard of the change."""
    publish, late = world.balancer._publish, threading.Event()

    def half(folder: Path, texts: dict[str, str]) -> None:
        publish(folder, {ROUTES[1]: texts[ROUTES[1]]})
        threading.Timer(0.5, lambda: (late.set(), publish(folder, texts))).start()

    monkeypatch.setattr(world.balancer, "_publish", half)
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_b")])
    assert late.is_set(), "it returned while requests went by the old routes"
    assert {world.request()[1] for _ in range(10)} == {"cl_b"}


def test_routes_that_were_removed_are_written_anew(world: LocalWorld) -> None:
    for path in (world.folder / "routes").iterdir():
        path.unlink()
    (world.folder / "routes").rmdir()
    (world.folder / "traefik.yml").unlink()
    (world.folder / "status.json").unlink()
    world.balancer.ensure(spec())
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_b")])
    assert world.request() == (200, "cl_b")


@pytest.mark.parametrize("name", ["traefik.yml", "routes/routes.yml", "routes/spare.yml", "../tls.crt"])
@pytest.mark.parametrize("garbled", [False, True])
def test_files_that_are_not_as_they_were_written_are_seen_and_written_anew(
    world: LocalWorld, name: str, garbled: bool
) -> None:
    path = world.folder / name
    before = path.read_text()
    if garbled:
        path.write_text("{")
    else:
        path.unlink()
    found = world.balancer.describe(SERVICE)
    assert found is not None
    assert found.state != "ready"
    world.balancer.ensure(spec(), make=False)
    assert (path.read_text() == before) is (name != "../tls.crt")
    # Traefik may hear of the removal only now, and of the new file a moment later.
    assert eventually(lambda: world.balancer.describe(SERVICE) == found.model_copy(update={"state": "ready"}))
    assert world.request()[0] == 200


def test_a_supervisor_that_was_killed_is_seen_though_all_is_answered(world: LocalWorld) -> None:
    traefik = world.pids("traefik")
    world.kill("supervisor")
    (world.folder / "status.json").write_text("{")
    found = world.balancer.describe(SERVICE)
    assert found is not None
    assert "supervisor" in found.state
    world.balancer.ensure(spec(), make=False)
    assert len(world.pids("supervisor")) == 1
    assert world.pids("traefik") == traefik, "no request was broken off for it"


@pytest.mark.long
def test_a_traefik_that_hangs_is_replaced(world: LocalWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancer_module, "RELOAD_S", 0.2)
    (hung,) = world.pids("traefik")
    os.kill(hung, signal.SIGSTOP)
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_b")])
    assert world.request() == (200, "cl_b")
    assert world.pids("traefik") != [hung]


@pytest.mark.long
def test_a_traefik_that_cannot_start_is_told_with_its_reason(
    world: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balancer_module, "START_S", 3.0)
    world.kill("supervisor")
    world.kill("traefik")
    world.balancer._traefik = "/nowhere/traefik"
    with pytest.raises(CloudError, match="ends as soon as it starts"):
        world.balancer.ensure(spec())
    assert "/nowhere/traefik" in (world.folder / "output.log").read_text()


@pytest.mark.long
def test_a_supervisor_whose_traefik_is_gone_is_replaced(backends: dict[str, Process], tmp_path: Path) -> None:
    """An upgrade to another checkout, after which the old one was deleted, and then Traefik died."""
    old = tmp_path / "old-traefik"
    old.symlink_to(Path(sys.executable).with_name("traefik"))
    with local_world(tmp_path / "home", backends) as world:
        world.balancer._traefik = str(old)
        world.balancer.ensure(spec())
        world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
        before = world.pids("supervisor")
        old.unlink()
        world.kill("traefik")
        upgraded = LocalBalancer(world.home)
        assert upgraded.ensure(spec()).url == world.url
        assert world.request()[0] == 200
        assert world.pids("supervisor") != before


def test_a_port_that_another_program_has(world: LocalWorld) -> None:
    port = int(world.url.rpartition(":")[2])
    world.kill("supervisor")
    world.kill("traefik")
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

        def stolen() -> bool:
            try:
                thief.bind(("127.0.0.1", port))
            except OSError:  # Traefik's last threads still end
                return False
            thief.listen()
            return True

        eventually(stolen)
        with pytest.raises(BadConfig, match=f"port {port}") as caught:
            world.balancer.ensure(spec())
        assert f"sport = :{port}" in caught.value.remedy
        found = world.balancer.describe(SERVICE)
        assert found is not None
        assert str(port) in found.state
    eventually(lambda: world.pids("traefik"))
    world.balancer.ensure(spec())
    assert world.request()[0] == 200


def test_garbled_backends_are_told_and_set_anew(world: LocalWorld) -> None:
    (world.folder / "backends.json").write_text("{")
    with pytest.raises(CloudError, match=r"backends\.json") as caught:
        world.balancer.ensure(spec())
    assert "set_backends" in caught.value.remedy
    assert world.request()[0] == 200, "it goes on by what it has"
    world.balancer.set_backends(SERVICE, 2, [world.backend("cl_b")])
    world.balancer.ensure(spec())
    assert world.request() == (200, "cl_b")


@pytest.mark.parametrize("text", ["{", "", "[]"])
def test_one_endpoints_garbled_file_is_nobody_elses_trouble(
    world: LocalWorld, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(world.url.rpartition(":")[2])
    (world.folder / "endpoint.json").write_text(text)
    found = LocalBalancer(world.home, ports=f"{port}-{port + 50}").ensure(spec("svc_2"))
    assert int(found.url.rpartition(":")[2]) > port, "that of the one that runs is known by its being taken"
    assert world.balancer.list_owned(OURS) == ["svc_2"]
    assert SERVICE in capsys.readouterr().out
    world.balancer.remove(SERVICE)
    assert not world.folder.exists()


def test_a_folder_that_is_none(tmp_path: Path, backends: dict[str, Process]) -> None:
    (tmp_path / "balancers").write_text("a file")
    with pytest.raises(CloudError, match="cannot be read or written"):
        LocalBalancer(tmp_path).ensure(spec())


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, QuotaExceeded), (errno.EDQUOT, QuotaExceeded), (errno.EROFS, Denied), (errno.EACCES, Denied)],
)
def test_what_the_disk_refuses(tmp_path: Path, number: int, kind: type[CloudError]) -> None:
    with pytest.raises(kind, match=os.strerror(number)) as caught, disk(tmp_path / "svc"):
        raise OSError(number, os.strerror(number), str(tmp_path / "svc" / "routes.new"))
    assert "routes.new" in caught.value.message
    assert str(tmp_path) in caught.value.remedy


def test_a_remove_that_was_cut_short_is_done_by_the_next(world: LocalWorld) -> None:
    world.balancer.remove(SERVICE)
    trash = world.folder.parent / f".trash-{SERVICE}"
    trash.mkdir()
    (trash / "endpoint.json").write_text("{}")
    world.balancer.remove(SERVICE)
    assert not trash.exists()
    assert world.pids("traefik") == world.pids("supervisor") == []


def test_remove_ends_what_a_killed_supervisor_left(world: LocalWorld) -> None:
    world.kill("supervisor")
    (world.folder / "status.json").unlink()
    world.balancer.remove(SERVICE)
    assert world.pids("traefik") == []
    assert not world.folder.exists()
