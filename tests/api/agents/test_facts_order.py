"""In which order a head's facts reach their workflow: one after the other, but for many nodes that become ready."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.agent_nodes import CallingNode
from api.agent_reports import TOLD_AT_ONCE, Facts
from heliostat.models.agents import Fact, FactKind
from heliostat.models.common import utcnow


def fact(id: str, kind: FactKind = FactKind.RAY_READY, **data: Any) -> Fact:
    return Fact(id=id, kind=kind, at=utcnow(), data=data)


class Told(Facts):
    """Notes when each fact is begun and taken; ``lost`` are not taken."""

    def __init__(self, lost: frozenset[str] = frozenset()) -> None:
        self.lost, self.under_way, self.most = lost, 0, 0
        self.story: list[str] = []

    async def _deliver(self, node: CallingNode, fact: Fact) -> bool:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.story.append(f"+{fact.id}")
        await asyncio.sleep(0.001)
        self.story.append(f"-{fact.id}")
        self.under_way -= 1
        return fact.id not in self.lost


NODE: CallingNode = None  # type: ignore[assignment]


async def test_many_ready_nodes_are_told_side_by_side() -> None:
    facts = [fact(f"r{n}", node_id=f"nd_{n}") for n in range(45)]
    told = Told()
    assert await told.deliver(NODE, facts) == [f.id for f in facts]
    assert told.most == TOLD_AT_ONCE


async def test_all_else_waits_for_what_was_before() -> None:
    facts = [
        fact("head", gcs_address="10.0.0.1:6379"),
        fact("a", node_id="nd_a"),
        fact("b", node_id="nd_b"),
        fact("lost", FactKind.NODE_LOST, node_id="nd_a"),
        fact("again", node_id="nd_a"),
        fact("twice", node_id="nd_a"),
        fact("idle", FactKind.ACTIVITY, activity="idle"),
    ]
    told = Told()
    assert await told.deliver(NODE, facts) == [f.id for f in facts]
    assert told.story == [
        "+head", "-head", "+a", "+b", "-a", "-b", "+lost", "-lost", "+again", "-again", "+twice", "-twice", "+idle",
        "-idle",
    ]  # fmt: skip


@pytest.mark.parametrize(("lost", "safe"), [("b", ["head", "a", "c"]), ("head", [])])
async def test_nothing_after_one_that_was_not_taken(lost: str, safe: list[str]) -> None:
    facts = [fact("head"), *(fact(n, node_id=f"nd_{n}") for n in "abc"), fact("idle", FactKind.ACTIVITY)]
    assert await Told(frozenset({lost})).deliver(NODE, facts) == safe
