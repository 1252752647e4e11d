"""The methods for services of both clients, against a fake API over real HTTP."""

from __future__ import annotations

import io
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from heliostat.client.client import AsyncClient, Client
from heliostat.client.resources.rollouts import Back, Target, commanded, reached
from heliostat.errors import InvalidRequest, WaitTimeout, WorkloadFailed
from heliostat.models.common import utcnow
from heliostat.models.services import (
    ApplicationConfig,
    Rollout,
    RolloutAction,
    RolloutConfig,
    Service,
    ServiceConfig,
    ServiceDeploy,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
    VersionWeight,
)
from tests.heliostat.fake_api import TOKEN, FakeApi

V = ServiceVersionState
NOW = utcnow()
CONFIG = ServiceConfig(name="api", applications=[ApplicationConfig(import_path="m:app")])


# --- deploy


def test_deploy_sends_what_was_set_and_nothing_else(api: FakeApi, client: Client) -> None:
    client.services.deploy(CONFIG)
    client.services.deploy(CONFIG, in_place=True)
    client.services.deploy(CONFIG, max_surge_percent=50)
    client.services.deploy(ServiceDeploy(config=CONFIG, canary_percent=0))
    fields = [deploy.model_fields_set for deploy in api.deploys]
    assert fields == [
        {"config"}, {"config", "in_place"}, {"config", "max_surge_percent"}, {"config", "canary_percent"},
    ]  # fmt: skip
    with pytest.raises(InvalidRequest, match="in_place"):
        client.services.deploy(ServiceDeploy(config=CONFIG), in_place=True)


def test_a_key_deploys_once(api: FakeApi, client: Client) -> None:
    for _ in range(2):
        client.services.deploy(CONFIG, idempotency_key="mine")
    assert len(api.deploys) == 1
    api.trouble = ["lost"]
    client.services.deploy(CONFIG)
    assert len(api.deploys) == 2, "the try whose answer was lost counts"


def code(tmp_path: Path, *names: str) -> None:
    for name in names:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "main.py").write_text(f"NAME = {name!r}")
        (tmp_path / name / "sub" / "big.csv").write_text("1,2")
        (tmp_path / name / "__init__.py").write_text("")


def files(api: FakeApi, uri: str) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(api.bucket[f"uploads/{uri.removeprefix('upload:')}.zip"])).namelist()


def puts(api: FakeApi) -> int:
    return sum(method == "PUT" for method, _, _ in api.requests)


