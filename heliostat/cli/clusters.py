"""``heliostat cluster``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli import dry_run as plan_view
from heliostat.cli import live, options
from heliostat.cli.output import Format, age, duration, facts, next_steps, note, screen, show, table, tags
from heliostat.errors import InvalidRequest

if TYPE_CHECKING:
    from heliostat.models.clusters import Cluster, Node

app = typer.Typer(name="cluster", help="Manage Ray clusters.", no_args_is_help=True, rich_markup_mode=None)

Ref = Annotated[str, typer.Argument(metavar="NAME|ID")]


@app.command()
def create(
    name: options.Name = None,
    file: Annotated[Path | None, typer.Option("-f", "--config-file", help="YAML file with a ComputeConfig.")] = None,
    compute_config: Annotated[
        str | None, typer.Option("--compute-config", help="Compute config: NAME[:VERSION] or id. Default: the cloud's.")
    ] = None,
    cloud: Annotated[str | None, typer.Option("--cloud", help="Cloud to run on. Default: the default cloud.")] = None,
    project: options.Project = None,
    tag: options.Tags = None,
    wait: options.Wait = False,
    dry_run: options.DryRun = False,
    output: options.Output = Format.TEXT,
) -> None:
    """Create a cluster."""
    from heliostat.client import yaml_files
    from heliostat.models.clusters import ClusterCreate, ClusterState

    if file and compute_config:
        raise InvalidRequest("-f and --compute-config can't be combined.", remedy="Remove one of them.")
    config: Any = compute_config
    if file:
        document = yaml_files.load(file)
        config = yaml_files.compute_config(document, document.source)
    fields = {
        "name": name,
        "compute_config": config,
        "cloud": cloud,
        "project": project,
        "tags": options.pairs(tag, "--tag") or None,
    }
    request = yaml_files.build(
        ClusterCreate, {k: v for k, v in fields.items() if v is not None}, yaml_files.COMMAND_LINE
    )
    with options.connect() as client:
        if dry_run:
            plan = client.clusters.plan(request)
            show(plan, lambda: plan_view.text(plan))
            return
        cluster = client.clusters.create(request)
        if wait:
            note(f"Cluster {cluster.name} is accepted: {cluster.id}")
            cluster = live.wait_for_cluster(client, cluster, ClusterState.RUNNING, None)
    show(
        cluster,
        lambda: _get(cluster) if wait else f"Cluster {cluster.name} is accepted: {cluster.id}\n" + _next(cluster),
    )


@app.command()
def get(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Show a cluster, its leases and when it terminates."""
    with options.connect() as client:
        cluster = client.clusters.get(ref, project=project)
    show(cluster, lambda: _get(cluster))


@app.command("list")
def list_(
    state: options.State = None,
    name: options.Name = None,
    project: options.Project = None,
    tag: options.Tags = None,
    limit: options.Limit = 50,
    output: options.Output = Format.TEXT,
) -> None:
    """List clusters, newest first."""
    from heliostat.models.clusters import ClusterState

    wanted = options.choices(state, ClusterState, "--state")
    with options.connect() as client:
        found = client.clusters.list(state=wanted, name=name, project=project, tags=options.pairs(tag, "--tag"))
        clusters = options.first(found, limit, "clusters")
    show(
        clusters,
        lambda: table(
            ["ID", "NAME", "CLOUD", "STATE", "FOR", "ACTIVITY", "TERMINATES", "BY", "REASON"],
            [
                (
                    c.id, c.name, c.cloud, c.state, age(c.state_since), "" if c.state.settled else c.activity, _ends(c),
                    c.created_by, c.reason or (c.waits_for and f"waits for {c.waits_for}"),
                )
                for c in clusters
            ],
            empty="No clusters. `heliostat cluster create --wait` creates one; a job creates its own.",
        ),
    )  # fmt: skip


