"""``heliostat job``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli import dry_run as plan_view
from heliostat.cli import live, options
from heliostat.cli.output import Format, age, facts, next_steps, note, screen, show, table, tags
from heliostat.errors import InvalidRequest

if TYPE_CHECKING:
    from heliostat.models.jobs import Job, JobConfig

app = typer.Typer(
    name="job", help="Manage jobs (programs that run to completion).", no_args_is_help=True, rich_markup_mode=None
)

Ref = Annotated[str, typer.Argument(metavar="NAME|ID", help="A name selects the newest job with that name.")]


@app.command()
def submit(
    entrypoint: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- ENTRYPOINT...]",
            help="Command to run. Several words are its arguments; a single word is a shell command line.",
        ),
    ] = None,
    name: options.Name = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--config-file", help="YAML file with a JobConfig; flags override its fields.")
    ] = None,
    working_dir: options.WorkingDir = None,
    exclude: options.Exclude = None,
    requirements: options.Requirements = None,
    env: options.Env = None,
    py_module: options.PyModule = None,
    compute_config: options.ComputeConfigOf = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Cluster to run on. Default: the job creates its own.")
    ] = None,
    cloud: Annotated[
        str | None, typer.Option("--cloud", help="Cloud of the job's cluster. Default: the default cloud.")
    ] = None,
    project: options.Project = None,
    max_retries: Annotated[
        int | None, typer.Option("--max-retries", help="How many times to retry a failed run. Default: 1.")
    ] = None,
    timeout_s: Annotated[float | None, typer.Option("--timeout-s", help="Time limit of each run, in seconds.")] = None,
    tag: options.Tags = None,
    wait: Annotated[
        bool,
        typer.Option("-w", "--wait", help="Follow the log until the job ends; exit 10 if it fails. No time limit."),
    ] = False,
    dry_run: options.DryRun = False,
    output: options.Output = Format.TEXT,
) -> None:
    """Submit a job. Its command follows --, e.g. -- python main.py"""
    from heliostat.client import yaml_files

    fields = yaml_files.load(file) if file else yaml_files.Document({}, yaml_files.COMMAND_LINE)
    given = {
        "name": name,
        "entrypoint": _entrypoint(entrypoint),
        "working_dir": working_dir,
        "requirements": requirements,
        "py_modules": py_module or None,
        "compute_config": options.compute_config(compute_config),
        "cluster": cluster,
        "cloud": cloud,
        "project": project,
        "max_retries": max_retries,
        "timeout_s": timeout_s,
        "tags": options.pairs(tag, "--tag") or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    source = fields.source.replaced(given)
    fields |= given
    if exclude:
        fields["excludes"] = [*(fields.get("excludes") or []), *exclude]
    if env:
        fields["env_vars"] = {**(fields.get("env_vars") or {}), **options.env_vars(env)}
    if "entrypoint" not in fields:
        raise InvalidRequest(
            "The job has no entry point.",
            remedy="Put the command after --, or set `entrypoint` in the file.",
            field="entrypoint",
        )
    config = yaml_files.job_config(fields, source)
    with options.connect() as client:
        if dry_run:
            plan = client.jobs.plan(config)
            show(plan, lambda: plan_view.text(plan))
            return
        with live.status_line() as line:
            if _has_code(config):
                line.update("Packing and uploading the code", None)
            job = client.jobs.submit(config)
        if not wait:
            show(job, lambda: f"Job {job.name} is accepted: {job.id}\n" + _next(job))
            return
        note(f"Job {job.name} is accepted: {job.id}")
        last = live.follow_job(client, job)
        _judge(last)


@app.command()
def status(ref: Ref, project: options.Project = None, output: options.Output = Format.TEXT) -> None:
    """Show a job, its runs and why they ended."""
    with options.connect() as client:
        job = client.jobs.get(ref, project=project)
    show(job, lambda: _status(job))


@app.command("list")
def list_(
    state: options.State = None,
    name: options.Name = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Only jobs whose newest run uses this cluster.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="Only jobs that this schedule (id) started.")
    ] = None,
    project: options.Project = None,
    tag: options.Tags = None,
    limit: options.Limit = 50,
    output: options.Output = Format.TEXT,
) -> None:
    """List jobs, newest first."""
    from heliostat.models.jobs import JobState

    wanted = options.choices(state, JobState, "--state")
    with options.connect() as client:
        found = client.jobs.list(
            state=wanted,
            name=name,
            project=project,
            tags=options.pairs(tag, "--tag"),
            cluster=cluster,
            schedule=schedule,
        )
        jobs = options.first(found, limit, "jobs")
    show(
        jobs,
        lambda: table(
            ["ID", "NAME", "STATE", "RUNS", "SUBMITTED", "DURATION", "BY", "REASON"],
            [
                (
                    j.id, j.name, j.state, len(j.runs), f"{age(j.created_at)} ago", age(j.created_at, j.ended_at),
                    j.created_by, j.reason or (j.waits_for and f"waits for {j.waits_for}"),
                )
                for j in jobs
            ],
            empty="No jobs. `heliostat job submit --working-dir . -- python main.py` submits one.",
        ),
    )  # fmt: skip


@app.command()
def logs(
    ref: Ref,
    follow: Annotated[
        bool,
        typer.Option("-f", "--follow", help="Follow until the job ends, across retries. Ctrl-C does not stop the job."),
    ] = False,
    run: Annotated[str | None, typer.Option("--run", help="Only this run: its number or id.")] = None,
    tail: Annotated[int | None, typer.Option("--tail", min=0, help="Start with this many of the last lines.")] = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Print a job's log. It outlives the cluster. JSON and YAML output has one text per run."""
    with options.connect() as client:
        if not screen.text:
            if follow:
                raise InvalidRequest("-f works with text output only.", remedy="Remove -o or -f.")
            show(_texts(client.jobs.logs(ref, run=run, tail=tail, project=project)), str)
        elif follow:
            live.follow_log(client, client.jobs.get(ref, project=project), run=run, tail=tail)
        else:
            writer = live.LogWriter(one_run=run is not None)
            for text in client.jobs.logs(ref, run=run, tail=tail, project=project):
                writer.write(text)
            writer.finish()


