"""Code on its way to a cloud's bucket: content-addressed, uploaded once."""

from __future__ import annotations

from pydantic import Field

from heliostat.models.common import Model, Result

MAX_UPLOAD_BYTES = 2 * 2**30
"""Limit of one zip. Ray unpacks it on every node; larger data belongs in a bucket that the program reads."""


class UploadCreate(Model):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(gt=0)
    """Bytes of the zip."""
    cloud: str | None = None
    project: str | None = None
    """Of the job that will use it: packages are kept per project."""


class Upload(Result):
    """``uri`` is what a job config's ``working_dir`` or ``py_modules`` then holds. ``url`` is None when the
    bucket has it already; else PUT the bytes there, with ``headers``, before ``expires_in_s`` seconds."""

    uri: str
    url: str | None = None
    headers: dict[str, str] = {}
    expires_in_s: int = 0


def upload_key(project_id: str, sha256: str) -> str:
    """Where a package lies in its cloud's bucket. Per project: knowing a digest gives nobody another project's code."""
    return f"uploads/{project_id}/{sha256}.zip"
