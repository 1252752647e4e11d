"""The command line, run in this process against a fake API; what needs a process of its own is in
``test_cli_process.py``."""

from __future__ import annotations

import io
import json
import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.cli import app as cli
from heliostat.cli.output import age, duration
from heliostat.client import config
from heliostat.models.clusters import ClusterState, Lease
from heliostat.models.common import Condition, Event, EventLevel, utcnow
from heliostat.models.jobs import JobConfig, JobState, RunCause, RunState
from tests.heliostat.fake_api import TOKEN, FakeApi

SECRET = "s3cret-value"


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.setenv("HELIOSTAT_HOST", api.url)
    monkeypatch.setenv("HELIOSTAT_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Ran:
        capsys.readouterr()
        code = cli.main(list(args))
        got = capsys.readouterr()
        return Ran(code, got.out, got.err)

    return run


def only(api: FakeApi) -> Any:
    (job,) = api.jobs.values()
    return job


# --- job submit


def test_submit_says_what_can_be_done_next(api: FakeApi, run: Any) -> None:
    ran = run("job", "submit", "-n", "train", "--", "python", "main.py")
    job = only(api)
    assert ran.code == 0
    assert f"Job train is accepted: {job.id}" in ran.out
    for command in ("logs -f", "status", "terminate"):
        assert f"heliostat job {command} {job.id}" in ran.out


@pytest.mark.parametrize(
    ("words", "entrypoint"),
    [
        (["python", "main.py", "--lr", "0.1"], "python main.py --lr 0.1"),
        (["python", "-c", "print('a b')", "x;y", "$HOME"], """python -c 'print('"'"'a b'"'"')' 'x;y' '$HOME'"""),
        (["python a.py | tee out"], "python a.py | tee out"),
    ],
)
def test_words_of_the_entry_point_are_kept_whole(api: FakeApi, run: Any, words: list[str], entrypoint: str) -> None:
    assert run("job", "submit", "--", *words).code == 0
    assert only(api).config.entrypoint == entrypoint


def test_flags_win_over_the_file(api: FakeApi, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_FROM_SHELL", "x")
    (tmp_path / "src").mkdir()
    for name in ("main.py", "a.csv", "b.log", "c.tmp"):
        (tmp_path / "src" / name).write_text(name)
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("")
    (tmp_path / "requirements.txt").write_text("emoji\n")
    file = {
        "name": "from-file", "entrypoint": "python other.py", "working_dir": "nowhere", "excludes": ["*.csv"],
        "env_vars": {"KEPT": "1", "CHANGED": "1"}, "max_retries": 5, "tags": {"a": "file"}, "requirements": ["old"],
        "compute_config": "shape:1", "timeout_s": 9,
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(file))
    ran = run(
        "job", "submit", "-f", "job.yaml", "-n", "from-flag", "--working-dir", "src", "-e", "*.log", "-e", "*.tmp",
        "--env", "CHANGED=2", "--env", "TOKEN_FROM_SHELL", "--env", "EMPTY=", "--max-retries", "0", "--tag", "b=flag",
        "-r", "requirements.txt", "--py-module", "helpers", "--timeout-s", "30", "--compute-config", "shape:2",
        "--project", "default", "--cloud", "local", "-o", "json", "--", "python", "main.py",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    made = only(api).config
    assert (made.name, made.entrypoint, made.max_retries, made.timeout_s) == ("from-flag", "python main.py", 0, 30)
    assert made.excludes == ["*.csv", "*.log", "*.tmp"]
    assert sorted(made.env_vars) == ["CHANGED", "EMPTY", "KEPT", "TOKEN_FROM_SHELL"]
    assert (made.tags, made.requirements, made.compute_config) == ({"b": "flag"}, ["emoji"], "shape:2")
    assert (made.project, made.cloud) == ("default", "local")
    packed = zipfile.ZipFile(io.BytesIO(api.bucket[f"uploads/{made.working_dir.removeprefix('upload:')}.zip"]))
    assert packed.namelist() == ["pkg/main.py"]
    assert made.py_modules[0].startswith("upload:")


def test_env_values_are_sent_and_never_shown(api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []
    monkeypatch.setenv("KEY", SECRET)
    original = JobConfig.masked

    def masked(self: JobConfig) -> JobConfig:
        bodies.append(self.env_vars["KEY"].encode())
        return self  # a server that forgets to mask

    monkeypatch.setattr(JobConfig, "masked", masked)
    shown = ""
    for output in ("text", "json", "yaml"):
        ran = run("job", "submit", "--env", "KEY", "-o", output, "--", "x")
        assert ran.code == 0
        shown += ran.out + ran.err
    job = next(iter(api.jobs.values()))
    assert bodies == [SECRET.encode()] * 3
    assert job.config.env_vars == {"KEY": SECRET}
    for args in (
        ["job", "status", job.id],
        ["job", "list"],
        ["job", "list", "-o", "yaml"],
        ["job", "status", job.id, "-o", "json"],
    ):
        ran = run(*args)
        shown += ran.out + ran.err
    assert SECRET not in shown
    assert "KEY" in shown
    monkeypatch.setattr(JobConfig, "masked", original)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["job", "submit"], "no entry point"),
        (["job", "submit", "--working-dir", "missing", "--", "x"], "'missing'"),
        (["job", "submit", "--working-dir", "empty", "--", "x"], "holds no file"),
        (["job", "submit", "-r", "missing.txt", "--", "x"], "missing.txt"),
        (["job", "submit", "-f", "missing.yaml"], "missing.yaml"),
        (["job", "submit", "--env", "NOT_SET_ANYWHERE", "--", "x"], "NOT_SET_ANYWHERE"),
        (["job", "submit", "--tag", "x", "--", "x"], "KEY=VALUE"),
        (["job", "submit", "--max-retries", "-1", "--", "x"], "max_retries"),
        (["job", "submit", "-n", "a b", "--", "x"], "name"),
        (["job", "submit", "python", "x.py", "--flag"], "command after --"),
        (["job", "list", "--state", "GOOD"], "STARTING, RUNNING"),
        (["job", "wait", "x", "--state", "GOOD"], "STARTING, RUNNING"),
        (["cluster", "scale", "x", "--group", "g"], "nothing to set"),
        (["bogus"], "bogus"),
    ],
)
def test_wrong_input_is_exit_1_before_anything_is_sent(
    api: FakeApi, run: Any, tmp_path: Path, args: list[str], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    ran = run(*args)
    assert ran.code == 1
    assert says in ran.err
    assert ran.out == ""
    assert api.requests == []


def test_a_field_that_is_not_honoured_is_named(api: FakeApi, run: Any, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("entrypoint: x\njob_queue_config: {}\n")
    ran = run("job", "submit", "-f", "job.yaml", "-o", "json")
    assert ran.code == 1
    assert json.loads(ran.err)["error"]["field"] == "job_queue_config"
    assert api.requests == []


# --- following


def script(api: FakeApi, job_id: str, steps: list[Any]) -> None:
    """One step before each further look at the job's log."""
    left = iter(steps)
    api.on_request = lambda path: (next(left, lambda: None)(), None)[1] if path.endswith("/logs") else None


def two_attempts(api: FakeApi, job_id: str, end: RunState = RunState.SUCCEEDED) -> list[Any]:
    def first() -> None:
        api.log(api.start_run(job_id).id, b"trying\n")

    def second() -> None:
        api.end_run(job_id, RunState.FAILED, RunCause.APPLICATION, 1)
        api.log(api.start_run(job_id).id, b"again\n")

    def third() -> None:
        ok = end is RunState.SUCCEEDED
        api.end_run(job_id, end, None if ok else RunCause.APPLICATION, 0 if ok else 3)
        api.settle(job_id, JobState.SUCCEEDED if ok else JobState.FAILED, "" if ok else "exit code 3")

    return [lambda: None, first, second, third]


@pytest.fixture
def on_submit(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the next submitted job a life."""

    def arm(end: RunState) -> None:
        original = api.add_job

        def add_job(*args: Any, **kwargs: Any) -> Any:
            job = original(*args, **kwargs)
            script(api, job.id, two_attempts(api, job.id, end))
            return job

        monkeypatch.setattr(api, "add_job", add_job)

    return arm


def test_submit_wait_follows_the_log_across_retries(run: Any, on_submit: Any) -> None:
    on_submit(RunState.SUCCEEDED)
    ran = run("job", "submit", "-n", "train", "--wait", "--", "x")
    assert ran.code == 0
    assert ran.out == "trying\nagain\n"
    assert "run 2" in ran.err
    assert "succeeded after" in ran.err
    assert "at run 2" in ran.err
    assert "Job train: STARTING" in ran.err


def test_submit_wait_of_a_failing_program_is_exit_10(run: Any, on_submit: Any) -> None:
    on_submit(RunState.FAILED)
    ran = run("job", "submit", "--wait", "--", "x")
    assert ran.code == 10
    assert "exit code 3" in ran.err


def test_submit_wait_as_json_is_one_document(run: Any, on_submit: Any) -> None:
    on_submit(RunState.FAILED)
    ran = run("job", "submit", "--wait", "-o", "json", "--", "x")
    assert ran.code == 10
    assert ran.json["state"] == "FAILED"
    error = json.loads(ran.err)["error"]
    assert (error["code"], error["exit_code"], error["details"]["exit_code"]) == ("workload_failed", 10, 3)


def test_logs_follow(api: FakeApi, run: Any) -> None:
    job = api.add_job()
    script(api, job.id, two_attempts(api, job.id))
    ran = run("job", "logs", "-f", "train")
    assert (ran.code, ran.out) == (0, "trying\nagain\n")
    assert f"run 2 ({job.id}-2)" in ran.err
    assert "run 1" not in ran.err


def test_logs_of_one_run_and_a_tail(api: FakeApi, run: Any) -> None:
    job = api.add_job()
    for step in two_attempts(api, job.id):
        step()
    assert run("job", "logs", job.id).out == "trying\nagain\n"
    assert run("job", "logs", job.id, "--run", "1").out == "trying\n"
    assert run("job", "logs", job.id, "--tail", "1").out == "again\n"
    assert run("job", "logs", job.id, "-o", "json").json == [
        {"run_id": f"{job.id}-1", "text": "trying\n"},
        {"run_id": f"{job.id}-2", "text": "again\n"},
    ]
    assert run("job", "logs", job.id, "-f", "-o", "json").code == 1


@pytest.mark.parametrize("args", [["job", "logs", "-f", "train"], ["job", "wait", "train"]])
def test_ctrl_c_detaches_and_says_how_to_come_back(
    api: FakeApi, run: Any, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = api.add_job()
    looks = 0

    def press(*_: object) -> float:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise KeyboardInterrupt
        return 0.0

    import time

    monkeypatch.setattr(time, "sleep", press)
    ran = run(*args)
    assert ran.code == 130
    assert "Detached: job train keeps running" in ran.err
    assert job.id in ran.err
    assert api.jobs[job.id].state is JobState.STARTING
    assert not api.sent("POST", f"/v1/jobs/{job.id}/terminate")


@pytest.mark.parametrize(
    ("state", "cause", "code"),
    [
        (JobState.SUCCEEDED, None, 0),
        (JobState.FAILED, RunCause.APPLICATION, 10),
        (JobState.FAILED, RunCause.INFRASTRUCTURE, 2),
    ],
)
def test_wait_tells_by_its_exit_code(
    api: FakeApi, run: Any, state: JobState, cause: RunCause | None, code: int
) -> None:
    job = api.add_job()
    api.start_run(job.id)
    api.end_run(job.id, RunState(state), cause)
    api.settle(job.id, state)
    assert run("job", "wait", "train").code == code


def test_wait_with_a_limit_is_exit_3(api: FakeApi, run: Any) -> None:
    api.add_job(waits_for="1 of 2 workers")
    ran = run("job", "wait", "train", "--timeout-s", "0.2")
    assert ran.code == 3
    assert "waits for 1 of 2 workers" in ran.err


# --- looking


def test_status_has_the_promised_shape(api: FakeApi, run: Any) -> None:
    job = api.add_job()
    for step in two_attempts(api, job.id, RunState.FAILED):
        step()
    shown = run("job", "status", "train", "-o", "json").json
    assert {"id", "name", "state", "reason", "config", "runs"} <= shown.keys()
    fields = {"id", "state", "reason", "cause", "exit_code", "cluster_id", "started_at", "ended_at"}
    assert fields <= shown["runs"][0].keys()
    assert shown["runs"][1]["exit_code"] == 3
    assert yaml.safe_load(run("job", "status", "train", "-o", "yaml").out) == shown
    text = run("job", "status", "train").out
    for part in ("train", "FAILED", "exit code 3", "application", "clu_1", f"heliostat job logs {job.id}"):
        assert part in text


def test_lists_are_tables_with_ages(api: FakeApi, run: Any) -> None:
    assert "No jobs" in run("job", "list").out
    api.add_job("a", tags={"team": "x"})
    api.add_job("b", state=JobState.RUNNING, reason="two\nlines", waits_for="workers")
    lines = run("job", "list").out.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:3] == ["ID", "NAME", "STATE"]
    assert "two lines" in lines[1]
    assert "ago" in lines[1]
    assert not re.search(r"\d\d:\d\d", lines[1])
    assert [j["name"] for j in run("job", "list", "--state", "running", "-o", "json").json] == ["b"]
    assert [j["name"] for j in run("job", "list", "--tag", "team=x", "-o", "json").json] == ["a"]
    few = run("job", "list", "--limit", "1")
    assert len(few.out.splitlines()) == 2
    assert "more jobs" in few.err


def test_events(api: FakeApi, run: Any) -> None:
    job = api.add_job()
    api.events[job.id] = [
        Event(
            id=f"e{i}",
            resource_id=job.id,
            at=utcnow(),
            level=EventLevel.WARNING,
            kind="node_lost",
            actor="wf",
            message=f"m{i}",
        )
        for i in range(3)
    ]
    out = run("job", "events", "train", "--limit", "2").out
    assert "m0" not in out
    assert "node_lost" in out
    assert "m2" in out


def test_terminate(api: FakeApi, run: Any) -> None:
    job = api.add_job()
    ran = run("job", "terminate", "train", "--reason", "enough", "--wait")
    assert ran.code == 0
    assert "TERMINATED" in ran.out
    assert api.sent("POST", f"/v1/jobs/{job.id}/terminate") or api.sent("POST", "/v1/jobs/train/terminate")


def test_clusters(api: FakeApi, run: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("worker_nodes: [{name: w, min_nodes: 1, max_nodes: 3}]\n")
    ran = run("cluster", "create", "-n", "c", "-f", "c.yaml", "--tag", "a=b")
    assert ran.code == 0
    (cluster,) = api.clusters.values()
    assert cluster.compute_config.worker_nodes[0].max_nodes == 3
    now = utcnow()
    update = {
        "state": ClusterState.RUNNING, "leases": [Lease(holder="job_1", since=now)], "terminates_at": now,
        "conditions": [Condition(type="HeadReady", status=True, since=now)], "phase_seconds": {"head_ready": 5.93},
    }  # fmt: skip
    api.clusters[cluster.id] = cluster.model_copy(update=update)
    text = run("cluster", "get", "c").out
    for part in (cluster.id, "RUNNING", "w 1–3", "job_1", "HeadReady", "head ready 5.9s", "a=b"):
        assert part in text
    assert cluster.id in run("cluster", "list").out
    assert "nod_1" in run("cluster", "nodes", "c").out
    assert run("cluster", "nodes", "c", "-o", "json").json[0]["role"] == "head"
    assert run("cluster", "events", "c").code == 0
    assert run("cluster", "scale", "c", "--group", "w", "--max-nodes", "5").code == 0
    assert "TERMINATED" in run("cluster", "terminate", "c", "--wait").out
    assert run("cluster", "get", "nope").code == 1


def test_cluster_create_waits_and_tells_a_failure(api: FakeApi, run: Any) -> None:
    def fail(path: str) -> None:
        for id, cluster in api.clusters.items():
            if path.endswith(id):
                api.clusters[id] = cluster.model_copy(update={"state": ClusterState.FAILED, "reason": "no capacity"})

    api.on_request = fail
    ran = run("cluster", "create", "--wait")
    assert ran.code == 2
    assert "no capacity" in ran.err


def test_compute_configs(api: FakeApi, run: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "head_node: {required_resources: {CPU: 2, memory: 4Gi}}\nmaximum_uptime_minutes: 60\n"
    )
    assert "shape:1" in run("compute-config", "create", "-n", "shape", "-f", "c.yaml").out
    assert "shape:2" in run("compute-config", "create", "-n", "shape", "-f", "c.yaml").out
    assert run("compute-config", "get", "shape", "-o", "json").json["version"] == 2
    assert "at most 60 min" in run("compute-config", "get", "shape:1").out
    assert len(run("compute-config", "list").out.splitlines()) == 3
    assert "archived" in run("compute-config", "archive", "shape:1").out
    (tmp_path / "c.yaml").write_text("min_resources: {CPU: 1}\n")
    assert run("compute-config", "create", "-f", "c.yaml").code == 1


def test_schedules(api: FakeApi, run: Any, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("job_config: {name: nightly, entrypoint: x}\ncron_expression: '@daily'\n")
    assert "in 59m" in run("schedule", "apply", "-f", "s.yaml").out
    assert "nightly" in run("schedule", "list").out
    assert "is paused" in run("schedule", "pause", "nightly").out
    assert run("schedule", "status", "nightly", "-o", "json").json["state"] == "DISABLED"
    assert "is resumed" in run("schedule", "resume", "nightly").out
    assert "accepted" in run("schedule", "run", "nightly").out
    assert run("schedule", "delete", "nightly", "-o", "json").json == {"deleted": "nightly"}
    assert run("schedule", "delete", "nightly").code == 1
    assert run("schedule", "apply", "-f", "s.yaml", "-n", "other").code == 0
    assert list(api.schedules) == ["other"]


def test_clouds_and_people(api: FakeApi, run: Any) -> None:
    assert "local" in run("cloud", "list").out
    assert "Default" in run("cloud", "get", "local").out
    assert "default" in run("project", "list").out
    assert run("project", "create", "p").code == 0
    assert run("user", "create", "u", "--admin", "-o", "json").json["role"] == "admin"
    assert "admin" in run("user", "list").out
    made = run("token", "create", "ci", "--expires-in-days", "7")
    assert made.out == "hs-made-secret\n"
    id = next(iter(api.tokens))
    listed = run("token", "list").out
    assert id in listed
    assert "hs-made-secret" not in listed
    assert run("token", "revoke", id).code == 0
    assert run("user", "create", "not a name").code == 1


# --- who and where


def test_login_tries_the_token_and_keeps_it(api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIOSTAT_HOST")
    monkeypatch.delenv("HELIOSTAT_TOKEN")
    monkeypatch.setattr("sys.stdin", io.StringIO("wrong\n"))
    ran = run("login", "--host", api.url, "--token-stdin")
    assert ran.code == 4
    assert not config.credentials_path().exists()
    monkeypatch.setattr("sys.stdin", io.StringIO(TOKEN + "\n"))
    ran = run("login", "--host", api.url, "--token-stdin")
    assert ran.code == 0
    assert TOKEN not in ran.out + ran.err
    assert stat.S_IMODE(config.credentials_path().stat().st_mode) == 0o600
    assert "admin" in run("whoami").out
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run("login", "--host", api.url).code == 1


def test_the_stack_of_this_machine_is_found(api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIOSTAT_HOST")
    monkeypatch.delenv("HELIOSTAT_TOKEN")
    path = config.stack_path()
    path.parent.mkdir(parents=True)
    (path.parent / "admin.token").write_text(TOKEN)
    path.write_text(json.dumps({"api_url": api.url, "token_file": str(path.parent / "admin.token")}))
    assert run("whoami").code == 0
    assert f"server 0.1.0 at {api.url}" in run("version").out


def test_flags_before_the_command_win(api: FakeApi, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("HELIOSTAT_TOKEN", "wrong")
    (tmp_path / "token").write_text(TOKEN)
    assert run("--host", api.url, "--token-file", "token", "whoami").code == 0
    assert run("--host", api.url, "--token-file", "none", "whoami").code == 1


def test_exit_4_without_the_right_token(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_TOKEN", "wrong")
    ran = run("job", "list", "-o", "yaml")
    assert ran.code == 4
    assert yaml.safe_load(ran.err)["error"]["code"] == "unauthenticated"


def test_version_needs_no_server(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HELIOSTAT_HOST")
    ran = run("version", "-o", "json")
    assert ran.code == 0
    assert ran.json["server"] is None


def test_every_command_takes_output_and_help(run: Any) -> None:
    import typer.main

    def walk(command: Any, path: list[str]) -> Any:
        if hasattr(command, "commands"):
            for name, sub in command.commands.items():
                yield from walk(sub, [*path, name])
        else:
            yield path, command

    found = list(walk(typer.main.get_command(cli.app), []))
    promised = {
        "job": "submit status list logs wait terminate events",
        "service": "deploy status list wait events logs rollback terminate delete",
        "service rollout": "pause resume promote abort",
        "service token": "add delete",
        "cluster": "create get list terminate events nodes",
        "compute-config": "create get list archive",
        "schedule": "apply list status pause resume run delete",
        "cloud": "setup register update verify list get set-default delete",
    }
    paths = {" ".join(path) for path, _ in found}
    assert {f"{noun} {verb}" for noun, verbs in promised.items() for verb in verbs.split()} | {
        "login",
        "version",
    } <= paths
    for path, command in found:
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"-o", "--output"} <= options, path
        assert command.help, path


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2s"), (45, "45s"), (75, "1m 15s"), (3000, "50m"), (12_000, "3h 20m"), (900_000, "10d")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
    assert age(None) == ""
