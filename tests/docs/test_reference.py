"""The generated reference is complete: no field, setting, error, command or metric without a meaning."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from heliostat import errors
from heliostat.cli.app import app
from runtime.settings import Settings
from tests.docs.pages import ROOT
from tools import reference

PAGES = reference.pages()
MODELS: dict[str, type[BaseModel]] = {
    name: value for name, value in vars(reference).items() if isinstance(value, type) and issubclass(value, BaseModel)
}


def test_each_field_has_a_meaning() -> None:
    MODELS.pop("BaseModel", None)
    missing = [f"{m}.{f}" for m, model in MODELS.items() for f in model.model_fields if not reference.meaning(model, f)]
    assert missing == []


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
