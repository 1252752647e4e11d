"""The command line as a process: exit codes, signals, pipes, and how fast it starts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from heliostat.models.jobs import JobState, RunCause, RunState
from heliostat.models.services import ServiceState
from tests.heliostat.fake_api import TOKEN, FakeApi

ROOT = Path(__file__).parents[3]


def heliostat(api: FakeApi | None, *args: str, **env: str) -> subprocess.Popen[str]:
    known = {"HELIOSTAT_HOST": api.url, "HELIOSTAT_TOKEN": TOKEN} if api else {}
    command = [sys.executable, "-m", "heliostat", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **known, **env}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def settled(api: FakeApi, state: JobState, cause: RunCause | None = None) -> str:
    job = api.add_job()
    api.log(api.start_run(job.id).id, b"line\n" * 20_000)
    api.end_run(job.id, RunState(state), cause)
    api.settle(job.id, state)
    return job.id


def test_exit_codes(api: FakeApi) -> None:
    ok = settled(api, JobState.SUCCEEDED)
    failed = settled(api, JobState.FAILED, RunCause.APPLICATION)
    ours = settled(api, JobState.FAILED, RunCause.INFRASTRUCTURE)
    runs = {
        "0": heliostat(api, "job", "wait", ok),
        "1": heliostat(api, "job", "status", "nope", "-o", "json"),
        "1 usage": heliostat(api, "job", "submit", "--bogus"),
        "2": heliostat(api, "job", "wait", ours),
        "3": heliostat(api, "job", "wait", api.add_job("slow").id, "--timeout-s", "0.1"),
        "4": heliostat(api, "job", "list", HELIOSTAT_TOKEN="wrong"),
        "10": heliostat(api, "job", "wait", failed),
    }
    done = {wanted: finished(process) for wanted, process in runs.items()}
    assert {wanted: code for wanted, (code, _, _) in done.items()} == {w: int(w.split()[0]) for w in runs}, done
    assert json.loads(done["1"][2])["error"]["code"] == "not_found"
    assert "Traceback" not in "".join(out + err for _, out, err in done.values())


def test_api_down_is_exit_2_and_names_the_url() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = finished(heliostat(None, "job", "list", HELIOSTAT_HOST=url, HELIOSTAT_TOKEN="t"))
    assert code == 2
    assert out == ""
    assert url in err
    assert "make up" in err


def test_no_heliostat_known_is_exit_1(tmp_path: Path) -> None:
    code, _, err = finished(heliostat(None, "job", "list", HOME=str(tmp_path)))
    assert code == 1
    assert "make up" in err


def test_ctrl_c_while_following_leaves_the_job_alone(api: FakeApi) -> None:
    job = api.add_job()
    api.log(api.start_run(job.id).id, b"first line\n")
    process = heliostat(api, "job", "logs", "-f", "train")
    assert process.stdout is not None
    assert process.stdout.readline() == "first line\n", "a followed log is not buffered"
    process.send_signal(signal.SIGINT)
    code, _, err = finished(process)
    assert code == 130
    assert f"heliostat job logs -f {job.id}" in err
    assert "Traceback" not in err
    assert not any(path.endswith("/terminate") for _, path, _ in api.requests)


@pytest.mark.long
def test_a_reader_that_has_enough_ends_it_quietly(api: FakeApi) -> None:
    job = settled(api, JobState.SUCCEEDED)
    process = heliostat(api, "job", "logs", job)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.returncode == 141


def test_the_token_can_come_from_a_pipe_and_is_in_no_argument(api: FakeApi, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "heliostat", "login", "--host", api.url, "--token-stdin"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        command, input=TOKEN, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".config" / "heliostat" / "credentials.json").stat().st_mode & 0o777 == 0o600
    assert finished(heliostat(None, "whoami", HOME=str(tmp_path)))[0] == 0


def loaded(*args: str) -> set[str]:
    """The modules that a command line imports."""
    code = (
        "import sys; from heliostat.cli.app import main\n"
        "main(sys.argv[1:]); print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HELIOSTAT_HOST": "http://127.0.0.1:9"},
    )  # fmt: skip
    return set(done.stderr.split())


def test_help_imports_nothing_heavy() -> None:
    modules = loaded("job", "--help")
    assert "typer" in modules
    assert not {"heliostat.models.common", "httpx", "rich", "yaml"} & modules


def test_a_plain_command_imports_neither_rich_nor_yaml_nor_httpx_own_command(api: FakeApi) -> None:
    modules = loaded("--host", api.url, "job", "status", "x")
    assert {"httpx", "pydantic"} <= modules
    assert not {"rich", "yaml", "pygments", "click"} & modules


def test_help_starts_fast() -> None:
    """Best of three, as processor time: other work on this machine must not count."""

    def cost() -> float:
        import resource

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert finished(heliostat(None, "--help"))[0] == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cost() for _ in range(3)) < 0.5


def everything(control: int) -> bytes:
    """What is written to a terminal, until its other end is closed."""
    shown = b""
    while True:
        try:
            block = os.read(control, 4096)
        except OSError:  # so Linux says that it is closed
            block = b""
        if not block:
            os.close(control)
            return shown
        shown += block


def test_a_watched_service_on_a_terminal_leaves_its_last_picture(api: FakeApi) -> None:
    import fcntl
    import pty
    import struct
    import termios

    service = api.add_service("api", waits_for="its head")
    version = api.add_version(service.id)
    steps = iter([lambda: None, lambda: api.shift(version.id, 100)])

    def end() -> None:
        api.change(service.id, state=ServiceState.TERMINATED, reason="asked for")

    api.on_request = lambda _: next(steps, end)()
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    env = {**os.environ, "HELIOSTAT_HOST": api.url, "HELIOSTAT_TOKEN": TOKEN, "TERM": "xterm"}
    command = [sys.executable, "-m", "heliostat", "service", "status", "api", "--watch"]
    process = subprocess.Popen(
        command, stdout=terminal, stderr=terminal, env={**env, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    )
    os.close(terminal)
    shown = everything(control).decode()
    assert process.wait(timeout=60) == 0, shown
    assert "waits for its head" in shown
    last = shown[shown.rindex("VERSION") :]
    assert "v1" in last
    assert "100 %" in last
    assert "asked for" in last
    assert "TERMINATED" in shown


@pytest.mark.long
def test_a_status_line_on_a_terminal_and_a_log_in_a_file(api: FakeApi, tmp_path: Path) -> None:
    """stderr is a terminal, stdout a file: the file holds the log alone."""
    import pty

    job = api.add_job(waits_for="its head")
    steps = iter([lambda: None] * 3 + [lambda: api.log(api.start_run(job.id).id, b"hello\n")])

    def on_request(path: str) -> None:
        if path.endswith("/logs"):
            step: Any = next(steps, None)
            if step:
                step()
            else:
                api.settle(job.id, JobState.SUCCEEDED)

    api.on_request = on_request
    control, terminal = pty.openpty()
    code = (
        "import sys; from heliostat.client.client import Client; from heliostat.cli import live\n"
        "with Client() as c: live.follow_job(c, c.jobs.get('train'))"
    )
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=out, stderr=terminal,
            env={
                **os.environ, "PYTHONPATH": str(ROOT), "HELIOSTAT_HOST": api.url,
                "HELIOSTAT_TOKEN": TOKEN, "TERM": "xterm",
            },
        )  # fmt: skip
        os.close(terminal)
        shown = everything(control)
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "out").read_text() == "hello\n"
    assert b"Job train: STARTING, waits for its head" in shown


@pytest.mark.parametrize("args", [[], ["job"]])
def test_no_arguments_show_the_help(args: list[str]) -> None:
    code, out, err = finished(heliostat(None, *args))
    assert "Usage: heliostat" in out + err
    assert code in (0, 1)
