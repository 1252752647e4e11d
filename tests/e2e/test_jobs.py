"""A job's whole life as its user sees it, by the command line, on real Ray."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.support import ROOT, Stack, processes_with, seconds_between, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

PROGRAM = """
import os, ray, helper
print("first line", flush=True)
ray.init()
value = ray.get(ray.remote(lambda: os.environ["E2E_SECRET"]).remote())
assert value == os.environ["E2E_SECRET"] and len(value) == 32
print("length", helper.length(value), flush=True)
print("data there:", os.path.exists("data/big.bin"), flush=True)
"""


def test_own_cluster_whole_life_and_no_secret_anywhere(stack: Stack, tmp_path: Path) -> None:
    """Code shipped, env honoured and seen nowhere, exit 0, log from the first line and after the end, nothing left."""
    (tmp_path / "main.py").write_text(PROGRAM)
    (tmp_path / "helper.py").write_text("length = len")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "big.bin").write_bytes(os.urandom(100_000))
    secret = secrets.token_hex(16)
    with Watch(secret, stack.token) as seen:
        done = stack.cli(
            *("job", "submit", "-n", "whole", "--working-dir", str(tmp_path), "-e", "data", "--env", "E2E_SECRET"),
            *("--compute-config", stack.config_file({"head_node": {"resources": {"CPU": 1}}}), "--wait"),
            *("--", "python", "main.py"),
            env={"E2E_SECRET": secret},
        )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "first line" in lines, done.stdout
    assert "length 32" in lines, done.stdout
    assert "data there: False" in lines, done.stdout
    job = stack.ask("job", "status", "whole")
    assert job["state"] == "SUCCEEDED"
    assert [(r["state"], r["exit_code"], r["cause"]) for r in job["runs"]] == [("SUCCEEDED", 0, None)]
    assert job["config"]["env_vars"] == {"E2E_SECRET": "********"}

    cluster = stack.await_cluster(job["cluster_id"], "TERMINATED")
    assert set(cluster["phase_seconds"]) >= {"head_launched", "head_registered", "head_ready"}, cluster
    assert not [p for m in machine_ids(stack, cluster["id"]) for p in stack.node_processes(m)]
    assert stack.log("whole") == done.stdout, "the log of a cluster that is gone is the log that was followed"

    assert seen() == [], "argument lists that held a secret"
    histories = stack.history(job["id"]) + stack.history(cluster["id"])
    assert "E2E_SECRET" in histories, "the names of env values are no secret"
    assert secret not in histories
    answers = [stack.get(f"/v1/jobs/{job['id']}"), stack.get("/v1/jobs"), stack.ask("job", "events", "whole")]
    assert secret not in json.dumps(answers)
    assert files_with(stack.home.path, secret) == []
    assert files_with(stack.home.path, stack.token) == [stack.home.token_file.name]


class Watch:
    """Looks at every argument list of this machine. Ray's own ``setup_worker.py`` is told apart: Ray hands a worker's
    runtime environment over in its arguments, for the tenths of a second until it becomes the worker."""

    def __init__(self, *secrets_: str) -> None:
        self._secrets = [s.encode() for s in secrets_]
        self._seen: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> object:
        self._thread.start()
        return lambda: sorted(self._seen)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    argv = Path(f"/proc/{pid}/cmdline").read_bytes()
                except OSError:
                    continue
                if any(s in argv for s in self._secrets) and b"/_private/workers/setup_worker.py\0" not in argv:
                    self._seen.add(argv.replace(b"\0", b" ").decode(errors="replace"))


def files_with(folder: Path, text: str) -> list[str]:
    """Nodes' own folders apart. What vanishes meanwhile (the parts that live write by renaming) is not there."""
    needle, found = text.encode(), []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "node"]
        for path in (Path(place, name) for name in names if name != "node"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.is_symlink() and needle in path.read_bytes():
                    found.append(str(path.relative_to(folder)))
    return sorted(found)


def machine_ids(stack: Stack, cluster_id: str) -> list[str]:
    return [n["machine_id"] for n in stack.nodes(cluster_id) if n["machine_id"]]


@pytest.mark.long
def test_retries_run_on_the_same_cluster_and_the_log_follows_across_them(
    stack: Stack, warm: str, tmp_path: Path
) -> None:
    """Fails twice, then succeeds: three runs, each executed once, one followed log."""
    marks = tmp_path / "marks"
    entrypoint = f"echo attempt $(wc -l < {marks}); echo x >> {marks}; test $(wc -l < {marks}) -ge 3 || exit 7"
    marks.touch()
    job = stack.submit(entrypoint, options=("--cluster", warm, "--max-retries", "2", "-n", "thrice"))
    followed = stack.cli("job", "logs", "-f", job)
    assert followed.returncode == 0, followed.stderr
    assert [line for line in followed.stdout.splitlines() if line.startswith("attempt")] == [
        "attempt 0",
        "attempt 1",
        "attempt 2",
    ]
    ended = stack.job(job)
    assert ended["state"] == "SUCCEEDED", ended
    assert [(r["state"], r["exit_code"], r["cause"], r["cluster_id"]) for r in ended["runs"]] == [
        ("FAILED", 7, "application", warm),
        ("FAILED", 7, "application", warm),
        ("SUCCEEDED", 0, None, warm),
    ]
    assert marks.read_text() == "x\n" * 3
    assert "attempt 1" in stack.log(job, "--run", "2")
    assert "attempt 0" not in stack.log(job, "--run", "2")
    assert stack.cluster(warm)["state"] == "RUNNING"


def test_no_retries_left_is_exit_10_and_the_reason_names_the_exception(stack: Stack, warm: str) -> None:
    done = stack.cli(
        *("job", "submit", "--cluster", warm, "--max-retries", "0", "--wait", "-n", "broken"),
        *("--", "python", "-c", "raise ValueError('kaputt')"),
    )
    assert done.returncode == 10
    assert "exit code 1: ValueError: kaputt" in done.stderr
    assert "Traceback" in done.stdout
    assert stack.job("broken")["reason"] == "run 1 failed, no retries left: exit code 1: ValueError: kaputt"


@pytest.mark.long
def test_timeout_s_ends_each_run(stack: Stack, warm: str) -> None:
    began = time.monotonic()
    token = secrets.token_hex(8)
    done = stack.cli(
        *("job", "submit", "--cluster", warm, "--max-retries", "0", "--timeout-s", "3", "--wait", "-n", "long"),
        *("--", f"sleep 600 # {token}"),
    )
    assert done.returncode == 10, done.stderr
    run = stack.job("long")["runs"][-1]
    assert run["cause"] == "timeout"
    assert "3 s" in run["reason"]
    assert 2.5 <= seconds_between(run["running_at"], run["ended_at"]) < 20
    assert time.monotonic() - began < 60
    assert not entrypoints(token)


def test_terminate_while_the_cluster_starts_leaves_nothing(stack: Stack) -> None:
    job = stack.submit("python", "-c", "print('never')", options=("-n", "early"))
    done = stack.cli("job", "terminate", job, "--reason", "changed my mind", "--wait")
    assert done.returncode == 0, done.stderr
    ended = stack.job(job)
    assert ended["state"] == "TERMINATED", ended
    assert "changed my mind" in ended["reason"]
    assert "admin" in ended["reason"]
    until("its cluster to end", lambda: all(
        c["state"] in ("TERMINATED", "FAILED") for c in stack.get("/v1/clusters")["items"]
        if c["id"] == ended["cluster_id"]
    ), 120)  # fmt: skip
    if ended["cluster_id"]:
        assert not [p for m in machine_ids(stack, ended["cluster_id"]) for p in stack.node_processes(m)]
    assert "never" not in stack.log(job)


def test_terminate_while_running_ends_every_process_of_it(stack: Stack, warm: str) -> None:
    """Also what the entry point put into a session of its own."""
    token = secrets.token_hex(8)
    job = stack.submit(f"setsid sleep 600 & sleep 600 # {token}", options=("--cluster", warm))
    stack.await_job(job, "RUNNING")
    until("its entry point to run", lambda: entrypoints(token))
    run_id = stack.job(job)["runs"][0]["id"]
    assert stack.cli("job", "terminate", job, "--wait").returncode == 0
    ended = stack.job(job)
    assert (ended["state"], ended["runs"][0]["state"], ended["runs"][0]["cause"]) == (
        "TERMINATED",
        "STOPPED",
        "stopped",
    )
    assert not entrypoints(token)
    # Ray's own supervisor of the run is told last, and takes a moment to go.
    until("Ray's supervisor to go too", lambda: not processes_with(f"HELIOSTAT_RUN_ID={run_id}"))
    assert stack.cluster(warm)["state"] == "RUNNING"


def entrypoints(token: str) -> dict[int, str]:
    return {pid: argv for pid, argv in processes_with(token).items() if "heliostat" not in argv}


@pytest.mark.long
def test_ctrl_c_detaches_and_says_how_to_come_back(stack: Stack, warm: str) -> None:
    job = stack.submit("echo here I am; sleep 600", options=("--cluster", warm))
    stack.await_job(job, "RUNNING")
    follower = stack.start_cli("job", "logs", "-f", job)
    assert follower.stdout is not None
    for line in follower.stdout:
        if "here I am" in line:
            break
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=20)
    assert follower.returncode == 130
    assert f"heliostat job logs -f {job}" in said
    assert stack.job(job)["state"] == "RUNNING"
    stack.cli("job", "terminate", job, "--wait")


