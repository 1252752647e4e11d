"""One stack for all tests that do not break it; those that do make their own. Every stack ends with a look for what
it left behind: a process or a short name in /tmp fails the run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.support import ROOT, Stack
from tests.lab import inside
from tests.lab.fixtures import lab, site

__all__ = ["lab", "own_stack", "site", "stack", "warm"]

NewStack = Callable[..., Stack]


@contextmanager
def new_home(name: str) -> Iterator[Path]:
    """Kept for the reader when the tests of it fail."""
    folder = Path(tempfile.mkdtemp(prefix=f"e2e-{name}-"))
    yield folder / "home"
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Shared by all; nothing of it may be killed."""
    with new_home("shared") as home:
        stack = Stack(home)
        try:
            stack.up()
            yield stack
        finally:
            left = stack.dispose()
        assert not left, left


@pytest.fixture(scope="session")
def warm(stack: Stack) -> str:
    """A cluster that is up, for jobs that need none of their own: its id."""
    config = {"head_node": {"resources": {"CPU": 2}}, "worker_nodes": [], "idle_termination_minutes": 0}
    made = stack.ask("cluster", "create", "-n", "warm", "-f", stack.config_file(config))
    stack.await_cluster(made["id"], "RUNNING")
    return str(made["id"])


@pytest.fixture
def own_stack(request: pytest.FixtureRequest) -> Iterator[NewStack]:
    """Makes stacks of the test's own, which it may break: ``own_stack({"HELIOSTAT_…": …}, code=…)``."""
    made: list[Stack] = []
    homes: list[Path] = []

    def make(settings: dict[str, str] | None = None, code: Path = ROOT, *, up: bool = True) -> Stack:
        folder = Path(tempfile.mkdtemp(prefix="e2e-own-"))
        homes.append(folder)
        stack = Stack(folder / "home", settings, code)
        made.append(stack)
        if up:
            stack.up()
        return stack

    yield make
    left = [thing for stack in made for thing in stack.dispose()]
    assert not left, left
    if not getattr(request.node, "failed", False):
        for folder in homes:
            shutil.rmtree(folder)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    if outcome.get_result().failed:  # type: ignore[attr-defined]
        item.failed = True  # type: ignore[attr-defined]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    return inside.hand_over(item)
