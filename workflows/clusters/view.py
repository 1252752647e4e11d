"""A cluster as others see it: the API's resource, and Markdown for the Temporal UI. Pure."""

from __future__ import annotations

from heliostat.models.clusters import Cluster, Lease, Node
from runtime.messages.clusters import ClusterInput
from workflows.clusters.state import ClusterData, NodeEntry


def cluster_resource(request: ClusterInput, s: ClusterData) -> Cluster:
    due = [d for d in (s.idle_deadline(request.config), s.uptime_deadline(request.config)) if d is not None]
    config = request.config.model_copy(
        update={
            "worker_nodes": [
                g.model_copy(update=s.bounds[g.name].model_dump()) if g.name in s.bounds else g
                for g in request.config.worker_nodes
            ]
        }
    )
    return Cluster(
        id=request.cluster_id,
        name=request.name,
        project=request.project,
        cloud=request.cloud,
        state=s.phase,
        reason=s.reason,
        waits_for=s.waits_for,
        compute_config=config,
        tags=request.tags,
        created_by=request.created_by,
        created_at=request.created_at,
        state_since=s.state_since,
        ended_at=s.state_since if s.phase.settled else None,
        conditions=list(s.conditions.values()),
        leases=[Lease(holder=h, since=t) for h, t in s.leases.items()],
        activity=s.activity,
        idle_since=s.idle_since,
        terminates_at=min(due) if due else None,
        phase_seconds=s.phase_seconds,
        ray_version=s.ray_version,
        desired={group: s.wanted(group) for group in s.bounds},
        revision=s.revision,
    )


def node_resource(cluster_id: str, node: NodeEntry) -> Node:
    return Node(
        id=node.id,
        cluster_id=cluster_id,
        role=node.role,
        group=node.group,
        slot=node.slot,
        generation=node.generation,
        state=node.state,
        reason=node.reason,
        notice=node.notice,
        machine_id=node.machine_id,
        ip=node.ip,
        created_at=node.created_at,
        running_at=node.running_at,
        ended_at=node.ended_at,
        instance_type=node.instance_type,
        zone=node.zone,
        market=node.market,
    )


def cluster_details(request: ClusterInput, s: ClusterData) -> str:
    """What an operator wants to know, without opening anything else."""
    lines = [f"### {s.phase} since {s.state_since:%Y-%m-%d %H:%M:%S} UTC", "", s.reason or ""]
    if s.waits_for:
        lines += ["", f"**Waiting on** {s.waits_for}"]
    lines += ["", f"- requested by {request.created_by}; project {request.project}; cloud {request.cloud}"]
    if s.leases:
        lines.append("- leases: " + ", ".join(f"`{h}`" for h in s.leases))
    else:
        lines.append(f"- no lease; activity {s.activity}" + (f" since {s.idle_since:%H:%M:%S}" if s.idle_since else ""))
    resource = cluster_resource(request, s)
    if resource.terminates_at:
        lines.append(f"- ends automatically at {resource.terminates_at:%Y-%m-%d %H:%M:%S} UTC unless something changes")
    for condition in s.conditions.values():
        word = "yes" if condition.status else "**no**"
        lines.append(
            f"- {condition.type}: {word} since {condition.since:%H:%M:%S}"
            + (f" ({condition.reason}: {condition.message})" if condition.reason else "")
        )
    if s.phase_seconds:
        lines.append("- phases: " + ", ".join(f"{k} {v:.1f} s" for k, v in s.phase_seconds.items()))
    lines.append("")
    for node in s.nodes.values():  # a list: the UI's tables have no space between their columns
        where = f", {node.place}" if node.zone or node.instance_type else ""
        where += f", {node.ip}" if node.ip else ""
        machine = f", machine `{node.machine_id}`" if node.machine_id else ""
        why = f": {' '.join(node.reason.split())}" if node.reason else ""
        leaves = f", **{node.notice}**" if node.notice else ""
        lines.append(f"- {node.group} {node.slot}.{node.generation} **{node.state}**{where}{machine}{leaves}{why}")
    return "\n".join(lines)
