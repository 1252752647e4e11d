"""``heliostat service``, run in this process against a fake API."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.models.common import Condition, Event, utcnow
from heliostat.models.services import (
    ApplicationConfig,
    ServiceConfig,
    ServiceState,
    ServiceVersionState,
    Traffic,
)
from tests.heliostat.cli.test_cli import run
from tests.heliostat.fake_api import FakeApi

__all__ = ["run"]
DEPLOY = ["service", "deploy", "-n", "api", "m:app"]
ONE = '[{"name": "a", "traffic_percent": 100}]'


def only(api: FakeApi) -> Any:
    (service,) = api.services.values()
    return service


def script(api: FakeApi, *steps: Callable[[str], None]) -> None:
    """After the next deploy: one step before each further look at the service; a step is given the version's id."""
    left = iter(steps)

    def start(service_id: str) -> None:
        version = max(api.services[service_id].versions, key=lambda v: v.number)

        def look(path: str) -> None:
            if path == f"/v1/services/{service_id}":
                next(left, lambda _: None)(version.id)

        api.on_request = look

    api.on_deploy = start


def running(api: FakeApi, name: str = "api") -> Any:
    """A service with v1 at 100 %."""
    service = api.add_service(name)
    api.shift(api.add_version(service.id).id, 100)
    return api.services[service.id]


# --- deploy


def test_deploy_says_what_can_be_done_next(api: FakeApi, run: Any) -> None:
    ran = run("service", "deploy", "-n", "api", "m:app", "size=3", "lang=de")
    assert ran.code == 0, ran.err
    service = only(api)
    (sent,) = api.deploys
    assert sent.config is not None
    assert sent.model_fields_set == {"config"}
    assert sent.config.applications == [ApplicationConfig(import_path="m:app", args={"size": "3", "lang": "de"})]
    assert f"Service api ({service.id}): version v1 is accepted." in ran.out
    assert '  curl -H "Authorization: Bearer first-token" http://127.0.0.1:7777/\n' in ran.out
    for command in ("status --watch api", "logs -f api", "terminate api"):
        assert f"heliostat service {command}" in ran.out


def test_the_curl_line_goes_to_where_the_application_is(api: FakeApi, run: Any) -> None:
    service = api.add_service("api", state=ServiceState.RUNNING)
    config = ServiceConfig(applications=[ApplicationConfig(import_path="m:app", route_prefix="/v2/score")])
    api.add_version(service.id, config)
    api.change(service.id, query_auth_token=None)
    assert "\n  curl http://127.0.0.1:7777/v2/score\n" in run("service", "status", "api").out
    api.change(service.id, versions=[], query_url=None)
    assert "curl" not in run("service", "status", "api").out


