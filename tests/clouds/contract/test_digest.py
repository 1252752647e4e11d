"""The digest of a machine's request, by which a repeat is told from another request."""

from __future__ import annotations

from typing import Any

from heliostat.models.compute_configs import Architecture
from tests.clouds.support import bare_spec


def test_what_was_added_to_a_request_leaves_the_digests_of_before() -> None:
    """Those of machines that were launched by the release before: else a repeat would be another request."""
    before = "aba17bf320546ef47fc0c48080160ed0a661fd99fde0da00a4b0e618d17ccf0a"
    assert bare_spec().digest() == before
    changed = {bare_spec(**c).digest() for c in CHANGES}
    assert len(changed | {before}) == len(CHANGES) + 1


CHANGES: list[dict[str, Any]] = [
    {"accelerator": "T4"},
    {"cpu_architecture": Architecture.ARM64},
    {"advanced": {"EbsOptimized": True}},
    {"instance_type": "m6i.large"},
]
