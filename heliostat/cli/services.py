"""``heliostat service``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import live, options, service_request, service_view
from heliostat.cli.output import Format, age, next_steps, note, screen, show, table
from heliostat.errors import HeliostatError, InvalidRequest

if TYPE_CHECKING:
    from heliostat.client import Client
    from heliostat.models.services import Service, ServiceDeploy

app = typer.Typer(
    name="service", help="Ray Serve applications behind one URL.", no_args_is_help=True, rich_markup_mode=None
)
rollout = typer.Typer(
    name="rollout", help="Steer the rollout that is under way.", no_args_is_help=True, rich_markup_mode=None
)
token = typer.Typer(name="token", help="What requests to it carry.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rollout)
app.add_typer(token)

Ref = Annotated[str, typer.Argument(metavar="NAME|ID")]
OrderWait = Annotated[
    bool,
    typer.Option("-w", "--wait", help="Wait until it is so, without a time limit; exit 10 if it can't be any more."),
]


@app.command()
def deploy(
    import_path: Annotated[
        str | None, typer.Argument(metavar="[IMPORT_PATH]", help="module.sub:app; default: the file's applications.")
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[K=V...]", help="Arguments of the application's builder.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "-f",
            "--config-file",
            help="YAML in the shape of ServiceConfig; flags win over it. Several, one a version, with --versions.",
        ),
    ] = None,
    name: options.Name = None,
    version_name: Annotated[
        str | None, typer.Option("--version-name", help="Name of the new version; default: v and its number.")
    ] = None,
    working_dir: options.WorkingDir = None,
    exclude: options.Exclude = None,
    requirements: options.Requirements = None,
    env: options.Env = None,
    py_module: options.PyModule = None,
    compute_config: options.ComputeConfigOf = None,
    cloud: Annotated[str | None, typer.Option("--cloud", help="Where its clusters are made.")] = None,
    project: options.Project = None,
    cluster_replicas: Annotated[
        int | None, typer.Option("--cluster-replicas", help="Clusters of the version; 2 outlive the loss of a head.")
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Update the running version on its own clusters: Serve's config, counts or code only."
        ),
    ] = False,
    canary_percent: Annotated[
        int | None,
        typer.Option("--canary-percent", help="Pause at this share of the traffic until promoted or aborted."),
    ] = None,
    max_surge_percent: Annotated[
        int | None,
        typer.Option("--max-surge-percent", help="Capacity beyond the running version's while two run; default 100."),
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", help="Percent of the traffic step by step, e.g. 5,25,50,100.")
    ] = None,
    hold_s: Annotated[
        float | None, typer.Option("--hold-s", help="Seconds for which each step is held and watched; default 15.")
    ] = None,
    versions: Annotated[
        str | None,
        typer.Option(
            "--versions",
            metavar="JSON",
            help='Static weights: \'[{"name": "v1", "traffic_percent": 80}, …]\', which sum to 100.',
        ),
    ] = None,
    tag: options.Tags = None,
    wait: Annotated[
        bool,
        typer.Option(
            "-w", "--wait", help="Wait until the version has its traffic, without a time limit; exit 10 if it fails."
        ),
    ] = False,
    timeout_s: options.WaitLimit = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Deploy a service: a new version takes the traffic over step by step, no request fails."""
    _check_limit(wait, timeout_s)
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
        accepted = _accepted(service, request)
        if not wait:
            show(service, lambda: accepted + "\n" + service_view.next_commands(service))
            return
        note(accepted)
        last = _followed(service, lambda seen: service_view.follow_deploy(client, service, request, timeout_s, seen))
    show(last, lambda: service_view.status(last))


