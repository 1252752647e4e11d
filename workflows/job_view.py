"""How a job is shown in the Temporal UI. Pure."""

from __future__ import annotations

from heliostat.models.jobs import Job


def job_details(job: Job) -> str:
    lines = [f"### {job.state} since {job.state_since:%Y-%m-%d %H:%M:%S} UTC", "", job.reason or ""]
    if job.waits_for:
        lines += ["", f"**Waits for** {job.waits_for}"]
    lines += [
        "",
        f"- asked for by {job.created_by}; project {job.project}",
        f"- `{job.config.entrypoint[:200]}`",
        f"- cluster `{job.cluster_id}`" if job.cluster_id else "- no cluster yet",
        "",
        "| run | state | cause | exit code | cluster | began | ended |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in job.runs:
        why = f"{run.cause}: {run.reason}" if run.cause else ""
        ended = f"{run.ended_at:%H:%M:%S}" if run.ended_at else ""
        code = "" if run.exit_code is None else str(run.exit_code)
        lines.append(
            f"| {run.number} | {run.state} | {why} | {code} | {run.cluster_id or ''} "
            f"| {run.started_at:%H:%M:%S} | {ended} |"
        )
    return "\n".join(lines)
