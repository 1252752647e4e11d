"""``demo-service``: a service upgraded under load, second by second; then the end of everything.

Like ``demo``, by what a user has: the stack's command line and the CLI. The load is ``benchmarks.load``, which
looks at every single answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from embedded.demo import answer, cli, in_a_fresh_home, title
from embedded.parts import ROOT
from embedded.supervisor import say
from heliostat.errors import InfrastructureError
from runtime.home import Home, end_processes

EXAMPLE = ROOT / "examples" / "serve_model" / "service.yaml"
UPGRADE = ("main:build", "order=2", "version=2", "--steps", "10,25,50,75,100", "--hold-s", "3")
BEFORE_S, AFTER_S = 5, 5
"""Seconds of load on the old version alone, and on the new one alone."""
MOST_S = 900
BAR = 30


def demo_service() -> int:
    """Exit code 0: no request failed, and nothing is left."""
    return in_a_fresh_home(_run)


def _run(home: Home, env: dict[str, str], up_s: float) -> int:
    name = f"demo-{os.getpid()}"
    title(f"2. Deploy {EXAMPLE.parent.relative_to(ROOT)}")
    began = time.monotonic()
    code = _heliostat(env, "service", "deploy", "-f", str(EXAMPLE), "-n", name, "--wait")
    if code:
        return _told(env, name, code)
    service = answer(env, "service", "status", name)
    say(f"deployed in {time.monotonic() - began:.1f} s (the stack itself started in {up_s:.1f} s)")
    _try(service)

    title("3. Upgrade it under load: every answer is checked, no request is retried")
    code, report = _upgrade(env, name, service)
    say("")
    for line in _summary(report):
        say(line)
    if code:
        return _told(env, name, code)

    title("4. Terminate it")
    ended = _heliostat(env, "service", "terminate", name, "--wait")
    return ended or (1 if report["failed"] or len(report["versions"]) != 2 else 0)


def _try(service: dict[str, Any]) -> None:
    """One streamed answer, as it comes."""
    url = f"{service['query_url']}/generate?prompt=Alice&words=20&seed=7"
    say(f'\n$ curl -N -H "Authorization: Bearer $TOKEN" "{url}"')
    bearer = {"Authorization": f"Bearer {service['query_auth_token']}"}
    with httpx.stream("GET", url, headers=bearer, timeout=60, trust_env=False) as response:
        response.raise_for_status()
        for text in response.iter_text():
            sys.stdout.write(text)
            sys.stdout.flush()


def _upgrade(env: dict[str, str], name: str, service: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The deploy's exit code, and the load's report."""
    names = {v["id"]: v["name"] for v in service["versions"]}
    order = list(names)
    deploying: subprocess.Popen[str] | None = None
    stop_at, report = 0, dict[str, Any]()
    with _load(service) as load:
        assert load.stdout is not None
        # While the new version's cluster starts, every fifth second is enough.
        for line in load.stdout:
            seen = json.loads(line)
            if "kinds" in seen:
                report = seen
                break
            for version_id in seen["versions"]:
                if version_id not in names:
                    found = answer(env, "service", "status", name)
                    names |= {v["id"]: v["name"] for v in found["versions"]}
                    order.append(version_id)
            quiet = len(seen["versions"]) <= 1 and not seen["failed"] and deploying is not None and not stop_at
            if not quiet or seen["second"] % 5 == 0:
                say(_second(seen, order, names))
            if deploying is None and seen["second"] + 1 >= BEFORE_S:
                say("      $ heliostat service deploy -f service.yaml " + " ".join(UPGRADE) + " --wait")
                words = cli("service", "deploy", "-f", str(EXAMPLE), "-n", name, *UPGRADE, "--wait")
                deploying = subprocess.Popen(
                    words, env=env, cwd=EXAMPLE.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            if deploying is not None and deploying.poll() is not None and not stop_at:
                say(f"      the deploy has ended with exit code {deploying.returncode}")
                stop_at = seen["second"] + AFTER_S
            if stop_at and seen["second"] >= stop_at:
                load.send_signal(signal.SIGINT)
    if deploying is None or not report:
        raise InfrastructureError("the load ended early.")
    if deploying.poll() is None:
        end_processes([deploying.pid], grace_s=5)
    said, _ = deploying.communicate(timeout=30)
    if deploying.returncode:
        say(said)
    return deploying.returncode, report


@contextmanager
def _load(service: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    words = [
        sys.executable, "-m", "benchmarks.load", service["query_url"], "--token-env", "HELIOSTAT_DEMO_QUERY_TOKEN",
        "--example", "--live", "--json", "--seconds", str(MOST_S),
    ]  # fmt: skip
    env = os.environ | {"HELIOSTAT_DEMO_QUERY_TOKEN": str(service["query_auth_token"] or "")}
    child = subprocess.Popen(words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        if child.poll() is None:
            end_processes([child.pid], grace_s=30)
        child.wait()


def _second(seen: dict[str, Any], order: list[str], names: dict[str, str]) -> str:
    """`` 12 s   20 requests   0 failed   ██████████████░░░░░░  v1 70 %  v2 30 %``."""
    counts = {version: seen["versions"].get(version, 0) for version in order}
    total = sum(counts.values())
    bar, shares = "", []
    for number, (version, count) in enumerate(counts.items()):
        part = count / total if total else 0
        bar += "█░▒"[number % 3] * round(BAR * part)
        shares.append(f"{names.get(version, version)} {100 * part:3.0f} %")
    return f"{seen['second']:4d} s {seen['ok']:4d} right {seen['failed']:3d} failed  {bar[:BAR]:<{BAR}}  " + "  ".join(
        shares
    )


def _summary(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['sent']} requests: {report['ok']} right, {report['failed']} failed"]
    lines += [f"  {name:<8} {kind['ok']:>6} right {kind['failed']:>4} failed" for name, kind in report["kinds"].items()]
    lines += [
        f"  version {' '.join(v['texts']) or v['version_id']}: {v['ok']} answers, "
        f"from second {v['first_s']:.1f} to {v['last_s']:.1f}"
        for v in report["versions"].values()
    ]
    lines += [f"  failed: {f['kind']} at {f['at_s']} s: {f['error']}" for f in report["failures"][:10]]
    return lines


def _heliostat(env: dict[str, str], *command: str) -> int:
    return subprocess.run(cli(*command), env=env, cwd=EXAMPLE.parent, check=False).returncode


def _told(env: dict[str, str], name: str, code: int) -> int:
    """What happened to it, for the reader of a demo that failed."""
    say(f"error: the service demo failed (exit code {code})")
    _heliostat(env, "service", "events", name)
    return code
