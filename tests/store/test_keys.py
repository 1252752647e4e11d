from __future__ import annotations

import base64
import secrets
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from heliostat.errors import InternalError, InvalidRequest
from runtime.keys import Keys, load_or_create


def test_tokens_depend_on_all_that_they_are_for() -> None:
    keys = Keys(b"k" * 32)
    token = keys.bootstrap_token("node_1", 1)
    assert len(token) == 64
    assert token == Keys(b"k" * 32).bootstrap_token("node_1", 1)
    others = {keys.bootstrap_token("node_1", 2), keys.bootstrap_token("node_2", 1), keys.ray_token("node_1/1")}
    others |= {Keys(b"j" * 32).bootstrap_token("node_1", 1), keys.bucket_key().hex()}
    assert len(others | {token}) == 6


def test_sealed_values_open_under_their_own_secret_only() -> None:
    old, new = Keys(b"a" * 32), Keys(b"b" * 32, older=(b"a" * 32,))
    ciphertext = old.seal({"PASSWORD": "hunter2"})
    assert b"hunter2" not in ciphertext
    assert new.open(ciphertext) == {"PASSWORD": "hunter2"}
    with pytest.raises(InternalError, match="another secret key"):
        Keys(b"c" * 32).open(ciphertext)


def test_processes_that_start_at_once_get_the_same_secret(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(lambda _: load_or_create(home).ray_token("c"), range(8)))
    assert len(tokens) == 1
    assert [p.name for p in home.iterdir()] == ["secret.key"]
    assert stat.S_IMODE((home / "secret.key").stat().st_mode) == 0o600


def test_the_environment_wins_and_nonsense_is_refused(tmp_path: Path) -> None:
    secret = secrets.token_bytes(32)
    keys = load_or_create(tmp_path, base64.b64encode(secret).decode())
    assert keys.ray_token("c") == Keys(secret).ray_token("c")
    assert list(tmp_path.iterdir()) == []
    for nonsense in ("not base64!", base64.b64encode(b"short").decode()):
        with pytest.raises(InvalidRequest) as e:
            load_or_create(tmp_path, nonsense)
        assert nonsense not in str(e.value)
