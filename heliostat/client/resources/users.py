"""Projects, users and API tokens."""

from __future__ import annotations

from heliostat.client.effects import Flow, Stream
from heliostat.client.groups import Group, M, many, one
from heliostat.client.resources import lists
from heliostat.client.transport import path_of
from heliostat.models.users import Project, ProjectCreate, Token, TokenCreate, User, UserCreate


class Projects(Group[M]):
    @one
    def create(self, request: ProjectCreate, *, idempotency_key: str | None = None) -> Flow[Project]:
        return (yield from self._api.call("POST", path_of("projects"), Project, body=request, key=idempotency_key))

    @many
    def list(self) -> Stream[Project]:
        return lists.pages(self._api, path_of("projects"), Project)

    @one
    def add_member(self, project: str, user: str) -> Flow[None]:
        """Adds a user to a project, each by name or id (admins only)."""
        return (yield from self._api.call("PUT", path_of("projects", project, "members", user), type(None)))

    @one
    def remove_member(self, project: str, user: str) -> Flow[None]:
        return (yield from self._api.call("DELETE", path_of("projects", project, "members", user), type(None)))


class Users(Group[M]):
    @one
    def create(self, request: UserCreate, *, idempotency_key: str | None = None) -> Flow[User]:
        return (yield from self._api.call("POST", path_of("users"), User, body=request, key=idempotency_key))

    @many
    def list(self) -> Stream[User]:
        return lists.pages(self._api, path_of("users"), User)


class Tokens(Group[M]):
    @one
    def create(self, request: TokenCreate, *, idempotency_key: str | None = None) -> Flow[Token]:
        """Creates a token. Only this answer contains ``secret``."""
        return (yield from self._api.call("POST", path_of("tokens"), Token, body=request, key=idempotency_key))

    @many
    def list(self, *, user: str | None = None) -> Stream[Token]:
        """Your tokens; an admin sees all."""
        return lists.pages(self._api, path_of("tokens"), Token, user=user)

    @one
    def revoke(self, token_id: str) -> Flow[None]:
        return (yield from self._api.call("DELETE", path_of("tokens", token_id), type(None)))
