"""From directories to zips that the cluster fetches: the same content gives the same bytes, so that the
bucket needs each only once.

What a zip holds. Everything stands below one directory ``pkg/`` (Ray strips it): the content of
``working_dir`` itself, or ``pkg/<module>/…`` for one of ``py_modules``. Entries are sorted; times are 1980; modes are
0644, or 0755 for what its owner may execute. Empty directories are kept. A symbolic link is packed as what it leads to,
wherever that is, because the cluster does not have it; one that leads nowhere or back to one of its own
parents is refused by name, and so is whatever is neither file nor directory.

What is left out. ``.git``, ``.venv``, ``venv``, ``__pycache__``, and what ``excludes`` (``-e``) name, as lines of a
.gitignore after those: the last pattern that matches decides, so ``!venv/`` brings one of the defaults back. As in git,
nothing below an excluded directory can be brought back: exclude ``data/*``, not ``data/``, to keep ``!data/small.csv``.
A ``.gitignore`` file itself has no effect: a job may need what git ignores (a model, a data file).
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from heliostat.errors import InvalidRequest, TooLarge
from heliostat.models.jobs import DEFAULT_EXCLUDES
from heliostat.models.uploads import MAX_UPLOAD_BYTES

TOP = "pkg"
BLOCK = 1024 * 1024
EPOCH = (1980, 1, 1, 0, 0, 0)
LEVEL = 1
"""Of deflate: three times as fast as the default for a tenth more bytes; people wait for this."""
REMOTE = re.compile(r"^([a-z][a-z0-9+.-]*://|upload:)")


@dataclass(frozen=True)
class Package:
    """A zip in a temporary file. ``size`` in bytes."""

    path: Path
    sha256: str
    size: int

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Entry:
    name: str
    """Path below the packed directory, ``/``-separated; a directory's ends with ``/``."""
    path: Path
    size: int
    executable: bool


def is_remote(location: str) -> bool:
    """True for a URL or ``upload:<sha256>``: passed on as it is; False for a path of this machine."""
    return REMOTE.match(location) is not None


def pack_working_dir(directory: str | Path, excludes: Iterable[str] = (), limit: int = MAX_UPLOAD_BYTES) -> Package:
    """Packs the content of a directory.

    Raises InvalidRequest (missing, not a directory, nothing left to pack, unreadable), TooLarge.
    """
    root = _directory(directory, "working_dir")
    return _pack(root, TOP, list(excludes), limit, "working_dir")


def pack_module(module: str | Path, excludes: Iterable[str] = (), limit: int = MAX_UPLOAD_BYTES) -> Package:
    """Packs one Python module, a package's directory or a single ``.py`` file, so that it can be imported by its
    own name. Raises like :func:`pack_working_dir`."""
    path = Path(module)
    if path.is_file():
        if path.suffix != ".py":
            raise InvalidRequest(
                f"py_modules: {str(module)!r} is neither a directory nor a .py file.",
                remedy="A wheel belongs into requirements.",
                field="py_modules",
            )
        entry = Entry(path.name, path, path.stat().st_size, executable=False)
        return _write([entry], TOP, limit, "py_modules", path)
    root = _directory(module, "py_modules")
    name = root.resolve().name
    if not name.isidentifier():
        raise InvalidRequest(
            f"py_modules: the directory {str(module)!r} can't be imported, its name is no Python identifier.",
            remedy="Give the directory of the package itself.",
            field="py_modules",
        )
    return _pack(root, f"{TOP}/{name}", list(excludes), limit, "py_modules")


def _directory(directory: str | Path, field: str) -> Path:
    root = Path(directory).expanduser()
    if not root.exists():
        raise InvalidRequest(
            f"{field}: there is no directory {str(directory)!r} (looked in {Path.cwd()}).",
            remedy="Paths are taken from the current directory.",
            field=field,
        )
    if not root.is_dir():
        raise InvalidRequest(
            f"{field}: {str(directory)!r} is not a directory.",
            remedy="Give a directory or the URL of a zip.",
            field=field,
        )
    return root


def _pack(root: Path, top: str, excludes: list[str], limit: int, field: str) -> Package:
    entries = sorted(walk(root, excludes, field), key=lambda e: e.name)
    if not any(not e.name.endswith("/") for e in entries):
        raise InvalidRequest(
            f"{field}: the directory {str(root)!r} holds no file"
            + (" that is not excluded." if any(root.iterdir()) else "."),
            remedy="Give the directory of your program, or check the excludes.",
            field=field,
        )
    return _write(entries, top, limit, field, root)


