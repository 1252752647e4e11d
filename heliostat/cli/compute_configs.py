"""``heliostat compute-config``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import options
from heliostat.cli.output import Format, age, facts, next_steps, show, table

if TYPE_CHECKING:
    from heliostat.models.compute_configs import ComputeConfigVersion, NodeConfig

app = typer.Typer(
    name="compute-config",
    help="Manage compute configs (versioned shapes of clusters).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Ref = Annotated[str, typer.Argument(metavar="NAME[:VERSION]|ID", help="A name alone selects the newest version.")]


@app.command()
def create(
    file: Annotated[Path, typer.Option("-f", "--config-file", help="YAML file with a ComputeConfig.")],
    name: options.Name = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Create a compute config, or the next version of an existing one."""
    from heliostat.client import yaml_files
    from heliostat.models.compute_configs import ComputeConfigCreate

    fields = yaml_files.load(file)
    config = yaml_files.compute_config(fields, fields.source)
    request = yaml_files.build(
        ComputeConfigCreate, {"config": config} | ({"name": name} if name else {}), yaml_files.COMMAND_LINE
    )
    with options.connect() as client:
        made = client.compute_configs.create(request, project=project)
    step = next_steps((f"heliostat cluster create --compute-config {_ref(made)}", "create a cluster with it"))
    show(made, lambda: f"Compute config {_ref(made)} is created: {made.id}\n{step}")


@app.command()
def get(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Show one version of a compute config."""
    with options.connect() as client:
        found = client.compute_configs.get(ref, project=project)
    show(found, lambda: _get(found))


@app.command("list")
def list_(
    name: options.Name = None,
    project: options.Project = None,
    archived: Annotated[bool, typer.Option("--archived", help="Include archived versions.")] = False,
    limit: options.Limit = 50,
    output: options.Output = Format.TEXT,
) -> None:
    """List compute configs."""
    with options.connect() as client:
        found = options.first(
            client.compute_configs.list(name=name, project=project, archived=archived), limit, "compute configs"
        )
    show(
        found,
        lambda: table(
            ["ID", "NAME", "VERSION", "CREATED", "BY", "ARCHIVED"],
            [
                (c.id, c.name, c.version, f"{age(c.created_at)} ago", c.created_by, "yes" if c.archived_at else "")
                for c in found
            ],
            empty="No compute configs. `heliostat compute-config create -n NAME -f FILE` creates one.",
        ),
    )


@app.command()
def archive(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Archive a compute config. New clusters can't use it, existing ones keep running."""
    with options.connect() as client:
        found = client.compute_configs.archive(ref, project=project)
    show(found, lambda: f"Compute config {_ref(found)} is archived.")


def _ref(version: ComputeConfigVersion) -> str:
    return f"{version.name}:{version.version}" if version.name else version.id


def _get(version: ComputeConfigVersion) -> str:
    config = version.config
    text = facts(
        [
            ("Compute config", f"{_ref(version)} ({version.id})"),
            ("Cloud", config.cloud or "the default cloud"),
            ("Head", _shape(config.head_node)),
            ("Retained", config.head_node.keeps),
            ("Zones", ", ".join(config.zones or [])),
            (
                "Idle",
                f"terminates after {config.idle_termination_minutes:g} min"
                if config.idle_termination_minutes
                else "never terminates",
            ),
            ("Uptime", f"at most {config.maximum_uptime_minutes:g} min" if config.maximum_uptime_minutes else ""),
            ("Created", f"{age(version.created_at)} ago by {version.created_by}"),
            ("Archived", f"{age(version.archived_at)} ago" if version.archived_at else ""),
        ]
    )
    if config.worker_nodes:
        rows = [(g.name, g.min_nodes, g.max_nodes, g.market_type, _shape(g)) for g in config.worker_nodes]
        text += "\n\n" + table(["WORKERS", "MIN", "MAX", "MARKET", "SHAPE"], rows, empty="")
    return text


def _shape(node: NodeConfig) -> str:
    if node.instance_type:
        return node.instance_type
    wanted = node.required_resources.model_dump(exclude_none=True) if node.required_resources else node.resources or {}
    types = [" or ".join(node.instance_types)] if node.instance_types else []
    amounts = [f"{k} {v:g}" for k, v in wanted.items() if v and not isinstance(v, str)]
    words = [str(v) for v in wanted.values() if isinstance(v, str)]  # accelerator, architecture
    return ", ".join([*types, *amounts, *words]) or "the cloud's default"
