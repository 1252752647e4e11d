"""The status line, the followed log, and Ctrl-C, which stops neither the job nor the service."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import typer

from heliostat.cli.output import age, is_terminal, note, screen, show, write

if TYPE_CHECKING:
    from rich.status import Status

    from heliostat.client.client import Client
    from heliostat.models.clusters import Cluster
    from heliostat.models.jobs import Job

DETACHED = 130
"""128 + SIGINT: Ctrl-C. The resource keeps running; a script must not take this for success."""


class StatusLine:
    """What the command waits for and since when, on stderr: one live line on a terminal, else a line per change."""

    def __init__(self) -> None:
        self._live: Status | None = None
        self._shown = ""

    def update(self, text: str, since: datetime | None) -> None:
        if not screen.text:
            return
        if not is_terminal(sys.stderr):
            if text != self._shown:
                note(text)
            self._shown = text
            return
        self._shown = text
        line = _Ticking(text, since)
        if self._live is None:
            from rich.console import Console

            self._live = Console(stderr=True).status(line)
        else:
            self._live.update(line)
        self._live.start()

    def clear(self) -> None:
        """Takes the live line away, so that other text can be written."""
        if self._live is not None:
            self._live.stop()


class _Ticking:
    """rich redraws it several times a second, so the time runs without a call of the API."""

    def __init__(self, text: str, since: datetime | None) -> None:
        self.text = text
        self.since = since

    def __rich__(self) -> Any:
        from rich.text import Text

        # The time comes first: a narrow terminal cuts the end off.
        return Text((f"{age(self.since)} · " if self.since else "") + self.text, no_wrap=True, overflow="ellipsis")


@contextmanager
def status_line() -> Iterator[StatusLine]:
    line = StatusLine()
    try:
        yield line
    finally:
        line.clear()


@contextmanager
def detachable(what: str, *steps: str) -> Iterator[None]:
    """Ctrl-C inside does not stop the resource; it prints how to return to it."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"\nDetached: {what} keeps running." + "".join(f"\n  {step}" for step in steps))
        raise typer.Exit(DETACHED) from None


def job_line(job: Job) -> str:
    run = job.runs[-1] if job.runs else None
    attempt = (
        f" (run {run.number}, {run.state})" if run and (run.number > 1 or str(run.state) != str(job.state)) else ""
    )
    return f"Job {job.name}: {job.state}{attempt}" + (f", waits for {job.waits_for}" if job.waits_for else "")


def cluster_line(cluster: Cluster) -> str:
    return f"Cluster {cluster.name}: {cluster.state}" + (
        f", waits for {cluster.waits_for}" if cluster.waits_for else ""
    )


def follow_job(client: Client, job: Job) -> Job:
    """The job's log on stdout, across retries, with the status line where nothing is printed; its last state."""
    from heliostat.client.logs import LogText

    last = job
    logs = LogWriter()
    with status_line() as line, detachable(f"job {job.name}", *_back(job)):
        for item in client.jobs.watch(job.id):
            if isinstance(item, LogText):
                line.clear()
                logs.write(item)
                continue
            last = item
            if not item.state.settled and logs.at_line_start:
                line.update(job_line(item), item.state_since)
    logs.finish()
    return last


def follow_log(client: Client, job: Job, *, run: int | str | None, tail: int | None) -> None:
    """``job logs -f``."""
    logs = LogWriter(one_run=run is not None)
    with detachable(f"job {job.name}", *_back(job)):
        for text in client.jobs.logs(job.id, follow=True, run=run, tail=tail):
            logs.write(text)
    logs.finish()


def print_streams(pieces: Iterator[Any]) -> None:
    """Several files, each with its name above it whenever another one goes on. In JSON and YAML: one text a file."""
    if not screen.text:
        texts: dict[str, list[str]] = {}
        for piece in pieces:
            texts.setdefault(piece.stream, []).append(str(piece))
        show([{"stream": stream, "text": "".join(found)} for stream, found in texts.items()], str)
        return
    writing = ""
    for piece in pieces:
        if piece.stream != writing:
            write(("\n" if writing else "") + f"==> {piece.stream} <==\n")
            writing = piece.stream
        write(str(piece))


class LogWriter:
    """A log on stdout; says on stderr when another run begins, so that two attempts are not taken for one."""

    def __init__(self, *, one_run: bool = False) -> None:
        self.one_run = one_run
        self.run_id: str | None = None
        self.at_line_start = True

    def write(self, text: Any) -> None:
        if text.run_id is not None and text.run_id != self.run_id:
            if not self.one_run and (self.run_id is not None or not str(text.run_id).endswith("-1")):
                self.finish()
                note(f"──── run {str(text.run_id).rpartition('-')[2]} ({text.run_id}) ────")
            self.run_id = text.run_id
        if screen.text:
            write(str(text))
            self.at_line_start = text.endswith("\n")

    def finish(self) -> None:
        """The shell's prompt and our own notes begin on a line of their own."""
        if not self.at_line_start and sys.stdout.isatty():
            write("\n")
        self.at_line_start = True


def wait_for_job(client: Client, job: Job, state: Any, timeout: float | None) -> Job:
    """``Jobs.wait`` with the status line."""
    with status_line() as line, detachable(f"job {job.name}", f"heliostat job wait {job.id}  wait again"):
        return client.jobs.wait(
            job.id, state=state, timeout=timeout, on_change=lambda job: line.update(job_line(job), job.state_since)
        )


def wait_for_cluster(client: Client, cluster: Cluster, state: Any, timeout: float | None) -> Cluster:
    """``Clusters.wait`` with the status line."""
    with (
        status_line() as line,
        detachable(f"cluster {cluster.name}", f"heliostat cluster get {cluster.id}  show its status"),
    ):
        return client.clusters.wait(
            cluster.id, state=state, timeout=timeout, on_change=lambda c: line.update(cluster_line(c), c.state_since)
        )


def _back(job: Job) -> tuple[str, ...]:
    return (f"heliostat job logs -f {job.id}    follow it again", f"heliostat job terminate {job.id}  terminate it")
