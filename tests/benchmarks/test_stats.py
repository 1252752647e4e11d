from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import BUSY, page
from benchmarks.stats import percentile, ratios, table


@pytest.mark.parametrize(("percent", "value"), [(1, 1), (50, 50), (99, 99), (100, 100)])
def test_percentiles_are_by_nearest_rank(percent: float, value: int) -> None:
    assert percentile(range(100, 0, -1), percent) == value
    assert percentile([7.0], percent) == 7.0


def test_ratios_are_of_pairs() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="argument"):
        ratios([1.0], [1.0, 2.0])


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [[1, "x"]]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def test_the_page_shows_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    common: dict[str, object] = {"at": "2026-01-01T00:00:00+00:00", "took_s": 5, "load_before": 0.1, "load_after": 0.2}
    common |= {"machine": "m", "cores": 2, "options": {"pairs": 1}}
    numbers = {"ours_s": [2.0], "bare_s": [1.9], "ratios": [1.05], "phases": [{}]}
    (tmp_path / "cluster_start.json").write_text(json.dumps(common | numbers))
    written = page(tmp_path)
    assert "| 2.00 s (2.00 – 2.00) | 1.90 s (1.90 – 1.90) | 1.05 × | ≤ 1.25 × |" in written
    assert "## warm_job" not in written
    assert BUSY not in written
    (tmp_path / "cluster_start.json").write_text(json.dumps(common | numbers | {"load_before": 9.0}))
    assert BUSY in page(tmp_path)
