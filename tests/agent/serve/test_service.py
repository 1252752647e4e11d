"""The agent's Serve side against a stand-in for Ray: deploys and their status."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from heliostat.models.agents import ServeStatus
from tests.agent.conftest import until
from tests.agent.control_plane import ControlPlane
from tests.agent.serve.support import (
    GATE,
    SECRET,
    app,
    ask,
    gate,
    give,
    probe,
    puts,
    stop_asking,
)


def test_a_deploy_is_completed_given_to_serve_and_its_health_is_told(start: Any, plane: ControlPlane) -> None:
    head = start()
    data = b"not a zip, which nobody here opens"
    sha = hashlib.sha256(data).hexdigest()
    plane.bucket[f"uploads/{sha}"] = data
    package = {"url": f"{plane.url}/bucket/uploads/{sha}?signature=x", "sha256": sha}
    one = app("one") | {"runtime_env": {"working_dir": package, "env_vars": {"A": SECRET}}}
    two = app("two") | {"route_prefix": "/two", "runtime_env": {"working_dir": {"remote": "https://x/y.zip"},
                                                               "py_modules": [package]}}  # fmt: skip
    config = {"http_options": {"request_timeout_s": 7}, "logging_config": {"log_level": "DEBUG"},
              "grpc_options": {"grpc_servicer_functions": ["m:add"]}}  # fmt: skip
    answer = give(plane, "sv_1", one, two, target_capacity=50, config=config)
    base = json.loads((head.folder / "fake-environ.json").read_text())["HELIOSTAT_SERVE_PORTS"].split(",")
    addresses = {"http": f"{head.ip}:{base[0]}", "grpc": f"{head.ip}:{base[1]}"}
    assert answer == {"ok": True, "result": addresses, "error": "", "retryable": False}
    [given] = puts(head)
    uri = given["applications"][0]["runtime_env"]["working_dir"]
    assert uri.startswith(f"http://{head.ip}:")
    assert uri.endswith(f"/packages/{sha}.zip")
    assert given["applications"][0]["runtime_env"]["env_vars"] == {"A": SECRET}
    assert given["applications"][1]["runtime_env"] == {"working_dir": "https://x/y.zip", "py_modules": [uri]}
    assert plane.gets == [f"uploads/{sha}"]
    assert given["proxy_location"] == "HeadOnly"
    assert given["http_options"] == {"host": head.ip, "port": int(base[0]), "request_timeout_s": 7,
                                     "keep_alive_timeout_s": 90}  # fmt: skip
    assert given["grpc_options"] == {"port": int(base[1]), "request_timeout_s": None, "grpc_servicer_functions": [
        "heliostat_serve_gate.guard_grpc", "heliostat_grpc:m_add"]}  # fmt: skip
    module = (head.folder / "provider" / "heliostat_grpc.py").read_text()
    assert f"sys.path += ['{head.folder}/packages/{sha}.zip/pkg']" in module
    assert "m_add = import_attr('m:add')" in module
    assert given["target_capacity"] == 50
    assert given["logging_config"] == {"log_level": "DEBUG"}
    fact = plane.fact("serve", healthy=True)["data"]
    status = ServeStatus.model_validate(fact)
    assert status.model_dump(mode="json") == fact
    assert (status.version_id, status.deploy, status.failed, status.message) == ("sv_1", "dp_sv_1", False, "")
    assert (status.http, status.grpc) == (addresses["http"], addresses["grpc"])
    assert status.applications["two"].deployments["Model"].replicas == 1
    assert SECRET not in head.log()


def test_an_update_in_place_surges_what_was_there_and_is_labelled_when_it_is_healthy(
    start: Any, plane: ControlPlane
) -> None:
    head = start()
    give(plane, "sv_1", app(deployments=["Model", "Front"]))
    plane.fact("serve", version_id="sv_1", healthy=True)
    two = app(deployments=["Model", "Front", "Fresh"], becomes="DEPLOYING") | {
        "deployments": [{"name": "Model", "num_replicas": 2}, {"name": "Fresh", "num_replicas": 1}]
    }
    assert give(plane, "sv_2", two)["ok"]
    assert puts(head)[-1]["applications"][0]["deployments"] == [
        {"name": "Model", "num_replicas": 2, "max_surge_percent": 100},
        {"name": "Fresh", "num_replicas": 1},
        {"name": "Front", "max_surge_percent": 100},
    ]
    fact = plane.fact("serve", version_id="sv_2")["data"]
    assert (fact["healthy"], fact["failed"]) == (False, False)
    assert gate(head)["version_id"] == "sv_1"
    # what people say themselves holds
    three = app(deployments=["Model", "Front"]) | {"deployments": [{"name": "Model", "max_surge_percent": 20}]}
    assert give(plane, "sv_3", three)["ok"]
    plane.fact("serve", version_id="sv_3", healthy=True)
    assert puts(head)[2]["applications"][0]["deployments"][0] == {"name": "Model", "max_surge_percent": 20}
    until(lambda: gate(head)["version_id"] == "sv_3")


def test_names_that_the_new_code_has_no_more_are_left_out_without_a_word(start: Any, plane: ControlPlane) -> None:
    head = start()
    give(plane, "sv_1", app(deployments=["Old", "Model", "Older"]))
    plane.fact("serve", version_id="sv_1", healthy=True)
    give(plane, "sv_2", app(deployments=["Model"]))
    plane.fact("serve", version_id="sv_2", healthy=True)
    assert not [f for f in plane.facts if f["kind"] == "serve" and f["data"]["failed"]]
    assert [[d["name"] for d in p["applications"][0].get("deployments", [])] for p in puts(head)] == [
        [], ["Model", "Old", "Older"], ["Model"]]  # fmt: skip
    # a name that the config itself has is its author's fault
    give(plane, "sv_3", app(deployments=["Model"]) | {"deployments": [{"name": "Nope"}]})
    fact = plane.fact("serve", version_id="sv_3", failed=True)["data"]
    assert "Deployment 'Nope' does not exist" in fact["message"]
    # the replicas of sv_2 are still there, though Serve shows none
    give(plane, "sv_4", app(deployments=["Model"]))
    assert puts(head)[-1]["applications"][0]["deployments"] == [{"name": "Model", "max_surge_percent": 100}]
    plane.fact("serve", version_id="sv_4", healthy=True)


def test_a_failed_deploy_says_why_without_its_secrets(start: Any, plane: ControlPlane) -> None:
    head = start()
    says = (
        "The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or "
        "initial health check failing. See controller logs for details. Error:\nTraceback (most recent call last):\n"
        f'  File "m.py", line 1, in __init__\n    raise ValueError(x)\nValueError: wrong key {SECRET}\n'
    )
    give(plane, "sv_1", app(becomes="DEPLOY_FAILED", says=says))
    fact = plane.fact("serve", failed=True)["data"]
    assert fact["message"] == (
        "application default is DEPLOY_FAILED: deployment Model is DEPLOY_FAILED: The deployment failed to start 3 "
        "times in a row. Error: ValueError: wrong key ********"
    )
    assert SECRET not in json.dumps(plane.facts)
    assert SECRET not in head.log()
    ended = plane.do("serve_probe", **probe("http://127.0.0.1:1"))
    assert ended["result"]["healthy"] is False
    assert "Serve has given the version up" in ended["result"]["message"]


def test_what_serve_refuses_is_final_and_named_without_its_secrets(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    ask(head, "serve-refuses")
    answer = give(plane, "sv_1")
    assert (answer["ok"], answer["retryable"]) == (False, False)
    assert answer["error"] == ("Serve refuses the config. HTTP 400: applications.0.deployments.0.num_replicas: "
                               "Input should be a valid integer")  # fmt: skip
    assert SECRET not in head.log()
    stop_asking(head, "serve-refuses")
    assert give(plane, "sv_1")["ok"]
    other = give(plane, "sv_2", config={"http_options": {"request_timeout_s": 3}})
    assert (other["ok"], other["retryable"]) == (False, False)
    assert "can't change http_options.request_timeout_s" in other["error"]
    assert "not a valid Serve config" in plane.do("serve_deploy", version_id="sv_3", gate=GATE, config={})["error"]


def test_serve_away_is_tried_again_then_retryable(start: Any, plane: ControlPlane) -> None:
    head = start(constants={"serve_put_s": 3.0})
    plane.fact("ray_ready")
    ask(head, "serve-fails")
    answer = give(plane, "sv_1")
    assert (answer["ok"], answer["retryable"]) == (False, True)
    assert len(puts(head)) >= 2


def test_serve_that_comes_back_in_time_is_given_what_it_did_not_take(start: Any, plane: ControlPlane) -> None:
    head = start()
    plane.fact("ray_ready")
    ask(head, "serve-fails")
    command = plane.command("serve_deploy", version_id="sv_1", deploy="dp_1", gate=GATE,
                            config={"applications": [app()]})  # fmt: skip
    until((head.folder / "fake-serve-puts.json").exists)
    stop_asking(head, "serve-fails")
    assert plane.result(command)["ok"]
    assert len(puts(head)) >= 2


def test_the_same_deploy_again_changes_nothing(start: Any, plane: ControlPlane) -> None:
    head = start()
    first = give(plane, "sv_1")
    again = give(plane, "sv_1", gate={"enabled": False, "hashes": []})
    assert again == first
    assert len(puts(head)) == 1
    assert gate(head)["enabled"] is False


def test_a_broken_dashboard_changes_nothing_but_the_message(start: Any, plane: ControlPlane) -> None:
    head = start()
    give(plane, "sv_1")
    plane.fact("serve", healthy=True)
    ask(head, "is-deaf")
    fact = plane.fact("serve", message="Ray's dashboard does not answer: this is the last known status")
    assert fact["data"]["healthy"] is True
    stop_asking(head, "is-deaf")
    plane.fact("serve", after=plane.facts.index(fact), healthy=True, message="")
