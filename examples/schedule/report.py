"""A report that a schedule makes: the nodes of the cluster, and the sum of a hundred tasks.

python report.py        # without Heliostat, on a machine with Ray
"""

import os
from datetime import UTC, datetime

import ray


@ray.remote
def square(number: int) -> int:
    return number * number


ray.init()
total = sum(ray.get([square.remote(i) for i in range(100)]))
assert total == 328350, total
print(f"report {os.environ.get('REPORT', 'cluster')!r} at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
for node in ray.nodes():
    print(f"node {node['NodeID'][:8]}: {int(node['Resources'].get('CPU', 0))} CPU")
print(f"sum of squares: {total}")
