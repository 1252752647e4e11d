"""One call: who it says it is, what it repeats, what it raises."""

from __future__ import annotations

import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from heliostat.client import transport as _transport
from heliostat.client.client import Client
from heliostat.errors import (
    BY_CODE,
    HeliostatError,
    InternalError,
    NotFound,
    Unauthenticated,
    Unavailable,
    UserError,
)
from heliostat.models.jobs import JobConfig, JobState
from heliostat.models.users import ProjectCreate
from tests.heliostat.fake_api import TOKEN, FakeApi

CONFIG = JobConfig(entrypoint="python main.py")


def answering(*responses: httpx.Response) -> tuple[Client, list[httpx.Request]]:
    """A client of a server that answers just this."""
    seen: list[httpx.Request] = []
    left = list(responses)

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return left.pop(0)

    return Client("http://heliostat.test", "t", transport=httpx.MockTransport(handle)), seen


def test_the_token_is_sent_as_bearer(api: FakeApi, client: Client) -> None:
    assert client.whoami().user == "admin"
    assert api.requests[-1][2]["authorization"] == f"Bearer {TOKEN}"


def test_an_unknown_token_is_exit_4(api: FakeApi) -> None:
    with Client(api.url, "wrong") as client, pytest.raises(Unauthenticated) as caught:
        client.whoami()
    assert caught.value.exit_code == 4
    assert "heliostat login" in caught.value.remedy


def test_without_a_token_nothing_is_sent(api: FakeApi) -> None:
    with Client(api.url) as client, pytest.raises(Unauthenticated, match="no token"):
        client.whoami()
    assert api.requests == []


@pytest.mark.usefixtures("no_pause")
def test_a_lost_answer_makes_no_second_job(api: FakeApi, client: Client) -> None:
    api.trouble = ["lost", "lost"]
    job = client.jobs.submit(CONFIG)
    assert list(api.jobs) == [job.id]
    keys = {headers["idempotency-key"] for headers in api.sent("POST", "/v1/jobs")}
    assert len(api.sent("POST", "/v1/jobs")) == 3
    assert len(keys) == 1


def test_two_submits_have_two_keys_unless_one_is_given(api: FakeApi, client: Client) -> None:
    assert client.jobs.submit(CONFIG).id != client.jobs.submit(CONFIG).id
    assert (
        client.jobs.submit(CONFIG, idempotency_key="mine").id == client.jobs.submit(CONFIG, idempotency_key="mine").id
    )


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("status", sorted(_transport.RETRIED_STATUS))
def test_a_busy_server_is_asked_again(api: FakeApi, client: Client, status: int) -> None:
    api.trouble = [status, status]
    client.whoami()
    assert len(api.requests) == 3


