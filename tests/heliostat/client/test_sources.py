"""Config files as PyYAML reads them, with the place of each value."""

from __future__ import annotations

from pathlib import Path

import pytest

from heliostat.client.sources import load
from heliostat.errors import InvalidRequest

MERGED = """\
one: &one {A: "1"}
two: &two {B: "2"}
both:
  <<: *one
  <<: *two
list:
  <<: [*one, *two]
  A: "3"
"""


def test_several_merges_add_up(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(MERGED)
    fields = load(path)
    assert (fields["both"], fields["list"]) == ({"A": "1", "B": "2"}, {"A": "3", "B": "2"})


def test_a_duplicate_key_is_refused_with_both_places(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nenv_vars:\n  A: x\n  A: y\n")
    with pytest.raises(InvalidRequest, match=r"job\.yaml:4:3: env_vars\.A is a duplicate of line 3") as refused:
        load(path)
    assert refused.value.field == "env_vars.A"