def _write(entries: list[Entry], top: str, limit: int, field: str, root: Path) -> Package:
    total = sum(e.size for e in entries)
    if total > limit:
        raise _too_large(entries, total, limit, field, root)
    handle, name = tempfile.mkstemp(prefix="heliostat-", suffix=".zip")
    path = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as target,
        ):
            for entry in entries:
                _add(target, f"{top}/{entry.name}", entry, field)
        size = path.stat().st_size
        if size > limit:
            raise _too_large(entries, size, limit, field, root)
        with path.open("rb") as packed:
            digest = hashlib.file_digest(packed, "sha256").hexdigest()
    except OSError as error:
        path.unlink(missing_ok=True)
        raise InvalidRequest(
            f"{field}: {error.filename or root} can't be packed: {error.strerror or error}.",
            remedy="Exclude it with -e if the job does not need it; TMPDIR names where the zip is made.",
            field=field,
        ) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Package(path, digest, size)


def _add(target: zipfile.ZipFile, name: str, entry: Entry, field: str) -> None:
    info = zipfile.ZipInfo(name, EPOCH)
    info.create_system = 3  # Unix, wherever this runs: the modes below are Unix's
    if name.endswith("/"):
        info.external_attr = (stat.S_IFDIR | 0o755) << 16 | 0x10
        target.writestr(info, b"")
        return
    info.external_attr = (stat.S_IFREG | (0o755 if entry.executable else 0o644)) << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    info.file_size = entry.size  # decides on zip64 beforehand
    copied = 0
    with entry.path.open("rb") as source, target.open(info, "w") as sink:
        while block := source.read(BLOCK):
            copied += len(block)
            if copied > entry.size:
                raise _changed(entry, field)
            sink.write(block)
    if copied != entry.size:
        raise _changed(entry, field)


def _changed(entry: Entry, field: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {entry.path} changed while it was packed.",
        remedy="Submit again, or exclude it with -e.",
        field=field,
    )


def walk(root: Path, excludes: Iterable[str], field: str = "working_dir") -> Iterator[Entry]:
    """The entries below ``root`` that are not excluded, in no order."""
    ignored = ignored_by([*DEFAULT_EXCLUDES, *excludes])

    def visit(directory: Path, prefix: str, parents: tuple[str, ...]) -> Iterator[Entry]:
        real = os.path.realpath(directory)
        if real in parents:
            raise InvalidRequest(
                f"{field}: the link {directory} leads back to {real}, which holds it.",
                remedy=f"Exclude it: -e '/{prefix.rstrip('/')}'.",
                field=field,
            )
        kept = False
        try:
            children = list(os.scandir(directory))
        except OSError as error:
            raise InvalidRequest(
                f"{field}: {directory} can't be read: {error.strerror}.",
                remedy=f"Exclude it: -e '/{prefix}'.",
                field=field,
            ) from error
        for child in children:
            name = prefix + child.name
            if ignored(name + "/" if child.is_dir() else name):
                continue
            kept = True
            if child.is_dir():
                yield from visit(Path(child.path), name + "/", (*parents, real))
                continue
            try:
                info = child.stat()
            except OSError as error:
                raise InvalidRequest(
                    f"{field}: the link {child.path} leads nowhere ({error.strerror}).",
                    remedy=f"Exclude it: -e '/{name}'.",
                    field=field,
                ) from error
            if not stat.S_ISREG(info.st_mode):
                raise InvalidRequest(
                    f"{field}: {child.path} is neither file nor directory.",
                    remedy=f"Exclude it: -e '/{name}'.",
                    field=field,
                )
            yield Entry(name, Path(child.path), info.st_size, bool(info.st_mode & stat.S_IXUSR))
        if not kept and prefix:
            yield Entry(prefix, directory, 0, executable=False)

    return visit(root, "", ())


def ignored_by(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Whether a path is left out, by lines of a .gitignore; a directory's path ends with ``/``. The last pattern that
    matches decides."""
    # git takes ./data for nothing at all; people mean /data by it.
    lines = [re.sub(r"^(!?)\./", r"\1/", text) for text in patterns]
    for line in lines:
        try:
            found = GitIgnoreSpec.from_lines([line]).patterns
        except (ValueError, re.error) as error:
            raise _no_pattern(line) from error
        if all(pattern.include is None for pattern in found):
            raise _no_pattern(line)
    return GitIgnoreSpec.from_lines(lines).match_file


def _no_pattern(text: str) -> InvalidRequest:
    return InvalidRequest(
        f"excludes: {text!r} is not a valid pattern.",
        remedy="Write a line of .gitignore, e.g. 'data/' or '*.ckpt'. Escape a leading # or ! with a backslash.",
        field="excludes",
    )


def _too_large(entries: list[Entry], total: int, limit: int, field: str, root: Path) -> TooLarge:
    largest = sorted(entries, key=lambda e: e.size, reverse=True)[:5]
    listing = ", ".join(f"{e.name} ({in_words(e.size)})" for e in largest)
    return TooLarge(
        f"{field}: {root} is {in_words(total)}, more than the {in_words(limit)} that may be uploaded. "
        f"The largest files: {listing}.",
        remedy="Leave out what the job does not need with -e, and read large data from a bucket or a shared disk.",
        field=field,
        details={"bytes": total, "limit": limit, "largest": [{"name": e.name, "bytes": e.size} for e in largest]},
    )


def in_words(size: float) -> str:
    """``1536`` → ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