def test_code_of_a_service_and_its_applications_is_uploaded_once(
    api: FakeApi, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code(tmp_path, "work", "other", "helpers")
    env = {"working_dir": "other", "py_modules": ["helpers", "https://x/y.zip"], "excludes": ["sub/"], "pip": ["a"]}
    config = ServiceConfig(
        name="api",
        working_dir="work",
        excludes=["*.csv"],
        py_modules=["helpers"],
        applications=[
            ApplicationConfig(name="a", route_prefix="/a", import_path="m:a"),
            ApplicationConfig(name="b", route_prefix="/b", import_path="m:b", runtime_env={"working_dir": "work"}),
            ApplicationConfig(name="c", route_prefix="/c", import_path="m:c", runtime_env=env),
        ],
    )
    client.services.deploy(config)
    sent = api.deploys[0].config
    assert sent is not None
    plain, same, own = (app.runtime_env for app in sent.applications)
    assert files(api, str(sent.working_dir)) == ["pkg/__init__.py", "pkg/main.py", "pkg/sub/"]
    assert plain == {}
    assert same == {"working_dir": sent.working_dir}
    assert files(api, own["working_dir"]) == ["pkg/__init__.py", "pkg/main.py"]
    assert own["py_modules"][1] == "https://x/y.zip"
    assert files(api, own["py_modules"][0]) == ["pkg/helpers/__init__.py", "pkg/helpers/main.py"]
    assert (own["pip"], "excludes" in own) == (["a"], False)
    assert files(api, sent.py_modules[0])[-1] == "pkg/helpers/sub/"
    assert puts(api) == 4
    client.services.deploy(config)
    assert puts(api) == 4, "the bucket has it all"
    assert config.working_dir == "work", "the caller's own config is left as it was"


def test_code_of_several_versions_is_packed_before_anything_is_sent(
    api: FakeApi, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code(tmp_path, "work")

    def deploy(other: str) -> ServiceDeploy:
        return ServiceDeploy(
            configs=[
                CONFIG.model_copy(update={"version_name": "a", "working_dir": "work"}),
                CONFIG.model_copy(update={"version_name": "b", "working_dir": other}),
            ],
            versions=[VersionWeight(name="a", traffic_percent=50), VersionWeight(name="b", traffic_percent=50)],
        )

    with pytest.raises(InvalidRequest, match="missing"):
        client.services.deploy(deploy("missing"))
    assert api.requests == []
    client.services.deploy(deploy("work"))
    assert len({c.working_dir for c in api.deploys[0].configs}) == 1
    assert puts(api) == 1


def test_code_goes_to_the_cloud_of_the_service(api: FakeApi, client: Client, tmp_path: Path) -> None:
    code(tmp_path, "work")
    clouds: list[str | None] = []
    api.on_upload = lambda request: clouds.append(request.cloud)
    config = CONFIG.model_copy(update={"working_dir": str(tmp_path / "work")})
    client.services.deploy(config)
    service = next(iter(api.services))
    api.change(service, cloud="elsewhere")
    client.services.deploy(config)
    client.services.deploy(config.model_copy(update={"cloud": "local"}))
    assert clouds == [None, "elsewhere", "local"]


@pytest.mark.parametrize("env", [{"working_dir": 1}, {"py_modules": "a"}, {"excludes": [1]}])
def test_code_that_is_no_text_is_refused(client: Client, env: dict[str, Any]) -> None:
    app = ApplicationConfig(import_path="m:app", runtime_env=env)
    with pytest.raises(InvalidRequest, match=next(iter(env))):
        client.services.deploy(ServiceConfig(name="api", applications=[app]))


async def test_the_async_client_does_the_same(api: FakeApi, tmp_path: Path) -> None:
    code(tmp_path, "work")
    async with AsyncClient(api.url, TOKEN) as client:
        service = await client.services.deploy(CONFIG.model_copy(update={"working_dir": str(tmp_path / "work")}))
        api.shift(service.versions[0].id, 100)
        assert (await client.services.wait_deployed(service)).state is ServiceState.RUNNING
        assert (await client.services.wait("api")).state is ServiceState.RUNNING
        assert [s.id async for s in client.services.list(state="RUNNING")] == [service.id]
        assert [v.name async for v in client.services.versions("api")] == ["v1"]
        made = await client.services.add_token("api")
        await client.services.delete_token("api", made.id)
        assert (await client.services.terminate("api")).state is ServiceState.TERMINATED
        assert [s.state async for s in client.services.watch("api")] == [ServiceState.TERMINATED]
        await client.services.delete("api")
    assert api.services == {}


# --- waiting


def test_wait_gives_up_only_when_asked_to(api: FakeApi, client: Client) -> None:
    service = api.add_service(waits_for="a head")
    api.add_version(service.id)
    with pytest.raises(WaitTimeout, match="waits for a head"):
        client.services.wait_deployed(api.services[service.id], timeout=0.1)
    with pytest.raises(WaitTimeout):
        client.services.wait("api", state="TERMINATED", timeout=0.1)


@pytest.mark.usefixtures("no_pause")
def test_a_watch_rides_out_an_outage(api: FakeApi, client: Client) -> None:
    service = api.add_service()
    seen = []
    for now in client.services.watch("api"):
        seen.append(now.state)
        if len(seen) == 1:
            api.trouble = [503] * 30
            api.change(service.id, state=ServiceState.TERMINATED)
    assert seen == [ServiceState.STARTING, ServiceState.TERMINATED]


# --- when a deploy is there, and when it never will be


def version(number: int, state: V = V.RUNNING, weight: int = 0, **fields: Any) -> ServiceVersion:
    fields = {"name": f"v{number}", "target_weight": weight, "state_since": NOW, **fields}
    return ServiceVersion(
        id=f"sv_{number}", service_id="svc_1", number=number, state=state, weight=weight,
        config=CONFIG.model_copy(update={"rollout": RolloutConfig()}), created_by="u", created_at=NOW, **fields,
    )  # fmt: skip


def service(*versions: ServiceVersion, state: ServiceState = ServiceState.RUNNING, **fields: Any) -> Service:
    now = utcnow()
    return Service(
        id="svc_1", name="api", project="p", cloud="local", state=state, versions=list(versions), created_by="u",
        created_at=now, state_since=now, **fields,
    )  # fmt: skip


def rollout(percent: int, state: str = "holding", to: str = "sv_2") -> Rollout:
    return Rollout(version_id=to, percent=percent, state=state, since=utcnow())


OUT, BACK = ServiceState.ROLLING_OUT, ServiceState.ROLLING_BACK
OLD = version(1, weight=100)


def test_the_version_of_a_deploy_is_the_one_with_its_name_or_the_newest() -> None:
    answer = service(version(1, name="blue"), version(3), version(2))
    assert Target.of(answer).version_id == "sv_3"
    named = ServiceDeploy(config=CONFIG.model_copy(update={"version_name": "blue"}))
    assert Target.of(answer, named).version_id == "sv_1"
    with pytest.raises(WorkloadFailed):
        Target.of(service())


@pytest.mark.parametrize(
    ("now", "there"),
    [
        (service(OLD, version(2, V.STARTING), state=OUT, primary_version="sv_1", rollout=rollout(0)), False),
        (service(OLD, version(2, weight=100), state=OUT, primary_version="sv_1", rollout=rollout(100)), False),
        (service(version(2, weight=100), state=OUT, primary_version="sv_2"), False),
        (service(version(2, weight=100), primary_version="sv_2"), True),
        # complete, and another deploy began before we looked again
        (service(version(2, weight=95), state=OUT, primary_version="sv_2", rollout=rollout(5, to="sv_3")), True),
        # unhealthy, but on its way back or being healed
        (service(OLD, version(2, V.UNHEALTHY, 5), state=BACK, primary_version="sv_1"), False),
        (service(version(2, V.UNHEALTHY, 100), state=ServiceState.UNHEALTHY, primary_version="sv_2"), False),
        # a terminated service that is deployed again, before its workflow has woken up
        (service(version(2, V.STARTING), state=ServiceState.TERMINATED), False),
        # somebody paused it by hand
        (service(OLD, version(2, weight=5), state=OUT, primary_version="sv_1", rollout=rollout(5, "paused")), False),
    ],
)
def test_a_rollout_is_done_when_the_version_has_it_all(now: Service, there: bool) -> None:
    assert Target("sv_2").reached(now) is there


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (service(OLD, version(2, V.UNHEALTHY, reason="no module m")), "is unhealthy: no module m."),
        (service(version(2, V.UNHEALTHY), state=ServiceState.UNHEALTHY, reason="hangs"), "is unhealthy: hangs."),
        (service(OLD, version(2, V.TERMINATING, reason="asked for")), "was rolled back: asked for."),
        (service(OLD, version(2, V.TERMINATED), version(3, V.STARTING)), "replaced by the deploy of v3 (sv_3)"),
        (service(OLD, version(3), version(4)), "replaced by the deploy of v4"),
        (service(version(2, V.TERMINATING), state=ServiceState.TERMINATING, reason="by anna"), "TERMINATING: by anna."),
    ],
)
def test_a_deploy_that_will_never_be_there_says_why(now: Service, says: str) -> None:
    with pytest.raises(WorkloadFailed) as caught:
        Target("sv_2").reached(now)
    assert says in caught.value.message
    assert caught.value.exit_code == 10


