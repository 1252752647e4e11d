"""``heliostat cloud``."""

from __future__ import annotations

from typing import Annotated

import typer

from heliostat.cli import options
from heliostat.cli.output import Format, age, facts, show, table

app = typer.Typer(name="cloud", help="Places that machines come from.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(output: options.Output = Format.TEXT) -> None:
    """List clouds."""
    with options.connect() as client:
        found = list(client.clouds.list())
    show(
        found,
        lambda: table(
            ["ID", "NAME", "PROVIDER", "DEFAULT", "AGE"],
            [(c.id, c.name, c.provider, "yes" if c.is_default else "", age(c.created_at)) for c in found],
            empty="No clouds.",
        ),
    )


@app.command()
def get(ref: Annotated[str, typer.Argument(metavar="NAME|ID")], output: options.Output = Format.TEXT) -> None:
    """Show a cloud and what it can do."""
    with options.connect() as client:
        cloud = client.clouds.get(ref)
    can = cloud.capabilities
    show(
        cloud,
        lambda: facts(
            [
                ("Cloud", f"{cloud.name} ({cloud.id})"),
                ("Provider", cloud.provider),
                ("Default", "yes" if cloud.is_default else "no"),
                ("Markets", ", ".join(can.markets)),
                ("Zones", ", ".join(can.zones)),
                ("Instance types", ", ".join(can.instance_types or ["any"])),
                ("CPUs a node", f"at most {can.max_cpu_per_node:g}" if can.max_cpu_per_node else ""),
                ("GPUs a node", f"at most {can.max_gpu_per_node}"),
            ]
        ),
    )
