"""User-data on a real ``sh`` and Python, against a real HTTP server."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds import bootstrap

GOLDEN = Path(__file__).parent / "golden" / "user_data.sh"
TOKEN = "5e" * 32


def _fake_agent() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr("agent/__init__.py", "")
        z.writestr(
            "agent/__main__.py",
            "import json, sys\nboot = json.load(open(sys.argv[1]))\nprint('AGENT', boot['node_id'], sys.argv[1])\n"
            "sys.exit(7)\n",
        )
    return buffer.getvalue()


class Api(http.server.BaseHTTPRequestHandler):
    answers: list[tuple[int, bytes]] = []
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    Api.answers, Api.asked = [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _boot(script: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    file = folder / "user-data"
    file.write_text(script)
    base = {"PATH": os.environ["PATH"], "HELIOSTAT_PYTHON": sys.executable}
    return subprocess.run(["sh", str(file)], env=base | env, capture_output=True, text=True, timeout=60, check=False)


def test_the_same_bytes_for_ever() -> None:
    """A change here changes the request of machines that are being launched during an upgrade: do it knowingly
    (HELIOSTAT_UPDATE_GOLDEN=1)."""
    script = bootstrap.user_data("http://127.0.0.1:8700", "node_1", 3, TOKEN, "ab" * 32)
    if os.environ.get("HELIOSTAT_UPDATE_GOLDEN"):
        GOLDEN.write_text(script)
    assert script == GOLDEN.read_text()
    assert len(script.encode()) < 16 * 1024


def test_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="16 KiB"):
        bootstrap.user_data("http://" + "x" * 16384, "node_1", 1, TOKEN, "ab" * 32)


def test_boots_the_agent_it_was_told(api: str, tmp_path: Path) -> None:
    data = _fake_agent()
    sha = hashlib.sha256(data).hexdigest()
    Api.answers = [(503, b"not yet"), (200, b"something else"), (200, data)]
    node_dir = tmp_path / "node"
    done = _boot(bootstrap.user_data(api + "/", "node_x", 2, TOKEN, sha), tmp_path, HELIOSTAT_NODE_DIR=str(node_dir))
    boot_file = node_dir / "heliostat-boot.json"
    assert done.stdout.split() == ["AGENT", "node_x", str(boot_file)], done.stderr
    assert done.returncode == 7, "the machine's end is the agent's end"
    assert Api.asked == [f"/agent/v1/bundle/{sha}"] * 3, "an error and wrong bytes are tried again"
    assert stat.S_IMODE(boot_file.stat().st_mode) == 0o600
    assert json.loads(boot_file.read_text()) == {
        "api_url": api + "/",
        "node_id": "node_x",
        "generation": 2,
        "bootstrap_token": TOKEN,
        "bundle_sha256": sha,
    }
    assert TOKEN not in done.stdout + done.stderr

    Api.asked.clear()
    again = _boot(bootstrap.user_data(api, "node_x", 2, TOKEN, sha), tmp_path, HELIOSTAT_NODE_DIR=str(node_dir))
    assert again.returncode == 7
    assert Api.asked == [], "a bundle that is there is not fetched again"


def test_elsewhere_the_machine_ends_with_its_agent(api: str, tmp_path: Path) -> None:
    data = _fake_agent()
    Api.answers = [(200, data)]
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    shutdown = bin_dir / "shutdown"
    shutdown.write_text('#!/bin/sh\necho "SHUTDOWN $@"\n')
    shutdown.chmod(0o755)
    script = bootstrap.user_data(api, "node_x", 2, TOKEN, hashlib.sha256(data).hexdigest())
    script = script.replace("/var/lib/heliostat", str(tmp_path / "var"))  # the test has no right to the real one
    done = _boot(script, tmp_path, PATH=f"{bin_dir}:{os.environ['PATH']}")
    assert done.stdout.splitlines()[-1] == "SHUTDOWN -h now", done.stderr
    assert "exit code 7" in done.stderr


def test_bundle_is_the_agent_and_deterministic() -> None:
    sha, data = bootstrap.bundle()
    assert hashlib.sha256(data).hexdigest() == sha
    bootstrap.bundle.cache_clear()
    assert bootstrap.bundle() == (sha, data)
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        names = z.namelist()
        assert "agent/__init__.py" in names
        assert names == sorted(names)
        assert not [n for n in names if "__pycache__" in n]
        for name in names:
            assert z.read(name) == (bootstrap.AGENT_FOLDER.parent / name).read_bytes()


def test_old_bundles_stay(tmp_path: Path) -> None:
    store = tmp_path / "bundles"
    old = "0" * 64
    store.mkdir()
    (store / f"{old}.zip").write_bytes(b"old release")
    bundles = bootstrap.Bundles(store)
    sha = bundles.keep()
    assert bundles.keep() == sha
    assert bundles[sha] == bootstrap.bundle()[1]
    assert bundles[old] == b"old release"
    assert set(bundles) == {sha, old}
    assert "1" * 64 not in bundles
    assert "../bundles/" + old not in bundles
    assert len(list(store.iterdir())) == len(bundles) == 2, "no temporary file stays"