@app.command()
def wait(
    ref: Ref,
    state: Annotated[str, typer.Option("-s", "--state", help="State to wait for.")] = "SUCCEEDED",
    timeout_s: options.WaitLimit = None,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Wait until a job reaches a state. Exit 10 if the job fails first."""
    from heliostat.models.jobs import JobState

    wanted = options.choice(state, JobState, "--state")
    with options.connect() as client:
        job = live.wait_for_job(client, client.jobs.get(ref, project=project), wanted, timeout_s)
    show(job, lambda: _status(job))


@app.command()
def terminate(
    ref: Ref,
    reason: options.Reason = "",
    wait: options.Wait = False,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Terminate a job, also while its cluster starts."""
    from heliostat.models.jobs import JobState

    with options.connect() as client:
        job = client.jobs.terminate(ref, reason=reason, project=project)
        if wait and not job.state.settled:
            job = live.wait_for_job(client, job, None, None)
    ended = f"is {job.state}" if job.state.settled else "is being terminated"
    steps = next_steps((f"heliostat job wait -s {JobState.TERMINATED} {job.id}", "wait until it has ended"))
    show(job, lambda: f"Job {job.name} ({job.id}) {ended}." + ("" if job.state.settled else "\n" + steps))


@app.command()
def events(
    ref: Ref,
    limit: options.EventLimit = 200,
    project: options.Project = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Show a job's events: who did what, when and why."""
    with options.connect() as client:
        options.show_events(client.jobs.events(ref, project=project), limit)


def _entrypoint(words: list[str] | None) -> str | None:
    """One word is a shell line already (``-- "python a.py | tee out"``); several are an argv, each kept whole."""
    if not words:
        return None
    return words[0] if len(words) == 1 else shlex.join(words)


def _has_code(config: JobConfig) -> bool:
    from heliostat.client.packaging import is_remote

    return any(
        not is_remote(code) for code in [*config.py_modules, *([config.working_dir] if config.working_dir else [])]
    )


def _texts(pieces: Any) -> list[dict[str, Any]]:
    found: dict[str | None, list[str]] = {}
    for piece in pieces:
        found.setdefault(piece.run_id, []).append(str(piece))
    return [{"run_id": run_id, "text": "".join(texts)} for run_id, texts in found.items()]


def _judge(job: Job) -> None:
    """The end of ``submit --wait``."""
    from heliostat.client.resources.jobs import reached
    from heliostat.models.jobs import JobState

    if not screen.text:
        show(job, str)
    reached(job, JobState.SUCCEEDED)
    note(f"Job {job.name} ({job.id}) succeeded after {age(job.created_at, job.ended_at)}" + _attempts(job) + ".")


def _attempts(job: Job) -> str:
    return f", at run {len(job.runs)}" if len(job.runs) > 1 else ""


def _status(job: Job) -> str:
    text = facts(
        [
            ("Job", f"{job.name} ({job.id})"),
            (
                "State",
                f"{job.state} for {age(job.state_since)}"
                if not job.state.settled
                else f"{job.state} {age(job.ended_at)} ago",
            ),
            ("Reason", job.reason),
            ("Waits for", job.waits_for),
            ("Entry point", job.config.entrypoint),
            ("Cluster", job.cluster_id),
            ("Schedule", job.schedule_id),
            ("Submitted", f"{age(job.created_at)} ago by {job.created_by} in project {job.project}"),
            ("Duration", age(job.created_at, job.ended_at) if job.ended_at else ""),
            ("Env", ", ".join(job.config.env_vars)),
            ("Tags", tags(job.tags)),
        ]
    )
    if job.runs:
        rows = [
            (
                r.number,
                r.state,
                r.cause,
                r.exit_code,
                r.cluster_id,
                f"{age(r.started_at)} ago",
                age(r.started_at, r.ended_at),
                r.reason,
            )
            for r in job.runs
        ]
        text += "\n\n" + table(
            ["RUN", "STATE", "CAUSE", "EXIT", "CLUSTER", "STARTED", "DURATION", "REASON"], rows, empty=""
        )
    return text + "\n" + _next(job)


def _next(job: Job) -> str:
    if job.state.settled:
        return next_steps(
            (f"heliostat job logs {job.id}", "show its log"), (f"heliostat job events {job.id}", "show its events")
        )
    return next_steps(
        (f"heliostat job logs -f {job.id}", "follow its log"),
        (f"heliostat job status {job.id}", "show its status"),
        (f"heliostat job terminate {job.id}", "terminate it"),
    )
