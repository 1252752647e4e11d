"""The methods of both clients, against a fake API over real HTTP."""

from __future__ import annotations

import inspect
import io
import threading
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from heliostat.client.client import AsyncClient, Client
from heliostat.client.groups import Group, many, one
from heliostat.client.logs import LogText
from heliostat.errors import (
    ClusterFailed,
    InfrastructureError,
    InvalidRequest,
    TooLarge,
    Unavailable,
    WaitTimeout,
    WorkloadFailed,
)
from heliostat.models.clusters import ClusterCreate, ClusterState
from heliostat.models.common import Event, utcnow
from heliostat.models.jobs import Job, JobConfig, JobState, RunCause, RunState
from heliostat.models.schedules import ScheduleConfig
from tests.heliostat.fake_api import TOKEN, FakeApi


def groups(client: object) -> dict[str, Group]:  # type: ignore[type-arg]
    return {name: value for name, value in vars(client).items() if isinstance(value, Group)}


def methods(group: object) -> dict[str, str]:
    found = {}
    for name, value in inspect.getmembers_static(type(group)):
        if isinstance(value, one):
            found[name] = "one"
        elif isinstance(value, many):
            found[name] = "many"
        elif not name.startswith("_") and callable(value):
            found[name] = "own"
    return found


async def test_both_clients_have_the_same_methods() -> None:
    sync, other = Client("http://h", "t"), AsyncClient("http://h", "t")
    assert groups(sync).keys() == groups(other).keys()
    assert methods(sync) == methods(other)
    for name, group in groups(sync).items():
        assert methods(group) == methods(getattr(other, name))
        for method in methods(group):
            ours, theirs = getattr(group, method), getattr(getattr(other, name), method)
            assert inspect.signature(ours) == inspect.signature(theirs)
            assert ours.__doc__ == theirs.__doc__
    assert set(methods(sync.jobs)) == {"submit", "plan", "get", "list", "terminate", "events", "wait", "logs", "watch"}


async def test_the_async_client_does_the_same(api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("print('hi')")
    async with AsyncClient(api.url, TOKEN) as client:
        assert (await client.whoami()).user == "admin"
        job = await client.jobs.submit(JobConfig(name="a", entrypoint="python main.py", working_dir=str(tmp_path)))
        run = api.start_run(job.id)
        api.log(run.id, b"one\ntwo\n")
        api.end_run(job.id, RunState.SUCCEEDED)
        api.settle(job.id, JobState.SUCCEEDED)
        logs = client.jobs.logs(job.id, follow=True)
        assert isinstance(logs, AsyncIterator)
        assert "".join([text async for text in logs]) == "one\ntwo\n"
        assert (await client.jobs.wait(job.id)).state is JobState.SUCCEEDED
        assert [j.id async for j in client.jobs.list()] == [job.id]


# --- lists


def test_lists_are_fetched_page_by_page_as_one_goes_on(api: FakeApi, client: Client) -> None:
    made = [api.add_job(f"j{i}").id for i in range(7)]
    found = client.jobs.list(page_size=3)
    assert isinstance(found, Iterator)
    assert api.requests == []
    assert next(found).id == made[-1]
    assert len(api.requests) == 1
    assert [j.id for j in found] == made[-2::-1]
    assert len(api.requests) == 3


def test_lists_are_filtered(api: FakeApi, client: Client) -> None:
    api.add_job("a", tags={"team": "x"})
    api.add_job("b", state=JobState.RUNNING, tags={"team": "y"})
    assert [j.name for j in client.jobs.list(state="RUNNING")] == ["b"]
    assert [j.name for j in client.jobs.list(name="a")] == ["a"]
    assert [j.name for j in client.jobs.list(tags={"team": "y"})] == ["b"]


def test_events_are_read_to_the_end(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    api.events[job.id] = [
        Event(id=f"evt_{i}", resource_id=job.id, at=utcnow(), kind="k", actor="user:a", message=str(i))
        for i in range(450)
    ]
    assert [e.message for e in client.jobs.events("train")] == [str(i) for i in range(450)]


# --- logs


def test_logs_end_when_not_followed(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"so far\n")
    assert "".join(client.jobs.logs(job.id)) == "so far\n"


def followed(api: FakeApi, client: Client, job: Job, then: list[Callable[[], None]], **how: object) -> list[LogText]:
    """Follows the job's log; one of ``then`` happens before each further look of the client at the list."""
    steps = iter(then)

    def on_request(path: str) -> None:
        if path.endswith("/logs"):
            next(steps, lambda: None)()

    api.on_request = on_request
    return list(client.jobs.logs(job.id, follow=True, **how))  # type: ignore[arg-type]


def test_a_followed_log_goes_on_across_retries_and_loses_nothing(api: FakeApi, client: Client) -> None:
    api.chunk_size = 7
    job = api.add_job()

    def first() -> None:
        api.start_run(job.id)
        api.log(f"{job.id}-1", b"first attempt\n")

    def second() -> None:
        api.log(f"{job.id}-1", b"failed\n")
        api.end_run(job.id, RunState.FAILED, RunCause.APPLICATION, 1)
        api.start_run(job.id)
        api.log(f"{job.id}-2", b"second ")

    def third() -> None:
        api.log(f"{job.id}-2", b"attempt\n")
        api.end_run(job.id, RunState.SUCCEEDED)
        api.settle(job.id, JobState.SUCCEEDED)

    pieces = followed(api, client, job, [lambda: None, first, second, third])
    by_run = {n: "".join(p for p in pieces if p.run_id == f"{job.id}-{n}") for n in (1, 2)}
    assert by_run == {1: "first attempt\nfailed\n", 2: "second attempt\n"}
    assert [p.run_id for p in pieces] == sorted(p.run_id or "" for p in pieces)


def test_a_chunk_that_grows_is_read_on_by_range(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"abc")

    def grow() -> None:
        api.log(run.id, b"def")
        api.settle(job.id, JobState.SUCCEEDED)

    assert "".join(followed(api, client, job, [lambda: None, lambda: None, grow])) == "abcdef"
    reads = [headers.get("range") for method, path, headers in api.requests if path.startswith("/bucket")]
    assert reads == [None, "bytes=3-"]  # nothing twice, and nothing while nothing has grown


def test_characters_split_between_chunks_and_reads_are_whole(api: FakeApi, client: Client) -> None:
    text = "grün 🚀 日本\n" * 20
    data = text.encode()
    api.chunk_size = 5
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, data[:37])

    def rest() -> None:
        api.log(run.id, data[37:])
        api.settle(job.id, JobState.SUCCEEDED)

    assert "".join(followed(api, client, job, [lambda: None, rest])) == text


def test_bytes_that_are_no_text_stop_nothing(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"a\xff\xfeb\n\xf0\x9f")
    api.settle(job.id, JobState.SUCCEEDED)
    assert "".join(client.jobs.logs(job.id, follow=True)) == "a��b\n�"


def test_a_piece_that_comes_late_is_waited_for(api: FakeApi, client: Client) -> None:
    api.chunk_size = 4
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"aaaabbbbcccc")
    late = api.logs[run.id].pop(1)

    def arrive() -> None:
        api.logs[run.id].insert(1, late)
        api.settle(job.id, JobState.SUCCEEDED)

    assert "".join(followed(api, client, job, [lambda: None, arrive])) == "aaaabbbbcccc"