@pytest.mark.long
def test_a_schedule_starts_jobs_and_is_gone_when_deleted(stack: Stack, warm: str, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    file = tmp_path / "nightly.yaml"
    file.write_text(
        f"cron_expression: '0 3 * * *'\ntimezone: Europe/Berlin\n"
        f"job_config: {{name: nightly, entrypoint: 'echo x >> {marks}', cluster: {warm}}}\n"
    )
    assert stack.ask("schedule", "apply", "-f", str(file))["next_trigger_at"]
    started = stack.ask("schedule", "run", "nightly")["id"]
    assert stack.await_job(started, "SUCCEEDED")["schedule_id"] == stack.ask("schedule", "status", "nightly")["id"]
    assert stack.ask("schedule", "status", "nightly")["last_jobs"] == [started]
    assert stack.cli("schedule", "pause", "nightly").returncode == 0
    assert stack.ask("schedule", "status", "nightly")["state"] == "DISABLED"
    assert stack.cli("schedule", "delete", "nightly").returncode == 0
    assert stack.ask("schedule", "list") == []
    assert marks.read_text() == "x\n"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("example", ["core_scale_out", "data_batch", "tune_cpu"])
def test_examples_run(stack: Stack, example: str) -> None:
    folder = ROOT / "examples" / example
    done = stack.cli("job", "submit", "-n", example, "-f", str(folder / "job.yaml"), "--wait", cwd=folder, timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