def test_flags_win_over_the_file(api: FakeApi, run: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("main.py", "a.csv", "b.log"):
        (tmp_path / "src" / name).write_text(name)
    (tmp_path / "requirements.txt").write_text("emoji\n")
    file = {
        "name": "from-file", "applications": [{"import_path": "old:app", "route_prefix": "/x", "args": {"a": 1}}],
        "working_dir": "nowhere", "excludes": ["*.csv"], "env_vars": {"KEPT": "1", "CHANGED": "1"},
        "rollout": {"steps": [50, 100], "max_error_rate": 0.2}, "cluster_replicas": 1, "tags": {"a": "file"},
    }  # fmt: skip
    (tmp_path / "service.yaml").write_text(yaml.safe_dump(file))
    ran = run(
        "service", "deploy", "-f", "service.yaml", "-n", "from-flag", "--version-name", "blue", "--working-dir", "src",
        "-e", "*.log", "--env", "CHANGED=2", "-r", "requirements.txt", "--compute-config", "shape:2",
        "--cloud", "local", "--project", "default", "--cluster-replicas", "2", "--canary-percent", "25",
        "--max-surge-percent", "50", "--steps", "5,25,100", "--hold-s", "2", "--tag", "b=flag", "-o", "json", "new:app",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (sent,) = api.deploys
    made = sent.config
    assert made is not None
    assert (sent.canary_percent, sent.max_surge_percent, sent.in_place) == (25, 50, False)
    assert (made.name, made.version_name, made.cluster_replicas) == ("from-flag", "blue", 2)
    assert (made.applications[0].import_path, made.applications[0].route_prefix) == ("new:app", "/x")
    assert made.applications[0].args == {"a": 1}
    assert made.excludes == ["*.csv", "*.log"]
    assert made.env_vars == {"KEPT": "1", "CHANGED": "2"}
    assert (made.rollout.steps, made.rollout.hold_s, made.rollout.max_error_rate) == ([5, 25, 100], 2, 0.2)
    assert (made.tags, made.requirements, made.compute_config) == ({"b": "flag"}, ["emoji"], "shape:2")
    assert (made.project, made.cloud) == ("default", "local")
    key = f"uploads/{str(made.working_dir).removeprefix('upload:')}.zip"
    assert zipfile.ZipFile(io.BytesIO(api.bucket[key])).namelist() == ["pkg/main.py"]
    assert ran.json["versions"][0]["name"] == "blue"


def test_in_place(api: FakeApi, run: Any) -> None:
    assert run(*DEPLOY, "--in-place").code == 0
    assert api.deploys[0].in_place


def test_versions_with_static_weights(api: FakeApi, run: Any, tmp_path: Path) -> None:
    for name in ("blue", "green"):
        (tmp_path / f"{name}.yaml").write_text(
            f"name: api\nversion_name: {name}\napplications: [{{import_path: 'm:app'}}]\n"
        )
    weights = '[{"name": "blue", "traffic_percent": 80}, {"name": "green", "traffic_percent": 20}]'
    ran = run("service", "deploy", "-f", "blue.yaml", "-f", "green.yaml", "--versions", weights)
    assert ran.code == 0, ran.err
    assert "blue at 80 %, green at 20 %" in ran.out
    assert [c.version_name for c in api.deploys[0].configs] == ["blue", "green"]
    ran = run("service", "deploy", "-n", "api", "--versions", weights.replace("80", "60").replace("20", "40"))
    assert ran.code == 0, ran.err
    assert (api.deploys[1].name, api.deploys[1].configs) == ("api", [])
    assert [v.traffic_percent for v in api.deploys[1].versions] == [60, 40]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["service", "deploy"], "no application"),
        (["service", "deploy", "m:app"], "no name"),
        (["service", "deploy", "-n", "api", "m.py"], "import path"),
        ([*DEPLOY, "size"], "KEY=VALUE"),
        ([*DEPLOY, "--steps", "5,x"], "5,25,50,100"),
        ([*DEPLOY, "--steps", "50,5,100"], "rollout.steps"),
        ([*DEPLOY, "--hold-s", "0"], "rollout.hold_s"),
        ([*DEPLOY, "--canary-percent", "101"], "canary_percent"),
        ([*DEPLOY, "--in-place", "--canary-percent", "5"], "no canary"),
        ([*DEPLOY, "--in-place", "--steps", "5,100"], "can't be combined with --in-place"),
        ([*DEPLOY, "--in-place", "--hold-s", "5"], "can't be combined with --in-place"),
        ([*DEPLOY, "--versions", ONE, "--version-name", "a", "--hold-s", "5"], "can't be combined with --versions"),
        ([*DEPLOY, "--in-place", "--max-surge-percent", "5"], "max_surge_percent bounds a rollout"),
        (["service", "deploy", "-n", "api", "--versions", ONE, "--max-surge-percent", "5"], "static weights"),
        (["service", "deploy", "-f", "two.yaml", "-f", "two.yaml", "--versions", ONE, "m:app"], "several files"),
        ([*DEPLOY, "--timeout-s", "5"], "--wait"),
        (["service", "rollback", "x", "--timeout-s", "5"], "--wait"),
        (["service", "rollout", "promote", "x", "--timeout-s", "5"], "--wait"),
        ([*DEPLOY, "--cluster-replicas", "0"], "cluster_replicas"),
        ([*DEPLOY, "--versions", "v1=80"], "not valid JSON"),
        ([*DEPLOY, "--versions", '{"a": 1}'], "not a list"),
        (["service", "deploy", "-n", "api", "--versions", '[{"name": "a", "traffic_percent": 90}]'], "sums to 90"),
        (["service", "deploy", "-n", "api", "--versions", "[]", "--env", "A=1"], "weights only"),
        (["service", "deploy", "--versions", '[{"name": "a", "traffic_percent": 100}]'], "name the service"),
        ([*DEPLOY, "--working-dir", "missing"], "'missing'"),
        (["service", "deploy", "-f", "two.yaml", "-f", "two.yaml"], "--versions"),
        (["service", "deploy", "-f", "two.yaml", "m:app"], "several applications"),
        (["service", "deploy", "-f", "env.yaml", "--env", "A=1"], "env_vars is not a mapping"),
        (["service", "wait", "x", "--state", "GOOD"], "ROLLING_OUT"),
        (["service", "list", "--state", "GOOD"], "ROLLING_OUT"),
        (["service", "status", "x", "--watch", "-o", "json"], "text output only"),
        (["service", "logs", "x", "-f", "-o", "json"], "text output only"),
        (["service", "rollout", "promote", "x", "--percent", "0"], "1 to 100"),
    ],
)
def test_wrong_input_is_exit_1_before_anything_is_sent(
    api: FakeApi, run: Any, tmp_path: Path, args: list[str], says: str
) -> None:
    (tmp_path / "two.yaml").write_text(
        "name: api\napplications:\n- {name: a, route_prefix: /a, import_path: 'm:a'}\n"
        "- {name: b, route_prefix: /b, import_path: 'm:b'}\n"
    )
    (tmp_path / "env.yaml").write_text("name: api\nenv_vars: [A]\napplications: [{import_path: 'm:a'}]\n")
    ran = run(*args)
    assert ran.code == 1, ran.err
    assert says in ran.err
    assert ran.out == ""
    assert api.requests == []


