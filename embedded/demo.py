"""``demo``: a fresh stack, a real Ray job on a fresh cluster, its log, its result, where the time went; then the end.

Everything goes through what a user has: the stack's command line and the CLI.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from embedded.parts import ROOT
from embedded.supervisor import say
from embedded.teardown import local_machines, may_hold_clusters
from heliostat.errors import InfrastructureError, InternalError
from runtime.home import Home, is_alive

EXAMPLE = ROOT / "examples" / "core_scale_out" / "job.yaml"
Work = Callable[[Home, dict[str, str], float], int]
"""What a demo does on its stack: home, environment of the CLI, seconds that the start took → exit code."""


def demo() -> int:
    """Exit code 0: the job succeeded and nothing is left."""
    return in_a_fresh_home(_run_example)


def in_a_fresh_home(work: Work) -> int:
    """Does ``work`` on a stack of its own and ends that. ``HELIOSTAT_HOME`` names the home to use; default: a temporary
    one, which is removed if all went well."""
    if os.environ.get("HELIOSTAT_HOME"):
        return _demo(Home(Path(os.environ["HELIOSTAT_HOME"])), work)
    with tempfile.TemporaryDirectory(prefix="heliostat-demo-") as scratch:
        code = _demo(Home(Path(scratch)), work)
        if code:
            kept = Path(f"{scratch}-failed")
            Path(scratch).rename(kept)
            Path(scratch).mkdir()  # for the context manager to remove
            say(f"The demo failed (exit code {code}); its logs are in {kept}/logs")
        return code


def _demo(home: Home, work: Work) -> int:
    if home.stack_pid() is not None:
        raise InfrastructureError(
            f"a stack already runs in {home.path}.",
            remedy="Unset HELIOSTAT_HOME to run the demo beside it, in a home of its own.",
            resource=str(home.path),
        )
    if may_hold_clusters(home):
        raise InfrastructureError(
            f"{home.path} holds clusters or jobs that have not ended; the demo would end them.",
            remedy="Unset HELIOSTAT_HOME: the demo makes a home of its own.",
            resource=str(home.path),
        )
    any_port = {f"HELIOSTAT_{name}_PORT": "0" for name in ("API", "TEMPORAL", "UI", "BUCKET", "METRICS", "SDK_METRICS")}
    env = {**any_port, **os.environ, "HELIOSTAT_HOME": str(home.path)}
    began = time.monotonic()
    title("1. Start Heliostat on this machine")
    try:
        code = _stack(env, "up", "--detach")
        up_s = time.monotonic() - began
        if code == 0:
            # By environment, not by the home's stack.json: credentials of another Heliostat would come first.
            host = {"HELIOSTAT_HOST": home.state()["api_url"], "HELIOSTAT_TOKEN": home.token_file.read_text().strip()}
            code = work(home, env | host, up_s)
    finally:
        title("5. End everything")
        down_began = time.monotonic()
        ended = _stack(env, "down")
        say(f"ended in {time.monotonic() - down_began:.1f} s")
    _check_clean(home)
    say(f"\nThe demo took {time.monotonic() - began:.0f} s. Next: `make up`, then `heliostat --help`.")
    return code or ended


def _run_example(home: Home, env: dict[str, str], up_s: float) -> int:
    title(f"2. Submit {EXAMPLE.relative_to(ROOT)} and follow its log")
    name = f"demo-{os.getpid()}"
    submitted = time.monotonic()
    # Its program reads the files beside it: a relative working_dir in the YAML is that of the YAML.
    done = subprocess.run(
        cli("job", "submit", "-n", name, "-f", str(EXAMPLE), "--wait"), env=env, cwd=EXAMPLE.parent, check=False
    )
    followed_s = time.monotonic() - submitted
    if done.returncode:
        say(f"error: the job did not succeed (exit code {done.returncode})")
        subprocess.run(cli("job", "events", name), env=env, check=False)
        return done.returncode
    job = answer(env, "job", "status", name)
    cluster = answer(env, "cluster", "get", job["cluster_id"] or job["runs"][-1]["cluster_id"])
    title("3. Its result")
    say(f"job {job['id']} {job['state']} on cluster {cluster['id']}, run(s): {len(job['runs'])}")
    title("4. Where the time went (seconds)")
    for what, seconds in _times(up_s, followed_s, job, cluster):
        say(f"  {what:<56} {seconds:8.2f}")
    return 0


def _times(up_s: float, followed_s: float, job: dict[str, Any], cluster: dict[str, Any]) -> list[tuple[str, float]]:
    rows = [
        ("start of the stack, all parts ready", up_s),
        ("the job as its user saw it: submit to last line", followed_s),
    ]
    rows += [(f"  its cluster: {phase.replace('_', ' ')}", s) for phase, s in cluster["phase_seconds"].items()]
    for run in job["runs"]:
        started, running, ended = (_at(run.get(k)) for k in ("started_at", "running_at", "ended_at"))
        if started and running:
            rows.append(
                (f"  run {run['number']}: wait for the cluster, ship the code, start the program", running - started)
            )
        if running and ended:
            rows.append((f"  run {run['number']}: the program itself ({run['state']})", ended - running))
    return rows


def _at(text: str | None) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None


def _check_clean(home: Home) -> None:
    """Raises InternalError when a process of this home still lives: a demo that leaks is no success."""
    left = [f"{part} (pid {pid})" for pid, part in home.processes().items()] + local_machines(home, "list")
    # What runs on a node, job drivers included, inherits the node's own directory in its environment; a service's
    # load balancer is told its folder.
    mark, balancer = f"HELIOSTAT_NODE_DIR={home.path}/".encode(), f"{home.path}/balancers/".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and is_alive(int(entry.name)):
            try:
                environ, argv = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            except OSError:
                continue  # gone, or another user's
            if balancer in argv or any(item.startswith(mark) for item in environ.split(b"\0")):
                left.append(f"pid {entry.name}")
    if left:
        raise InternalError(f"the demo left something behind: {'; '.join(left)}", remedy="Report this.")
    say("checked: no process is left")


def _stack(env: dict[str, str], *command: str) -> int:
    return subprocess.run([sys.executable, "-m", "embedded.stack", *command], cwd=ROOT, env=env, check=False).returncode


def cli(*command: str) -> list[str]:
    """The installed command where there is one, else the same from the checkout."""
    installed = Path(sys.executable).with_name("heliostat")
    return [str(installed), *command] if installed.exists() else [sys.executable, "-m", "heliostat", *command]


def answer(env: dict[str, str], *command: str) -> dict[str, Any]:
    done = subprocess.run(cli(*command, "-o", "json"), env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InfrastructureError(f"`heliostat {' '.join(command)}` failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def title(text: str) -> None:
    say(f"\n── {text} " + "─" * max(2, 76 - len(text)))
