"""Who may do what: every route of /v1 against nobody, a stranger, a revoked and an expired token."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import httpx
from sqlalchemy import update

from heliostat.models.common import utcnow
from store.tables import tokens
from tests.api.conftest import World

JOB = {"entrypoint": "true"}
SERVICE = {"config": {"name": "mine", "applications": [{"import_path": "main:app"}]}}
SCHEDULE = {"cron_expression": "@daily", "job_config": JOB}

BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/jobs"): JOB,
    ("POST", "/v1/clusters"): {},
    ("PATCH", "/v1/clusters/{ref}/limits"): {"group": "workers", "max_nodes": 3},
    ("POST", "/v1/compute-configs"): {"config": {}},
    ("PUT", "/v1/schedules/{name}"): SCHEDULE,
    ("POST", "/v1/services"): SERVICE,
    ("POST", "/v1/services/{ref}/rollout"): {"action": "pause"},
    ("POST", "/v1/uploads"): {"sha256": "a" * 64, "size": 1},
    ("POST", "/v1/projects"): {"name": "new"},
    ("POST", "/v1/users"): {"name": "new"},
    ("POST", "/v1/tokens"): {"name": "new"},
}

ADMIN_ONLY = {
    ("POST", "/v1/projects"),
    ("POST", "/v1/users"),
    ("PUT", "/v1/projects/{ref}/members/{user}"),
    ("DELETE", "/v1/projects/{ref}/members/{user}"),
}


def routes(world: World) -> list[tuple[str, str]]:
    found = []
    for path, item in world.app.openapi()["paths"].items():
        if path.startswith("/v1/"):
            found += [(method.upper(), path) for method in item]
    assert len(found) > 30
    return sorted(found)


async def call(http: httpx.AsyncClient, method: str, path: str, ref: str) -> httpx.Response:
    url = path.replace("{ref}", ref).replace("{name}", ref).replace("{id}", ref).replace("{user}", "ada")
    body = BODIES.get((method, path))
    return await http.request(method, url, json=body) if body is not None else await http.request(method, url)


async def test_without_a_valid_token_every_route_is_closed(world: World) -> None:
    ada = world.tokens["ada"]
    expired = await world.user("old", "team")
    async with world.admin as http:
        revoked = (await http.post("/v1/tokens", json={"name": "r"})).json()
        async with world.client(revoked["secret"]) as soon:
            assert (await soon.get("/v1/whoami")).status_code == 200  # and is in the cache now
        assert (await http.delete(f"/v1/tokens/{revoked['id']}")).status_code == 204
    async with world.db.begin() as conn:
        user = "SELECT id FROM users WHERE name = 'old'"
        await conn.exec_driver_sql(f"UPDATE tokens SET expires_at = '2020-01-01 00:00:00' WHERE user_id IN ({user})")
    for token in (None, "nonsense", revoked["secret"], expired, ada[:-1]):
        async with world.client(token) as http:
            for method, path in routes(world):
                answer = await call(http, method, path, "x")
                assert answer.status_code == 401, (method, path, token)
                assert answer.json()["code"] == "unauthenticated"
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["content-type"] == "application/problem+json"


async def test_others_things_are_not_found(world: World) -> None:
    async with world.ada as http:
        refs = {
            "jobs": (await http.post("/v1/jobs", json={**JOB, "name": "mine"})).json(),
            "clusters": (await http.post("/v1/clusters", json={"name": "mine"})).json(),
            "compute-configs": (await http.post("/v1/compute-configs", json={"name": "mine", "config": {}})).json(),
            "services": (await http.post("/v1/services", json=SERVICE)).json(),
            "schedules": (await http.put("/v1/schedules/mine", json=SCHEDULE)).json(),
            "tokens": (await http.get("/v1/tokens")).json()["items"][0],
            "projects": (await http.get("/v1/projects")).json()["items"][0],
        }
    async with world.eve as http:
        tried = 0
        for method, path in routes(world):
            noun = path.split("/")[2]
            if "{" not in path or noun == "clouds" or (method, path) == ("PUT", "/v1/schedules/{name}"):
                continue
            wanted = 403 if (method, path) in ADMIN_ONLY else 404
            for ref in {refs[noun]["id"], refs[noun]["name"]}:
                answer = await call(http, method, path, ref)
                assert answer.status_code == wanted, (method, path, ref, answer.text)
                tried += 1
        assert tried > 30
        for noun in ("jobs", "clusters", "compute-configs", "schedules", "services"):
            assert (await http.get(f"/v1/{noun}")).json()["items"] == []
            assert (await http.get(f"/v1/{noun}", params={"project": "team"})).status_code == 404
            assert (await http.get(f"/v1/{noun}/mine", params={"project": "team"})).status_code == 404
        for path, body in (("jobs", {**JOB, "project": "team"}), ("clusters", {"project": "team"})):
            answer = await http.post(f"/v1/{path}", json=body)
            assert (answer.status_code, answer.json()["field"]) == (404, "project")
        put = await http.put("/v1/schedules/s", json={**SCHEDULE, "job_config": {**JOB, "project": "team"}})
        assert (put.status_code, put.json()["field"]) == (404, "job_config.project")
        on = await http.post("/v1/jobs", json={**JOB, "cluster": refs["clusters"]["id"]})
        assert (on.status_code, on.json()["field"]) == (404, "cluster")
    async with world.admin as http:
        for noun in ("jobs", "clusters", "schedules", "services"):
            assert (await http.get(f"/v1/{noun}/{refs[noun]['id']}")).status_code == 200


async def test_members_may_not_do_an_admins_work(world: World) -> None:
    async with world.ada as http:
        for method, path in sorted(ADMIN_ONLY):
            answer = await call(http, method, path, "team")
            assert (answer.status_code, answer.json()["code"]) == (403, "permission_denied"), path
        assert [u["name"] for u in (await http.get("/v1/users")).json()["items"]] == ["ada"]
        for_other = await http.post("/v1/tokens", json={"name": "x", "user": "eve"})
        assert for_other.status_code == 404


async def test_a_new_member_sees_the_project_at_once_and_a_removed_one_no_more(world: World) -> None:
    async with world.ada as ada, world.admin as admin, world.eve as eve:
        job = (await ada.post("/v1/jobs", json=JOB)).json()["id"]
        assert (await eve.get(f"/v1/jobs/{job}")).status_code == 404
        assert (await admin.put("/v1/projects/team/members/eve")).status_code == 204
        assert (await eve.get(f"/v1/jobs/{job}")).status_code == 200
        assert (await admin.delete("/v1/projects/team/members/eve")).status_code == 204
        assert (await eve.get(f"/v1/jobs/{job}")).status_code == 404


async def test_a_name_in_two_projects_asks_for_more(world: World) -> None:
    async with world.ada as ada, world.eve as eve, world.admin as admin:
        mine = (await ada.post("/v1/jobs", json={**JOB, "name": "n"})).json()["id"]
        await eve.post("/v1/jobs", json={**JOB, "name": "n"})
        assert (await admin.get("/v1/jobs/n")).status_code == 409
        assert (await admin.get("/v1/jobs/n", params={"project": "team"})).json()["id"] == mine
        assert (await admin.get(f"/v1/jobs/{mine}")).json()["id"] == mine


async def test_who_i_am(world: World) -> None:
    async with world.ada as http:
        me = (await http.get("/v1/whoami")).json()
    assert (me["user"], me["role"], me["organization"], me["projects"]) == ("ada", "member", "default", ["team"])
    async with world.admin as http:
        assert (await http.get("/v1/whoami")).json()["projects"] == ["default", "other", "team"]


async def test_tokens_are_hashed_listed_without_secret_and_expire(world: World) -> None:
    async with world.ada as http:
        made = (await http.post("/v1/tokens", json={"name": "ci", "expires_in_days": 1})).json()
        assert made["user"] == "ada"
        assert 23 < (_when(made["expires_at"]) - utcnow()).total_seconds() / 3600 <= 24
        listed = await http.get("/v1/tokens")
        assert made["secret"] not in listed.text
        assert {t["name"] for t in listed.json()["items"]} == {"t", "ci"}
    for path in world.settings.home.glob("records.db*"):
        assert made["secret"].encode() not in path.read_bytes()
    async with world.client(made["secret"]) as http:
        assert (await http.get("/v1/whoami")).status_code == 200
        async with world.db.begin() as conn:
            past = utcnow() - timedelta(seconds=1)
            await conn.execute(update(tokens).where(tokens.c.id == made["id"]).values(expires_at=past))
        world.context.callers.forget()
        expired = await http.get("/v1/whoami")
    assert (expired.status_code, "expired" in expired.json()["detail"]) == (401, True)


async def test_a_cached_token_still_expires_on_time(world: World) -> None:
    async with world.ada as http:
        made = (await http.post("/v1/tokens", json={"name": "short", "expires_in_days": 0.2 / 86400})).json()
    async with world.client(made["secret"]) as http:
        while (answer := await http.get("/v1/whoami")).status_code == 200:
            assert utcnow() < _when(made["expires_at"]) + timedelta(seconds=5)
    assert answer.status_code == 401


async def test_a_repeated_token_request_gives_a_secret_until_the_first_one_is_used(world: World) -> None:
    headers = {"idempotency-key": "k"}
    async with world.ada as http:
        first = (await http.post("/v1/tokens", json={"name": "x"}, headers=headers)).json()
        second = (await http.post("/v1/tokens", json={"name": "x"}, headers=headers)).json()
        assert (first["id"], True) == (second["id"], first["secret"] != second["secret"])
        async with world.client(first["secret"]) as dead, world.client(second["secret"]) as live:
            assert (await dead.get("/v1/whoami")).status_code == 401
            assert (await live.get("/v1/whoami")).status_code == 200
        third = (await http.post("/v1/tokens", json={"name": "x"}, headers=headers)).json()
        assert (third["id"], third["secret"]) == (first["id"], None)
        async with world.client(second["secret"]) as live:
            assert (await live.get("/v1/whoami")).status_code == 200


async def test_names_of_users_and_projects_are_taken_once(world: World) -> None:
    async with world.admin as http:
        for noun in ("users", "projects"):
            first = await http.post(f"/v1/{noun}", json={"name": "n"}, headers={"idempotency-key": noun})
            assert first.status_code == 201
            again = await http.post(f"/v1/{noun}", json={"name": "n"}, headers={"idempotency-key": noun})
            assert again.json() == first.json()
            taken = await http.post(f"/v1/{noun}", json={"name": "n"})
            assert (taken.status_code, taken.json()["field"]) == (409, "name")


def _when(text: str) -> Any:
    from datetime import datetime

    return datetime.fromisoformat(text)
