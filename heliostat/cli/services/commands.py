"""``heliostat service``."""

from __future__ import annotations

from typing import Annotated

import typer

from heliostat.cli import live, options
from heliostat.cli.output import Format, age, next_steps, note, screen, show, table
from heliostat.cli.services import view as service_view
from heliostat.cli.services.deploy import deploy
from heliostat.cli.services.rollout import ordered, rollout
from heliostat.cli.services.shared import OrderWait, Ref, check_limit
from heliostat.errors import InvalidRequest

app = typer.Typer(
    name="service", help="Ray Serve applications behind one URL.", no_args_is_help=True, rich_markup_mode=None
)
token = typer.Typer(name="token", help="What requests to it carry.", no_args_is_help=True, rich_markup_mode=None)
app.command()(deploy)
app.add_typer(rollout)
app.add_typer(token)


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
    check_limit(wait, timeout_s)
    with options.connect() as client:
        before = client.services.get(ref, project=project) if wait else None
        service = client.services.rollback(ref, reason=reason, project=project)
        ordered(client, before, service, f"Service {service.name} goes back.", None, None, timeout_s)


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
