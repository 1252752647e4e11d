"""What the endpoint adds to a request. The same GET is sent to the head's proxy (with the gate in it) and through the
service's load balancer, on kept connections, in interleaved pairs: at half of the proxy's own rate, and at saturation
by 16 connections. Load, load balancer and Ray share the machine's cores, so this is an upper bound."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from dataclasses import replace
from typing import Any

from benchmarks.load import Load
from benchmarks.load_http import Connection, Progress, Target
from benchmarks.load_kinds import Plan, expect, pad
from benchmarks.services import Bench, bench, config
from benchmarks.stats import median, table

CONNECTIONS = 16
GOAL_P50_MS, GOAL_P99_MS = 3.0, 15.0
PAIR_S = 10.0


async def run(pairs: int, seconds: float = 60, **_: Any) -> dict[str, Any]:
    """``seconds``: of each measurement, at most ``PAIR_S``."""
    length = min(seconds, PAIR_S)
    found: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        found.setdefault(key, []).append(round(value, 3))

    async with bench() as b:
        await b.deploy(config("v1", delay_s=0))
        through, direct = await _targets(b)
        await _saturate(direct, 3)  # the first requests open what later ones use
        for _pair in range(pairs):
            note("direct_rps", await _saturate(direct, length))
            note("through_rps", await _saturate(through, length))
        rate = median(found["direct_rps"]) / 2
        for number in range(pairs):
            for name, target in (("direct", direct), ("through", through)):
                p50, p99 = await _fixed(target, rate, length)
                note(f"{name}_p50_ms", p50)
                note(f"{name}_p99_ms", p99)
            print(f"  pair {number + 1} at {rate:.0f}/s: { ({k: v[-1] for k, v in found.items()}) }", flush=True)
        await b.end()
    return found | {
        "rate": round(rate, 1),
        "added_p50_ms": [t - d for t, d in zip(found["through_p50_ms"], found["direct_p50_ms"], strict=True)],
        "added_p99_ms": [t - d for t, d in zip(found["through_p99_ms"], found["direct_p99_ms"], strict=True)],
        "saturation_ratios": [t / d for t, d in zip(found["through_rps"], found["direct_rps"], strict=True)],
    }


async def _targets(b: Bench) -> tuple[Target, Target]:
    """Through the endpoint; at the proxy, whose address no user of ours has."""
    service = await b.settled()
    assert service.query_url is not None
    files = b.stack.home.path / "balancers" / service.id / "backends.json"
    (backend,) = json.loads(files.read_text())["backends"]
    token = service.query_auth_token or ""
    return Target(service.query_url, token), Target(f"http://{backend['http']}", token)


async def _saturate(target: Target, seconds: float) -> float:
    """Answers per second of a closed loop; each is looked at. Raises WrongAnswer, Broken, OSError."""
    until, count = time.monotonic() + seconds, 0

    async def lane() -> None:
        nonlocal count
        connection = await Connection.open(target, target.tls)
        while time.monotonic() < until:
            nonce = secrets.token_hex(8)
            expect(await connection.exchange(Progress(), "GET", f"/echo?nonce={nonce}"), f"{nonce} {pad(nonce)}\n")
            count += 1
        connection.close()

    began = time.monotonic()
    await asyncio.gather(*(lane() for _ in range(CONNECTIONS)))
    return count / (time.monotonic() - began)


async def _fixed(target: Target, rate: float, seconds: float) -> tuple[float, float]:
    """p50 and p99 in milliseconds, from when a request was due. Raises RuntimeError when one failed."""
    (kind,) = Plan().only("get_kept").kinds
    async with Load(target.url, target.token, Plan(kinds=(replace(kind, per_s=rate),))) as load:
        await asyncio.sleep(seconds)
    report = load.report()
    if report.failed:
        raise RuntimeError(report.summary())
    p50, p99 = report.kinds["get_kept"].p50_ms, report.kinds["get_kept"].p99_ms
    assert p50 is not None
    assert p99 is not None
    return p50, p99


def show(found: dict[str, Any]) -> str:
    def ms(values: list[float]) -> str:
        return f"{median(values):.1f} ms ({min(values):.1f} – {max(values):.1f})"

    return table(
        ["", "direct", "through the endpoint", "added, or ratio (of pairs)", "goal"],
        [
            [f"p50 at {found['rate']:.0f}/s", ms(found["direct_p50_ms"]), ms(found["through_p50_ms"]),
             ms(found["added_p50_ms"]), f"≤ {GOAL_P50_MS:g} ms"],
            [f"p99 at {found['rate']:.0f}/s", ms(found["direct_p99_ms"]), ms(found["through_p99_ms"]),
             ms(found["added_p99_ms"]), f"≤ {GOAL_P99_MS:g} ms"],
            [f"answers/s, {CONNECTIONS} connections", f"{median(found['direct_rps']):.0f}",
             f"{median(found['through_rps']):.0f}", f"{median(found['saturation_ratios']):.2f} ×", "—"],
        ],
    )  # fmt: skip
