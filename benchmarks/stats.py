"""Medians with their spread, and the tables that they are shown in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100).__int__() - 1))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """``median (least – greatest)``, seconds."""
    return f"{median(values):.2f} s ({min(values):.2f} – {max(values):.2f})"


def ratios(ours: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Of each pair: the machine's mood is the same in both."""
    return [a / b for a, b in zip(ours, bare, strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
