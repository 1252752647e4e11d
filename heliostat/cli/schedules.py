"""``heliostat schedule``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli import options
from heliostat.cli.output import Format, age, facts, next_steps, show, table

if TYPE_CHECKING:
    from heliostat.models.schedules import Schedule

app = typer.Typer(
    name="schedule", help="Manage schedules (jobs that start by cron).", no_args_is_help=True, rich_markup_mode=None
)

Ref = Annotated[str, typer.Argument(metavar="NAME|ID")]


@app.command()
def apply(
    file: Annotated[Path, typer.Option("-f", "--config-file", help="YAML file with a ScheduleConfig.")],
    name: Annotated[str | None, typer.Option("-n", "--name", help="Name; overrides job_config.name.")] = None,
    project: Annotated[str | None, typer.Option("--project", help="Project; overrides job_config.project.")] = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Create or update a schedule. Its code is uploaded now: apply again after you change it."""
    from heliostat.client import yaml_files

    fields = yaml_files.load(file)
    source = fields.source
    if isinstance(fields.get("job_config"), dict):
        given = {k: v for k, v in {"name": name, "project": project}.items() if v is not None}
        fields["job_config"] = {**fields["job_config"], **given}
        source = source.replaced(given, "job_config.")
    config = yaml_files.schedule_config(fields, source)
    with options.connect() as client:
        made = client.schedules.apply(config)
    show(made, lambda: _status(made))


@app.command()
def status(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Show a schedule, its next start and its newest jobs."""
    with options.connect() as client:
        found = client.schedules.get(ref, project=project)
    show(found, lambda: _status(found))


@app.command("list")
def list_(
    name: options.Name = None,
    project: options.Project = None,
    limit: options.Limit = 50,
    output: options.Output = Format.TEXT,
) -> None:
    """List schedules."""
    with options.connect() as client:
        found = options.first(client.schedules.list(name=name, project=project), limit, "schedules")
    show(
        found,
        lambda: table(
            ["ID", "NAME", "STATE", "CRON", "TIMEZONE", "NEXT", "LAST JOB"],
            [
                (
                    s.id, s.name, s.state, s.config.cron_expression, s.config.timezone, _next_time(s),
                    s.last_jobs[0] if s.last_jobs else "",
                )
                for s in found
            ],
            empty="No schedules. `heliostat schedule apply -f FILE` creates one.",
        ),
    )  # fmt: skip


@app.command()
def pause(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Pause a schedule. It starts no jobs until you resume it; running jobs continue."""
    with options.connect() as client:
        found = client.schedules.pause(ref, project=project)
    steps = next_steps((f"heliostat schedule resume {found.name}", "resume it"))
    show(found, lambda: f"Schedule {found.name} is paused.\n{steps}")


@app.command()
def resume(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Resume a paused schedule."""
    with options.connect() as client:
        found = client.schedules.resume(ref, project=project)
    show(found, lambda: f"Schedule {found.name} is resumed. Next start: {_next_time(found) or 'unknown'}.")


@app.command()
def run(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Start one job of a schedule now."""
    with options.connect() as client:
        job = client.schedules.run(ref, project=project)
    steps = next_steps((f"heliostat job logs -f {job.id}", "follow its log"))
    show(job, lambda: f"Job {job.name} is accepted: {job.id}\n{steps}")


@app.command()
def delete(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Delete a schedule. Its jobs stay."""
    with options.connect() as client:
        client.schedules.delete(ref, project=project)
    show({"deleted": ref}, lambda: f"Schedule {ref} is deleted.")


def _status(schedule: Schedule) -> str:
    config = schedule.config
    text = facts(
        [
            ("Schedule", f"{schedule.name} ({schedule.id})"),
            ("State", schedule.state),
            ("Cron", f"{config.cron_expression} ({config.timezone})"),
            ("Next", _next_time(schedule)),
            ("Overlap", config.overlap_policy),
            ("Entry point", config.job_config.entrypoint),
            ("Last jobs", ", ".join(schedule.last_jobs)),
            ("Applied", f"{age(schedule.updated_at)} ago by {schedule.created_by} in project {schedule.project}"),
        ]
    )
    return f"{text}\n" + next_steps(
        (f"heliostat schedule run {schedule.name}", "start one job now"),
        (f"heliostat schedule pause {schedule.name}", "pause it")
        if schedule.state == "ENABLED"
        else (f"heliostat schedule resume {schedule.name}", "resume it"),
    )


def _next_time(schedule: Schedule) -> str:
    from heliostat.models.common import utcnow

    return f"in {age(utcnow(), schedule.next_trigger_at)}" if schedule.next_trigger_at else ""