def test_a_canary_is_there_at_its_pause_or_beyond() -> None:
    canary = Target("sv_2", canary_percent=25)
    going = {"state": OUT, "primary_version": "sv_1"}
    assert not canary.reached(service(OLD, version(2, weight=5), rollout=rollout(5, "paused"), **going))
    assert not canary.reached(service(OLD, version(2, weight=25), rollout=rollout(25), **going))
    assert canary.reached(service(OLD, version(2, weight=25), rollout=rollout(25, "paused"), **going))
    assert canary.reached(service(version(2, weight=100), primary_version="sv_2")), "the first version has no canary"
    whole = Target.of(service(OLD, version(2)), ServiceDeploy(config=CONFIG, canary_percent=100))
    assert whole.canary_percent is None


def test_static_weights_are_there_when_they_hold() -> None:
    a, b = version(1, weight=80), version(2, weight=20)
    target = Target(None, weights={"v1": 80, "v2": 20, "v3": 0})
    assert not target.reached(service(version(1, weight=100), version(2, V.STARTING), state=OUT))
    assert not target.reached(service(a, b, state=OUT))
    assert target.reached(service(a, b, version(3, V.TERMINATED)))
    with pytest.raises(WorkloadFailed, match="replaced"):
        target.reached(service(version(1, weight=50), version(2, weight=50)))
    with pytest.raises(WorkloadFailed, match=r"v2 .* is unhealthy: no module"):
        Target(None, weights={"v1": 80, "v2": 20}).reached(service(a, version(2, V.UNHEALTHY, reason="no module")))


