"""A job as the Temporal UI shows it. Pure."""

from __future__ import annotations

from heliostat.models.jobs import Job


def job_details(job: Job) -> str:
    lines = [f"### {job.state} since {job.state_since:%Y-%m-%d %H:%M:%S} UTC", "", job.reason or ""]
    if job.waits_for:
        lines += ["", f"**Waiting on** {job.waits_for}"]
    lines += [
        "",
        f"- requested by {job.created_by}; project {job.project}",
        f"- `{job.config.entrypoint[:200]}`",
        f"- cluster `{job.cluster_id}`" if job.cluster_id else "- no cluster yet",
        "",
    ]
    for run in job.runs:  # a list: the UI's tables have no space between their columns
        code = "" if run.exit_code is None else f", exit code {run.exit_code}"
        until = f" to {run.ended_at:%H:%M:%S}" if run.ended_at else ""
        why = f": {run.cause}: {' '.join(run.reason.split())}" if run.cause else ""
        lines.append(f"- run {run.number} **{run.state}**{code}, from {run.started_at:%H:%M:%S}{until}{why}")
    return "\n".join(lines)
