"""A fake API per test, and a machine on which no other Heliostat can be found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from heliostat.client import logs as _logs
from heliostat.client import transport as _transport
from heliostat.client.client import Client
from heliostat.client.resources import lists, services
from tests.heliostat.fake_api import TOKEN, Door, FakeApi, serving


@pytest.fixture(autouse=True)
def _nobody_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in ("HELIOSTAT_HOST", "HELIOSTAT_TOKEN", "HELIOSTAT_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def _door() -> Iterator[Door]:
    with serving() as door:
        yield door


@pytest.fixture
def api(_door: Door) -> FakeApi:
    return _door.opens_to(FakeApi())


@pytest.fixture(autouse=True)
def _short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits look again at once: what they wait for here is done by the test, not by time."""
    monkeypatch.setattr(_logs, "FOLLOW_S", 0.01)
    monkeypatch.setattr(services, "WATCH_S", 0.01)
    monkeypatch.setattr(lists.Pace, "next", lambda self: 0.01)


@pytest.fixture
def client(api: FakeApi) -> Iterator[Client]:
    with Client(api.url, TOKEN) as made:
        yield made


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once."""
    monkeypatch.setattr(_transport, "FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(_transport, "MAX_DELAY_S", 0.0)
