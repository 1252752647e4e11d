"""``heliostat project``, ``heliostat user``, ``heliostat token``."""

from __future__ import annotations

from typing import Annotated

import typer

from heliostat.cli import options
from heliostat.cli.output import Format, age, note, show, table

projects = typer.Typer(name="project", help="Manage projects.", no_args_is_help=True, rich_markup_mode=None)
users = typer.Typer(name="user", help="Manage users.", no_args_is_help=True, rich_markup_mode=None)
tokens = typer.Typer(name="token", help="Manage API tokens.", no_args_is_help=True, rich_markup_mode=None)


@projects.command("create")
def create_project(name: str, output: options.Output = Format.TEXT) -> None:
    """Create a project (admins only)."""
    from heliostat.client.yaml_files import COMMAND_LINE, build
    from heliostat.models.users import ProjectCreate

    request = build(ProjectCreate, {"name": name}, COMMAND_LINE)
    with options.connect() as client:
        made = client.projects.create(request)
    show(made, lambda: f"Project {made.name} is created: {made.id}")


@projects.command("list")
def list_projects(output: options.Output = Format.TEXT) -> None:
    """List your projects."""
    with options.connect() as client:
        found = list(client.projects.list())
    show(
        found,
        lambda: table(["ID", "NAME", "AGE"], [(p.id, p.name, age(p.created_at)) for p in found], empty="No projects."),
    )


@projects.command("add-member")
def add_member(project: str, user: str, output: options.Output = Format.TEXT) -> None:
    """Add a user to a project (admins only)."""
    with options.connect() as client:
        client.projects.add_member(project, user)
    show({"project": project, "added": user}, lambda: f"{user} is in project {project}.")


@projects.command("remove-member")
def remove_member(project: str, user: str, output: options.Output = Format.TEXT) -> None:
    """Remove a user from a project (admins only)."""
    with options.connect() as client:
        client.projects.remove_member(project, user)
    show({"project": project, "removed": user}, lambda: f"{user} is no longer in project {project}.")


@users.command("create")
def create_user(
    name: str,
    admin: Annotated[bool, typer.Option("--admin", help="Make the user an admin of the organization.")] = False,
    project: Annotated[
        list[str] | None, typer.Option("--project", help="Add the user to this project; can be repeated.")
    ] = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Create a user (admins only)."""
    from heliostat.client.yaml_files import COMMAND_LINE, build
    from heliostat.models.users import Role, UserCreate

    fields = {"name": name, "role": Role.ADMIN if admin else Role.MEMBER, "projects": project or []}
    request = build(UserCreate, fields, COMMAND_LINE)
    with options.connect() as client:
        made = client.users.create(request)
    show(
        made,
        lambda: (
            f"User {made.name} is created: {made.id}\n`heliostat token create NAME --user {made.name}` creates a token."
        ),
    )


@users.command("list")
def list_users(output: options.Output = Format.TEXT) -> None:
    """List users."""
    with options.connect() as client:
        found = list(client.users.list())
    rows = [(u.id, u.name, u.role, ", ".join(u.projects), age(u.created_at)) for u in found]
    show(found, lambda: table(["ID", "NAME", "ROLE", "PROJECTS", "AGE"], rows, empty="No users."))


@tokens.command("create")
def create_token(
    name: str,
    user: Annotated[str | None, typer.Option("--user", help="Owner of the token. Default: you.")] = None,
    expires_in_days: Annotated[
        float | None, typer.Option("--expires-in-days", help="Days until it expires. Default: never.")
    ] = None,
    output: options.Output = Format.TEXT,
) -> None:
    """Create an API token and print it on stdout. It is not shown again."""
    from heliostat.client.yaml_files import COMMAND_LINE, build
    from heliostat.models.users import TokenCreate

    fields = {"name": name, "user": user, "expires_in_days": expires_in_days}
    request = build(TokenCreate, {k: v for k, v in fields.items() if v is not None}, COMMAND_LINE)
    with options.connect() as client:
        made = client.tokens.create(request)
    note(f"Token {made.name} ({made.id}) of {made.user} is created. It is not shown again:")
    show(made, lambda: made.secret or "")


@tokens.command("list")
def list_tokens(output: options.Output = Format.TEXT) -> None:
    """List API tokens, without their secrets."""
    with options.connect() as client:
        found = list(client.tokens.list())
    rows = [
        (
            t.id,
            t.name,
            t.user,
            age(t.created_at),
            t.expires_at and f"{t.expires_at:%Y-%m-%d}",
            "yes" if t.revoked_at else "",
        )
        for t in found
    ]
    show(found, lambda: table(["ID", "NAME", "USER", "AGE", "EXPIRES", "REVOKED"], rows, empty="No tokens."))


@tokens.command("revoke")
def revoke_token(token_id: str, output: options.Output = Format.TEXT) -> None:
    """Revoke an API token at once."""
    with options.connect() as client:
        client.tokens.revoke(token_id)
    show({"revoked": token_id}, lambda: f"Token {token_id} is revoked.")
