"""Uploads of code to a cloud's bucket. They are content-addressed: each content is uploaded once."""

from __future__ import annotations

from pydantic import Field

from heliostat.models.common import Model, Result

MAX_UPLOAD_BYTES = 2 * 2**30
"""Limit of one zip. Ray unpacks it on every node; larger data belongs in a bucket that the program reads."""


class UploadCreate(Model):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(gt=0)
    """Size of the zip in bytes."""
    cloud: str | None = None
    project: str | None = None
    """Project of the job that will use it; packages are stored per project."""


class Upload(Result):
    """``uri`` is the value for ``working_dir`` or ``py_modules``. ``url`` is None when the bucket has the content; else
    PUT the bytes there, with ``headers``, within ``expires_in_s`` seconds."""

    uri: str
    url: str | None = None
    headers: dict[str, str] = {}
    expires_in_s: int = 0


def upload_key(project_id: str, sha256: str) -> str:
    """Key of a package in its cloud's bucket. It contains the project: a digest gives no access to other projects'
    code."""
    return f"uploads/{project_id}/{sha256}.zip"