def test_retry_after_is_honoured(api: FakeApi, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    api.trouble = [(429, {"Retry-After": "7"}), (503, {"Retry-After": later}), (503, {"Retry-After": "soon"})]
    client.whoami()
    assert slept[0] == 7
    assert 1 < slept[1] <= 20
    assert slept[2] < 1


def test_a_server_that_asks_for_an_hour_is_not_waited_for(api: FakeApi, client: Client) -> None:
    api.trouble = [(503, {"Retry-After": "3600"})]
    with pytest.raises(Unavailable):
        client.whoami()
    assert len(api.requests) == 1


def test_a_wait_bears_even_that(api: FakeApi, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    job = api.add_job()
    steps = iter([lambda: None, lambda: api.settle(job.id, JobState.SUCCEEDED)])
    api.on_request = lambda path: next(steps, lambda: None)()
    api.trouble = [None, (503, {"Retry-After": "3600"})]
    assert client.jobs.wait(job.id).state is JobState.SUCCEEDED
    assert _transport.MAX_RETRY_AFTER_S in slept


@pytest.mark.usefixtures("no_pause")
def test_tries_are_bounded_and_told(api: FakeApi) -> None:
    told: list[HeliostatError] = []
    api.trouble = [503] * 50
    with Client(api.url, TOKEN, on_retry=lambda error, delay: told.append(error)) as client:
        with pytest.raises(Unavailable):
            client.whoami()
    assert len(api.requests) == _transport.TRIES
    assert len(told) == _transport.TRIES - 1


@pytest.mark.usefixtures("no_pause")
def test_an_error_of_the_request_is_not_repeated(api: FakeApi, client: Client) -> None:
    with pytest.raises(NotFound) as caught:
        client.jobs.get("nope")
    assert caught.value.resource == "nope"
    assert caught.value.remedy == "`heliostat job list` shows them."
    assert len(api.requests) == 1


@pytest.mark.usefixtures("no_pause")
def test_api_down_names_the_url_and_the_remedy() -> None:
    with socket.socket() as taken:  # bound and not listening: refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with Client(url, "t") as client, pytest.raises(Unavailable) as caught:
            client.whoami()
    assert url in caught.value.message
    assert "make up" in caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("no_pause")
def test_a_proxy_of_the_environment_is_not_used_for_this_machine(
    api: FakeApi, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Client(api.url, TOKEN) as proxied:
        assert proxied.whoami().user == "admin"


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_comes_back_as_its_own_class(code: str) -> None:
    cls = BY_CODE[code]
    problem = cls("It broke.", remedy="Mend it.", resource="job_1", field="name", details={"a": 1}).to_problem()
    client, _ = answering(*[httpx.Response(cls.status, json=problem) for _ in range(1)])
    if cls.status in _transport.RETRIED_STATUS:
        return  # repeated first; the code is read alike
    with pytest.raises(HeliostatError) as caught:
        client.whoami()
    assert type(caught.value) is cls
    assert caught.value.to_problem() == problem


def test_a_problem_with_a_retried_status_keeps_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "TRIES", 1)
    problem = Unavailable("Temporal is out of reach.", remedy="Try again.").to_problem()
    client, _ = answering(*[httpx.Response(503, json=problem, headers={"Retry-After": "999"})])
    with pytest.raises(Unavailable, match="Temporal"):
        client.whoami()


def test_an_answer_that_is_not_ours_is_told_as_such() -> None:
    client, _ = answering(httpx.Response(404, text="<html>nginx</html>"))
    with pytest.raises(NotFound) as caught:
        client.whoami()
    assert "nginx" in caught.value.message
    assert "Heliostat" in caught.value.remedy


def test_an_answer_that_is_not_understood_names_the_field() -> None:
    client, _ = answering(httpx.Response(200, json={"user": 1}))
    with pytest.raises(InternalError, match="user"):
        client.whoami()


def test_a_newer_server_may_add_fields() -> None:
    me = {"user": "a", "role": "admin", "organization": "o", "projects": [], "server_version": "9", "new": True}
    client, _ = answering(httpx.Response(200, json=me))
    assert client.whoami().server_version == "9"


@pytest.mark.usefixtures("no_pause")
def test_a_delete_whose_answer_was_lost_is_done(api: FakeApi, client: Client) -> None:
    client.schedules.apply(schedule())
    api.trouble = ["lost"]
    client.schedules.delete("nightly")
    assert api.schedules == {}
    with pytest.raises(NotFound):
        client.schedules.delete("nightly")


def test_names_are_quoted_in_paths() -> None:
    client, seen = answering(httpx.Response(404, json=NotFound("none").to_problem()))
    with pytest.raises(NotFound):
        client.compute_configs.get("a/../b?c:2")
    assert seen[0].url.raw_path == b"/v1/compute-configs/a%2F..%2Fb%3Fc%3A2"


def test_defaults_are_left_to_the_server(api: FakeApi) -> None:
    client, seen = answering(httpx.Response(201, json={"id": "p", "name": "x", "created_at": "2026-01-01T00:00:00Z"}))
    client.projects.create(ProjectCreate(name="x"))
    assert seen[0].read() == b'{"name":"x"}'


def test_a_host_that_is_no_url_is_a_user_error() -> None:
    with pytest.raises(UserError, match="localhost:8700"):
        Client("localhost:8700", "t")


def schedule():  # type: ignore[no-untyped-def]
    from heliostat.models.schedules import ScheduleConfig

    return ScheduleConfig(job_config=JobConfig(name="nightly", entrypoint="true"), cron_expression="0 3 * * *")
