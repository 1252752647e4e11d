"""``heliostat cloud``."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli import live, options
from heliostat.cli.output import Format, age, coloured, duration, facts, next_steps, note, screen, show, table, write
from heliostat.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from heliostat.client.client import Client
    from heliostat.models.clouds import Check, Cloud, Verification

app = typer.Typer(name="cloud", help="Manage clouds (where clusters run).", no_args_is_help=True, rich_markup_mode=None)

Ref = Annotated[str, typer.Argument(metavar="NAME|ID")]

FAILED = InvalidRequest.exit_code
LAUNCH_IDLE_MINUTES, LAUNCH_UPTIME_MINUTES = 5.0, 60.0
"""Of the cluster of ``verify --launch``: it terminates by itself if this process dies."""

_SIGNS = {"ok": ("✓", "green"), "failed": ("✗", "red"), "warning": ("!", "yellow"), "skipped": ("–", None)}


@app.command()
def setup(
    provider: Annotated[str, typer.Option("--provider", help="Cloud provider: aws or gcp.")],
    region: Annotated[str, typer.Option("--region", help="Region, e.g. us-west-2 or us-central1.")],
    name: Annotated[str, typer.Option("-n", "--name", help="Name of the cloud.")],
    project: Annotated[str | None, typer.Option("--project", help="Google Cloud project id (gcp only).")] = None,
    directory: Annotated[
        Path, typer.Option("-d", "--dir", help="Directory to write to. Default: the current one.")
    ] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    output: options.Output = Format.TEXT,
) -> None:
    """Write a template of what a cloud needs in its account. Review it, apply it, then register the cloud."""
    from heliostat.client import yaml_files
    from heliostat.models.clouds import CloudSetup

    fields = {"provider": provider, "region": region, "name": name, "project": project}
    request = yaml_files.build(CloudSetup, {k: v for k, v in fields.items() if v is not None}, yaml_files.COMMAND_LINE)
    with options.connect() as client:
        made = client.clouds.setup(request)
    written = [directory / Path(file).name for file in made.files]
    for path in written:
        if path.exists() and not force:
            raise InvalidRequest(
                f"{path} already exists.", remedy="Choose another --dir, or overwrite it with --force."
            )
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in zip(written, made.files.values(), strict=True):
        path.write_text(text)
    show(
        {"files": [str(path) for path in written], "next_step": made.next_step},
        lambda: "Written: " + ", ".join(map(str, written)) + "\n\n" + made.next_step,
    )


@app.command()
def register(
    file: Annotated[Path, typer.Option("-f", "--config-file", help="YAML file with name, provider and config.")],
    name: options.Name = None,
    default: Annotated[bool, typer.Option("--default", help="Make it the default cloud.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check what the cloud needs; exit 1 if a check fails.")
    ] = True,
    output: options.Output = Format.TEXT,
) -> None:
    """Register a cloud. Its file holds names only, no credentials."""
    from heliostat.client import yaml_files

    given = {k: v for k, v in {"name": name, "is_default": default or None}.items() if v is not None}
    fields = yaml_files.load(file)
    request = yaml_files.cloud(fields | given, fields.source.replaced(given))
    with options.connect() as client:
        cloud = client.clouds.register(request)
        note(f"Cloud {cloud.name} is registered: {cloud.id}")
        found = client.clouds.verify(cloud.id) if verify else None
    _show_verified(cloud, found)


@app.command()
def update(
    ref: Ref,
    file: Annotated[Path, typer.Option("-f", "--config-file", help="YAML file as registered, with the changes.")],
    default: Annotated[bool, typer.Option("--default", help="Make it the default cloud.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check what the cloud needs; exit 1 if a check fails.")
    ] = True,
    output: options.Output = Format.TEXT,
) -> None:
    """Replace a cloud's config, for example to change an image. Fields that the file leaves out get their
    defaults. Name and provider can't change; region, account, network and bucket only while nothing uses the cloud."""
    from heliostat.client import yaml_files

    with options.connect() as client:
        before = client.clouds.get(ref)
        document = yaml_files.load(file)
        fields = {"name": before.name, "provider": before.provider.value} | document
        request = yaml_files.cloud(fields | ({"is_default": True} if default else {}), document.source)
        cloud = client.clouds.update(before.id, request)
        changed = _changed(before, cloud)
        note(f"Cloud {cloud.name} ({cloud.id}): " + (f"changed {', '.join(changed)}." if changed else "unchanged."))
        found = client.clouds.verify(cloud.id) if verify else None
    _show_verified(cloud, found, changed=changed)


def _show_verified(cloud: Cloud, found: Verification | None, **more: list[str]) -> None:
    """Exits with 1 when the verification failed."""
    show(
        {"cloud": cloud.model_dump(mode="json"), **more, "verification": found and found.model_dump(mode="json")},
        lambda: (_checklist(found.checks) + "\n" if found else "") + _next(cloud, found),
    )
    if found is not None and not found.ok:
        raise typer.Exit(FAILED)


def _changed(before: Cloud, after: Cloud) -> list[str]:
    """Fields of the config."""
    old, new = (c.config.model_dump() if c.config is not None else {} for c in (before, after))
    return [f"config.{name}" for name in new if new[name] != old.get(name)]