def test_a_failed_version_that_is_chosen_all_the_same_is_waited_for() -> None:
    """The records call it UNHEALTHY until its workflow has the deploy."""
    kept = service(version(1, weight=100), version(2, V.UNHEALTHY, kept_until=NOW))
    deploy = ServiceDeploy.model_validate({"name": "api", "versions": [{"name": "v2", "traffic_percent": 100}]})
    target = Target.of(kept, deploy)
    assert not target.reached(kept)
    again = version(2, V.UNHEALTHY, state_since=NOW + timedelta(seconds=1), reason="it fails still")
    with pytest.raises(WorkloadFailed, match="it fails still"):
        target.reached(service(version(1, weight=100), again))


LATER = OLD.state_since + timedelta(seconds=1)
OUT_2 = service(OLD, version(2, V.STARTING, 5), state=OUT, primary_version="sv_1", rollout=rollout(5))
"""v2 is being rolled out over v1."""
RUNS_2 = service(
    version(1, V.TERMINATED), version(2, weight=100), primary_version="sv_2", previous_version="sv_1"
)  # fmt: skip


@pytest.mark.parametrize(
    ("before", "now", "there"),
    [
        # a rollout is given up
        (OUT_2, OUT_2, False),
        (OUT_2, service(OLD, version(2, V.STARTING, 5), state=BACK, primary_version="sv_1", rollout=rollout(5)), False),
        (OUT_2, service(OLD, version(2, V.STARTING, 5), state=OUT, primary_version="sv_1"), False),
        (OUT_2, service(OLD, version(2, V.TERMINATING), primary_version="sv_1"), True),
        (OUT_2, service(OLD, version(2, V.UNHEALTHY), primary_version="sv_1"), True),
        (
            OUT_2,
            service(OLD, version(2, V.TERMINATED), version(3, V.STARTING), primary_version="sv_1", state=OUT,
                    rollout=rollout(0, to="sv_3")),
            True,
        ),  # another deploy began before we looked again
        # it was complete before the order came, so the version before is brought back
        (OUT_2, RUNS_2, False),
        (OUT_2, service(version(1, V.STARTING), version(2, weight=100), state=BACK, primary_version="sv_2"), False),
        # accepted, and its rollout is not in the records yet
        (service(OLD, version(2, V.STARTING), primary_version="sv_1"), service(OLD, version(2, V.STARTING),
         primary_version="sv_1"), False),
        # none was under way: RUNNING is no answer
        (RUNS_2, RUNS_2, False),
        (
            RUNS_2,
            service(version(1, V.STARTING), version(2, weight=100), primary_version="sv_2", state=BACK,
                    rollout=rollout(0, to="sv_1")),
            False,
        ),
        (RUNS_2, service(version(1, weight=100), version(2, V.TERMINATING), primary_version="sv_1", state=BACK), False),
        (RUNS_2, service(version(1, weight=100), version(2, V.TERMINATING), primary_version="sv_1"), True),
        # the records of before do not tell which version that is
        (RUNS_2.model_copy(update={"previous_version": None}), RUNS_2, False),
        (RUNS_2.model_copy(update={"previous_version": None}), service(OLD, primary_version="sv_1"), True),
    ],
)  # fmt: skip
def test_a_rollback_is_done_when_it_is_seen_to_be(before: Service, now: Service, there: bool) -> None:
    assert Back(before).reached(now) is there


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (
            service(version(1, V.UNHEALTHY, state_since=LATER, reason="no module m"), version(2, weight=100),
                     primary_version="sv_2"),
            "v1 (sv_1) does not serve: no module m.",
        ),
        (
            service(version(1, V.TERMINATED, state_since=LATER), version(2, weight=100), primary_version="sv_2"),
            "v1 (sv_1) does not serve.",
        ),
        (
            service(version(1, V.TERMINATED), version(2), version(3, weight=100), primary_version="sv_3"),
            "replaced by the deploy of v3",
        ),
        (service(version(2), state=ServiceState.TERMINATED), "TERMINATED"),
    ],
)  # fmt: skip
def test_a_rollback_that_comes_to_nothing_says_why(now: Service, says: str) -> None:
    back = Back(RUNS_2)
    with pytest.raises(WorkloadFailed) as caught:
        back.reached(now)
    assert says in caught.value.message


