"""Where host and token come from."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from heliostat.client import config
from heliostat.errors import UserError


def stack(url: str = "http://127.0.0.1:8700", token: str = "stack-token") -> Path:
    path = config.stack_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "admin.token").write_text(token + "\n")
    path.write_text(json.dumps({"api_url": url, "token_file": str(path.parent / "admin.token"), "pids": {"api": 1}}))
    return path


def test_nothing_known_tells_what_to_do() -> None:
    with pytest.raises(UserError) as caught:
        config.resolve()
    assert "make up" in caught.value.remedy
    assert "heliostat login" in caught.value.remedy


def test_the_stack_of_this_machine_needs_no_login() -> None:
    path = stack()
    found = config.resolve()
    assert (found.host, found.token) == ("http://127.0.0.1:8700", "stack-token")
    assert str(path) in found.host_from


def test_each_source_wins_over_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    stack()
    config.store("http://login:1", "login-token")
    assert (config.resolve().host, config.resolve().token) == ("http://login:1", "login-token")
    monkeypatch.setenv("HELIOSTAT_HOST", "http://env:2/")
    monkeypatch.setenv("HELIOSTAT_TOKEN", "env-token")
    assert (config.resolve().host, config.resolve().token) == ("http://env:2", "env-token")
    assert (config.resolve("https://flag:3").host, config.resolve("https://flag:3", "flag-token").token) == (
        "https://flag:3",
        "flag-token",
    )


def test_a_stored_token_goes_to_its_own_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stack()
    config.store("http://login:1", "login-token")
    assert config.resolve("http://other:2").token == ""
    assert config.resolve("http://127.0.0.1:8700").token == "stack-token"
    monkeypatch.setenv("HELIOSTAT_HOST", "http://login:1")
    assert config.resolve().token == "login-token"


def test_heliostat_home_names_another_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "second"))
    stack("http://127.0.0.1:9999", "second")
    assert config.resolve().host == "http://127.0.0.1:9999"


def test_credentials_are_for_their_owner_only() -> None:
    path = config.store("http://login:1", "secret-token")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["credentials.json"]
    assert "secret-token" not in repr(config.resolve())
    path.chmod(0o644)
    with pytest.raises(UserError, match="Other users can read"):
        config.resolve()


def test_logging_in_elsewhere_keeps_the_first() -> None:
    config.store("http://a:1", "a")
    config.store("http://b:2", "b")
    assert config.resolve().host == "http://b:2"
    assert config.resolve("http://a:1").token == "a"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_file_is_named(content: str) -> None:
    path = stack()
    path.write_text(content)
    with pytest.raises(UserError, match=r"stack\.json"):
        config.resolve()
