"""Counts the primes below a limit, in many tasks, on as many nodes as the cluster brings up for them.

    python primes.py [--below 5_000_000_000] [--tasks 100]

Prints how the work spread over the nodes, and checks the count against the known value.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections import Counter

import numpy as np
import ray

KNOWN = {10**7: 664_579, 10**8: 5_761_455, 10**9: 50_847_534, 2 * 10**9: 98_222_287, 5 * 10**9: 234_954_223}
BLOCK = 4_000_000
"""Numbers sieved at a time: 4 MB stay in the processor's cache."""


def small_primes(limit: int) -> np.ndarray:
    flags = np.ones(limit + 1, dtype=bool)
    flags[:2] = False
    for n in range(2, math.isqrt(limit) + 1):
        if flags[n]:
            flags[n * n :: n] = False
    return np.flatnonzero(flags)


@ray.remote(num_cpus=1)
def count_primes(start: int, stop: int, divisors: np.ndarray) -> tuple[int, str]:
    """Primes in [start, stop), and the node that counted them."""
    found = 0
    for low in range(start, stop, BLOCK):
        high = min(low + BLOCK, stop)
        flags = np.ones(high - low, dtype=bool)
        flags[: max(0, 2 - low)] = False  # 0 and 1
        for p in divisors:
            if p * p >= high:
                break
            flags[max(p * p, -(-low // p) * p) - low :: p] = False
        found += int(np.count_nonzero(flags))
    return found, ray.get_runtime_context().get_node_id()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--below", type=int, default=5 * 10**9)
    parser.add_argument("--tasks", type=int, default=100)
    args = parser.parse_args()

    ray.init()
    began = time.monotonic()
    divisors = ray.put(small_primes(math.isqrt(args.below) + 1))  # once per node, not once per task
    edges = [args.below * i // args.tasks for i in range(args.tasks + 1)]
    waiting = [count_primes.remote(a, b, divisors) for a, b in itertools.pairwise(edges)]
    print(f"{args.tasks} tasks of 1 CPU each wait; the cluster has {ray.cluster_resources().get('CPU', 0):g} CPU now")

    total, by_node = 0, Counter[str]()
    while waiting:
        (done,), waiting = ray.wait(waiting)
        found, node = ray.get(done)
        total += found
        if node not in by_node:
            print(f"{time.monotonic() - began:5.1f} s  node {len(by_node) + 1} is at work ({node[:8]})", flush=True)
        by_node[node] += 1
        if (args.tasks - len(waiting)) % 20 == 0:
            print(f"{time.monotonic() - began:5.1f} s  {args.tasks - len(waiting)} of {args.tasks} tasks", flush=True)

    shares = ", ".join(f"{node[:8]} did {n}" for node, n in by_node.most_common())
    print(
        f"{total:,} primes below {args.below:,} in {time.monotonic() - began:.1f} s on {len(by_node)} nodes: {shares}"
    )
    if total != KNOWN.get(args.below, total):
        print(f"wrong: there are {KNOWN[args.below]:,}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
