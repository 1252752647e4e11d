from __future__ import annotations

import asyncio

from store.commands import close_commands, finish_command, open_commands, put_command
from store.database import Database

OK = {"ok": True, "result": {"accepted": True}, "error": "", "retryable": False}
LATER = {"ok": False, "result": {}, "error": "Ray is starting", "retryable": True}
BAD = {"ok": False, "result": {}, "error": "no such run", "retryable": False}


async def put(db: Database, id: str, token: bytes = b"t1", node: str = "node_1") -> object:
    return await put_command(db, id, "clu_1", node, "submit_run", {"run_id": "r"}, token)


async def test_a_command_is_given_once_and_answers_the_newest_attempt(db: Database) -> None:
    assert await put(db, "c1") is None
    assert await put(db, "c1", b"t2") is None
    assert await put(db, "c2", node="node_2") is None
    found = await open_commands(db, ["node_1", "node_2", "node_3"])
    assert [(c.id, c.node_id, c.kind, c.args) for c in found] == [
        ("c1", "node_1", "submit_run", {"run_id": "r"}),
        ("c2", "node_2", "submit_run", {"run_id": "r"}),
    ]
    assert await open_commands(db, []) == []
    assert await finish_command(db, "c1", "node_1", OK) == b"t2"
    assert [c.id for c in await open_commands(db, ["node_1", "node_2"])] == ["c2"]
    assert await put(db, "c1", b"t3") == OK


async def test_the_first_result_stays_and_a_repeat_tells_the_token_again(db: Database) -> None:
    await put(db, "c1")
    assert await finish_command(db, "c1", "node_1", OK) == b"t1"
    assert await finish_command(db, "c1", "node_1", BAD) == b"t1"
    assert await put(db, "c1") == OK


async def test_another_node_can_not_answer(db: Database) -> None:
    await put(db, "c1")
    assert await finish_command(db, "c1", "node_2", OK) is None
    assert await finish_command(db, "none", "node_1", OK) is None
    assert await put(db, "c1") is None


async def test_a_command_that_could_not_be_tried_opens_again(db: Database) -> None:
    await put(db, "c1")
    await finish_command(db, "c1", "node_1", LATER)
    assert await open_commands(db, ["node_1"]) == []
    assert await put(db, "c1", b"t2") is None
    assert [c.id for c in await open_commands(db, ["node_1"])] == ["c1"]
    await finish_command(db, "c1", "node_1", BAD)
    assert await put(db, "c1", b"t3") == BAD


async def test_what_a_node_has_not_done_ends_with_it(db: Database) -> None:
    await put(db, "c1")
    await put(db, "c2")
    await put(db, "other", node="node_2")
    await finish_command(db, "c2", "node_1", OK)
    async with db.begin() as conn:
        await close_commands(conn, ["node_1"])
    assert [c.id for c in await open_commands(db, ["node_1", "node_2"])] == ["other"]
    result = await put(db, "c1")
    assert isinstance(result, dict)
    assert (result["error"], result["retryable"]) == ("its node has ended", False)
    assert await put(db, "c2") == OK


async def test_a_result_and_a_repeat_at_once_never_lose_the_result(db: Database) -> None:
    for n in range(20):
        id = f"c{n}"
        await put(db, id)
        token, answer = await asyncio.gather(finish_command(db, id, "node_1", OK), put(db, id, b"t2"))
        # Either the repeat saw the result, or its token is the one that is completed.
        assert (answer == OK) or (token == b"t2")