@app.command()
def verify(
    ref: Ref,
    launch: Annotated[bool, typer.Option("--launch", help="Also start a small cluster and terminate it.")] = False,
    timeout: options.WaitLimit = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Check permissions, network rules and bucket of a cloud. Exit 1 if a check fails."""
    with options.connect() as client:
        cloud = client.clouds.get(ref)
        found = client.clouds.verify(cloud.id)
        if screen.text:
            write(_checklist(found.checks) + "\n")
        result = found.model_dump(mode="json")
        if launch and found.ok:
            result["launch"] = _launch(client, cloud, timeout)
    if not screen.text:
        show(result, str)
    if not found.ok:
        note("Not launched: a check has failed." if launch else "A check has failed.")
        raise typer.Exit(FAILED)


@app.command("list")
def list_(output: options.Output = Format.TEXT) -> None:
    """List clouds."""
    with options.connect() as client:
        found = list(client.clouds.list())
    show(
        found,
        lambda: table(
            ["ID", "NAME", "PROVIDER", "REGION", "DEFAULT", "AGE"],
            [
                (
                    c.id,
                    c.name,
                    c.provider,
                    c.config and c.config.region,
                    "yes" if c.is_default else "",
                    age(c.created_at),
                )
                for c in found
            ],
            empty="No clouds.",
        ),
    )


@app.command()
def get(ref: Ref, output: options.Output = Format.TEXT) -> None:
    """Show a cloud, its capabilities and its config."""
    with options.connect() as client:
        cloud = client.clouds.get(ref)
    show(cloud, lambda: _get(cloud))


@app.command("set-default")
def set_default(ref: Ref, output: options.Output = Format.TEXT) -> None:
    """Make a cloud the default. Requests that name no cloud use it."""
    with options.connect() as client:
        cloud = client.clouds.set_default(ref)
    show(cloud, lambda: f"Cloud {cloud.name} ({cloud.id}) is the default.")


@app.command()
def delete(
    ref: Ref,
    force: Annotated[
        bool,
        typer.Option("--force", help="Do not check for resources left there, e.g. because its role no longer exists."),
    ] = False,
    output: options.Output = Format.TEXT,
) -> None:
    """Delete a cloud that nothing uses. Its account and its bucket do not change."""
    with options.connect() as client:
        cloud = client.clouds.get(ref)
        client.clouds.delete(cloud.id, force=force)
    show(cloud, lambda: f"Cloud {cloud.name} ({cloud.id}) is deleted.")


def _launch(client: Client, cloud: Cloud, timeout: float | None) -> dict[str, Any]:
    """Starts a cluster and waits for its head. Terminates it in any case, also after Ctrl-C."""
    from heliostat.models.clusters import ClusterCreate, ClusterState
    from heliostat.models.compute_configs import ComputeConfig

    name = f"verify-{secrets.token_hex(4)}"  # known before the request, so that it can be terminated in any case
    config = ComputeConfig(idle_termination_minutes=LAUNCH_IDLE_MINUTES, maximum_uptime_minutes=LAUNCH_UPTIME_MINUTES)
    began = time.monotonic()
    try:
        cluster = client.clusters.create(ClusterCreate(name=name, cloud=cloud.id, compute_config=config))
        with live.status_line() as line:
            client.clusters.wait(
                cluster.id,
                state=ClusterState.RUNNING,
                timeout=timeout,
                on_change=lambda c: line.update(live.cluster_line(c), c.state_since),
            )
        took = time.monotonic() - began
        if screen.text:
            write(_line("ok", "launch", f"a cluster was ready after {duration(took)}") + "\n")
    finally:
        _end(client, name)
    client.clusters.wait(cluster.id, state=ClusterState.TERMINATED, timeout=timeout)
    note(f"Cluster {name} is terminated.")
    return {"cluster_id": cluster.id, "seconds": round(took, 1)}


def _end(client: Client, name: str) -> None:
    try:
        client.clusters.terminate(name, reason="cloud verify --launch")
    except NotFound:
        return  # it was not accepted
    note(f"Cluster {name} is being terminated.")


def _checklist(checks: list[Check]) -> str:
    """A line for each check; what to do about it below."""
    width = max((len(c.name) for c in checks), default=0)
    lines = []
    for check in checks:
        lines.append(_line(check.state, check.name.ljust(width), check.detail))
        lines += [f"    {line}" for line in check.remedy.splitlines()]
    return "\n".join(lines)


def _line(state: str, name: str, detail: str) -> str:
    sign, colour = _SIGNS.get(state, ("?", None))
    if colour and coloured(sys.stdout):
        sign = typer.style(sign, fg=colour)
    return f"{sign} {name}  {detail}".rstrip()


def _get(cloud: Cloud) -> str:
    can = cloud.capabilities
    text = facts(
        [
            ("Cloud", f"{cloud.name} ({cloud.id})"),
            ("Provider", cloud.provider),
            ("Default", "yes" if cloud.is_default else "no"),
            ("Markets", ", ".join(can.markets)),
            ("Zones", ", ".join(can.zones)),
            ("Instance types", ", ".join(can.instance_types or ["any"])),
            ("CPUs per node", f"at most {can.max_cpu_per_node:g}" if can.max_cpu_per_node else ""),
            ("GPUs per node", f"at most {can.max_gpu_per_node}"),
        ]
    )
    if cloud.config is None:
        return text
    import yaml

    config = cloud.config.model_dump(mode="json", exclude_none=True)
    lines = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).splitlines()
    return text + "\n\nConfig\n" + "\n".join(f"  {line}" for line in lines)


def _next(cloud: Cloud, found: Verification | None) -> str:
    if found is not None and not found.ok:
        return next_steps((f"heliostat cloud verify {cloud.name}", "check again after you fix this"))
    return next_steps(
        (f"heliostat cloud verify {cloud.name} --launch", "start a small cluster there"),
        (f"heliostat cloud set-default {cloud.name}", "make it the default"),
        (f"heliostat job submit --cloud {cloud.name} -- …", "run a job there"),
    )