# --- deploy --wait


def test_wait_tells_each_step_of_the_rollout(api: FakeApi, run: Any) -> None:
    service = running(api)
    now = utcnow()
    old = service.versions[0]
    api.change_version(old.id, checklist=[Condition(type="Cluster", status=True, since=old.created_at)])
    starts = Condition(type="Cluster", status=False, message="a head (usually 10 s)", since=now)
    script(
        api,
        lambda v: api.change_version(v, checklist=[starts]),
        lambda v: api.shift(v, 5),
        lambda v: api.shift(v, 50),
        lambda v: api.shift(v, 100),
    )
    ran = run(*DEPLOY, "--wait")
    assert ran.code == 0, ran.err
    order = [
        "v2 is accepted",
        "v2 waits for a head (usually 10 s)",
        "v2 5 % · v1 95 %",
        "v2 50 % · v1 50 %",
        "v2 100 %",
    ]
    places = [ran.err.index(text) for text in order]
    assert places == sorted(places)
    assert "(v1: 0s after its deploy)" in ran.err
    assert "120 requests, no error" in ran.err
    assert "v2 is observed at 5 % (15 s a step)" in ran.err
    assert "RUNNING" in ran.out
    assert "Bearer first-token" in ran.out


def test_wait_for_a_canary_ends_at_the_pause(api: FakeApi, run: Any) -> None:
    running(api)
    script(api, lambda v: api.shift(v, 5), lambda v: api.shift(v, 25), lambda v: api.shift(v, 25, "paused"))
    ran = run(*DEPLOY, "--wait", "--canary-percent", "25")
    assert ran.code == 0, ran.err
    assert "v2 25 % · v1 75 %, paused" in ran.err
    assert "to v2: paused at 25 %" in ran.out
    assert "heliostat service rollout promote api" in ran.out
    assert "heliostat service rollout abort api" in ran.out


def test_wait_for_static_weights(api: FakeApi, run: Any) -> None:
    service = running(api)

    def hold(_: str) -> None:
        for version, weight in zip(api.services[service.id].versions, (20, 80), strict=True):
            api.change_version(version.id, weight=weight, target_weight=weight, state=ServiceVersionState.RUNNING)
        api.change(service.id, state=ServiceState.RUNNING)

    script(api, lambda _: None, hold)
    weights = '[{"name": "v1", "traffic_percent": 80}, {"name": "green", "traffic_percent": 20}]'
    ran = run("service", "deploy", "-n", "api", "--version-name", "green", "--versions", weights, "--wait", "m:app")
    assert ran.code == 0, ran.err
    assert "green 20 % · v1 80 %" in ran.err


def unhealthy(api: FakeApi) -> Callable[[str], None]:
    def end(version_id: str) -> None:
        kept = {"kept_until": utcnow(), "state": ServiceVersionState.UNHEALTHY, "reason": "ImportError: no module m"}
        api.change_version(version_id, **kept)
        api.change(only(api).id, state=ServiceState.UNHEALTHY)

    return end


def test_a_version_that_fails_is_exit_10_with_the_reason(api: FakeApi, run: Any) -> None:
    script(api, lambda _: None, unhealthy(api))
    ran = run(*DEPLOY, "--wait")
    assert ran.code == 10
    assert "ImportError: no module m" in ran.err
    assert "heliostat service logs api --version v1" in ran.err