@app.command()
def terminate(
    ref: Ref,
    reason: options.Reason = "",
    wait: options.Wait = False,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Terminate a cluster and all its nodes. Work that runs on it ends."""
    from heliostat.models.clusters import ClusterState

    with options.connect() as client:
        cluster = client.clusters.terminate(ref, reason=reason, project=project)
        if wait:
            cluster = live.wait_for_cluster(client, cluster, ClusterState.TERMINATED, None)
    ended = f"is {cluster.state}" if cluster.state.settled else "is being terminated"
    show(cluster, lambda: f"Cluster {cluster.name} ({cluster.id}) {ended}.")


@app.command()
def events(
    ref: Ref, limit: options.EventLimit = 200, project: options.Project = None, output: options.Output = Format.TEXT
) -> None:
    """Show a cluster's events: who did what, when and why."""
    with options.connect() as client:
        options.show_events(client.clusters.events(ref, project=project), limit)


@app.command()
def nodes(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """List a cluster's nodes, including ended ones."""
    with options.connect() as client:
        found = list(client.clusters.nodes(ref, project=project))
    show(
        found,
        lambda: table(
            ["ID", "GROUP", "STATE", "IP", "MACHINE", "PLACEMENT", "AGE", "STARTUP", "REASON"],
            [
                (
                    n.id, n.group, n.state, n.ip, n.machine_id, _placement(n), age(n.created_at, n.ended_at),
                    n.running_at and age(n.created_at, n.running_at), n.reason or n.notice,
                )
                for n in found
            ],
            empty="No node has been requested yet.",
        ),
    )  # fmt: skip


@app.command()
def logs(
    ref: Ref,
    node: Annotated[str | None, typer.Option("--node", help="Only this node (id).")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow until the cluster has ended.")] = False,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Start with this many of the last lines.")] = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Print the logs of a cluster's nodes (agent and Ray). They outlive the cluster."""
    with options.connect() as client:
        if not screen.text and follow:
            raise InvalidRequest("-f works with text output only.", remedy="Remove -o or -f.")
        cluster = client.clusters.get(ref, project=project)
        with live.detachable(f"cluster {cluster.name}", f"heliostat cluster logs -f {cluster.id}  follow it again"):
            pieces = client.clusters.logs(cluster.id, node=node, follow=follow, tail=tail)
            live.print_streams(pieces)


@app.command()
def scale(
    ref: Ref,
    group: Annotated[str, typer.Option("--group", help="Worker group.")],
    min_nodes: Annotated[int | None, typer.Option("--min-nodes", min=0, help="Minimum number of nodes.")] = None,
    max_nodes: Annotated[int | None, typer.Option("--max-nodes", min=0, help="Maximum number of nodes.")] = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Set the limits of one worker group. They apply to this cluster only."""
    from heliostat.models.clusters import ScaleLimits

    given = {k: v for k, v in {"min_nodes": min_nodes, "max_nodes": max_nodes}.items() if v is not None}
    if not given:
        raise InvalidRequest("There is nothing to set.", remedy="Give --min-nodes, --max-nodes or both.")
    with options.connect() as client:
        cluster = client.clusters.set_limits(ref, ScaleLimits(group=group, **given), project=project)
    limits = ", ".join(f"{name} {value}" for name, value in given.items())
    show(cluster, lambda: f"Cluster {cluster.name}: group {group} has {limits}." + _next(cluster))


def _get(cluster: Cluster) -> str:
    took = ", ".join(
        f"{phase.replace('_', ' ')} {duration(seconds)}" for phase, seconds in cluster.phase_seconds.items()
    )
    text = facts(
        [
            ("Cluster", f"{cluster.name} ({cluster.id})"),
            ("State", f"{cluster.state} for {age(cluster.state_since)}"),
            ("Reason", cluster.reason),
            ("Waits for", cluster.waits_for),
            ("Cloud", cluster.cloud),
            ("Retained", cluster.compute_config.head_node.keeps),
            (
                "Workers",
                ", ".join(f"{g.name} {g.min_nodes}–{g.max_nodes}" for g in cluster.compute_config.worker_nodes),
            ),
            (
                "Activity",
                ""
                if cluster.state.settled
                else cluster.activity + (f" for {age(cluster.idle_since)}" if cluster.idle_since else ""),
            ),
            ("Leases", ", ".join(f"{lease.holder} ({age(lease.since)})" for lease in cluster.leases)),
            ("Terminates", _ends(cluster)),
            ("Ray", cluster.ray_version),
            ("Created", f"{age(cluster.created_at)} ago by {cluster.created_by} in project {cluster.project}"),
            ("Phases", took),
            ("Tags", tags(cluster.tags)),
        ]
    )
    if cluster.conditions:
        rows = [(c.type, "yes" if c.status else "no", age(c.since), c.reason, c.message) for c in cluster.conditions]
        text += "\n\n" + table(["CONDITION", "MET", "FOR", "REASON", "MESSAGE"], rows, empty="")
    return text + "\n" + _next(cluster)


def _placement(node: Node) -> str:
    """``m6i.large us-west-2a SPOT``; "" where the cloud has no such things."""
    market = node.market if node.market and (node.zone or node.instance_type) else None
    return " ".join(part for part in (node.instance_type, node.zone, market) if part)


def _ends(cluster: Cluster) -> str:
    """``in 12m``, as far as it is known."""
    from heliostat.models.common import utcnow

    if cluster.terminates_at is None or cluster.state.settled:
        return ""
    return f"in {age(utcnow(), cluster.terminates_at)}"


def _next(cluster: Cluster) -> str:
    if cluster.state.settled:
        return next_steps((f"heliostat cluster events {cluster.id}", "show its events"))
    return next_steps(
        (f"heliostat job submit --cluster {cluster.name} -- …", "run a job on it"),
        (f"heliostat cluster nodes {cluster.id}", "show its nodes"),
        (f"heliostat cluster terminate {cluster.id}", "terminate it"),
    )