def test_a_version_that_was_draining_has_not_failed_to_come_back_because_it_ended() -> None:
    draining = service(version(1, V.TERMINATING), version(2, weight=100), primary_version="sv_2",
                       previous_version="sv_1")  # fmt: skip
    back = Back(draining)
    ended = version(1, V.TERMINATED, state_since=LATER)
    assert not back.reached(service(ended, version(2, weight=100), primary_version="sv_2"))
    starts = service(version(1, V.STARTING), version(2, weight=100), primary_version="sv_2", state=BACK)
    assert not back.reached(starts)
    with pytest.raises(WorkloadFailed):
        back.reached(service(ended, version(2, weight=100), primary_version="sv_2"))


def test_what_steers_a_rollout_is_waited_for_until_it_is_seen() -> None:
    going = {"state": OUT, "primary_version": "sv_1"}
    paused = service(OLD, version(2, V.STARTING, 5), rollout=rollout(5, "paused"), **going)
    further = service(OLD, version(2, V.STARTING, 25), rollout=rollout(25, "paused"), **going)
    done = service(version(1, V.TERMINATING), version(2, weight=100), primary_version="sv_2")
    for action, percent, stops in ((RolloutAction.RESUME, None, True), (RolloutAction.PROMOTE, None, False),
                                   (RolloutAction.PROMOTE, 100, False), (RolloutAction.PROMOTE, 25, True)):  # fmt: skip
        target = commanded(paused, action, percent)
        assert not target.reached(paused)
        assert target.reached(further) is stops
        assert target.reached(done)
        with pytest.raises(WorkloadFailed, match="unhealthy"):
            target.reached(service(OLD, version(2, V.UNHEALTHY), primary_version="sv_1"))
    # static weights: no version gets all of it
    target = commanded(paused, RolloutAction.RESUME)
    assert target.reached(service(version(1, weight=80), version(2, weight=20), primary_version="sv_1"))
    assert isinstance(commanded(paused, RolloutAction.ABORT), Back)
    # accepted when its rollout was not in the records yet
    early = commanded(service(OLD, version(2, V.STARTING), primary_version="sv_1"), RolloutAction.PROMOTE)
    assert not early.reached(service(OLD, version(2, V.STARTING), primary_version="sv_1"))
    assert early.reached(done)


def test_orders_are_waited_for(api: FakeApi, client: Client) -> None:
    service = api.add_service(state=ServiceState.RUNNING)
    old, new = api.add_version(service.id), api.add_version(service.id)
    api.shift(old.id, 100)
    api.shift(new.id, 5, "paused")
    before = client.services.get("api")
    with pytest.raises(WaitTimeout):
        client.services.wait_steered(before, "promote", timeout=0.1)
    with pytest.raises(InvalidRequest, match="at once"):
        client.services.wait_steered(before, "pause")
    api.shift(new.id, 100)
    assert client.services.wait_steered(before, "promote").primary_version == new.id
    assert [s.id for s in client.services.list(cloud="local")] == [service.id]
    assert list(client.services.list(cloud="other")) == []


@pytest.mark.parametrize(
    ("now", "wanted", "there"),
    [
        (service(), ServiceState.RUNNING, True),
        (service(state=OUT), ServiceState.RUNNING, False),
        (service(OLD, state=ServiceState.UNHEALTHY), ServiceState.RUNNING, False),
        (service(state=ServiceState.UNHEALTHY), ServiceState.RUNNING, None),
        (service(state=ServiceState.UNHEALTHY), ServiceState.UNHEALTHY, True),
        (service(state=ServiceState.TERMINATING), ServiceState.RUNNING, None),
        (service(state=ServiceState.TERMINATING), ServiceState.TERMINATED, False),
        (service(state=ServiceState.TERMINATED), ServiceState.TERMINATING, True),
    ],
)
def test_a_state_is_reached_or_out_of_reach(now: Service, wanted: ServiceState, there: bool | None) -> None:
    if there is not None:
        assert reached(now, wanted) is there
        return
    with pytest.raises(WorkloadFailed):
        reached(now, wanted)
