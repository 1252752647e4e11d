"""Two API processes on one PostgreSQL: what SQLite's single writer hides would show here."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from temporalio.client import Client

from runtime.settings import Settings
from store.database import Database
from tests.api.clouds.test_routes import AWS, Answers, organization
from tests.api.conftest import World, opened
from tests.store.conftest import fresh_database

pytestmark = pytest.mark.timeout(90)
JOB = {"entrypoint": "true"}


@pytest.fixture
async def two(tmp_path: Path, postgres: str, temporal: Client) -> AsyncIterator[tuple[World, World]]:
    with fresh_database(postgres) as url:
        settings = Settings(home=tmp_path, task_queue=uuid.uuid4().hex, database_url=url, api_processes=2)
        async with opened(settings, temporal) as first, opened(settings, temporal) as second:
            await first.user("ada", "team")
            second.tokens.update(first.tokens)
            yield first, second


async def test_one_key_at_two_apis_makes_one_thing(two: tuple[World, World]) -> None:
    async with two[0].ada as a, two[1].ada as b:
        for path, body in (
            ("jobs", JOB),
            ("clusters", {"name": "c"}),
            ("compute-configs", {"name": "c", "config": {}}),
        ):
            headers = {"idempotency-key": path}
            answers = await asyncio.gather(
                *(http.post(f"/v1/{path}", json=body, headers=headers) for http in (a, b) for _ in range(5))
            )
            assert {r.status_code for r in answers} == {201}, [r.text for r in answers]
            assert len({r.json()["id"] for r in answers}) == 1
            assert len((await b.get(f"/v1/{path}")).json()["items"]) == 1


async def test_names_and_versions_at_two_apis(two: tuple[World, World]) -> None:
    async with two[0].ada as a, two[1].ada as b:
        made = await asyncio.gather(
            *(http.post("/v1/clusters", json={"name": "c"}) for http in (a, b) for _ in range(4))
        )
        assert sorted(r.status_code for r in made) == [201] + [409] * 7
        body: dict[str, Any] = {"name": "v", "config": {}}
        versions = await asyncio.gather(
            *(http.post("/v1/compute-configs", json=body) for http in (a, b) for _ in range(4))
        )
        assert sorted(r.json()["version"] for r in versions) == list(range(1, 9))


async def test_deploys_at_two_apis_all_count(two: tuple[World, World]) -> None:
    body = {"config": {"name": "s", "applications": [{"import_path": "main:app"}]}}
    async with two[0].ada as a, two[1].ada as b:
        made = await asyncio.gather(*(http.post("/v1/services", json=body) for http in (a, b) for _ in range(4)))
        assert {r.status_code for r in made} == {201}, [r.text for r in made]
        assert len({(r.json()["id"], r.json()["query_auth_token"]) for r in made}) == 1
        assert sorted(r.json()["versions"][0]["number"] for r in made) == list(range(1, 9))
        headers = {"idempotency-key": "k"}
        again = await asyncio.gather(
            *(http.post("/v1/services", json=body, headers=headers) for http in (a, b) for _ in range(3))
        )
        assert {r.status_code for r in again} == {201}, [r.text for r in again]
        versions = (await b.get("/v1/services/s/versions")).json()["items"]
        assert [v["number"] for v in versions] == list(range(9, 0, -1))


async def test_filters_and_pages(two: tuple[World, World]) -> None:
    async with two[0].ada as http:
        ids = []
        for n in range(5):
            tags = {"team": "ml" if n % 2 else "web"}
            ids.append((await http.post("/v1/jobs", json={**JOB, "tags": {**tags, "a.b/c": str(n)}})).json()["id"])
        first = (await http.get("/v1/jobs", params={"limit": 3})).json()
        rest = (await http.get("/v1/jobs", params={"limit": 3, "cursor": first["next_cursor"]})).json()
        assert [j["id"] for j in first["items"] + rest["items"]] == ids[::-1]
        found = (await http.get("/v1/jobs", params={"tag": ["team:ml", "a.b/c:1", "a.b/c:2"]})).json()["items"]
        assert [j["id"] for j in found] == [ids[1]]
        for odd in ("}:x", "'; --:x", "{a,b}:x", "a b:x", "%:x"):
            assert (await http.get("/v1/jobs", params={"tag": odd})).json()["items"] == [], odd


async def test_a_revoked_token_dies_at_the_other_api_too(two: tuple[World, World]) -> None:
    async with two[0].ada as a:
        made = (await a.post("/v1/tokens", json={"name": "x"})).json()
        async with two[1].client(made["secret"]) as b:
            assert (await b.get("/v1/whoami")).status_code == 200
            assert (await a.delete(f"/v1/tokens/{made['id']}")).status_code == 204
            async with asyncio.timeout(30):
                while (await b.get("/v1/whoami")).status_code != 401:
                    await asyncio.sleep(0.1)


async def test_records_that_are_away_are_unavailable(two: tuple[World, World]) -> None:
    away = Database("postgresql+psycopg://me:hunter2@127.0.0.1:1/none")
    world = two[0]
    world.context.callers.db, whole = away, world.context.callers.db
    async with world.ada as http:
        world.context.callers.forget()
        _says_so(await http.get("/v1/jobs"))
        world.context.callers.db = whole
        world.change(db=away)
        for answer in (await http.get("/v1/jobs"), await http.post("/v1/jobs", json=JOB), await http.get("/v1/jobs/x")):
            _says_so(answer)
        ready = await http.get("/readyz")
        assert (ready.status_code, "are unreachable" in ready.json()["checks"]["records"]) == (503, True)
        world.change(db=whole)
        assert (await http.get("/v1/jobs")).status_code == 200


def _says_so(answer: httpx.Response) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "hunter2" not in answer.text
    assert answer.json()["remedy"]


async def test_of_clouds_registered_at_two_apis_one_name_is_one_and_one_is_the_default(
    two: tuple[World, World],
) -> None:
    config = {**AWS, "external_id": two[0].keys.external_id(await organization(two[0]))}
    body = {"name": "prod", "provider": "aws", "config": config, "is_default": True}
    for world in two:
        world.change(temporal=Answers(world.context.temporal))
    async with two[0].admin as a, two[1].admin as b:
        headers = {"idempotency-key": "k"}
        same = await asyncio.gather(
            *(http.post("/v1/clouds", json=body, headers=headers) for http in (a, b) for _ in range(3))
        )
        assert {r.status_code for r in same} == {201}, [r.text for r in same]
        assert len({r.json()["id"] for r in same}) == 1
        others = await asyncio.gather(
            *(http.post("/v1/clouds", json=body | {"name": "two"}) for http in (a, b) for _ in range(3))
        )
        assert sorted(r.status_code for r in others) == [201] + [409] * 5
        listed = (await b.get("/v1/clouds")).json()["items"]
        assert sorted((c["name"], c["is_default"]) for c in listed) == [
            ("local", False),
            ("prod", False),
            ("two", True),
        ]
        deleted = await asyncio.gather(*(http.delete("/v1/clouds/prod") for http in (a, b)))
        assert 204 in {r.status_code for r in deleted} <= {204, 404}
        assert (await a.post("/v1/clouds", json=body | {"is_default": False})).status_code == 201
