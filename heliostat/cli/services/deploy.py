"""``heliostat service deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import live, options
from heliostat.cli.output import Format, note, show
from heliostat.cli.services import request as service_request
from heliostat.cli.services import view as service_view

if TYPE_CHECKING:
    from heliostat.models.services import ServiceDeploy
from heliostat.cli.services.rollout import followed
from heliostat.cli.services.shared import accepted, check_limit


def deploy(
    import_path: Annotated[
        str | None, typer.Argument(metavar="[IMPORT_PATH]", help="module.sub:app. Default: the file's applications.")
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[K=V...]", help="Arguments of the application builder.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "-f",
            "--config-file",
            help="YAML file with a ServiceConfig; flags override its fields. With --versions: one per version.",
        ),
    ] = None,
    name: options.Name = None,
    version_name: Annotated[
        str | None, typer.Option("--version-name", help="Name of the new version. Default: v and its number.")
    ] = None,
    working_dir: options.WorkingDir = None,
    exclude: options.Exclude = None,
    requirements: options.Requirements = None,
    env: options.Env = None,
    py_module: options.PyModule = None,
    compute_config: options.ComputeConfigOf = None,
    cloud: Annotated[str | None, typer.Option("--cloud", help="Cloud of its clusters.")] = None,
    project: options.Project = None,
    cluster_replicas: Annotated[
        int | None, typer.Option("--cluster-replicas", help="Clusters per version; 2 survive the loss of a head.")
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Update the running version on its own clusters: Serve's config, replicas or code only."
        ),
    ] = False,
    canary_percent: Annotated[
        int | None,
        typer.Option("--canary-percent", help="Pause at this percentage of traffic until you promote or abort."),
    ] = None,
    max_surge_percent: Annotated[
        int | None,
        typer.Option("--max-surge-percent", help="Extra capacity while two versions run, in percent. Default: 100."),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", help="Percent of traffic for the new version, step by step, e.g. 5,25,50,100."),
    ] = None,
    hold_s: Annotated[
        float | None, typer.Option("--hold-s", help="Seconds to hold and observe each step. Default: 15.")
    ] = None,
    versions: Annotated[
        str | None,
        typer.Option(
            "--versions",
            metavar="JSON",
            help='Static weights that sum to 100: \'[{"name": "v1", "traffic_percent": 80}, …]\'',
        ),
    ] = None,
    tag: options.Tags = None,
    wait: Annotated[
        bool,
        typer.Option(
            "-w", "--wait", help="Wait until the version has its traffic; exit 10 if it fails. No time limit."
        ),
    ] = False,
    timeout_s: options.WaitLimit = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Deploy a service. The new version takes over the traffic step by step; no request fails."""
    check_limit(wait, timeout_s)
    flags = {
        "name": name,
        "version_name": version_name,
        "working_dir": working_dir,
        "requirements": requirements,
        "py_modules": py_module or None,
        "compute_config": options.compute_config(compute_config),
        "cloud": cloud,
        "project": project,
        "cluster_replicas": cluster_replicas,
        "tags": options.pairs(tag, "--tag") or None,
    }
    how = {"canary_percent": canary_percent, "max_surge_percent": max_surge_percent, "in_place": in_place or None}
    request = service_request.build(
        file or [],
        replacing={key: value for key, value in flags.items() if value is not None},
        adding=service_request.Added(
            application=service_request.application(import_path, arguments or []),
            excludes=exclude or [],
            env_vars=options.env_vars(env or []),
            rollout=service_request.rollout(steps, hold_s),
        ),
        how={key: value for key, value in how.items() if value is not None},
        versions=versions,
    )
    with options.connect() as client:
        with live.status_line() as line:
            if _has_code(request):
                line.update("Packing and uploading the code", None)
            service = client.services.deploy(request)
        answer = accepted(service, request)
        if not wait:
            show(service, lambda: answer + "\n" + service_view.next_commands(service))
            return
        note(answer)
        last = followed(service, lambda seen: service_view.follow_deploy(client, service, request, timeout_s, seen))
    show(last, lambda: service_view.status(last))


def _has_code(request: ServiceDeploy) -> bool:
    from heliostat.client.resources.uploads import service_places

    configs = [request.config] if request.config is not None else request.configs
    return any(service_places(config) for config in configs)