def test_a_hole_in_a_complete_log_is_said(api: FakeApi, client: Client) -> None:
    api.chunk_size = 4
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"aaaabbbbcccc")
    api.logs[run.id].pop(1)
    api.settle(job.id, JobState.SUCCEEDED)
    assert "".join(client.jobs.logs(job.id)) == "aaaa\n[heliostat: 4 bytes of this log were lost]\ncccc"


@pytest.mark.usefixtures("no_pause")
def test_a_piece_that_the_bucket_has_not_is_an_error(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"abc")
    api.add_job("other")
    del api.bucket[api.logs[run.id][0]]
    api.bucket[api.logs[run.id][0] + "x"] = b""
    page = api.log_page
    api.bucket[api.logs[run.id][0]] = b"abc"
    listed = page(api.jobs[job.id], None)
    del api.bucket[api.logs[run.id][0]]
    api.log_page = lambda job, run: listed  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="404"):
        list(client.jobs.logs(job.id))


@pytest.mark.parametrize(("tail", "expected"), [(0, ""), (1, "six\n"), (3, "four\nfive\nsix\n"), (99, None)])
def test_tail_begins_with_the_last_lines_of_all_runs(
    api: FakeApi, client: Client, tail: int, expected: str | None
) -> None:
    api.chunk_size = 6
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"one\ntwo\nthree\nfour\n")
    again = api.start_run(job.id)
    api.log(again.id, b"five\nsix\n")
    api.settle(job.id, JobState.SUCCEEDED)
    whole = "one\ntwo\nthree\nfour\nfive\nsix\n"
    assert "".join(client.jobs.logs(job.id, tail=tail)) == (whole if expected is None else expected)
    assert "".join(client.jobs.logs(job.id, tail=tail, follow=True)) == (whole if expected is None else expected)


def test_tail_counts_a_last_line_without_an_end(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"one\ntwo\nthree")
    assert "".join(client.jobs.logs(job.id, tail=2)) == "two\nthree"


