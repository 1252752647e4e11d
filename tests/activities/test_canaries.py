"""The judgement on a canary, by what the gates have counted."""

from __future__ import annotations

import random

import pytest

from activities.canaries import Sum, judge
from heliostat.models.services import LATENCY_BOUNDS_MS, RolloutConfig

RULES = RolloutConfig()


def traffic(*latencies_ms: float, errors: int = 0) -> Sum:
    buckets = [0] * (len(LATENCY_BOUNDS_MS) + 1)
    for ms in latencies_ms:
        buckets[next((i for i, bound in enumerate(LATENCY_BOUNDS_MS) if ms <= bound), -1)] += 1
    return Sum(requests=len(latencies_ms), errors=errors, buckets=buckets)


GOOD = traffic(*[40.0] * 300)


@pytest.mark.parametrize(
    ("canary", "words"),
    [
        (traffic(*[40.0] * 50), ""),
        (traffic(*[400.0] * 10), "p95"),
        (traffic(*[40.0] * 40, *[400.0] * 10), "p95"),
        (traffic(*[400.0] * 9), ""),  # too few to tell
        (traffic(*[40.0] * 9, 5000.0), ""),  # the first of a new replica, say
        (traffic(*[40.0] * 28, *[5000.0] * 2), ""),
        (traffic(*[40.0] * 50, errors=1), ""),
        (traffic(*[40.0] * 50, errors=2), "2 of 50 answers failed"),
    ],
)
def test_against_a_good_version(canary: Sum, words: str) -> None:
    found = judge(RULES, canary, GOOD, GOOD)
    assert words in found
    assert bool(words) == bool(found)


def test_a_version_like_the_running_one_passes_whatever_the_shape_of_its_latencies() -> None:
    """Some requests are slow by nature (one in thirty, five seconds): by chance p95 is one of them, or is not."""
    dice = random.Random(20261126)

    def some(number: int) -> Sum:
        return traffic(*(5000.0 if dice.random() < 1 / 30 else dice.uniform(20, 80) for _ in range(number)))

    ever = some(3000)
    breaches = [judge(RULES, some(60), some(120), ever) for _ in range(500)]
    assert sum(map(bool, breaches)) <= 5, "not more than one step in a hundred goes back for nothing"
    slow = [judge(RULES, traffic(*(dice.uniform(200, 800) for _ in range(60))), some(120), ever) for _ in range(100)]
    assert sum(map(bool, slow)) >= 95, "and one that is ten times slower is seen"


@pytest.mark.parametrize(
    ("canary", "ever", "waits_s", "hangs"),
    [
        (Sum(), GOOD, 2.5, False),
        (Sum(), GOOD, 3.5, True),
        (traffic(*[40.0] * 50), GOOD, 9, False),
        (traffic(*[40.0] * 50), GOOD, 11, True),
        (Sum(), traffic(*[40.0] * 999, 5000.0), 4.9, False),
        (Sum(), traffic(*[40.0] * 90, *[5000.0] * 10), 14, False),
        (Sum(), traffic(*[40.0] * 90, *[5000.0] * 10), 16, True),
        (Sum(), Sum(), 9, False),
        (Sum(), Sum(), 11, True),
    ],
)
def test_a_request_without_an_answer(canary: Sum, ever: Sum, waits_s: float, hangs: bool) -> None:
    """What the running version's requests take at times is no hanging."""
    canary = canary.model_copy(update={"ongoing": 1, "oldest_s": waits_s})
    assert ("waits for its answer" in judge(RULES, canary, ever, ever)) is hangs