@app.command()
def status(
    ref: Ref,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every second, until it is terminated. Ctrl-C leaves it alone.")
    ] = False,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Show a service, its versions and their traffic."""
    if watch and not screen.text:
        raise InvalidRequest("A watched status is text.", remedy="Leave -o or --watch out.")
    with options.connect() as client:
        service = client.services.get(ref, project=project)
        if watch:
            service_view.watch(client, service)
            return
    show(service, lambda: service_view.status(service))


@app.command("list")
def list_(
    state: options.State = None,
    name: options.Name = None,
    project: options.Project = None,
    cloud: Annotated[str | None, typer.Option("--cloud", help="Only those in this cloud.")] = None,
    tag: options.Tags = None,
    limit: options.Limit = 50,
    output: options.Output = Format.TEXT,
) -> None:
    """List services, newest first."""
    from heliostat.models.services import ServiceState

    wanted = options.choices(state, ServiceState, "--state")
    with options.connect() as client:
        found = client.services.list(
            state=wanted, name=name, project=project, cloud=cloud, tags=options.pairs(tag, "--tag")
        )
        services = options.first(found, limit, "services")
    show(
        services,
        lambda: table(
            ["ID", "NAME", "STATE", "FOR", "ROLLOUT", "URL", "BY", "REASON"],
            [
                (
                    s.id, s.name, s.state, age(s.state_since),
                    s.rollout and f"{s.rollout.state} at {s.rollout.percent} %", s.query_url, s.created_by,
                    service_view.why_so(s),
                )
                for s in services
            ],
            empty="No services. `heliostat service deploy -n NAME --working-dir . module:app` deploys one.",
        ),
    )  # fmt: skip


@app.command()
def wait(
    ref: Ref,
    state: Annotated[str, typer.Option("-s", "--state", help="The state to wait for.")] = "RUNNING",
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Wait until a service is in a state; exit 10 as soon as it can't get there."""
    from heliostat.models.services import ServiceState

    wanted = options.choice(state, ServiceState, "--state")
    with options.connect() as client:
        service = service_view.wait_for(client, client.services.get(ref, project=project), wanted, timeout_s)
    show(service, lambda: service_view.status(service))


@app.command()
def events(
    ref: Ref, limit: options.EventLimit = 200, project: options.Project = None, output: options.Output = Format.TEXT
) -> None:
    """Show who did what to a service, when and why."""
    with options.connect() as client:
        options.show_events(client.services.events(ref, project=project), limit)


