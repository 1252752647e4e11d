"""The generated reference is complete: no field, setting, error, command or metric without a meaning."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from clouds.contract import errors as cloud_errors
from heliostat import errors
from heliostat.cli.app import app
from runtime.settings import Settings
from tests.docs.pages import ROOT
from tools import reference

PAGES = reference.pages()
MODELS: dict[str, type[BaseModel]] = {
    name: value for name, value in vars(reference).items() if isinstance(value, type) and issubclass(value, BaseModel)
}

ALONG = {"PhysicalResources.accelerator": {"GPU"}, "AwsConfig.balancer_subnets": {"balancer_security_groups"}}
"""Fields that go only together with others."""


def test_each_field_has_a_meaning() -> None:
    MODELS.pop("BaseModel", None)
    missing = [f"{m}.{f}" for m, model in MODELS.items() for f in model.model_fields if not reference.meaning(model, f)]
    assert missing == []


def test_each_field_has_an_example() -> None:
    models = [model for name, model in MODELS.items() if name not in ("BaseModel", "Settings", "Metric")]
    missing = {f"{m.__name__}.{f}" for m in models for f in m.model_fields if not reference.sample(m, f)}
    assert missing == {"AwsCloudCreate.config", "GcpCloudCreate.config"}, "which have tables of their own"


@pytest.mark.parametrize(("field", "text"), reference.EXAMPLES.items())
def test_an_example_is_accepted(field: str, text: str) -> None:
    owner, _, name = field.partition(".")
    of = [m for m in MODELS.values() if owner in {c.__name__ for c in m.__mro__} and name in m.model_fields]
    assert of, "of no field"
    for model in of:
        model.model_validate(samples(model, name, *ALONG.get(field, ())))


def samples(model: type[BaseModel], *names: str) -> dict[str, Any]:
    """The examples of these fields and of those that are required; a part that has a table of its own, by its own."""
    found = {}
    for name in {*names, *(name for name, info in model.model_fields.items() if info.is_required())}:
        part = model.model_fields[name].annotation
        if text := reference.sample(model, name):
            found[name] = yaml.safe_load(text.strip("`"))
        elif isinstance(part, type) and issubclass(part, BaseModel):
            found[name] = samples(part)
    return found


def test_each_described_field_exists() -> None:
    known = {
        f"{owner.__name__}.{f}"
        for m in MODELS.values()
        for owner in m.__mro__
        for f in vars(owner).get("__annotations__", {})
    }
    assert sorted(reference.MEANINGS.keys() - known) == []


def test_each_error_has_a_meaning() -> None:
    codes = {code for code, cls in errors.BY_CODE.items() if cls.__module__ == errors.__name__}
    assert codes == set(reference.ERRORS)
    page = PAGES["reference/errors.md"]
    assert all(f"| `{code}` |" in page for code in codes)


def test_each_error_of_a_cloud_has_a_meaning() -> None:
    found = {
        c.code for c in vars(cloud_errors).values() if isinstance(c, type) and c.__module__ == cloud_errors.__name__
    }
    assert found == set(reference.CLOUD_ERRORS)


def test_each_command_and_option_is_listed() -> None:
    page = PAGES["reference/commands.md"]

    def walk(command: Any, path: str) -> None:
        assert f"# {path}\n" in page or path == "heliostat", path
        for option in command.params:
            for flag in option.opts if option.param_type_name == "option" and option.name != "help" else ():
                assert flag in page, (path, flag)
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")

    walk(typer.main.get_command(app), "heliostat")


def test_each_setting_is_listed() -> None:
    page = PAGES["reference/settings.md"]
    for name in Settings.model_fields:
        assert f"`HELIOSTAT_{name.upper()}`" in page, name


def test_each_metric_that_the_documents_name_is_listed() -> None:
    page = PAGES["reference/metrics.md"]
    for file in sorted((ROOT / "docs").rglob("*.md")):
        for metric in re.findall(r"`(heliostat_[a-z_]+)(?:\{[^}]*\})?`", file.read_text()):
            assert f"`{metric}" in page, (file.name, metric)


@pytest.mark.parametrize("path", sorted(PAGES))
def test_tables_are_whole(path: str) -> None:
    """Each row has the cells of its head, so nothing in a cell was taken for a border."""
    width = 0
    for line in PAGES[path].splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not cells or not width or cells == width, line
        width = cells


def test_types_read_as_words() -> None:
    page = PAGES["reference/job-config.md"]
    assert "| `max_retries` | integer ≥ 0, ≤ 100 | `1` |" in page
    assert "| `timeout_s` | number > 0 | none | seconds |" in page
    assert "typing." not in "".join(PAGES.values())
    assert "<class" not in "".join(PAGES.values())