def test_a_failed_deploy_as_json_is_one_document(api: FakeApi, run: Any) -> None:
    script(api, lambda _: None, unhealthy(api))
    ran = run(*DEPLOY, "--wait", "-o", "json")
    assert ran.code == 10
    assert ran.json["versions"][0]["state"] == "UNHEALTHY"
    error = json.loads(ran.err)["error"]
    assert (error["code"], error["exit_code"], error["details"]["version_state"]) == (
        "workload_failed", 10, "UNHEALTHY",
    )  # fmt: skip


def test_a_rollback_is_waited_for_and_then_told(api: FakeApi, run: Any) -> None:
    service = running(api)

    def breach(version: str) -> None:
        api.change_version(version, state=ServiceVersionState.UNHEALTHY, reason="5xx: 12 % of 100 answers")
        api.change(service.id, state=ServiceState.ROLLING_BACK)

    def back(version: str) -> None:
        api.change_version(version, weight=0)
        api.change_version(service.versions[0].id, weight=100)
        api.change(service.id, state=ServiceState.RUNNING, rollout=None)

    script(api, lambda v: api.shift(v, 5), breach, breach, back)
    ran = run(*DEPLOY, "--wait")
    assert ran.code == 10
    assert "12 % of 100 answers" in ran.err
    assert ran.err.index("v2 5 % · v1 95 %") < ran.err.rindex("  v1 100 %")


def test_a_deploy_that_is_superseded_says_by_which(api: FakeApi, run: Any) -> None:
    service = running(api)

    def supersede(version: str) -> None:
        api.add_version(service.id)
        api.change_version(version, state=ServiceVersionState.TERMINATING, reason="superseded")

    script(api, lambda _: None, supersede)
    ran = run(*DEPLOY, "--wait")
    assert ran.code == 10
    assert "Version v2" in ran.err
    assert "superseded by the deploy of v3" in ran.err


def test_a_deploy_that_supersedes_says_so(api: FakeApi, run: Any) -> None:
    service = running(api)
    api.shift(api.add_version(service.id).id, 5)
    assert "It replaces the rollout to v2." in run(*DEPLOY).out


