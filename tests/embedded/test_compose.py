"""No container engine is at hand where this is tested: the compose file is held against the compose
specification's schema (``compose_spec.json``, of the docker-compose 1.29.2 wheel, Apache-2.0) and against the code."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from runtime.messages.common import SEARCH_ATTRIBUTES
from runtime.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_follows_the_compose_specification() -> None:
    schema = json.loads(Path(__file__).with_name("compose_spec.json").read_text())
    # The specification has got a top-level name since that release.
    jsonschema.Draft7Validator(schema).validate({key: value for key, value in COMPOSE.items() if key != "name"})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({"services": {"api": {"imagee": "x"}}})


def test_two_apis_and_two_workers_on_postgresql() -> None:
    for name in ("api-1", "api-2", "worker-1", "worker-2"):
        environment = SERVICES[name]["environment"]
        assert environment["HELIOSTAT_DATABASE_URL"].startswith("postgresql+psycopg://"), name
        assert environment["HELIOSTAT_API_PROCESSES"] == "2", name
    upstreams = re.findall(r"server (\S+):8700", (ROOT / "deploy" / "gateway.conf").read_text())
    assert upstreams == ["api-1", "api-2"]
    assert SERVICES["worker-1"]["pid"] == SERVICES["worker-2"]["pid"]


def test_every_setting_exists() -> None:
    """A setting that was renamed would be ignored in silence."""
    for name, service in SERVICES.items():
        for variable in service.get("environment", {}):
            if variable.startswith("HELIOSTAT_"):
                assert variable.removeprefix("HELIOSTAT_").lower() in Settings.model_fields, (name, variable)


def test_names_that_are_used_exist() -> None:
    for name, service in SERVICES.items():
        for other in service.get("depends_on", {}):
            assert other in SERVICES, name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), name
            else:
                assert source in COMPOSE["volumes"], name
        command = service.get("command", [])
        if command[:2] == ["python", "-m"]:
            module = ROOT / command[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), command
        elif command[:1] == ["python"]:
            assert (ROOT / command[1]).exists(), command
        assert ":" in service["image"], f"{name} has no fixed tag"


def test_operators_doors_are_on_loopback_only() -> None:
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert published.pop("gateway") == ["8700:8700"]
    assert published.pop("bucket") == ["8701:8701"]
    assert published.pop("nodes") == ["8800-8899:8800-8899"], "what people ask services by"
    ports = SERVICES["worker-1"]["environment"]["HELIOSTAT_BALANCER_PORTS"]
    assert ports == SERVICES["worker-2"]["environment"]["HELIOSTAT_BALANCER_PORTS"] == "8800-8899"
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports), published


def test_the_namespace_gets_our_search_attributes() -> None:
    script = (ROOT / "deploy" / "temporal-namespace.sh").read_text()
    names = re.search(r"for name in (.+); do", script)
    assert names is not None
    assert sorted(names[1].split()) == sorted(key.name for key in SEARCH_ATTRIBUTES)


@pytest.mark.parametrize("script", sorted((ROOT / "deploy").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["/bin/sh", "-n", str(script)], check=True)


def test_the_image_holds_the_application_and_is_not_root() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    }
    assert all((ROOT / source).exists() for source in copied), copied
    roots = {"heliostat", "api", "workflows", "activities", "clouds", "agent", "store", "runtime", "installation.py"}
    roots |= {"server.py", "worker.py"}
    assert roots <= copied
    assert "USER heliostat" in lines
