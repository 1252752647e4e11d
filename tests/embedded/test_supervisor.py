"""The supervisor over small real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from embedded import supervisor as module
from embedded.supervisor import Part, PartFailed, Supervisor, rotate, tail
from runtime.home import is_alive

SERVE = "import pathlib, time; pathlib.Path({flag!r}).touch(); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SERVE
DIES = "import sys; print('no such setting: FOO'); sys.exit(3)"


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.pids: list[dict[str, int]] = []
        self.supervisor = Supervisor(self.pids.append, self.said.append)

    def part(self, name: str, program: str = SERVE, **kw: float) -> Part:
        flag = self.folder / f"{name}.ready"

        async def is_ready() -> bool:
            return flag.exists()

        code = program.format(flag=str(flag))
        log = self.folder / f"{name}.log"
        return Part(name, [sys.executable, "-S", "-c", code], dict(os.environ), log, self.folder, is_ready, **kw)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.supervisor.kill_all()
    await made.supervisor.stop()


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not what():
            await asyncio.sleep(0.01)


async def test_starts_tells_pids_and_stops_in_reverse_order(bench: Bench) -> None:
    await bench.supervisor.start(bench.part("one"))
    await bench.supervisor.start(bench.part("two"), bench.part("three"))
    pids = bench.pids[-1]
    assert set(pids) == {"one", "two", "three"}
    assert len({os.getsid(pid) for pid in pids.values()}) == 3, "Ctrl-C must not reach them"
    await bench.supervisor.stop()
    assert [line for line in bench.said if line.startswith("stopping")] == [
        "stopping three",
        "stopping two",
        "stopping one",
    ]
    assert not [pid for pid in pids.values() if is_alive(pid)]
    assert bench.pids[-1] == {}


async def test_a_part_that_dies_is_started_again(bench: Bench) -> None:
    await bench.supervisor.start(bench.part("one"), bench.part("two"))
    before = bench.pids[-1]
    os.kill(before["one"], signal.SIGKILL)
    await until(lambda: bench.pids[-1].get("one", before["one"]) != before["one"])
    assert bench.pids[-1]["two"] == before["two"]
    assert "one ended by signal SIGKILL; it restarts in 0.2 s" in "\n".join(bench.said)


async def test_a_part_that_never_comes_up_ends_the_start_with_its_words(bench: Bench) -> None:
    with pytest.raises(PartFailed, match=r"(?s)it ended 3 times.*no such setting: FOO"):
        await bench.supervisor.start(bench.part("one", DIES))


async def test_a_part_that_is_never_ready_ends_the_start(bench: Bench) -> None:
    with pytest.raises(PartFailed, match="was not ready within 1 s"):
        await bench.supervisor.start(bench.part("one", "import time; time.sleep(600)", ready_s=0.6))


async def test_a_missing_program_is_named(bench: Bench) -> None:
    part = bench.part("one")
    part.argv = ["/nonexistent/temporal"]
    with pytest.raises(PartFailed, match="not found: /nonexistent/temporal") as raised:
        await bench.supervisor.start(part)
    assert "make setup" in raised.value.remedy


async def test_what_does_not_end_is_killed(bench: Bench) -> None:
    await bench.supervisor.start(bench.part("one", STUBBORN, stop_s=0.3))
    pid = bench.pids[-1]["one"]
    await bench.supervisor.stop()
    assert not is_alive(pid)
    assert any("is killed" in line for line in bench.said)


async def test_the_second_interrupt_kills_at_once(bench: Bench) -> None:
    await bench.supervisor.start(bench.part("one", STUBBORN, stop_s=600))
    stopping = asyncio.create_task(bench.supervisor.stop())
    await until(lambda: "stopping one" in bench.said)
    bench.supervisor.kill_all()
    async with asyncio.timeout(30):
        await stopping


async def test_a_part_that_keeps_dying_is_started_ever_more_slowly(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(0 if seconds >= 0.2 else seconds)

    flag = bench.folder / "one.ready"
    # The first one lives until it was seen to be ready; those after it die at once.
    code = "import os, pathlib, time; os.path.exists({flag!r}) or (pathlib.Path({flag!r}).touch(), time.sleep(60))"
    part = bench.part("one", code)
    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    await bench.supervisor.start(part)
    assert part.process is not None
    part.process.kill()
    await until(lambda: flag.exists() and part.deaths >= 10)
    # On a slow machine looks at whether the part is ready come that seldom too; their pauses are other numbers.
    steps = {min(0.2 * 2**n, module.MAX_BACKOFF_S) for n in range(12)}
    backoffs = [pause for pause in pauses if pause in steps]
    assert backoffs[:4] == [0.2, 0.4, 0.8, 1.6]
    assert max(backoffs) == module.MAX_BACKOFF_S


async def test_a_part_that_gave_up_is_not_ready_though_something_answers_in_its_place(bench: Bench) -> None:
    part = bench.part("one", "raise SystemExit(3)")

    async def stranger() -> bool:
        return part.deaths >= module.START_TRIES

    part.is_ready = stranger
    with pytest.raises(module.PartFailed, match="ended 3 times"):
        await bench.supervisor.start(part)


def test_logs_are_rotated(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    for number in range(8):
        rotate(log)
        log.write_text(f"run {number}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["api.log", *(f"api.log.{n}" for n in range(1, 6))]
    assert (tmp_path / "api.log.5").read_text() == "run 2\n"
    assert tail(log) == "run 7"
    assert tail(tmp_path / "none.log") == "(nothing)"