def test_ctrl_c_detaches_and_says_how_to_come_back(api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    looks = iter([0.0, 0.0])

    def press(_: float) -> None:
        if next(looks, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", press)
    ran = run(*DEPLOY, "--wait")
    assert ran.code == 130
    assert "Detached: service api keeps running" in ran.err
    assert "heliostat service status --watch api" in ran.err
    assert only(api).state is ServiceState.STARTING


# --- looking


def test_status_has_the_promised_shape(api: FakeApi, run: Any) -> None:
    service = running(api)
    version = api.add_version(service.id)
    api.shift(version.id, 25)
    seen = Traffic(requests=12_345, errors=7, requests_per_s=41.25, p50_ms=4.2, p95_ms=310.0)
    api.change_version(version.id, traffic=seen)
    shown = run("service", "status", "api", "-o", "json").json
    assert {"id", "name", "state", "query_url", "query_auth_token", "versions"} <= shown.keys()
    assert {"id", "state", "weight"} <= shown["versions"][0].keys()
    assert yaml.safe_load(run("service", "status", "api", "-o", "yaml").out) == shown
    text = run("service", "status", "api").out
    for part in (
        "ROLLING_OUT", "to v2: holding at 25 % (5 → 25 → 50 → 100)", "25 % → 100 %", "75 % → 0 %", "12,345", "41.2",
        "4.2 ms", "310 ms", 'curl -H "Authorization: Bearer first-token" http://127.0.0.1:7777/', "rollout promote",
    ):  # fmt: skip
        assert part in text, text


def test_status_says_what_is_not_met_yet(api: FakeApi, run: Any) -> None:
    service = api.add_service(waits_for="v1")
    version = api.add_version(service.id)
    wait = Condition(type="Application", status=False, message="default to be healthy", since=utcnow())
    api.change_version(version.id, checklist=[wait])
    text = run("service", "status", "api").out
    assert "Application" in text
    assert "default to be healthy" in text


def test_env_values_are_never_shown(api: FakeApi, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServiceConfig, "masked", lambda self: self)  # a server that forgets to mask
    service = api.add_service()
    app = ApplicationConfig(import_path="m:app", runtime_env={"env_vars": {"INNER": "s3cret"}})
    api.add_version(service.id, ServiceConfig(applications=[app], env_vars={"OUTER": "s3cret"}))
    for args in (["status", "api"], ["status", "api", "-o", "json"], ["list", "-o", "yaml"]):
        ran = run("service", *args)
        assert ran.code == 0
        assert "s3cret" not in ran.out + ran.err


def test_watch_without_a_terminal_prints_a_line_per_change(api: FakeApi, run: Any) -> None:
    service = running(api)
    version = api.add_version(service.id)
    steps = iter(
        [
            lambda: None,
            lambda: None,
            lambda: api.shift(version.id, 5),
            lambda: api.change_version(version.id, traffic=Traffic(requests=9)),
            lambda: api.shift(version.id, 100),
            lambda: api.change(service.id, state=ServiceState.TERMINATED, reason="asked for"),
        ]
    )
    api.on_request = lambda _: next(steps, lambda: None)()
    ran = run("service", "status", "api", "--watch")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "RUNNING  v2 STARTING 0 %, v1 RUNNING 100 %",
        "ROLLING_OUT  v2 RUNNING 5 %, v1 RUNNING 95 %  rollout holding at 5 %",
        "RUNNING  v2 RUNNING 100 %",
        "TERMINATED  v2 RUNNING 100 %  (asked for)",
    ]


def test_list(api: FakeApi, run: Any) -> None:
    assert "No services" in run("service", "list").out
    api.shift(api.add_version(running(api, "a").id).id, 25)
    api.add_service("b", waits_for="a head")
    lines = run("service", "list").out.splitlines()
    assert lines[0].split()[:3] == ["ID", "NAME", "STATE"]
    assert "waits for a head" in lines[1]
    assert "holding at 25 %" in lines[2]
    assert [s["name"] for s in run("service", "list", "--state", "starting", "-o", "json").json] == ["b"]
    assert [len(run("service", "list", "--cloud", c, "-o", "json").json) for c in ("local", "other")] == [2, 0]


def test_events_and_logs(api: FakeApi, run: Any) -> None:
    service = running(api)
    api.events[service.id] = [
        Event(id="e1", resource_id=service.id, at=utcnow(), kind="weights", actor="wf", message="v1 has all of it")
    ]
    assert "v1 has all of it" in run("service", "events", "api").out
    api.service_logs = {"v1/replica.log": "one\n", "v2/replica.log": "two\n"}
    assert run("service", "logs", "api").out == "==> v1/replica.log <==\none\n\n==> v2/replica.log <==\ntwo\n"
    assert run("service", "logs", "api", "--version", "v2", "-o", "json").json == [
        {"stream": "v2/replica.log", "text": "two\n"}
    ]
    api.change(service.id, state=ServiceState.TERMINATED)
    assert run("service", "logs", "api", "-f").code == 0


# --- waiting and steering


def test_wait_tells_by_its_exit_code(api: FakeApi, run: Any) -> None:
    running(api)
    assert run("service", "wait", "api").code == 0
    slow = api.add_service("slow", waits_for="a head")
    ran = run("service", "wait", "slow", "-t", "0.1")
    assert ran.code == 3
    assert "waits for a head" in ran.err
    api.add_version(slow.id, state=ServiceVersionState.UNHEALTHY)
    api.change(slow.id, state=ServiceState.UNHEALTHY, reason="ImportError")
    ran = run("service", "wait", "slow")
    assert ran.code == 10
    assert "ImportError" in ran.err
    assert run("service", "wait", "slow", "-s", "unhealthy").code == 0
    assert run("service", "wait", "nope").code == 1


def test_terminate_and_delete(api: FakeApi, run: Any) -> None:
    service = running(api)
    assert run("service", "delete", "api").code == 1
    ran = run("service", "terminate", "api", "--wait")
    assert ran.code == 0
    assert f"Service api ({service.id}) is TERMINATED." in ran.out
    assert "heliostat service delete api" in ran.out
    assert run("service", "delete", "api", "-o", "json").json == {"deleted": "api"}
    assert api.services == {}
    assert run("service", "delete", "api").code == 1


def test_rollout_and_rollback(api: FakeApi, run: Any) -> None:
    service = running(api)
    assert run("service", "rollout", "pause", "api").code == 1
    api.shift(api.add_version(service.id).id, 5)
    for args in (["pause"], ["resume"], ["promote"], ["promote", "--percent", "50"], ["abort"]):
        ran = run("service", "rollout", args[0], "api", *args[1:])
        assert ran.code == 0, ran.err
        assert "The rollout of service api" in ran.out
    assert "is rolling back" in run("service", "rollback", "api", "--reason", "slow").out
    assert api.orders == [
        ("pause", None), ("resume", None), ("promote", None), ("promote", 50), ("abort", None), ("rollback", None),
    ]  # fmt: skip


def looks(api: FakeApi, *steps: Callable[[], None]) -> None:
    """After the next order: one step before each further look. Before them the records say what they said."""
    left = iter(steps)

    def accepted(service_id: str) -> None:
        def look(path: str) -> None:
            if path == f"/v1/services/{service_id}":
                next(left, lambda: None)()

        api.on_request = look

    api.on_order = accepted


def nothing() -> None:
    pass


def test_a_rollback_is_waited_for_though_the_records_still_say_running(api: FakeApi, run: Any) -> None:
    old = running(api).versions[0]
    new = api.add_version(only(api).id)
    api.shift(new.id, 100)
    id = only(api).id
    api.change(id, previous_version=old.id)

    def begins() -> None:
        api.change_version(old.id, state=ServiceVersionState.STARTING, state_since=utcnow())
        api.change(id, state=ServiceState.ROLLING_BACK)

    def done() -> None:
        api.change_version(old.id, state=ServiceVersionState.RUNNING, weight=100)
        api.change_version(new.id, state=ServiceVersionState.TERMINATING, weight=0)
        api.change(id, state=ServiceState.RUNNING, primary_version=old.id)

    looks(api, nothing, nothing, begins, done)
    ran = run("service", "rollback", "api", "--wait", "-o", "json")
    assert ran.code == 0, ran.err
    assert ran.json["primary_version"] == old.id

    def fails() -> None:
        api.change_version(new.id, state=ServiceVersionState.UNHEALTHY, state_since=utcnow(), reason="no module m")

    api.change(id, previous_version=new.id)
    looks(api, nothing, fails)
    ran = run("service", "rollback", "api", "--wait")
    assert (ran.code, "no module m" in ran.err) == (10, True)
    looks(api)
    assert run("service", "rollback", "api", "--wait", "--timeout-s", "0.1").code == 3


def test_steering_is_waited_for(api: FakeApi, run: Any) -> None:
    old = running(api).versions[0]
    new = api.add_version(only(api).id)
    id = only(api).id
    api.shift(new.id, 5, "paused")
    looks(api, nothing, lambda: api.shift(new.id, 25), lambda: api.shift(new.id, 25, "paused"))
    ran = run("service", "rollout", "resume", "api", "--wait")
    assert ran.code == 0, ran.err
    assert "v2 25 % · v1 75 %, paused" in ran.err
    looks(api, nothing, lambda: api.shift(new.id, 50), lambda: api.shift(new.id, 50, "paused"))
    assert run("service", "rollout", "promote", "api", "--percent", "50", "--wait").code == 0
    looks(api)
    assert run("service", "rollout", "promote", "api", "--wait", "-t", "0.1").code == 3

    def back() -> None:
        api.change_version(new.id, state=ServiceVersionState.TERMINATING, weight=0)
        api.change_version(old.id, weight=100)
        api.change(id, state=ServiceState.RUNNING, rollout=None)

    looks(api, nothing, nothing, back)
    ran = run("service", "rollout", "abort", "api", "--wait", "-o", "json")
    assert (ran.code, ran.json["rollout"], ran.json["primary_version"]) == (0, None, old.id), ran.err


def test_a_deploy_is_waited_for_as_long_as_was_asked(api: FakeApi, run: Any) -> None:
    ran = run(*DEPLOY, "--wait", "--timeout-s", "0.1")
    assert (ran.code, "after 0.1 s" in ran.err) == (3, True), ran.err


def test_tokens_are_rotated(api: FakeApi, run: Any) -> None:
    running(api)
    ran = run("service", "token", "add", "api")
    assert ran.out == "second-token\n"
    assert "heliostat service token delete api" in ran.err
    assert "qt_1 (primary), qt_2 (second, not accepted by every proxy yet)" in run("service", "status", "api").out
    assert run("service", "token", "delete", "api").code == 0
    assert "Bearer second-token" in run("service", "status", "api").out
    assert run("service", "token", "delete", "api", "--id", "qt_2", "-o", "json").json == {"deleted": "qt_2"}
