"""``heliostat service``."""

from __future__ import annotations

from typing import Annotated

import typer

from heliostat.cli import live, options
from heliostat.cli.output import Format, age, next_steps, note, screen, show, table
from heliostat.cli.services import view as service_view
from heliostat.cli.services.deploy import deploy
from heliostat.cli.services.rollout import rollout, show_result
from heliostat.cli.services.shared import CommandWait, Ref, check_limit
from heliostat.errors import InvalidRequest

app = typer.Typer(
    name="service",
    help="Manage services (Ray Serve applications behind one URL).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
token = typer.Typer(
    name="token",
    help="Manage query tokens (requests to a service carry one).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command()(deploy)
app.add_typer(rollout)
app.add_typer(token)


@app.command()
def status(
    ref: Ref,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh every second until it is terminated. Ctrl-C does not stop it.")
    ] = False,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Show a service, its versions and their traffic."""
    if watch and not screen.text:
        raise InvalidRequest("--watch works with text output only.", remedy="Remove -o or --watch.")
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
    cloud: Annotated[str | None, typer.Option("--cloud", help="Only services in this cloud.")] = None,
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
    state: Annotated[str, typer.Option("-s", "--state", help="State to wait for.")] = "RUNNING",
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Wait until a service reaches a state. Exit 10 if it can no longer reach it."""
    from heliostat.models.services import ServiceState

    wanted = options.choice(state, ServiceState, "--state")
    with options.connect() as client:
        service = service_view.wait_for(client, client.services.get(ref, project=project), wanted, timeout_s)
    show(service, lambda: service_view.status(service))


@app.command()
def events(
    ref: Ref, limit: options.EventLimit = 200, project: options.Project = None, output: options.Output = Format.TEXT
) -> None:
    """Show a service's events: who did what, when and why."""
    with options.connect() as client:
        options.show_events(client.services.events(ref, project=project), limit)


@app.command()
def logs(
    ref: Ref,
    version: Annotated[str | None, typer.Option("--version", help="Only this version: its name or id.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow until the service is terminated.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Start with this many of the last lines.")] = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Print the logs of a service's replicas and nodes. They outlive its clusters."""
    if follow and not screen.text:
        raise InvalidRequest("-f works with text output only.", remedy="Remove -o or -f.")
    with options.connect() as client:
        service = client.services.get(ref, project=project)
        with live.detachable(f"service {service.name}", f"heliostat service logs -f {service.name}  follow it again"):
            live.print_streams(client.services.logs(service.id, version=version, follow=follow, tail=tail))


@app.command()
def rollback(
    ref: Ref,
    reason: options.Reason = "",
    wait: CommandWait = False,
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Roll back a service. Aborts the current rollout or, without one, returns to the previous version."""
    check_limit(wait, timeout_s)
    with options.connect() as client:
        before = client.services.get(ref, project=project) if wait else None
        service = client.services.rollback(ref, reason=reason, project=project)
        show_result(client, before, service, f"Service {service.name} is rolling back.", None, None, timeout_s)


@app.command()
def terminate(
    ref: Ref,
    reason: options.Reason = "",
    wait: options.Wait = False,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Terminate a service. Its open requests are answered, then its clusters are released."""
    from heliostat.models.services import ServiceState

    with options.connect() as client:
        service = client.services.terminate(ref, reason=reason, project=project)
        if wait and not service.state.settled:
            service = service_view.wait_for(client, service, ServiceState.TERMINATED, None)
    ended = f"is {service.state}" if service.state.settled else "is being terminated"
    steps = next_steps(
        (f"heliostat service wait -s {ServiceState.TERMINATED} {service.name}", "wait until it has ended")
    )
    if service.state.settled:
        steps = service_view.next_commands(service)
    show(service, lambda: f"Service {service.name} ({service.id}) {ended}.\n{steps}")


@app.command()
def delete(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Delete a terminated service with its name, tokens and versions."""
    with options.connect() as client:
        client.services.delete(ref, project=project)
    show({"deleted": ref}, lambda: f"Service {ref} is deleted.")


@token.command("add")
def add_token(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Create a second token and print it on stdout. The first one stays valid until you delete it."""
    with options.connect() as client:
        made = client.services.add_token(ref, project=project)
    note(
        f"Token {made.id} is created"
        + (":" if made.active else "; `heliostat service status` shows when every proxy accepts it:")
    )
    show(made, lambda: made.token)
    note(f"When every caller uses it, `heliostat service token delete {ref}` deletes the first one.")


@token.command("delete")
def delete_token(
    ref: Ref,
    token_id: Annotated[
        str | None, typer.Option("--id", help="Token id. Default: the primary one; the other one becomes primary.")
    ] = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Delete a token. Requests that carry it are refused."""
    with options.connect() as client:
        client.services.delete_token(ref, token_id, project=project)
    which = token_id or "primary"
    show({"deleted": which}, lambda: f"The token {which} of service {ref} is deleted.")
