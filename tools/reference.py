"""The reference pages of the documentation, made from what they describe: models, command line, settings, errors,
metrics. ``tools/site.py`` puts them into the site.

    python -m tools.reference [DIR]     # the pages as Markdown, to read them without a site
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import annotated_types
import typer.main
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel
from pydantic.fields import FieldInfo

# What is described. Where a module moves, this is the only place to change; METRICS names modules by text, for what
# counts is that they register their metrics.
from heliostat import errors
from heliostat.cli.app import EXIT_CODES
from heliostat.cli.app import app as command_line
from heliostat.models.clouds import AwsCloudCreate, AwsConfig, AwsSubnet, GcpCloudCreate, GcpConfig
from heliostat.models.compute_configs import (
    ComputeConfig,
    HeadNodeConfig,
    PhysicalResources,
    RetainedVolume,
    WorkerNodeGroupConfig,
)
from heliostat.models.jobs import JobConfig
from heliostat.models.schedules import ScheduleConfig
from heliostat.models.services import ApplicationConfig, ProbeConfig, RolloutConfig, ServiceConfig
from runtime.settings import Settings
from tools.reference_texts import CLOUD_ERRORS, ERRORS, EXAMPLES, MEANINGS, UNIT, UNITS

METRICS = ["runtime.telemetry", "api.agents.serve_metrics | api.services.metrics"]
"""Modules that register metrics; of several names, the first that exists."""

API_METRICS = ("api_", "commands_", "reports", "service_")
"""What the API counts; the worker counts the rest."""

ROOT = Path(__file__).resolve().parents[1]
GENERATED = "<!-- Made by tools/reference.py: change what it describes, not this page. -->\n\n"


def pages() -> dict[str, str]:
    """Path below ``docs/`` → Markdown."""
    made = {
        "job-config": job_config,
        "service-config": service_config,
        "compute-config": compute_config,
        "schedule-config": schedule_config,
        "cloud-config": cloud_config,
        "commands": commands,
        "settings": settings,
        "errors": error_codes,
        "metrics": metrics,
    }
    return {f"reference/{name}.md": GENERATED + make() for name, make in made.items()}


# ── models ───────────────────────────────────────────────────────────────────────────────────────────


def job_config() -> str:
    return _config_page(
        "Job config",
        "The file of `heliostat job submit -f`, and `JobConfig` of the Python client. "
        "A flag of the command line wins over the file.",
        [JobConfig],
        "examples/data_batch/job.yaml",
    )


def service_config() -> str:
    return _config_page(
        "Service config",
        "The file of `heliostat service deploy -f`, and `ServiceConfig` of the Python client. "
        "See [deploy a service](../how-to/services.md) and [roll out a version](../how-to/rollouts.md).",
        [ServiceConfig, ApplicationConfig, ProbeConfig, RolloutConfig],
        "examples/serve_model/service.yaml",
    )


def compute_config() -> str:
    return _config_page(
        "Compute config",
        "The shape of a cluster: the file of `heliostat cluster create -f` and `heliostat compute-config create -f`, "
        "and the field `compute_config` of jobs and services. See [choose machines](../how-to/machines.md).",
        [ComputeConfig, HeadNodeConfig, WorkerNodeGroupConfig, PhysicalResources, RetainedVolume],
        "examples/compute_config/spot-workers.yaml",
    )


def schedule_config() -> str:
    return _config_page(
        "Schedule config",
        "The file of `heliostat schedule apply -f`, and `ScheduleConfig` of the Python client. "
        "See [run jobs on a schedule](../how-to/schedules.md).",
        [ScheduleConfig],
        "examples/schedule/schedule.yaml",
    )


def cloud_config() -> str:
    return _config_page(
        "Cloud config",
        "The file of `heliostat cloud register -f`. The template that `heliostat cloud setup` writes prints this file. "
        "It holds names, never a credential. See [AWS](../how-to/aws.md) and [Google Cloud](../how-to/gcp.md).",
        [AwsCloudCreate, AwsConfig, AwsSubnet, GcpCloudCreate, GcpConfig],
        None,
    )


def _config_page(title: str, about: str, models: list[type[BaseModel]], example: str | None) -> str:
    parts = [f"# {title}", about]
    for model in models:
        if len(models) > 1:
            parts.append(f"## {model.__name__}")
        rows = [[*row, sample(model, row[0].strip("`"))] for row in _rows(model, models)]
        parts.append(_table(["field", "type", "default", "unit", "meaning", "example"], rows))
    if example is not None:
        parts += ["## Example", f"`{example}`:", f"```yaml\n{(ROOT / example).read_text().strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _rows(model: type[BaseModel], models: Sequence[type[BaseModel]]) -> Iterator[list[str]]:
    for name, field in model.model_fields.items():
        required = field.is_required()
        default = "**required**" if required else _default(field.get_default(call_default_factory=True))
        yield [f"`{name}`", _type(field, models), default, unit(name), meaning(model, name)]


def meaning(model: type[BaseModel], name: str) -> str:
    """What the field is for: by its docstring, else by :data:`MEANINGS`; "" if neither says it."""
    for owner in model.__mro__:
        if issubclass(owner, BaseModel) and name in vars(owner).get("__annotations__", {}):
            text = owner.model_fields[name].description or _docstrings(owner).get(name)
            return plain(text) if text else MEANINGS.get(f"{owner.__name__}.{name}", "")
    return ""


def sample(model: type[BaseModel], name: str) -> str:
    """A value as a YAML file has it; "" where the type's own page or table shows one."""
    for owner in model.__mro__:
        if (value := EXAMPLES.get(f"{owner.__name__}.{name}")) is not None:
            return f"`{value}`"
    return ""


