"""Users, API tokens and projects."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from heliostat.models.common import Model, Name, Result


class Role(StrEnum):
    ADMIN = "admin"
    """Has access to everything in the organization."""
    MEMBER = "member"
    """Has access to its projects."""


class WhoAmI(Result):
    user: str
    role: Role
    organization: str
    projects: list[str]
    server_version: str


class ProjectCreate(Model):
    name: Name


class Project(Result):
    id: str
    name: str
    created_at: datetime


class UserCreate(Model):
    name: Name
    role: Role = Role.MEMBER
    projects: list[str] = []


class User(Result):
    id: str
    name: str
    role: Role
    projects: list[str] = []
    created_at: datetime


class TokenCreate(Model):
    name: Name
    user: str | None = None
    """Owner of the token. Default: the caller. Only an admin can create tokens for others."""
    expires_in_days: float | None = Field(default=None, gt=0)


class Token(Result):
    id: str
    name: str
    user: str
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    secret: str | None = None
    """The token itself, only in the answer that creates it."""