@app.command()
def logs(
    ref: Ref,
    version: Annotated[str | None, typer.Option("--version", help="One version only: its name or id.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the service is terminated.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Begin with the last so many lines.")] = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Print what a service's replicas and nodes have written; also after its clusters are gone."""
    if follow and not screen.text:
        raise InvalidRequest("A followed log is text.", remedy="Leave -o or -f out.")
    with options.connect() as client:
        service = client.services.get(ref, project=project)
        with live.detachable(f"service {service.name}", f"heliostat service logs -f {service.name}  follow it again"):
            live.print_streams(client.services.logs(service.id, version=version, follow=follow, tail=tail))


@app.command()
def rollback(
    ref: Ref,
    reason: options.Reason = "",
    wait: OrderWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Go back: give up the rollout under way or, when none is, bring back the version before."""
    _check_limit(wait, timeout_s)
    with options.connect() as client:
        before = client.services.get(ref, project=project) if wait else None
        service = client.services.rollback(ref, reason=reason, project=project)
        _ordered(client, before, service, f"Service {service.name} goes back.", None, None, timeout_s)


@app.command()
def terminate(
    ref: Ref,
    reason: options.Reason = "",
    wait: options.Wait = False,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """End a service at any moment: requests under way are answered, then its clusters are released."""
    from heliostat.models.services import ServiceState

    with options.connect() as client:
        service = client.services.terminate(ref, reason=reason, project=project)
        if wait and not service.state.settled:
            service = service_view.wait_for(client, service, ServiceState.TERMINATED, None)
    ended = f"is {service.state}" if service.state.settled else "is being terminated"
    steps = next_steps((f"heliostat service wait -s {ServiceState.TERMINATED} {service.name}", "wait for its end"))
    if service.state.settled:
        steps = service_view.next_commands(service)
    show(service, lambda: f"Service {service.name} ({service.id}) {ended}.\n{steps}")


@app.command()
def delete(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Forget a terminated service: its name, tokens and versions."""
    with options.connect() as client:
        client.services.delete(ref, project=project)
    show({"deleted": ref}, lambda: f"Service {ref} is deleted.")


@rollout.command()
def pause(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Stay at the present share until it is resumed, promoted or aborted."""
    _steer(ref, "pause", "stays where it is", project)


@rollout.command()
def resume(
    ref: Ref,
    wait: OrderWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Go on step by step after a pause."""
    _steer(ref, "resume", "goes on", project, wait=wait, timeout_s=timeout_s)


@rollout.command()
def promote(
    ref: Ref,
    percent: Annotated[
        int | None, typer.Option("--percent", help="Give the new version this share and stop there; default: all.")
    ] = None,
    wait: OrderWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Give the new version its traffic now, without further steps."""
    _steer(ref, "promote", f"goes to {percent or 100} %", project, percent, wait=wait, timeout_s=timeout_s)


@rollout.command()
def abort(
    ref: Ref,
    wait: OrderWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Give all the traffic back to the version that ran."""
    _steer(ref, "abort", "is given up, the traffic goes back", project, wait=wait, timeout_s=timeout_s)


@token.command("add")
def add_token(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Make a second token. It is printed alone on stdout; the first one stays valid until it is deleted."""
    with options.connect() as client:
        made = client.services.add_token(ref, project=project)
    note(
        f"Token {made.id} is made"
        + (":" if made.active else "; `heliostat service status` says when every proxy takes it:")
    )
    show(made, lambda: made.token)
    note(f"When every caller has it: `heliostat service token delete {ref}` ends the first one.")


@token.command("delete")
def delete_token(
    ref: Ref,
    token_id: Annotated[
        str | None, typer.Option("--id", help="Which; default: the primary one, the other takes its place.")
    ] = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Refuse requests with this token from now on."""
    with options.connect() as client:
        client.services.delete_token(ref, token_id, project=project)
    which = token_id or "primary"
    show({"deleted": which}, lambda: f"The token {which} of service {ref} is deleted.")


def _steer(
    ref: str,
    action: str,
    done: str,
    project: str | None,
    percent: int | None = None,
    *,
    wait: bool = False,
    timeout_s: float | None = None,
) -> None:
    if percent is not None and not 1 <= percent <= 100:
        raise InvalidRequest(f"--percent {percent} is no share.", remedy="Give 1 to 100.", field="percent")
    _check_limit(wait, timeout_s)
    with options.connect() as client:
        before = client.services.get(ref, project=project) if wait else None
        service = client.services.rollout(ref, action, percent=percent, project=project)
        text = f"The rollout of service {service.name} {done}."
        _ordered(client, before, service, text, action, percent, timeout_s)


def _ordered(
    client: Client,
    before: Service | None,
    service: Service,
    text: str,
    action: str | None,
    percent: int | None,
    timeout_s: float | None,
) -> None:
    """Shows what was accepted or, where it is waited for, what came of it. ``before``: the service before the order, to
    wait; None: don't."""
    if before is None:
        show(service, lambda: text + "\n" + service_view.next_commands(service))
        return
    note(text)
    last = _followed(service, lambda seen: service_view.follow_order(client, before, action, percent, timeout_s, seen))
    show(last, lambda: service_view.status(last))


def _followed(service: Service, follow: Callable[[Callable[[Service], None]], Service]) -> Service:
    """A failure is shown as a document too: the service as it was seen last."""
    last = service

    def seen(now: Service) -> None:
        nonlocal last
        last = now

    try:
        return follow(seen)
    except HeliostatError:
        if not screen.text:
            show(last, str)
        raise


def _check_limit(wait: bool, timeout_s: float | None) -> None:
    if timeout_s is not None and not wait:
        raise InvalidRequest(
            "--timeout-s limits a wait.", remedy="Give --wait too, or leave it out.", field="timeout_s"
        )


def _has_code(request: ServiceDeploy) -> bool:
    from heliostat.calls.uploads import service_places

    configs = [request.config] if request.config is not None else request.configs
    return any(service_places(config) for config in configs)


def _accepted(service: Service, request: ServiceDeploy) -> str:
    from heliostat.calls.rollouts import Target

    target = Target.of(service, request)
    if target.version_id is None:
        return f"Service {service.name} ({service.id}): accepted are {target.in_words}."
    name = next(v.name for v in service.versions if v.id == target.version_id)
    under_way = service.rollout.version_id if service.rollout is not None else None
    other = next((v.name for v in service.versions if v.id == under_way and v.id != target.version_id), None)
    return f"Service {service.name} ({service.id}): version {name} is accepted." + (
        f" It supersedes the rollout to {other}." if other else ""
    )
