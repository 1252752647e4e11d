"""What a broken version costs when it is deployed under load: lost requests, compared with the canary's share when the
failure is detected, and the time until all traffic is back. The version passes the probe and fails everything else, at
steps 5, 10, 20, … with the default hold of 15 s. One that does not start gets no traffic. Its share counts the requests
that were due while it had traffic. *Back* is when the last request was due that still reached it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.load import Load
from benchmarks.load_kinds import Plan
from benchmarks.load_report import Failure
from benchmarks.services import Bench, bench, config, load_on, version_of
from benchmarks.stats import table
from heliostat.errors import WorkloadFailed
from heliostat.models.services import ServiceState

SHARES = [5, 10, 20, 30, 50, 75, 100]
STEPS = {"steps": SHARES, "hold_s": 15, "keep_failed_s": 0}
BROKEN: dict[str, dict[str, Any]] = {
    "import error": {"import_path": "broken_import:build"},
    "crash at start": {"mode": "crash"},
    "answers 500": {"mode": "fail"},
    "hangs": {"mode": "hang"},
    "10 × slower": {"mode": "slow", "delay_s": 0.05},
}
BACK_S = 10.0
PLAN = Plan().only("get_fresh", "get_kept", "post").at(1.5).patient(10)
"""Requests that are quick by themselves, so that one that hangs is known for it."""


async def run(broken: tuple[str, ...] = tuple(BROKEN), **_: Any) -> dict[str, Any]:
    rows = []
    async with bench() as b:
        await b.deploy(config("good", delay_s=0.05))
        for what in broken:
            rows.append(await _deploy(b, what))
            print(f"  {rows[-1] | {'failures': len(rows[-1]['failures'])}}", flush=True)
        await b.end()
    return {"rows": rows, "steps": STEPS}


async def _deploy(b: Bench, what: str) -> dict[str, Any]:
    name = what.replace(" ", "-").replace("×", "x")
    service = await b.settled()
    async with load_on(service, plan=PLAN) as load:
        asked, deploy = await b.ask(config(name, rollout=STEPS, **({"delay_s": 0.05} | BROKEN[what])))
        broken = version_of(asked, name)
        try:
            await b.client.services.wait_deployed(asked, deploy, timeout=900)
        except WorkloadFailed:
            pass
        else:
            raise RuntimeError(f"a version that {what} was taken for good")
        await b.until("the rollout's end", lambda s: s.state == ServiceState.RUNNING and s.rollout is None)
        events = await b.events(broken.created_at)
    breach = next((load.at(e.at) for e in events if e.kind == "breach"), None)
    return {"what": what, "reason": next((e.message for e in events if e.kind == "rolled_back"), "")} | _cost(
        load, broken.id, breach, [load.at(e.at) for e in events if e.kind == "step"]
    )


def _cost(load: Load, version_id: str, breach_s: float | None, steps_s: list[float]) -> dict[str, Any]:
    """``steps_s``: when each step had its traffic."""
    report = load.report()
    seen = report.versions.get(version_id)
    # What hangs shows no version: nothing else of this load does.
    theirs = [f for f in report.failures if f.version_id == version_id or (f.stage == "answer" and not f.version_id)]
    others: list[Failure] = [f for f in report.failures if f not in theirs]
    percent = [0, *SHARES][len(steps_s)]
    last = max([f.at_s for f in theirs] + ([seen.last_due_s] if seen else []), default=None)
    began = steps_s[0] if steps_s else None
    due = sum(s.sent for s in report.timeline if began is not None and last is not None and began <= s.second <= last)
    return {
        "sent": report.sent,
        "lost": len(theirs),
        "lost_by_others": len(others),
        "canary_percent": percent,
        "due_while_it_had_traffic": due,
        "lost_percent": round(100 * len(theirs) / due, 1) if due else 0,
        "first_bad_to_breach_s": round(breach_s - theirs[0].at_s, 1) if theirs and breach_s is not None else None,
        "breach_to_back_s": round(max(0.0, last - breach_s), 1) if last is not None and breach_s is not None else None,
        "failures": [asdict(f) for f in report.failures],
    }


def show(found: dict[str, Any]) -> str:
    rows = []
    for r in found["rows"]:
        share = f"{r['lost_percent']} % of {r['due_while_it_had_traffic']}" if r["canary_percent"] else "no traffic"
        back = f"{r['breach_to_back_s']} s" if r["breach_to_back_s"] is not None else "—"
        first = f"{r['first_bad_to_breach_s']} s" if r["first_bad_to_breach_s"] is not None else "—"
        rows.append([r["what"], r["lost"], share, f"{r['canary_percent']} %", r["lost_by_others"], first, back])
    rows.append(["*goal*", "", "≤ the canary's share", "", "0", "", f"≤ {BACK_S:g} s"])
    return table(
        [
            "version that",
            "requests lost",
            "their share while it had traffic",
            "canary's share then",
            "lost by the good version",
            "first bad answer → breach",
            "breach → last request to it",
        ],
        rows,
    )
