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
        "| run | state | exit code | began | ended |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in job.runs:
        ended = f"{run.ended_at:%H:%M:%S}" if run.ended_at else ""
        code = "" if run.exit_code is None else str(run.exit_code)
        lines.append(f"| {run.number} | {run.state} | {code} | {run.started_at:%H:%M:%S} | {ended} |")
    # Below the table: the panel of the UI is half a page wide, and a reason may hold anything.
    why = [f"- run {run.number}: {run.cause}: {' '.join(run.reason.split())}" for run in job.runs if run.cause]
    return "\n".join([*lines, "", *why] if why else lines)