def unit(name: str) -> str:
    return UNIT.get(name) or next((said for suffix, said in UNITS if name.endswith(suffix)), "")


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Field → the string below it, of models that don't keep it themselves."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    found = {}
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    for line, after in itertools.pairwise(body):
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[line.target.id] = inspect.cleandoc(after.value.value)
    return found


def plain(text: str) -> str:
    """reST of a docstring as Markdown, on one line."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", " ".join(text.split()))
    return re.sub(r"\bNone\b(?=:| =)", "`null`", text.replace("``", "`"))


WORDS: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "boolean", Path: "path", Any: "any"}


def _type(field: FieldInfo, models: Sequence[type[BaseModel]]) -> str:
    said = _named(field.annotation, models)
    low = high = pattern = None
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Ge | annotated_types.Gt):
            low = f"{'> ' if isinstance(rule, annotated_types.Gt) else '≥ '}{_number(vars_of(rule)[0])}"
        elif isinstance(rule, annotated_types.Le | annotated_types.Lt):
            high = f"{'< ' if isinstance(rule, annotated_types.Lt) else '≤ '}{_number(vars_of(rule)[0])}"
        pattern = getattr(rule, "pattern", None) or pattern
    bounds = ", ".join(bound for bound in (low, high) if bound)
    return f"{said} {bounds}" if bounds else said


def vars_of(rule: Any) -> list[Any]:
    return [getattr(rule, name) for name in ("ge", "gt", "le", "lt") if hasattr(rule, name)]


def _number(value: Any) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _named(kind: Any, models: Sequence[type[BaseModel]]) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _named(arguments[0], models)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(part, models) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {_named(arguments[0], models)}"
    if origin is dict:
        return f"mapping of {_named(arguments[0], models)} to {_named(arguments[1], models)}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " or ".join(f"`{value.value}`" for value in kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if kind in models and len(models) > 1:
            return f"[{kind.__name__}](#{kind.__name__.lower()})"
        return f"[{kind.__name__}]({ELSEWHERE[kind]})" if kind in ELSEWHERE else kind.__name__
    return WORDS.get(kind, str(kind))


ELSEWHERE: dict[type[BaseModel], str] = {
    JobConfig: "job-config.md",
    ComputeConfig: "compute-config.md",
}


def _default(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, BaseModel):
        return "its defaults"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return f"`{value.value}`"
    if isinstance(value, Path):
        return f"`{str(value).replace(str(Path.home()), '~')}`"
    if isinstance(value, list):
        return f"`{', '.join(str(part) for part in value)}`"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"`{value}`"


# ── command line ─────────────────────────────────────────────────────────────────────────────────────


def commands() -> str:
    root: Any = typer.main.get_command(command_line)
    top = root.context_class(root, info_name="heliostat")
    parts = ["# Commands", plain(root.help or ""), EXIT_CODES]
    parts += ["Options before the command hold for each command:", _options(root, top)]
    for noun, group in root.commands.items():
        parts += _command(group, top, noun, 2)
    parts.append("[How the command line behaves](../cli.md): where it finds the API, output, exit codes.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _command(command: Any, parent: Any, name: str, level: int) -> Iterator[str]:
    context = command.context_class(command, info_name=name, parent=parent)
    yield f"{'#' * level} {context.command_path}"
    yield _sentence(plain(command.help or ""))
    if hasattr(command, "commands"):
        for verb, part in command.commands.items():
            yield from _command(part, context, verb, level + 1)
        return
    pieces = " ".join(piece for piece in command.collect_usage_pieces(context) if piece)
    pieces = re.sub(r"\[\[([^\[\]]*\.\.\.)\]\]\.\.\.", r"[\1]", pieces)  # a metavar that has its brackets already
    yield f"```text\n{context.command_path} {pieces}\n```"
    yield _options(command, context)


def _options(command: Any, context: Any) -> str:
    rows = []
    for parameter in command.params:
        record = None if parameter.name == "help" else parameter.get_help_record(context)
        if record is not None and not getattr(parameter, "hidden", False):
            rows.append([f"`{record[0].replace('|', chr(92) + '|')}`", _escaped(record[1])])
    return _table(["argument or option", ""], rows) if rows else ""


def _sentence(text: str) -> str:
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


# ── settings, errors, metrics ────────────────────────────────────────────────────────────────────────


def settings() -> str:
    rows = [
        [f"`HELIOSTAT_{row[0].strip('`').upper()}`", *row[1:]]
        for row in _rows(Settings, [Settings])
    ]  # fmt: skip
    return (
        "# Settings\n\n"
        "Environment variables of the API and the worker, read once when the process starts. "
        "[Operations](../operations.md#settings) explains the ones that most installations set.\n\n"
        f"{_table(['variable', 'type', 'default', 'unit', 'meaning'], rows)}\n\n"
        "Temporal's address, TLS and API key are settings of Temporal: `TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE`, "
        "`TEMPORAL_API_KEY`, `TEMPORAL_TLS_*`, or a profile in `temporal.toml`.\n\n"
        "The client reads `HELIOSTAT_HOST`, `HELIOSTAT_TOKEN` and `HELIOSTAT_HOME`. "
        "See [where it finds the API](../cli.md#where-it-finds-the-api).\n"
    )


def error_codes() -> str:
    rows = [
        [f"`{code}`", f"`{cls.__name__}`", str(cls.status), str(cls.exit_code), ERRORS.get(code, "")]
        for code, cls in _family(errors.HeliostatError)
    ]
    return (
        "# Errors\n\n"
        "The API answers an error as problem+json (RFC 9457) with `code`, `detail`, `remedy` and, where they apply, "
        "`resource`, `field` and `details`. The Python client raises the class of that code from `heliostat.errors`. "
        "The command line prints `detail` and `remedy` and ends with the exit code.\n\n"
        f"{_table(['code', 'class', 'HTTP status', 'exit code', 'meaning'], rows)}\n\n"
        "## Errors of clouds\n\n"
        "These codes name what a cloud answered. Events and `heliostat_launches_total{outcome}` show them.\n\n"
        f"{_table(['code', 'meaning'], ([f'`{code}`', text] for code, text in CLOUD_ERRORS.items()))}\n"
    )


def _family(cls: type[errors.HeliostatError]) -> Iterator[tuple[str, type[errors.HeliostatError]]]:
    """Depth first, those of ``heliostat.errors`` alone."""
    if cls.__module__ == errors.__name__:
        yield cls.code, cls
        for sub in cls.__subclasses__():
            yield from _family(sub)


def metrics() -> str:
    rows = []
    known: set[str] = set()
    for names in METRICS:
        _first_module(names)
        for family, labels in _families():
            if family.name.startswith("heliostat_") and family.name not in known:
                known.add(family.name)
                shown = family.name + ("_total" if family.type == "counter" else "")
                process = "API" if family.name.removeprefix("heliostat_").startswith(API_METRICS) else "worker"
                braces = "{" + ",".join(labels) + "}" if labels else ""
                rows.append([f"`{shown}{braces}`", family.type, process, _sentence(_escaped(family.documentation))])
    return (
        "# Metrics\n\n"
        "Prometheus metrics. `metrics_urls` in `stack.json` holds the addresses of the embedded stack. "
        "[Operations](../operations.md#what-to-watch) says which ones to watch.\n\n"
        f"{_table(['metric', 'type', 'process', 'meaning'], sorted(rows))}\n\n"
        "The worker also serves the metrics of the Temporal SDK, `temporal_*`, on a second port.\n"
    )


def _first_module(names: str) -> None:
    for name in names.split(" | "):
        try:
            importlib.import_module(name)
            return
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise ModuleNotFoundError(f"METRICS of tools/reference.py: there is none of {names}")


def _families() -> Iterator[tuple[Metric, Sequence[str]]]:
    """What is registered, with the names of its labels, which a family without a sample does not tell."""
    seen = set()
    for collector in list(REGISTRY._names_to_collectors.values()):
        if id(collector) in seen:
            continue
        seen.add(id(collector))
        describe: Callable[[], Any] = getattr(collector, "describe", None) or collector.collect
        for family in describe():
            labels: Any = getattr(collector, "_labelnames", None) or getattr(family, "_labelnames", ())
            yield family, labels


# ── Markdown ─────────────────────────────────────────────────────────────────────────────────────────


def _escaped(text: str) -> str:
    """For a cell of a table, where ``<x>`` would be HTML."""
    return re.sub(r"<([^<>]*)>", r"&lt;\1&gt;", text)


def _table(head: list[str], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        lines.append("| " + " | ".join(_cell(cell) for cell in row) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\|", " ".join(text.split()))


def main(arguments: list[str]) -> int:
    target = Path(arguments[0]) if arguments else Path("site/markdown")
    for name, text in pages().items():
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
