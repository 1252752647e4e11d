"""docs/benchmarks.md is what ``python -m benchmarks`` writes from the results."""

from __future__ import annotations

from benchmarks.__main__ import page
from tests.docs.pages import ROOT


def test_the_page_is_what_the_results_say() -> None:
    assert (ROOT / "docs/benchmarks.md").read_text() == page(ROOT / "benchmarks/results")