def test_one_run_can_be_read_alone(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    for n in (1, 2):
        api.log(api.start_run(job.id).id, f"run {n}\n".encode())
    assert "".join(client.jobs.logs(job.id, run=2)) == "run 2\n"
    assert "".join(client.jobs.logs(job.id, run=f"{job.id}-1")) == "run 1\n"


@pytest.mark.usefixtures("no_pause")
def test_a_followed_log_rides_out_an_outage(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    run = api.start_run(job.id)
    api.log(run.id, b"before\n")

    def outage() -> None:
        api.log(run.id, b"after\n")
        api.settle(job.id, JobState.SUCCEEDED)
        api.trouble = [503] * 30  # far more than one call would bear

    assert "".join(followed(api, client, job, [lambda: None, outage])) == "before\nafter\n"


def test_the_token_does_not_go_to_the_bucket(api: FakeApi, client: Client, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    job = client.jobs.submit(JobConfig(entrypoint="x", working_dir=str(tmp_path)))
    api.log(api.start_run(job.id).id, b"x")
    assert "".join(client.jobs.logs(job.id)) == "x"
    calls = [(method, headers) for method, path, headers in api.requests if path.startswith("/bucket")]
    assert [method for method, _ in calls] == ["PUT", "GET"]
    assert not any("authorization" in headers for _, headers in calls)


# --- waiting


def test_wait_returns_what_was_waited_for(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    seen: list[JobState] = []
    steps = iter([lambda: None, lambda: api.start_run(job.id), lambda: api.settle(job.id, JobState.SUCCEEDED)])
    api.on_request = lambda path: (next(steps, lambda: None)(), None)[1]
    assert client.jobs.wait("train", on_change=lambda j: seen.append(j.state)).state is JobState.SUCCEEDED
    assert seen == [JobState.STARTING, JobState.RUNNING]


@pytest.mark.parametrize(
    ("state", "cause", "error", "exit_code"),
    [
        (JobState.FAILED, RunCause.APPLICATION, WorkloadFailed, 10),
        (JobState.FAILED, RunCause.TIMEOUT, WorkloadFailed, 10),
        (JobState.FAILED, RunCause.CONFIGURATION, WorkloadFailed, 10),
        (JobState.TERMINATED, RunCause.STOPPED, WorkloadFailed, 10),
        (JobState.FAILED, RunCause.INFRASTRUCTURE, InfrastructureError, 2),
    ],
)
def test_wait_tells_the_program_from_us(
    api: FakeApi, client: Client, state: JobState, cause: RunCause, error: type[Exception], exit_code: int
) -> None:
    job = api.add_job()
    api.start_run(job.id)
    api.end_run(job.id, RunState.FAILED, cause, 3)
    api.settle(job.id, state, "it broke")
    with pytest.raises(error, match="it broke") as caught:
        client.jobs.wait(job.id)
    assert caught.value.exit_code == exit_code  # type: ignore[attr-defined]
    assert job.id in caught.value.remedy  # type: ignore[attr-defined]
    assert client.jobs.wait(job.id, state=None).state is state
    assert client.jobs.wait(job.id, state=state).state is state


def test_a_job_that_never_started_is_our_failure(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    api.settle(job.id, JobState.FAILED, "no capacity")
    with pytest.raises(InfrastructureError, match="no capacity"):
        client.jobs.wait(job.id)


def test_waiting_for_running_is_over_when_it_has_run(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    api.settle(job.id, JobState.SUCCEEDED)
    assert client.jobs.wait(job.id, state="RUNNING", timeout=5).state is JobState.SUCCEEDED


def test_wait_gives_up_only_when_asked_to(api: FakeApi, client: Client) -> None:
    job = api.add_job()
    with pytest.raises(WaitTimeout) as caught:
        client.jobs.wait(job.id, timeout=0.3)
    assert caught.value.exit_code == 3
    assert "STARTING" in caught.value.message


def test_watch_gives_the_job_and_its_log_to_the_end(api: FakeApi, client: Client) -> None:
    job = api.add_job()

    def run() -> None:
        api.log(api.start_run(job.id).id, b"hello\n")

    def end() -> None:
        api.end_run(job.id, RunState.SUCCEEDED)
        api.settle(job.id, JobState.SUCCEEDED)

    steps = iter([lambda: None, run, lambda: None, end])
    api.on_request = lambda path: (next(steps, lambda: None)(), None)[1] if path.endswith("/logs") else None
    seen = list(client.jobs.watch(job.id))
    assert "".join(s for s in seen if isinstance(s, LogText)) == "hello\n"
    assert [s.state for s in seen if isinstance(s, Job)] == [JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED]


def test_a_cluster_is_waited_for(api: FakeApi, client: Client) -> None:
    cluster = client.clusters.create(ClusterCreate(name="c"))
    steps = iter([lambda: None, lambda: set_state(ClusterState.RUNNING)])

    def set_state(state: ClusterState) -> None:
        api.clusters[cluster.id] = api.clusters[cluster.id].model_copy(update={"state": state, "reason": "disk full"})

    api.on_request = lambda path: next(steps, lambda: None)()
    assert client.clusters.wait("c").state is ClusterState.RUNNING
    set_state(ClusterState.FAILED)
    with pytest.raises(ClusterFailed, match="disk full"):
        client.clusters.wait("c")
    assert client.clusters.wait("c", state="TERMINATED").state is ClusterState.FAILED


# --- code


def code(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (work / "main.py").write_text("print('hi')")
    (work / "data" / "big.bin").write_bytes(b"x" * 10)
    module = tmp_path / "helpers"
    module.mkdir()
    (module / "__init__.py").write_text("")
    return work


def test_local_code_is_uploaded_once_and_replaced(api: FakeApi, client: Client, tmp_path: Path) -> None:
    work = code(tmp_path)
    config = JobConfig(
        entrypoint="python main.py",
        working_dir=str(work),
        excludes=["data/"],
        py_modules=[str(tmp_path / "helpers"), "https://x/y.zip"],
    )
    job = client.jobs.submit(config)
    assert job.config.working_dir is not None
    digest = job.config.working_dir.removeprefix("upload:")
    names = zipfile.ZipFile(io.BytesIO(api.bucket[f"uploads/{digest}.zip"])).namelist()
    assert names == ["pkg/main.py"]
    module, url = job.config.py_modules
    assert url == "https://x/y.zip"
    key = f"uploads/{module.removeprefix('upload:')}.zip"
    assert zipfile.ZipFile(io.BytesIO(api.bucket[key])).namelist() == ["pkg/helpers/__init__.py"]
    client.jobs.submit(config)
    puts = [headers for method, path, headers in api.requests if method == "PUT"]
    assert len(puts) == 2
    assert all(headers["x-checked"] == "yes" and "content-length" in headers for headers in puts)
    assert config.working_dir == str(work), "the caller's own config is left as it was"


async def test_the_async_upload_is_the_same_bytes(api: FakeApi, tmp_path: Path) -> None:
    work = code(tmp_path)
    async with AsyncClient(api.url, TOKEN) as client:
        uri = await client.uploads.working_dir(work)
    put = next(headers for method, _, headers in api.requests if method == "PUT")
    assert put["content-length"] == str(len(api.bucket[f"uploads/{uri.removeprefix('upload:')}.zip"]))
    assert "transfer-encoding" not in put
    with Client(api.url, TOKEN) as sync:
        assert sync.uploads.working_dir(work) == uri


def test_remote_code_passes_through(api: FakeApi, client: Client) -> None:
    for place in ("https://example.com/x.zip", "s3://bucket/x.zip", "upload:" + "0" * 64):
        assert client.jobs.submit(JobConfig(entrypoint="x", working_dir=place)).config.working_dir == place
    assert not api.sent("POST", "/v1/uploads")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_bad_code_is_refused_before_anything_is_sent(api: FakeApi, client: Client, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequest, match=name):
        client.jobs.submit(JobConfig(entrypoint="x", working_dir=str(tmp_path / name)))
    assert api.requests == []


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (507, Unavailable, "bucket is full"),
        (413, TooLarge, "too large"),
        (400, InvalidRequest, "match its hash"),
    ],
)
def test_a_bucket_that_refuses_leaves_no_job_and_no_file(
    api: FakeApi,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    error: type[Exception],
    says: str,
) -> None:
    import tempfile

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    api.bucket_status = status
    with pytest.raises(error, match=says):
        client.jobs.submit(JobConfig(entrypoint="x", working_dir=str(code(tmp_path))))
    assert api.jobs == {}
    assert list(scratch.iterdir()) == []


async def test_a_cancelled_upload_leaves_no_file(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio
    import tempfile

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    async with AsyncClient(api.url, TOKEN) as client:
        submitting = asyncio.create_task(client.jobs.submit(JobConfig(entrypoint="x", working_dir=str(code(tmp_path)))))
        api.on_request = lambda path: submitting.get_loop().call_soon_threadsafe(submitting.cancel) and None
        with pytest.raises(asyncio.CancelledError):
            await submitting
    assert list(scratch.iterdir()) == []
    assert api.jobs == {}


def test_a_schedule_freezes_its_code(api: FakeApi, client: Client, tmp_path: Path) -> None:
    job = JobConfig(name="nightly", entrypoint="python main.py", working_dir=str(code(tmp_path)))
    made = client.schedules.apply(ScheduleConfig(job_config=job, cron_expression="@daily"))
    assert (made.config.job_config.working_dir or "").startswith("upload:")
    with pytest.raises(InvalidRequest, match="name"):
        client.schedules.apply(ScheduleConfig(job_config=JobConfig(entrypoint="x"), cron_expression="@daily"))


def test_one_client_serves_several_threads(api: FakeApi, client: Client) -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(client.jobs.submit(JobConfig(entrypoint="x")).id)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 8
