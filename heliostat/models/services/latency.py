"""Latency histograms: their bounds, and quantiles from them."""

from __future__ import annotations

from collections.abc import Sequence

LATENCY_BOUNDS_MS = (
    1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700,
    1000, 1500, 2000, 3000, 5000, 7000, 10000, 20000, 30000, 60000,
)  # fmt: skip
"""Upper bounds of a latency histogram's buckets in milliseconds; one more bucket counts slower requests. The agent has
the same in ``agent/constants.py`` (a test compares)."""


def quantile(buckets: Sequence[int], q: float) -> float | None:
    """Milliseconds below which the share ``q`` lies, interpolated within its bucket; None without any. Slower requests
    count as the last bound. ``buckets``: counts by LATENCY_BOUNDS_MS and one more."""
    total = sum(buckets)
    if not total:
        return None
    rank, seen, low = q * total, 0, 0.0
    for count, bound in zip(buckets, (*LATENCY_BOUNDS_MS, LATENCY_BOUNDS_MS[-1]), strict=True):
        if count and seen + count >= rank:
            return round(low + (bound - low) * max(rank - seen, 0) / count, 2)
        seen, low = seen + count, float(bound)
    return float(LATENCY_BOUNDS_MS[-1])
