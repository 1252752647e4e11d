"""Packs directories into zips that the cluster fetches. The same content gives the same bytes, so the bucket stores
each only once.

Content of a zip: one directory ``pkg/`` (Ray strips it) with the content of ``working_dir``, or ``pkg/<module>/…`` for
one of ``py_modules``. Entries are sorted; times are 1980; modes are 0644, or 0755 for what its owner may execute. Empty
directories are kept. A symbolic link is packed as its target, because the cluster does not have the target; a broken
link, a cycle, and whatever is neither file nor directory are errors that name the path.

Excludes: ``.git``, ``.venv``, ``venv``, ``__pycache__``, then ``excludes`` (``-e``) as further lines of a .gitignore.
The last pattern that matches decides, so ``!venv/`` includes one of the defaults again. As in git, nothing below an
excluded directory can be included again: exclude ``data/*``, not ``data/``, to keep ``!data/small.csv``. A
``.gitignore`` file itself has no effect: a job may need what git ignores (a model, a data file).
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

from pathspec import GitIgnoreSpec, RegexPattern

from heliostat.errors import InvalidRequest, TooLarge
from heliostat.models.jobs import DEFAULT_EXCLUDES
from heliostat.models.uploads import MAX_UPLOAD_BYTES

TOP = "pkg"
BLOCK = 1024 * 1024
EPOCH = (1980, 1, 1, 0, 0, 0)
LEVEL = 1
"""Of deflate: three times as fast as the default for a tenth more bytes; a person waits for this."""
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
    """True for a URL or ``upload:<sha256>``, False for a path on this machine."""
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
                remedy="Put a wheel into requirements.",
                field="py_modules",
            )
        entry = Entry(path.name, path, path.stat().st_size, executable=False)
        return _write([entry], TOP, limit, "py_modules", path)
    root = _directory(module, "py_modules")
    name = root.resolve().name
    if not name.isidentifier():
        raise InvalidRequest(
            f"py_modules: the directory {str(module)!r} can't be imported: its name is not a Python identifier.",
            remedy="Give the directory of the package itself.",
            field="py_modules",
        )
    return _pack(root, f"{TOP}/{name}", list(excludes), limit, "py_modules")


def _directory(directory: str | Path, field: str) -> Path:
    root = Path(directory).expanduser()
    if not root.exists():
        raise InvalidRequest(
            f"{field}: there is no directory {str(directory)!r} in {Path.cwd()}.",
            remedy="A relative path starts at the current directory.",
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
            f"{field}: the directory {str(root)!r} contains no file"
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
            remedy="Exclude it with -e if the job does not need it. Set TMPDIR to put the zip on another disk.",
            field=field,
        ) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Package(path, digest, size)


def _add(target: zipfile.ZipFile, name: str, entry: Entry, field: str) -> None:
    info = zipfile.ZipInfo(name, EPOCH)
    info.create_system = 3  # Unix on every platform: the modes below are Unix modes
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
                f"{field}: the link {directory} is a cycle: it points to its own parent {real}.",
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
                    f"{field}: the link {child.path} is broken ({error.strerror}).",
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
    """Whether these lines of a .gitignore exclude an entry itself; a directory's path ends with ``/``.
    ``walk`` does not enter an excluded directory, so what is below one is never checked."""
    rules: list[RegexPattern] = []
    for text in patterns:
        # In git ./data matches nothing; people mean /data.
        line = re.sub(r"^(!?)\./", r"\1/", text)
        try:
            # ``data/**`` is what is below data, not data itself.
            found = GitIgnoreSpec.from_lines([re.sub(r"/\*\*(/?)$", r"/**/*\1", line)]).patterns
        except (ValueError, re.error) as error:
            raise _invalid_pattern(line) from error
        meant = [p for p in found if isinstance(p, RegexPattern) and p.include is not None]
        if not meant:
            raise _invalid_pattern(line)
        rules += meant
    # The last pattern that matches decides.
    return lambda path: next((bool(p.include) for p in reversed(rules) if _matches_itself(p, path)), False)


def _matches_itself(pattern: RegexPattern, path: str) -> bool:
    """Danger: the expressions of pathspec also match what is below a directory that they match, and ``match_file`` goes
    by that. Then ``!src/`` would bring back ``src/.git``, and an exclude after it would not count. A test compares
    with git."""
    assert pattern.regex is not None  # only of patterns without a meaning
    source = pattern.regex.pattern
    if source == ".":  # ``*`` and ``**``
        return True
    if source == "(?P<ps_d>/)":  # ``*/`` and ``**/``
        return path.endswith("/")
    found = pattern.regex.search(path)
    return found is not None and found.end() >= len(path.rstrip("/"))


def _invalid_pattern(text: str) -> InvalidRequest:
    return InvalidRequest(
        f"excludes: {text!r} is not a valid pattern.",
        remedy="Write a line of .gitignore, e.g. 'data/' or '*.ckpt'. Escape a leading # or ! with a backslash.",
        field="excludes",
    )


def _too_large(entries: list[Entry], total: int, limit: int, field: str, root: Path) -> TooLarge:
    largest = sorted(entries, key=lambda e: e.size, reverse=True)[:5]
    listing = ", ".join(f"{e.name} ({in_words(e.size)})" for e in largest)
    return TooLarge(
        f"{field}: {root} is {in_words(total)}, more than the limit of {in_words(limit)}. "
        f"The largest files: {listing}.",
        remedy="Exclude what the job does not need with -e, and read large data from a bucket or a shared disk.",
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
