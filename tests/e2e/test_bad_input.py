"""Bad input and bad luck at the command line: the exit code, the thing named, the remedy, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import NewStack
from tests.e2e.support import Stack, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def nothing_is_made(request: pytest.FixtureRequest, stack: Stack) -> Iterator[None]:
    """No job, no cluster, no upload, no process stays of what was refused."""
    before = made(stack)
    yield
    if "warm" not in request.fixturenames and "own_stack" not in request.fixturenames:
        assert made(stack) == before


def made(stack: Stack) -> list[object]:
    objects = sorted(p.name for p in (stack.home.path / "bucket" / "objects").rglob("*") if "uploads" in p.parts)
    parts = sorted(p.name for p in (stack.home.path / "bucket" / "parts").glob("*"))
    return [stack.sql(f"SELECT COUNT(*) FROM {t}") for t in ("jobs", "clusters", "schedules")] + [objects, parts]


def refused(stack: Stack, code: int, *words: str, command: tuple[str, ...], **kwargs: object) -> None:
    done = stack.cli(*command, **kwargs)  # type: ignore[arg-type]
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout == "", "an error is no answer"
    missing = [word for word in words if word not in done.stderr]
    assert not missing, f"{missing} not in:\n{done.stderr}"
    assert "Traceback" not in done.stderr


def test_unknown_field(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: x\nentrypoint: python x.py\nmax_retrys: 3\n")
    refused(stack, 1, str(file), "'max_retrys'", "'max_retries'", command=("job", "submit", "-f", str(file)))


def test_a_known_field_that_is_not_honoured(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("name: x\nentrypoint: python x.py\nimage_uri: docker.io/x\n")
    refused(stack, 1, "image_uri", "sets the image", command=("job", "submit", "-f", str(file)))


def test_bad_cron(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("cron_expression: '61 * * * *'\njob_config: {name: s, entrypoint: 'true'}\n")
    refused(stack, 1, "'61 * * * *'", "minute", "30 2 * * mon-fri", command=("schedule", "apply", "-f", str(file)))


def test_missing_working_dir(stack: Stack, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    refused(stack, 1, gone, "no directory", command=("job", "submit", "--working-dir", gone, "--", "true"))


def test_working_dir_of_3_gib(stack: Stack, tmp_path: Path) -> None:
    with (tmp_path / "model.bin").open("wb") as file:
        file.truncate(3 * 2**30)  # sparse
    command = ("job", "submit", "--working-dir", str(tmp_path), "--", "true")
    refused(stack, 1, "model.bin (3.0 GiB)", "2.0 GiB", "-e", command=command)


def test_config_that_cannot_fit(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "big.yaml"
    file.write_text("head_node: {resources: {CPU: 5000}}\n")
    refused(stack, 1, "5000 CPU", "local", "head_node", command=("cluster", "create", "-f", str(file)))
    refused(stack, 1, "5000 CPU", command=("job", "submit", "--compute-config", str(file), "--", "true"))


def test_unknown_cluster_and_config_and_job(stack: Stack) -> None:
    refused(stack, 1, "'nope'", "cluster", command=("job", "submit", "--cluster", "nope", "--", "true"))
    refused(stack, 1, "'nope:7'", command=("job", "submit", "--compute-config", "nope:7", "--", "true"))
    refused(stack, 1, "'nope'", "job", command=("job", "logs", "nope"))


def test_no_entry_point(stack: Stack) -> None:
    refused(stack, 1, "entry point", "after --", command=("job", "submit", "-n", "x"))


@pytest.mark.long
def test_wrong_or_expired_or_no_token(stack: Stack) -> None:
    refused(stack, 4, "token", "heliostat login", command=("job", "list"), env={"HELIOSTAT_TOKEN": "hst_wrong"})
    made = stack.cli("token", "create", "short", "--expires-in-days", "0.00001")  # 0.9 s
    assert made.returncode == 0, made.stderr
    short = made.stdout.strip()
    until("the token to expire", lambda: stack.cli("job", "list", env={"HELIOSTAT_TOKEN": short}).returncode == 4, 20)
    refused(stack, 4, "expired", command=("job", "list"), env={"HELIOSTAT_TOKEN": short})
    host = {"HELIOSTAT_HOST": stack.state["api_url"], "HELIOSTAT_HOME": "/nonexistent"}
    refused(stack, 4, "no token", "heliostat login", command=("job", "list"), env=host)


@pytest.mark.long
def test_no_permission(stack: Stack) -> None:
    """Another project's person sees nothing and may do nothing of an administrator's."""
    assert stack.cli("project", "create", "elsewhere").returncode == 0
    assert stack.cli("user", "create", "eve", "--project", "elsewhere").returncode == 0
    eve = {"HELIOSTAT_TOKEN": stack.cli("token", "create", "t", "--user", "eve").stdout.strip()}
    config = stack.ask("compute-config", "create", "-n", "ours", "-f", stack.config_file({}))
    refused(stack, 1, config["id"], command=("compute-config", "get", config["id"]), env=eve)
    refused(
        stack, 1, "'default'", "not yours", command=("job", "submit", "--project", "default", "--", "true"), env=eve
    )
    refused(stack, 4, "admin", command=("user", "create", "mallory"), env=eve)


@pytest.mark.long
def test_api_down(stack: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can come up there
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        env = {"HELIOSTAT_HOST": url, "HELIOSTAT_TOKEN": "hst_x"}
        refused(stack, 2, url, "make up", command=("job", "submit", "--", "true"), env=env)


@pytest.mark.long
def test_entry_point_that_does_not_exist(stack: Stack, warm: str) -> None:
    done = stack.cli(
        *("job", "submit", "--cluster", warm, "--max-retries", "0", "--wait", "-n", "typo", "--", "./mian.py", "--fast")
    )
    assert done.returncode == 10
    assert "the entry point was not found (exit code 127)" in done.stderr
    assert "./mian.py" in done.stderr


@pytest.mark.long  # pip asks the registry for as long as it likes
def test_requirement_that_does_not_resolve(stack: Stack, warm: str, tmp_path: Path) -> None:
    """Fails at once, whatever max_retries is: a second try would end the same way."""
    file = tmp_path / "requirements.txt"
    file.write_text("no-such-package-of-heliostat==99.1\n")
    done = stack.cli(
        *("job", "submit", "--cluster", warm, "-r", str(file), "--max-retries", "5", "--wait", "-n", "badreq"),
        *("--", "true"),
    )
    assert done.returncode in (1, 10), done.stderr
    job = stack.job("badreq")
    assert job["state"] == "FAILED"
    assert [run["cause"] for run in job["runs"]] == ["configuration"]
    assert "no-such-package-of-heliostat==99.1" in job["reason"]
    assert "no-such-package-of-heliostat==99.1" in done.stderr
    assert len(job["reason"]) < 600, "a reason is no traceback"


@pytest.mark.long
def test_temporal_down_and_disk_full(own_stack: NewStack, tmp_path: Path) -> None:
    """Temporal: refused and made by nobody, or accepted and made when it is back. The bucket: refused, nothing made."""
    stack = own_stack({"HELIOSTAT_BUCKET_QUOTA_BYTES": "200000"})
    (tmp_path / "data.bin").write_bytes(os.urandom(1_000_000))
    done = stack.cli("job", "submit", "--working-dir", str(tmp_path), "--", "true")
    assert done.returncode == 2, done.stderr
    assert "full" in done.stderr or "space" in done.stderr or "507" in done.stderr, done.stderr
    assert stack.ask("job", "list") == []
    assert made(stack)[3:] == [[], []]

    pid = stack.pid("temporal")
    os.kill(pid, signal.SIGSTOP)
    try:
        done = stack.cli("cluster", "create", "-n", "later", timeout=200)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Temporal does not answer" in done.stderr
    assert stack.ask("cluster", "list") == [], "refused is refused: nothing comes up afterwards"
    assert not stack.node_processes()
