"""All figures of docs/benchmarks.md, measured on this machine.

    python -m benchmarks [NAME …] [--pairs 10] [--seconds 60] [--jobs 2000] [--clusters 300]
        [--rollouts 20] [--kills 5] [--broken "hangs,…"] [--out DIR]

Each benchmark starts a stack of its own and ends it. Results go to ``DIR/<name>.json`` (default
``benchmarks/results``); ``docs/benchmarks.md`` is written again from all results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

from benchmarks import (
    accept,
    broken_versions,
    cluster_start,
    endpoint_cost,
    head_killed,
    histories,
    idle_clusters,
    launches,
    lifecycles,
    many_jobs,
    rollout_time,
    rollouts,
    service_changes,
    warm_job,
)
from benchmarks.stack import ROOT

BUSY = "*The machine was busy when this began (in a row of benchmarks: with the one before). Alone it may be faster.*"

ALL: dict[str, ModuleType] = {
    "cluster_start": cluster_start,
    "warm_job": warm_job,
    "accept": accept,
    "lifecycles": lifecycles,
    "many_jobs": many_jobs,
    "histories": histories,
    "idle_clusters": idle_clusters,
    "launches": launches,
    "rollouts": rollouts,
    "service_changes": service_changes,
    "broken_versions": broken_versions,
    "head_killed": head_killed,
    "rollout_time": rollout_time,
    "endpoint_cost": endpoint_cost,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(ALL)}")
    parser.add_argument("--pairs", type=int, default=10, help="interleaved pairs")
    parser.add_argument("--seconds", type=float, default=60, help="of each open loop")
    parser.add_argument("--jobs", type=int, default=2000, help="running at once")
    parser.add_argument("--clusters", type=int, default=300, help="idle at once")
    parser.add_argument("--rollouts", type=int, default=20, help="in a row, of a service under load")
    parser.add_argument("--kills", type=int, default=5, help="of a service's head, one after the other")
    parser.add_argument(
        "--broken", default=",".join(broken_versions.BROKEN), help="versions to deploy, by what is wrong"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("pairs", "seconds", "jobs", "clusters", "rollouts", "kills")}
    broken = tuple(args.broken.split(","))
    if set(broken) - set(broken_versions.BROKEN):
        parser.error(f"--broken is some of {', '.join(broken_versions.BROKEN)}")
    unknown = [name for name in args.names if name not in ALL]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that stacks are ended on the way out
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or ALL:
        print(f"── {name}", flush=True)
        began, load = time.monotonic(), os.getloadavg()[0]
        found = asyncio.run(ALL[name].run(**options, broken=broken))
        found |= {
            "options": options,
            "cores": os.cpu_count(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "took_s": round(time.monotonic() - began),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        }
        (args.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(ALL[name].show(found), flush=True)
    if args.out == ROOT / "benchmarks" / "results":
        (ROOT / "docs" / "benchmarks.md").write_text(page(args.out))
    return 0


def page(results: Path) -> str:
    """docs/benchmarks.md from all results that there are."""
    parts = [
        "# Benchmarks\n\n`python -m benchmarks` (`make bench`) writes this page; the numbers are in "
        "`benchmarks/results/`. Each figure is compared with the same work without Heliostat, measured in the same run "
        "in interleaved pairs. Ranges are minimum – maximum. `python -m benchmarks NAME` runs one benchmark again.\n"
    ]
    for name, module in ALL.items():
        path = results / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        options = ", ".join(f"{k} {v:g}" for k, v in found["options"].items())
        busy = found["load_before"] > found["cores"] / 2
        warning = f"\n{BUSY}\n" if busy else ""
        parts.append(
            f"## {name}\n\n{str(module.__doc__).strip()}\n\n{module.show(found)}\n{warning}\n"
            f"{found['at']}, {found['machine']}, load before and after {found['load_before']} and "
            f"{found['load_after']}, {found['took_s']} s; {options}.\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
